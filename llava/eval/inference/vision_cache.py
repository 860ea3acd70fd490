"""A bounded cache of encoder outputs, so that benchmarks that share images encode each of them once.

    cache = VisionCache(2 << 30)
    for benchmark in benchmarks:
        Engine(model, ..., vision_cache=cache).run(...)

The least recently used image is dropped first. Features are returned bit for bit as they were stored. One
cache belongs to one model; `image_key` identifies an image.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from llava.model.vision_store import VisionStore


class VisionCache:
    """Key -> `VisionFeatures`, at most `limit_bytes` of tensors. Safe to use from several threads.

    device: where features wait, "cpu" to spare an accelerator's memory; None (default) leaves them where they
    were made. An image larger than the whole limit is not kept. Raises ValueError for a negative limit.
    store: a second cache on disk, which later commands can use.
    """

    def __init__(
        self, limit_bytes: int, device: str | torch.device | None = None, store: VisionStore | None = None
    ) -> None:
        if limit_bytes < 0:
            raise ValueError(f"limit_bytes must be 0 or more, not {limit_bytes}")
        self.limit_bytes = limit_bytes
        self.store = store
        self.device = None if device is None else torch.device(device)
        self.bytes = 0
        self.hits = self.misses = 0
        self._items: OrderedDict[Hashable, tuple[Any, torch.device, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._model: weakref.ref[Any] | None = None

    def bind(self, model: Any) -> None:
        """Bind the cache to a model. Raises ValueError if it contains features of another model."""
        with self._lock:
            known = self._model() if self._model is not None else None
            if known is not None and known is not model:
                raise ValueError("this vision cache holds features of another model; make one per model")
            if known is None:
                self._items.clear()  # of a model that is gone
                self.bytes = 0
                self._model = weakref.ref(model)

    def get(self, key: Hashable, cues: Sequence[str] = ()) -> Any | None:
        """Return the features stored under `key`, on their device; None if one of `cues` is missing."""
        with self._lock:
            item = self._items.get(key)
            if item is not None and set(cues) <= set(getattr(item[0], "cues", ())):
                self._items.move_to_end(key)
                self.hits += 1
            else:
                item = None
        if item is None and self.store is not None:
            features = self.store.get(key, cues)
            if features is not None:
                self._keep(key, features)
                with self._lock:
                    self.hits += 1
                return features
        if item is None:
            with self._lock:
                self.misses += 1
            return None
        features, device, _ = item
        return features if self.device is None else _moved(features, device)

    def put(self, key: Hashable, features: Any) -> None:
        """Store `features` (a dataclass of tensors), dropping the least recently used ones to make room."""
        if self.store is not None:
            self.store.put(key, features)
        self._keep(key, features)

    def _keep(self, key: Hashable, features: Any) -> None:
        tensors = [tensor for value in vars(features).values() for tensor in _tensors(value).values()]
        size = sum(tensor.nbytes for tensor in tensors)
        if size > self.limit_bytes:
            return
        if keys := getattr(features, "keys", None):
            keys[0]  # read once, they no longer hold the pixels, which are as large as the features
        home = tensors[0].device if tensors else torch.device("cpu")
        kept = _moved(features, self.device or home)
        with self._lock:
            old = self._items.pop(key, None)
            self.bytes += size - (old[2] if old else 0)
            self._items[key] = (kept, home, size)
            while self.bytes > self.limit_bytes:
                self.bytes -= self._items.popitem(last=False)[1][2]

    def __len__(self) -> int:
        return len(self._items)


def image_key(image: Any, load_image: Callable[[Any], Any], protocol: str | None) -> Hashable:
    """Return the cache key of an image's features.

    Args:
        image: A question's `image`; a path is resolved and keyed by its file's time and size.
        load_image: How it is loaded; benchmarks that inherit one loader share it.
        protocol: How it is cut into crops; None if there is only one way.
    """
    reader = getattr(load_image, "__func__", load_image)
    reader = f"{reader.__module__}.{reader.__qualname__}"
    if isinstance(image, str | os.PathLike):
        place = os.path.realpath(image)
        try:
            state = os.stat(place)
            return place, state.st_mtime_ns, state.st_size, reader, protocol
        except OSError:  # it will be reported as unreadable when it is read
            return place, reader, protocol
    return type(image), image, reader, protocol


def _moved(features: Any, device: torch.device) -> Any:
    """Return `features` on a device, in tensors that own their memory: a view keeps its whole batch alive."""
    moved: dict[str, Any] = {}
    for field, value in vars(features).items():
        owned = {name: tensor.to(device) for name, tensor in _tensors(value).items()}
        for name, tensor in owned.items():
            if tensor.untyped_storage().nbytes() > tensor.nbytes:
                owned[name] = tensor.clone()
        if owned:
            moved[field] = owned if isinstance(value, dict) else owned[""]
    return dataclasses.replace(features, **moved)


def _tensors(value: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a field, which is one, or names several."""
    if isinstance(value, torch.Tensor):
        return {"": value}
    return value if isinstance(value, dict) else {}
