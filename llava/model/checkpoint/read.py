"""Read weight files shard by shard and assign them to a model that was built without memory.

Knows files (`.safetensors`, `.bin`, their indices) and parameter names; knows no architecture. `.bin` files
are pickles and are read with `weights_only=True`, always.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_LISTED = 40


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file or the keys, and the way out."""


def find_weight_files(folder: Path) -> list[Path]:
    """Weight files of a checkpoint folder, in the order to read them; safetensors win over `.bin`.

    Raises `CheckpointError` if there are none, or if an index is unreadable or names a file that is absent.
    """
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _files_of_index(index)
        if (folder / name).is_file():
            return [folder / name]
    raise CheckpointError(
        f"{folder}: no weights found; expected model.safetensors, pytorch_model.bin, or one of them in "
        "shards with its .index.json"
    )


def has_weights(folder: Path) -> bool:
    """True if the folder holds weight files under one of the standard names."""
    return any((folder / f).is_file() for n in WEIGHT_FILES for f in (n, f"{n}.index.json"))


def _files_of_index(index: Path) -> list[Path]:
    try:
        mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = list(dict.fromkeys(mapping.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a weight index ({error}); download the file again") from error
    files = [index.parent / name for name in sorted(names)]
    absent = [f.name for f in files if not f.is_file()]
    if absent:
        raise CheckpointError(
            f"{index} names {len(absent)} shard(s) that are not in its folder: {', '.join(absent)}; "
            "the download is incomplete"
        )
    return files


def read_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor on CPU) for every tensor of one file. Raises `CheckpointError` naming a corrupt file."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118  (not a dict)
                    yield key, handle.get_tensor(key)
        else:
            yield from _read_pickle(path).items()
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:  # torch's own text advises to switch the protection off
        raise CheckpointError(
            f"{path}: cannot be read: not a file of tensors alone, or not a weight file at all (a Git LFS "
            "pointer?); download it again, or have its maker save plain tensors"
        ) from error
    except Exception as error:  # safetensors, zip, pickle and OS errors share no base class
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); the file is damaged or incomplete: "
            "download it again"
        ) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the pre-1.6 file layout cannot be memory-mapped
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: holds no mapping of names to tensors")
    return state


def read_folder(folder: Path) -> Iterator[tuple[str, Tensor, Path]]:
    """(key, tensor, file) for every tensor of a checkpoint folder, one shard in memory at a time."""
    for path in find_weight_files(folder):
        for key, tensor in read_file(path):
            yield key, tensor, path


class Assigner:
    """Fills a model built on the meta device, tensor by tensor, and keeps the account.

    `place(name)` gives (dtype, device) of a parameter; `wrap(name, tensor)`, if given, may return a Parameter
    of its own (quantised weights) or None for the ordinary way.
    """

    def __init__(
        self,
        model: nn.Module,
        place: Callable[[str], tuple[torch.dtype, torch.device]],
        wrap: Callable[[str, Tensor], nn.Parameter | None] | None = None,
    ) -> None:
        self.model, self.place, self.wrap = model, place, wrap
        self.names = {n for n, _ in model.named_parameters()} | _persistent_buffers(model)
        self.done: set[str] = set()
        self.unexpected: list[str] = []

    def assign(self, name: str, tensor: Tensor, origin: str) -> None:
        """Put `tensor` under `name`; `origin` (file, key) is named when the shape is wrong."""
        if name not in self.names:
            self.unexpected.append(origin)
            return
        owner_name, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        old = getattr(owner, leaf)
        if tuple(old.shape) != tuple(tensor.shape):
            raise CheckpointError(
                f"{origin}: shape {tuple(tensor.shape)}, but the model built from config.json has "
                f"{tuple(old.shape)} for {name}; weights and config.json do not belong together"
            )
        dtype, device = self.place(name)
        new = self.wrap(name, tensor) if self.wrap else None
        if new is None:
            tensor = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None, copy=True)
            # a fresh, contiguous copy: a view into a memory-mapped shard would keep the whole file open
            tensor = tensor.contiguous()
            new = nn.Parameter(tensor, requires_grad=False) if isinstance(old, nn.Parameter) else tensor
        setattr(owner, leaf, new)
        self.done.add(name)

    def missing(self, prefix: str = "") -> list[str]:
        """Names under `prefix` that nothing was assigned to, sorted."""
        return sorted(n for n in self.names - self.done if n.startswith(prefix))


def _persistent_buffers(model: nn.Module) -> set[str]:
    return {n for n, _ in model.named_buffers() if n in model.state_dict()}


def listing(names: Iterable[str]) -> str:
    """Names for an error message, one a line, the tail of a long list counted."""
    names = list(names)
    lines = [f"  {n}" for n in names[:_LISTED]]
    if len(names) > _LISTED:
        lines.append(f"  ... and {len(names) - _LISTED} more")
    return "\n".join(lines)
