"""Read weight files shard by shard and assign them to a model that was built without memory.

Files (`.safetensors`, `.bin`, their indices) and parameter names only; independent of the architecture.
`.bin` files are pickles and are always read with `weights_only=True`.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from llava.model.checkpoint import CheckpointError

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_LISTED = 40


def find_weight_files(folder: Path) -> list[Path]:
    """List the weight files of a checkpoint folder in reading order; safetensors take precedence over `.bin`.

    Raises:
        CheckpointError: there are none, or an index is unreadable or names a missing file.
    """
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _files_of_index(index)
        if (folder / name).is_file():
            return [folder / name]
    raise CheckpointError(
        f"{folder}: no weights found; expected model.safetensors, pytorch_model.bin, or one of them in "
        "shards with its .index.json. Copy the checkpoint's weights into the folder."
    )


def has_weights(folder: Path) -> bool:
    """Return whether the folder contains weight files under one of the standard names."""
    return any((folder / f).is_file() for n in WEIGHT_FILES for f in (n, f"{n}.index.json"))


def _files_of_index(index: Path) -> list[Path]:
    try:
        mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = list(dict.fromkeys(mapping.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a weight index ({error}). Download the file again.") from error
    files = [index.parent / name for name in sorted(names)]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} missing shards: {', '.join(missing)}. The download is incomplete; "
            "download them again."
        )
    return files


def read_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (key, tensor on CPU) of every tensor of one file. Raises `CheckpointError` for a corrupt file."""
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
    except pickle.UnpicklingError as error:  # torch's own message advises to disable the protection
        raise CheckpointError(
            f"{path}: cannot be read: it contains more than tensors, or is not a weight file (such as a "
            "Git LFS pointer). Download it again, or ask its author for plain tensors."
        ) from error
    except Exception as error:  # safetensors, zip, pickle and OS errors share no base class
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {error}). The file is corrupt or incomplete; "
            "download it again."
        ) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the pre-1.6 file layout cannot be memory-mapped
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: not a mapping of names to tensors. Download it again.")
    return state


def read_folder(folder: Path) -> Iterator[tuple[str, Tensor, Path]]:
    """Yield (key, tensor, file) for every tensor of a checkpoint folder, one shard in memory at a time."""
    for path in find_weight_files(folder):
        for key, tensor in read_file(path):
            yield key, tensor, path


class Assigner:
    """Fills a model built on the meta device, tensor by tensor, and records what was assigned.

    Attributes:
        place: gives (dtype, device) of a parameter name.
        wrap: may return a parameter of its own for (name, tensor), such as a quantized weight, or None.
        done: names that were assigned.
        unexpected: origins of tensors that the model has no parameter for.
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
        """Assign `tensor` to `name`; `origin` (file, key) is named if the shape is wrong."""
        if name not in self.names:
            self.unexpected.append(origin)
            return
        owner_name, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        old = getattr(owner, leaf)
        if tuple(old.shape) != tuple(tensor.shape):
            raise CheckpointError(
                f"{origin}: shape {tuple(tensor.shape)}, but the model built from config.json has "
                f"{tuple(old.shape)} for {name}. Weights and config.json do not match; use one checkpoint's "
                "files."
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
        """Return the sorted names under `prefix` that nothing was assigned to."""
        return sorted(n for n in self.names - self.done if n.startswith(prefix))


def _persistent_buffers(model: nn.Module) -> set[str]:
    return {n for n, _ in model.named_buffers() if n in model.state_dict()}


def listing(names: Iterable[str]) -> str:
    """Format names for an error message, one per line; the end of a long list is only counted."""
    names = list(names)
    lines = [f"  {n}" for n in names[:_LISTED]]
    if len(names) > _LISTED:
        lines.append(f"  ... and {len(names) - _LISTED} more")
    return "\n".join(lines)
