"""Encode the images of training batches, each of them once if there is a folder to keep the features in.

    vision = TrainingVision(model, image_processor, "cache", load=dataset.load_image)
    vision.is_cached("images/000001.jpg")     # also in a worker process: then it need not be decoded
    vision.encode([None, pixels], sizes, paths, cues)

An image is identified by a hash of its file's content: a copy of the data set, or the same image in another
one, finds its features, and an image that was replaced, even by one of the same size and time, is encoded
again. Reading a file costs little next to decoding it. What else features depend on (weights and dtype of the
tower, image processor, aspect ratio) is in the name of the store's folder (see `llava.model.vision_store`).
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.model.features import VisionFeatures
from llava.model.multimodal_encoder.cues import tower_cues
from llava.model.vision_store import VisionStore, feature_file


@dataclass(frozen=True)
class CachedImages:
    """Tells whether the features of an image file are in the store. Can be sent to worker processes."""

    folder: Path  # of one tower
    protocol: str | None  # how images are cut into crops
    cues: tuple[str, ...]

    def __call__(self, path: str | Path) -> bool:
        """Return whether everything that training reads of an image is stored; False for unreadable files."""
        try:
            key = self.key(path)
        except OSError:
            return False
        return all(feature_file(self.folder, key, cue).is_file() for cue in ("", *self.cues))

    def key(self, path: str | Path) -> tuple[str, str | None]:
        """Return the identity of an image file. Raises `OSError`."""
        return hashlib.sha256(Path(path).read_bytes()).hexdigest(), self.protocol


class TrainingVision:
    """Encodes images without gradients, in the dtype of the tower whatever autocast is active.

    Features are the same, bit for bit, with and without a folder, and whatever other images are in a batch:
    the tower's passes are chosen so (see `VisionTower.passes`).

    Args:
        model: a LLaVA model; set its pruner before, which decides how images are cut into crops.
        image_processor: of its tower.
        folder, limit_gb: where features are kept, and at most how many GB; None encodes every time.
        cues: what the pruning methods of the run read besides [CLS] attention: all of it is kept.
        load: path -> {"image": pixels, "image_size": (width, height)}, for an image that was left out of a
            batch and is no longer in the folder.
        writers: processes that fill the folder together.
    """

    def __init__(
        self,
        model: Any,
        image_processor: Any,
        folder: str | Path | None = None,
        limit_gb: float = 50.0,
        cues: Sequence[str] = (),
        load: Callable[[str], dict[str, Any]] | None = None,
        writers: int = 1,
    ) -> None:
        self.model, self.load = model, load
        self.cues = tower_cues(cues)
        self.encoded = self.read = 0  # images of the tower, and of the folder
        self.store: VisionStore | None = None
        self.is_cached: CachedImages | None = None
        self._began = time.time_ns()
        self._told = False
        if folder is not None:
            self.store = VisionStore(Path(folder), int(limit_gb * 1e9), model, image_processor, writers)
            protocol = getattr(model.config, "anyres_protocol", None)
            self.is_cached = CachedImages(self.store.folder, protocol, self.cues)

    @torch.no_grad()
    def encode(
        self,
        images: Sequence[Tensor | None],
        image_sizes: Sequence[Any] | None,
        image_paths: Sequence[str | None] | None,
        cues: Sequence[str] = (),
    ) -> list[VisionFeatures]:
        """Return the features of every image, in order; those that are not stored are encoded together.

        Args:
            images: (3, H, W) or (crops, 3, H, W); None for one that `is_cached` found.
            image_sizes: (width, height) each.
            image_paths: files of the images; None for an image without one, which is not stored.
            cues: what the method of this batch reads.

        Raises:
            ValueError, FileNotFoundError: an image that was left out can no longer be loaded.
        """
        sizes = [None] * len(images) if image_sizes is None else list(image_sizes)
        paths = [None] * len(images) if image_paths is None else list(image_paths)
        cues = tower_cues(cues)
        if self.store is not None:
            cues = tuple(sorted({*cues, *self.cues}))
        found: dict[Any, VisionFeatures] = {}
        missing: dict[Any, int] = {}  # key -> place of its first image
        keys: list[Any] = []
        for place, path in enumerate(paths):
            key = self._key(path)
            keys.append(place if key is None else key)
            if keys[-1] in found or keys[-1] in missing:
                continue
            stored = None if key is None or self.store is None else self.store.get(key, cues)
            if stored is None:
                missing[keys[-1]] = place
            else:
                found[keys[-1]] = stored
        self.read += len(found)
        self.encoded += len(missing)
        if missing:
            places = list(missing.values())
            loaded = [self._loaded(images[place], sizes[place], paths[place]) for place in places]
            device = self.model.get_vision_tower().device.type
            with torch.autocast(device, enabled=False):
                pixels, of_pixels = [list(part) for part in zip(*loaded, strict=True)]
                fresh = self.model.encode_vision(pixels, of_pixels, cues)
            for key, place, features in zip(missing, places, fresh, strict=True):
                found[key] = features
                if self.store is not None and key != place and self._is_unchanged(paths[place]):
                    self.store.put(key, features)
            self._tell()
        return [found[key] for key in keys]

    def _key(self, path: str | None) -> Any | None:
        if path is None or self.is_cached is None:
            return None
        with suppress(OSError):  # deleted since it was loaded
            return self.is_cached.key(path)
        return None

    def _loaded(self, image: Tensor | None, size: Any, path: str | None) -> tuple[Tensor, Any]:
        """Return the pixels and the size of an image, which may have been left out of the batch."""
        if image is not None:
            return image, size
        if path is None or self.load is None:
            raise ValueError(f"images: {path!r} was left out of a batch, but its features are not stored.")
        found = self.load(path)
        return found["image"], found["image_size"]

    def _is_unchanged(self, path: str | None) -> bool:
        """Return whether a file was not changed since the run began: its pixels may be older than its key."""
        try:
            return path is not None and os.stat(path).st_ctime_ns < self._began
        except OSError:
            return False

    def _tell(self) -> None:
        if self.store is not None and self.store.is_full and not self._told:
            self._told = True
            print(
                f"note: --vision_cache {self.store.root}: no room for more encoded images. The others are "
                "encoded in every epoch; raise --vision_cache_gb to keep them.",
                file=sys.stderr,
            )
