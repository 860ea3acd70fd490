"""Identify a checkpoint by its content: answers of two models are never mixed in one file.

    fingerprint_checkpoint("checkpoints/llava-v1.5-7b")    # 16 hex digits

Hashed are the files directly in the folder, and those of the vision tower that config.json names if it is on
this machine:

- small files (settings of model, tokenizer, preprocessor, adapter and generation; templates): whole;
- `.safetensors`: names, dtypes and shapes of all tensors, small tensors whole, samples of every larger one;
- `.bin` of PyTorch 1.6 and later, a zip archive: names, sizes, CRC-32 and samples of all members;
- other weight files: whole if small, else samples.

Not hashed, because they do not change an answer: READMEs, logs, images, results of training
(`trainer_state.json`, `*_results.json`), its state (optimizer, scheduler, random numbers,
`training_args.bin`), hidden files and subfolders (`.git`, `checkpoint-500`). About 30 MB of a 14 GB
checkpoint are read; torch and transformers are not imported.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.entries import CONFIG, read_entries
from llava.model.checkpoint.find import tower_names, tower_places

_TEXT = (".json", ".txt", ".model", ".jinja", ".py")
_WEIGHTS = (".safetensors", ".bin")
_TRAINING = re.compile(
    r"(trainer_state|.*_results|log_history)\.json|(requirements|.*log).*\.txt"
    r"|(training_args|optimizer|scheduler|random_states|rng_state).*"
)
_WHOLE = 16 << 20  # bytes of a file that is read whole
_SMALL = 64 << 10  # bytes of a tensor that is read whole
_BLOCK, _TENSOR_BLOCKS, _FILE_BLOCKS = 4096, 8, 2048


def fingerprint_checkpoint(folder: str | Path, base: Path | None = None) -> str:
    """Hash a checkpoint folder and the folder of its vision tower; see the module for what is included.

    Args:
        folder: the checkpoint. Its own path does not enter the hash.
        base: the checkpoint below a LoRA adapter, in and beside which the tower may be.

    Returns:
        16 hex digits; "hub" if there is no such folder, for a name on the Hub.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "hub"
    digest = hashlib.sha256()
    _add_folder(digest, folder)
    try:
        keys = ("mm_vision_tower", "mm_image_tower", "mm_video_tower")
        config = read_entries(folder / "config.json", {key: CONFIG[key] for key in keys})
        towers = [name for _, name in tower_names(config).values()]
    except CheckpointError:
        towers = []  # loading such a checkpoint reports what is wrong
    for tower in towers:
        if isinstance(tower, list):
            tower = tower[0] if len(tower) == 1 else None
        if not tower:
            continue
        places = (place for place in tower_places(tower, folder, base) if (place / "config.json").is_file())
        if (place := next(places, None)) is not None and not place.samefile(folder):
            _add_folder(digest, place)
    return digest.hexdigest()[:16]


def _add_folder(digest: hashlib._Hash, folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or _TRAINING.fullmatch(path.name) or not path.is_file():
            continue
        if path.suffix in _TEXT or path.suffix in _WEIGHTS:
            size = path.stat().st_size
            digest.update(f"\0{path.name}\0{size}\0".encode())
            with path.open("rb") as file:
                _add_file(digest, file, size, path.suffix)


def _add_file(digest: hashlib._Hash, file: IO[bytes], size: int, suffix: str) -> None:
    if size <= _WHOLE:
        digest.update(file.read())
        return
    try:
        if suffix == ".safetensors":
            header, parts = _safetensors(file, size)
        elif suffix == ".bin" and zipfile.is_zipfile(file):
            header, parts = _zip_archive(file)
        else:
            header, parts = b"", []
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, zipfile.BadZipFile):
        header, parts = b"", []  # loading such a file reports what is wrong
    digest.update(header)
    for start, end in parts:
        _sample(digest, file, start, end, _TENSOR_BLOCKS)
    if not parts:
        _sample(digest, file, 0, size, _FILE_BLOCKS)


def _safetensors(file: IO[bytes], size: int) -> tuple[bytes, list[tuple[int, int]]]:
    """Return the header (names, dtypes, shapes) and the (start, end) of every tensor in the file."""
    (length,) = struct.unpack("<Q", file.read(8))
    if length > size:
        raise ValueError("the header is longer than the file")
    header = file.read(length)
    tensors = json.loads(header)
    tensors.pop("__metadata__", None)
    offsets = sorted(tuple(tensor["data_offsets"]) for tensor in tensors.values())
    return header, [(8 + length + start, 8 + length + end) for start, end in offsets]


def _zip_archive(file: IO[bytes]) -> tuple[bytes, list[tuple[int, int]]]:
    """Return names, sizes and CRC-32 of all members, and the (start, end) of each in the file.

    Samples are taken as well, because torch can be told to write no CRC-32.
    """
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    parts = []
    for member in members:
        file.seek(member.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
        start = member.header_offset + 30 + name + extra
        parts.append((start, start + member.compress_size))
    listing = [(member.filename, member.file_size, member.CRC) for member in members]
    return json.dumps(listing).encode(), parts


def _sample(digest: hashlib._Hash, file: IO[bytes], start: int, end: int, blocks: int) -> None:
    for at, count in _blocks(start, end, blocks):
        file.seek(at)
        digest.update(file.read(count))


def _blocks(start: int, end: int, blocks: int) -> Iterator[tuple[int, int]]:
    """Yield (position, length) to read: everything if it is small, else evenly spread with both ends."""
    if end - start <= max(_SMALL, blocks * _BLOCK):
        yield start, end - start
        return
    for step in range(blocks):
        yield start + (end - start - _BLOCK) * step // (blocks - 1), _BLOCK
