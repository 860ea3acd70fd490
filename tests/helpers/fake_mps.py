"""A stand-in for an accelerator without float64 (Apple's MPS), on any machine.

    with fake_mps() as device:
        torch.ones(2, device="mps")

Inside the block, "mps" is a device: its tensors use CPU memory, but claim to be on mps. As on a real one,
float64 is refused, and so is an operation on tensors of two devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_TO_COPY = torch.ops.aten._to_copy.default
_MIXES_DEVICES = ("copy_", "_to_copy", "index", "index_put_", "_index_put_impl_")  # indices may be on the CPU

_NO_BACKEND = (  # where torch's C++ code needs the device itself, or cannot track a wrapper
    "not linked with support for mps",
    "unexpected device type was provided mps",
    "version_counter for inference tensor",
)


class MpsTensor(Tensor):
    """A tensor that claims to be on mps; its memory is `inner`, on the CPU."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> MpsTensor:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="mps:0",
        )  # fmt: skip

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"mps({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []  # what ran on the device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(isinstance(leaf, MpsTensor) for leaf in tree_leaves((args, kwargs))):
            self.names.append(func.overloadpacket.__name__)
        return _run(func, args, kwargs)


class _Calls(TorchFunctionMode):
    """Replaces the calls that ask torch's C++ code for the device before they dispatch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist and isinstance(args[0], MpsTensor):
            return args[0].detach().inner.tolist()
        if func is Tensor.to:
            return _to(*args, **kwargs)
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if not any(text in str(error) for text in _NO_BACKEND):
                raise
        result = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
        return tree_map(lambda leaf: MpsTensor(leaf) if isinstance(leaf, Tensor) else leaf, result)


@contextmanager
def fake_mps() -> Iterator[list[str]]:
    """Make "mps" a device inside the block; yield the growing list of operations that ran on it."""
    with ExitStack() as stack:
        for name in ("torch.Event", "torch.mps.synchronize", "torch.mps.empty_cache"):
            stack.enter_context(mock.patch(name, mock.MagicMock))
        operations = stack.enter_context(_Operations())
        stack.enter_context(_Calls())
        yield operations.names


def _to(tensor: Tensor, *args, **kwargs) -> Tensor:
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for arg in args:
        if isinstance(arg, Tensor):
            device, dtype = arg.device, arg.dtype
        elif isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, torch.device | str):
            device = arg
    device, dtype = torch.device(device or tensor.device), dtype or tensor.dtype
    if device.type == tensor.device.type and dtype == tensor.dtype and not kwargs.get("copy"):
        return tensor
    return _TO_COPY(tensor, dtype=dtype, device=device)


def _inside(leaf):
    return leaf.inner if isinstance(leaf, MpsTensor) else leaf


def _run(func, args: tuple, kwargs: dict):
    name = func.overloadpacket.__name__
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [leaf for leaf in leaves if isinstance(leaf, MpsTensor)]
    on_mps = bool(ours)
    if kwargs.get("device") is not None:
        on_mps = torch.device(kwargs["device"]).type == "mps"
        kwargs = {**kwargs, "device": torch.device("cpu") if on_mps else kwargs["device"]}
    elif ours and name == "copy_":
        on_mps = isinstance(args[0], MpsTensor)
    elif ours and name not in _MIXES_DEVICES and any(x.ndim for x in leaves if not isinstance(x, MpsTensor)):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found mps:0 and cpu")
    if on_mps and kwargs.get("dtype") == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    result = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
    known = {id(leaf.inner): leaf for leaf in ours}  # the result of an operation in place is its argument

    def outside(leaf):
        if not isinstance(leaf, Tensor) or isinstance(leaf, MpsTensor) or not on_mps or leaf.is_meta:
            return leaf
        if leaf.dtype == torch.float64:
            raise TypeError(f"{name}: the MPS framework doesn't support float64")
        return known[id(leaf)] if id(leaf) in known else MpsTensor(leaf)

    return tree_map(outside, result)
