"""Encoded images on disk, so that commands that share images encode each of them once.

    store = VisionStore(folder, limit_bytes, model, image_processor)
    store.put(key, features)
    store.get(key, cues)          # VisionFeatures, bit for bit, or None

An image is one file, and each further cue of the tower another one. Files are written under a temporary name
and renamed, so a killed process leaves no half file, and several processes can use one folder. Each
tower, dtype, processor and release of torch has a folder of its own. When the limit is reached, the least
recently used files of all folders are deleted, but none that this process read or wrote: of a set of images
that is larger than the limit, the images that fit are kept. Features are written in the dtype in which the
tower computed them, also if the projector reads a wider one.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Hashable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from llava.model.features import VisionFeatures
from llava.model.transformers_compat import run_layer

VERSION = 2  # of the files
_LEAST_FREE = 1 << 30  # bytes of the disk that stay free


class VisionStore:
    """Key -> `VisionFeatures` of one model, at most `limit_bytes` in `folder`. Safe to use from threads.

    A folder that cannot be written, or a disk without space, ends the writing with one line on stderr.

    Args:
        writers: processes of one run that fill the folder together, each as fast as the others. None of them
            deletes what was used since this one began.
    """

    def __init__(
        self, folder: Path, limit_bytes: int, model: Any, image_processor: Any, writers: int = 1
    ) -> None:
        self.root, self.limit_bytes, self.writers = folder, limit_bytes, writers
        self.folder = folder / tower_identity(model, image_processor)
        self._model = model
        self._lock = threading.Lock()
        self._used: set[str] = set()  # names of files
        self._began = time.time()
        self._writes = True
        self.is_full = False  # whether nothing more is written for want of room
        self._size: int | None = None  # of all files, counted when the first one is written

    def get(self, key: Hashable, cues: Sequence[str] = ()) -> VisionFeatures | None:
        """Return an image's features with these cues; None if one of them is not stored."""
        found: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        device = self._model._projector_place[0]  # where encoded images are, and the model expects them
        for cue in ("", *cues):
            path = feature_file(self.folder, key, cue)
            loaded = _read(path)
            if loaded is None:
                return None
            found |= {name: tensor.to(device) for name, tensor in loaded[0].items()}
            facts = facts or loaded[1]
            with self._lock:
                self._used.add(path.name)
        size = facts["image_size"]
        return VisionFeatures(
            found.pop("features").to(getattr(torch, facts["dtype"].removeprefix("torch."))),
            found.pop("attention"),
            None if size is None else (size[0], size[1]),
            facts["keys"],
            facts["as_crops"],
            found,
            facts.get("is_clip", False),
        )

    def put(self, key: Hashable, features: VisionFeatures) -> None:
        """Store an image's features and cues, as far as there is room."""
        facts = {
            "image_size": features.image_size,
            "keys": list(features.keys),
            "as_crops": features.as_crops,
            "is_clip": features.is_clip,
            "dtype": str(features.features.dtype),
        }
        patches, computed = features.features, self._model.get_vision_tower().dtype
        if computed.itemsize < patches.dtype.itemsize:  # widened for the projector, without new values
            patches = patches.to(computed)
        main = {"features": patches, "attention": features.attention}
        self._write(feature_file(self.folder, key), main, facts)
        for cue, tensor in features.cues.items():
            self._write(feature_file(self.folder, key, cue), {cue: tensor}, {})

    def _write(self, path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        from safetensors.torch import save

        if not self._writes or path.exists():
            return
        content = save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            {"facts": json.dumps(facts)},
        )
        try:
            if not self._make_room(len(content)):
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                os.replace(temporary, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            self._writes = False
            print(f"{self.folder}: encoded images are not kept: {error.strerror}", file=sys.stderr)
            return
        with self._lock:
            self._used.add(path.name)
            self._size = (self._size or 0) + len(content) * self.writers

    def _make_room(self, needed: int) -> bool:
        """Delete least recently used files until `needed` bytes fit; return whether they do."""
        with self._lock:
            needed *= self.writers
            if self._size is not None and self._size + needed <= self.limit_bytes:
                return True
            files = []
            for path in self.root.glob("*/*"):
                with suppress(OSError):  # deleted by another process
                    state = path.stat()
                    files.append((max(state.st_atime, state.st_mtime), state.st_size, path))
            self._size = sum(size for _, size, _ in files)
            for used, size, path in sorted(files):
                if self._size + needed <= self.limit_bytes or (self.writers > 1 and used >= self._began):
                    break
                if path.name not in self._used:
                    with suppress(OSError):
                        path.unlink()
                    self._size -= size
            root = next(parent for parent in (self.root, *self.root.parents) if parent.exists())
            state = os.statvfs(root)
            free = state.f_bavail * state.f_frsize
            self.is_full = self._size + needed > self.limit_bytes or free - needed <= _LEAST_FREE
            self._writes = not self.is_full
            return self._writes


def feature_file(folder: Path, key: Hashable, cue: str = "") -> Path:
    """Return the file of an image's features, or of one further cue, in the folder of a tower."""
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
    end = "" if not cue else "." + hashlib.sha256(cue.encode()).hexdigest()[:8]
    return folder / f"{name}{end}.safetensors"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read one file; a damaged one is deleted."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = json.loads(file.metadata()["facts"])
        with suppress(OSError):
            os.utime(path)  # used now
        return tensors, facts
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        with suppress(OSError):
            path.unlink()
        return None


def device_name(device: torch.device) -> str:
    """Return what decides the bits of a result: "cpu", "mps", or the name of a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def tower_identity(model: Any, image_processor: Any) -> str:
    """Return a hash of all that features depend on but the image: weights, dtypes, device, versions."""
    tower = model.get_vision_tower()
    digest = hashlib.sha256()
    config = model.config
    facts = {
        "version": VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device_name(tower.device),
        "compiled": tower.run_layer is not run_layer,
        "kernels": tower.attn_implementation,
        "layer": tower.select_layer,
        "projector": str(model._projector_place[1]),
        "preset": repr(model.preset),
        "tower": tower.config.to_dict(),
        "processor": image_processor.to_dict(),
        "aspect": [getattr(config, name, None) for name in ("image_aspect_ratio", "image_grid_pinpoints")],
    }
    digest.update(json.dumps(facts, sort_keys=True, default=repr).encode())
    for tower in model.get_model().towers():
        for name, tensor in sorted(tower.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
