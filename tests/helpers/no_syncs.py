"""A mode in which operations fail that would wait for a GPU: proves on a CPU that code does not."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoSyncs(TorchDispatchMode):
    """Fail on operations that wait for a GPU, and on tensors made from host memory.

    uploads: allow tensors made from host memory, which do not wait if they are copied with non_blocking.
    """

    SYNCS = (
        "_local_scalar_dense item nonzero masked_select _unique _unique2 unique_dim unique_consecutive equal "
        "is_nonzero lift_fresh repeat_interleave bincount histc"
    ).split()

    def __init__(self, uploads: bool = False) -> None:
        super().__init__()
        self.uploads = uploads

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        allowed = self.uploads and name == "lift_fresh"
        assert allowed or name not in self.SYNCS, f"{name} waits for the device, or copies from the host"
        if name in ("index", "index_put", "index_put_"):
            assert not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]), name
        if name == "_to_copy":
            assert "device" not in (kwargs or {}), "a copy to another device"
        return function(*args, **(kwargs or {}))
