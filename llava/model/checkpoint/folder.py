"""Which files of a checkpoint folder, and of its base, make the model.

    checkpoint = CheckpointFolder(Path("llava-v1.5-7b-lora"), base=Path("vicuna-7b-v1.5"))
    checkpoint.config()["mm_vision_tower"]
    for key, tensor, path in checkpoint.weights(): ...

A folder is complete, or contains only a projector or only a LoRA adapter and needs a base.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.config import read_config
from llava.model.checkpoint.lora import is_lora, merge_lora
from llava.model.checkpoint.read import has_weights, read_file, read_folder

_PROJECTOR = "mm_projector.bin"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint on this machine; `base` is the language model below a projector or a LoRA adapter."""

    folder: Path
    base: Path | None = None

    def config(self) -> dict:
        """Read config.json; a LoRA folder without one uses its base's."""
        own = self.base is None or not is_lora(self.folder) or (self.folder / "config.json").is_file()
        return read_config(self.folder if own else self.base)

    def weights(self) -> Iterator[tuple[str, Tensor, Path]]:
        """Return an iterator over (key, tensor, file) of everything that makes the model.

        Raises:
            CheckpointError: the folder needs a base, or a base was given without need. Raised by the call,
                before any weight is read.
        """
        folder, base, projector = self.folder, self.base, self.folder / _PROJECTOR
        if is_lora(folder) and not has_weights(folder):
            if base is None:
                raise CheckpointError(
                    f"{folder}: contains only a LoRA adapter. Pass the model it was trained on as model_base."
                )
            return merge_lora(read_folder(base), folder)
        if base is None:
            if projector.is_file() and not has_weights(folder):
                raise CheckpointError(
                    f"{folder}: contains only a projector. Pass the language model as model_base."
                )
            return read_folder(folder)
        if projector.is_file():
            return _with_projector(base, projector)
        raise CheckpointError(
            f"{folder}: model_base was given, but the folder contains neither a LoRA adapter "
            f"(adapter_config.json) nor {_PROJECTOR}. For a complete checkpoint leave model_base out."
        )

    def tokenizer(self) -> Path:
        """Return the folder of the tokenizer: the base if it has one, else the checkpoint itself."""
        for place in (self.base, self.folder):
            if place is not None and any((place / name).is_file() for name in _TOKENIZERS):
                return place
        raise FileNotFoundError(
            f"{self.folder}: no tokenizer; expected one of {', '.join(_TOKENIZERS)}. Copy the checkpoint's "
            "tokenizer files into it."
        )

    def generation_config(self) -> Path | None:
        """Return the folder of generation_config.json, None if there is no such file."""
        folder = self.folder if self.base is None else self.base
        return folder if (folder / "generation_config.json").is_file() else None


def _with_projector(base: Path, projector: Path) -> Iterator[tuple[str, Tensor, Path]]:
    yield from read_folder(base)
    for key, tensor in read_file(projector):
        yield key, tensor, projector
