"""Provenance of answers: the configuration, its hash, and the metadata of every answer line.

Runs whose `Configuration` has the same hash may write to one answer file. What cannot change the meaning of
an answer (chunk, --limit, output folder) is not part of it. The batch size (unless answers are sampled),
captured graphs and versions are recorded, not compared.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from llava.eval.benchmarks import Question

# Fields that are left out, of the hash or of the metadata too, while they have these values, so that answer
# files of versions without them can be resumed.
_NOT_HASHED = {"preset": "exact"}
_NOT_WRITTEN = {
    "batch_size": None,
    "top_k": None,
    "unused_settings": (),
    "graphs": False,
    "compile": False,
    "server": None,
    "load_bits": None,
    "clip_budget": None,
}


@dataclass(frozen=True)
class Configuration:
    """Everything that decides an answer. `pruning` is `Pruner.config()` (method, tokens, ...)."""

    model: str
    weights: str  # fingerprint of the checkpoint folder
    questions: str  # fingerprint of the question file's content
    pruning: tuple[tuple[str, Any], ...]
    conv_mode: str
    dtype: str
    tower_dtype: str
    attn_implementation: str
    device: str  # cpu or cuda, without a number
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    seed: int = 0
    anyres: str | None = None  # None: the default of the method
    preset: str = "exact"
    batch_size: int | None = None  # questions per batch; hashed if answers are sampled: draws depend on it
    top_k: int | None = None  # of sampled answers only
    unused_settings: tuple[tuple[str, Any], ...] = ()  # of generation_config.json, see `Decoding.unused`
    clip_budget: str | None = None  # what `tokens` is for a clip; None: the questions are about images
    graphs: bool = False  # captured stages; never hashed: they compute what the same stages do without
    compile: bool = False  # compiled layers; hashed if True: they compute other last bits
    server: str | None = None  # name of the model on a server that runs the language model
    load_bits: int | None = None  # of quantized layers of the decoder

    def flat(self) -> dict[str, Any]:
        """Return one level of keys, pruning settings included, as stored in metadata."""
        fields = asdict(self)
        pruning = dict(fields.pop("pruning"))
        pruning.pop("seed", None)  # the same as `seed`
        fields = {key: value for key, value in fields.items() if _NOT_WRITTEN.get(key, ...) != value}
        if self.unused_settings:
            fields["unused_settings"] = dict(self.unused_settings)
        return {"method": pruning.pop("method"), **pruning, **fields}

    def hash(self) -> str:
        """Return 16 hex digits, equal for equal configurations on every machine."""
        hashed = compared(self.flat())
        hashed = {key: value for key, value in hashed.items() if _NOT_HASHED.get(key, ...) != value}
        text = json.dumps(hashed, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def metadata(self) -> dict[str, Any]:
        """Return the metadata that all answer lines of a run share."""
        return {**self.flat(), "config": self.hash(), "versions": versions()}


def compared(flat: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `Configuration.flat`, or of stored metadata, that decide answers."""
    only_recorded = {"graphs"} if flat.get("temperature") else {"graphs", "batch_size"}
    return {key: value for key, value in flat.items() if key not in only_recorded}


def differences(there: dict[str, Any], here: Configuration) -> list[str]:
    """Return one string per field in which stored metadata differs from this configuration."""
    mine = compared(here.flat())
    there = {**_NOT_HASHED, **compared(there)}
    optional = ("tokens", "important_ratio", "keep", *_NOT_WRITTEN)
    keys = [*mine, *(key for key in optional if key in there and key not in mine)]
    return [
        f"{key} is {_shown(key, there)} in the file, {_shown(key, mine)} in this run"
        + (" (sampled answers depend on the batch they are drawn in)" if key == "batch_size" else "")
        for key in keys
        if there.get(key) != mine.get(key)
    ]


def _shown(key: str, settings: dict[str, Any]) -> str:
    return "not recorded" if key in _NOT_WRITTEN and key not in settings else repr(settings.get(key))


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of this package, torch, transformers and Pillow."""
    found = {}
    for name in ("vispruner", "torch", "transformers", "pillow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a source tree that is not installed
            found[name] = "source"
    return found


def fingerprint_questions(questions: Iterable[Question]) -> str:
    """Hash ids, texts and image names (not folders), in order."""
    digest = hashlib.sha256()
    for question in questions:
        image = getattr(question.image, "name", None)
        digest.update(json.dumps([question.question_id, question.text, image]).encode())
    return digest.hexdigest()[:16]
