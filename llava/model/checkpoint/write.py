"""Write a checkpoint folder: weights in shards, one in memory at a time, and another folder's small files.

    write_checkpoint(Path("llava-13b"), weights, settings=Path("llava-13b-delta"))

Nothing is left behind by a write that fails: the weights get their names when all are written.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.config import read_config
from llava.model.checkpoint.find import tower_names, tower_places

SHARD_BYTES = 5 << 30
TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "chat_template.json"),
)
_SETTINGS = ("generation_config.json", "preprocessor_config.json", "processor_config.json")


def exit_code(write: Callable[..., None], *paths: str | Path) -> int:
    """Call `write(*paths)` for a command; print an error that its user can mend, and return the exit code."""
    try:
        write(*paths)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def check_target(target: Path, *sources: Path) -> None:
    """Refuse a folder that is one of the sources or already contains weights. Raises `CheckpointError`."""
    if target.exists() and (not target.is_dir() or any(target.samefile(source) for source in sources)):
        raise CheckpointError(f"{target}: not a folder to write to. Choose a new folder.")
    if target.is_dir() and any(path.suffix in (".safetensors", ".bin") for path in target.iterdir()):
        raise CheckpointError(
            f"{target}: already contains weights, and two sets of them in one folder are ambiguous. Choose a "
            "new folder."
        )


def write_checkpoint(target: Path, weights: Iterable[tuple[str, Tensor]], settings: Path) -> list[Path]:
    """Write weights and the small files of the folder `settings`; return the weight files.

    The entry `torch_dtype` or `dtype` of config.json becomes that of the first tensor.

    Raises:
        CheckpointError: the weights or config.json cannot be read.
        OSError: a file cannot be written.
    """
    config = read_config(settings)
    target.mkdir(parents=True, exist_ok=True)
    shards: list[tuple[Path, list[str]]] = []
    dtype, total = None, 0
    try:
        for part in _parts(weights):
            path = target / f".shard-{len(shards) + 1}.tmp"
            shards.append((path, list(part)))
            save_file(part, path, metadata={"format": "pt"})
            dtype = dtype or next(iter(part.values())).dtype
            total += sum(tensor.nbytes for tensor in part.values())
    except BaseException:
        for path, _ in shards:
            path.unlink(missing_ok=True)
        if not any(target.iterdir()):
            target.rmdir()
        raise
    files, places, many = [], {}, len(shards) > 1
    for number, (path, keys) in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else "model.safetensors"
        files.append(path.replace(target / name))
        places.update(dict.fromkeys(keys, name))
    if many:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    copy_files(settings, target, (*TOKENIZER_FILES, *_SETTINGS))
    copy_towers(config, settings, target)
    write_config(target, {**config, "dtype" if "dtype" in config else "torch_dtype": dtype})
    return files


def write_config(target: Path, config: dict) -> None:
    """Write config.json; a torch dtype becomes its name."""
    text = json.dumps(config, indent=2, default=lambda value: str(value).removeprefix("torch."))
    (target / "config.json").write_text(text + "\n", encoding="utf-8")


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of the files that exist."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def copy_towers(config: dict, source: Path, target: Path) -> None:
    """Copy the folders of the towers that `target` does not find under their names and `source` does."""
    for _, name in tower_names(config).values():
        if not isinstance(name, str):
            continue
        here, there = (
            [place for place in tower_places(name, folder) if (place / "config.json").is_file()]
            for folder in (source, target)
        )
        if here and not there:
            shutil.copytree(here[0], target / here[0].name)


def _parts(weights: Iterable[tuple[str, Tensor]]) -> Iterable[dict[str, Tensor]]:
    """Collect tensors up to SHARD_BYTES. Raises `CheckpointError` for a name that comes twice."""
    part: dict[str, Tensor] = {}
    seen: set[str] = set()
    for key, tensor in weights:
        if key in seen:
            raise CheckpointError(f"{key}: is in the weights twice. Use one checkpoint's files.")
        seen.add(key)
        if part and sum(one.nbytes for one in part.values()) + tensor.nbytes > SHARD_BYTES:
            yield part
            part = {}
        part[key] = tensor.contiguous()
    if part:
        yield part
