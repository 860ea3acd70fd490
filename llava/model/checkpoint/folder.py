"""Which files of a checkpoint folder, and of its base, make the model.

    checkpoint = CheckpointFolder(Path("llava-v1.5-7b-lora"), base=Path("vicuna-7b-v1.5"))
    checkpoint.config()["mm_vision_tower"]
    for key, tensor, path in checkpoint.weights(): ...

A folder is complete, or contains only a projector or only a LoRA adapter and needs a base. Commands check a
folder with `check`, before torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava.model.checkpoint import CheckpointError, warn
from llava.model.checkpoint.config import config_folder, read_config
from llava.model.checkpoint.entries import GENERATION, read_entries
from llava.model.checkpoint.find import (
    ADAPTER_CONFIG,
    PROJECTOR,
    TRAINABLES,
    base_hint,
    find_base,
    has_weights,
    is_lora,
    needs_base,
)
from llava.model.checkpoint.keys import translate

if TYPE_CHECKING:
    from torch import Tensor

    from llava.model.checkpoint.lora import LoraAdapter

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint on this machine; `base` is the language model below a projector or a LoRA adapter.

    Without a base, it is the one that the folder's files name, if it is on this machine (see `find_base`).
    `allow_outside`: a weight index may name files outside its folder.
    """

    folder: Path
    base: Path | None = None
    allow_outside: bool = False

    def __post_init__(self) -> None:
        if self.base is None:
            object.__setattr__(self, "base", find_base(self.folder))  # the dataclass is frozen

    def kind(self) -> str:
        """Return "complete", "lora" or "projector".

        Raises:
            CheckpointError: the folder needs a base, or a base was given without need.
        """
        folder, lora, projector = self.folder, is_lora(self.folder), (self.folder / PROJECTOR).is_file()
        full = has_weights(folder)
        if self.base is None:
            if full or not (lora or projector):
                return "complete"
            what = "a LoRA adapter" if lora else "a projector"
            trained = "the model it was trained on" if lora else "the language model"
            raise CheckpointError(
                f"{folder}: contains only {what}. Pass {trained} as model_base.{base_hint(folder)}"
            )
        if full and (lora or projector):
            other = f"a LoRA adapter ({ADAPTER_CONFIG})" if lora else PROJECTOR
            raise CheckpointError(
                f"{folder}: model_base was given, and the folder contains full weights as well as {other}. "
                "Leave model_base out to use the full weights, or move the trained part into a folder of its "
                "own."
            )
        if needs_base(self.base):
            raise CheckpointError(
                f"{self.base}: model_base is itself only a trained part of a model. Merge it with the model "
                "below it (scripts/merge_lora_weights.py), and pass the result."
            )
        if lora:
            return "lora"
        if projector:
            return "projector"
        raise CheckpointError(
            f"{folder}: model_base was given, but the folder contains neither a LoRA adapter "
            f"({ADAPTER_CONFIG}) nor {PROJECTOR}. For a complete checkpoint leave model_base out."
        )

    def check(self) -> dict:
        """Return config.json, after checking what can be checked without reading weights.

        Raises:
            CheckpointError: as `config` and `kind`, or generation_config.json is malformed.
        """
        config = self.config()
        self.kind()
        if (path := self.generation_config()) is not None:
            read_entries(path, GENERATION)
        return config

    def config(self) -> dict:
        """Read config.json; a folder without one uses its base's."""
        return read_config(self.config_folder)

    @property
    def config_folder(self) -> Path:
        """The folder whose config.json is used."""
        return config_folder(self.folder, self.base)

    def weights(self) -> Iterator[tuple[str, Tensor, Path]]:
        """Return an iterator over (key, tensor, file) of everything but the adapter.

        Raises:
            CheckpointError: as `kind`, by the call; by the iterator, a file that cannot be read.
        """
        from llava.model.checkpoint.read import read_folder

        kind = self.kind()
        if kind == "complete":
            parts = [n for n in (ADAPTER_CONFIG, TRAINABLES, PROJECTOR) if (self.folder / n).is_file()]
            if parts:
                what = "a LoRA adapter" if ADAPTER_CONFIG in parts else "a trained part"
                warn(
                    f"{self.folder}: contains full weights and {what} ({', '.join(parts)}). The full weights "
                    "are used, and the rest is not. Remove the files that are not of this model."
                )
            return read_folder(self.folder, self.allow_outside)
        base = read_folder(self.base, self.allow_outside)
        return self._over(base, TRAINABLES if kind == "lora" else PROJECTOR, optional=kind == "lora")

    def adapter(self) -> LoraAdapter | None:
        """Read the LoRA adapter, None if this folder is not one over a base."""
        from llava.model.checkpoint.lora import read_adapter

        return read_adapter(self.folder) if self.kind() == "lora" else None

    def _over(
        self, base: Iterator[tuple[str, Tensor, Path]], name: str, optional: bool
    ) -> Iterator[tuple[str, Tensor, Path]]:
        """Yield the base's weights without those that the file `name` replaces, then this file's.

        A projector is replaced as a whole, so that parts of two are never mixed.
        """
        from llava.model.checkpoint.read import read_file

        path = self.folder / name
        there = path.is_file() or not optional
        trained = dict(read_file(path)) if there else {}
        own = {translate(key) for key in trained}
        projector = any(_is_projector(key) for key in own)
        reason = "contains no weight of a projector" if there else "no such file"
        if not projector and not optional:
            first = f" (first key: {next(iter(trained))!r})" if trained else ""
            raise CheckpointError(
                f"{path}: {reason}{first}. Saving it failed in training, or the file is another one; use "
                "another checkpoint of the run."
            )
        borrowed = False
        for key, tensor, file in base:
            parameter = translate(key)
            if parameter not in own and not (projector and _is_projector(parameter)):
                borrowed |= _is_projector(parameter)
                yield key, tensor, file
        if not projector and not borrowed and self.config().get("mm_projector_type") != "identity":
            raise CheckpointError(
                f"{path}: {reason}, and model_base has no projector either. Use the folder that training "
                "wrote at its end, and pass the model that it started from as model_base."
            )
        if borrowed:
            warn(
                f"{path}: {reason}. The projector is that of model_base, not one trained with this adapter. "
                "Use the folder that training wrote at its end, unless the projector was frozen."
            )
        for key, tensor in trained.items():
            yield key, tensor, path

    def tokenizer(self) -> Path:
        """Return the folder of the tokenizer: the base if it has one, else the checkpoint itself."""
        for place in (self.base, self.folder):
            if place is not None and has_tokenizer(place):
                return place
        raise FileNotFoundError(
            f"{self.folder}: no tokenizer; expected one of {', '.join(_TOKENIZERS)}. Copy the checkpoint's "
            "tokenizer files into it."
        )

    def generation_config(self) -> Path | None:
        """Return the path of generation_config.json, None if there is no such file."""
        path = (self.folder if self.base is None else self.base) / "generation_config.json"
        return path if path.exists() else None


def has_tokenizer(folder: Path) -> bool:
    """Return whether the folder contains the file of a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZERS)


def _is_projector(name: str | None) -> bool:
    return name is not None and name.startswith("model.mm_projector.")
