"""Locations of the repository, the bundled model and data, and the cache."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# The folder that contains the package: the root of a clone, or site-packages, which has no bundled files.
REPOSITORY = Path(__file__).resolve().parents[1]
BUNDLED_MODEL = REPOSITORY / "playground" / "tiny" / "llava-tiny"
BUNDLED_ANYRES_MODEL = BUNDLED_MODEL.with_name("llava-tiny-anyres")  # the same weights, LLaVA-NeXT's crops
BUNDLED_DATA = REPOSITORY / "playground" / "tiny" / "eval"
BUNDLED_VIDEO_MODEL = BUNDLED_MODEL.with_name("video-llava-tiny")
BUNDLED_SMOL = BUNDLED_MODEL.with_name("smol")
BUNDLED_CLIPS = BUNDLED_DATA.with_name("video")
BUNDLED_MODELS = (BUNDLED_MODEL, BUNDLED_ANYRES_MODEL, BUNDLED_VIDEO_MODEL, BUNDLED_SMOL)


def cache_folder() -> Path:
    """Return the folder for converted towers and derived data: $VISPRUNER_CACHE, else ~/.cache/vispruner.

    It is in the folder for temporary files if HOME is not set for a user who is not in the user database
    (`docker run --user 12345`).
    """
    chosen = os.environ.get("VISPRUNER_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    try:
        return Path.home() / ".cache" / "vispruner"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"vispruner-{os.getuid()}"


def bundled_model(name: str) -> Path | None:
    """Return the folder of the bundled model with this name, such as smol; None if there is none."""
    return next((folder for folder in BUNDLED_MODELS if folder.name == name), None)


def require_bundled(path: Path, option: str) -> Path:
    """Return the location of a bundled file or folder of the repository.

    Args:
        path: One of the locations above, or a path below it.
        option: What to give instead, for the message.

    Raises:
        FileNotFoundError: `path` does not exist, as in an installed wheel.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file or folder. The bundled model and data come with a repository clone, "
            f"not with the installed package. Give {option}, or run from a clone."
        )
    return path
