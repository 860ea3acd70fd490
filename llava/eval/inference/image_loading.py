"""Load, resize and normalize images and clips ahead of the model, in order, by threads or by processes.

    loader = ImageLoader(load_image, image_processor, model.config)
    with read_ahead(images, loader, num_workers=None) as loaded:
        for content, error in loaded: ...

Both ways give identical pixels. Threads start at once, and Pillow releases the interpreter lock while it
decodes and resizes, but normalization and the model's own Python code share one interpreter. Processes share
nothing, but each takes seconds to start, because it imports torch and transformers. By default processes are
used only on machines with more than four cores and for many images.

`torch.utils.data.DataLoader` was considered. It has no thread mode, passes tensors through shared memory
(often 64 MB in containers), and ends the whole run when a worker dies; here the other images are loaded by
threads instead. Independent of the model and of the task.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

from llava.mm_utils import process_images

_SETTINGS = ("image_aspect_ratio", "image_grid_pinpoints", "anyres_protocol")
MANY_IMAGES, FEW_CORES = 1000, 4  # processes are faster above both
LoadedImage = tuple[Any, str | None]  # (content, None) or (None, what is wrong with it)


class ImageLoader:
    """image -> ((pixels (3, H, W) or (crops, 3, H, W) float32, (width, height)), None), or (None, error).

    Where `load_image` returns a list, the frames of a clip, the pixels are (3, frames, H, W).

    Whatever `load_image` raises is a fault of the image and is returned as text, and so are OSError and
    ValueError of the processor; other errors are raised. Can be sent to another process if its parts can.
    """

    def __init__(self, load_image: Callable[[Any], Any], image_processor: Any, config: Any) -> None:
        get = config.get if isinstance(config, dict) else lambda name: getattr(config, name, None)
        self.load_image, self.image_processor = load_image, image_processor
        self.config = {name: get(name) for name in _SETTINGS}

    def __call__(self, image: Any) -> LoadedImage:
        try:
            opened = self.load_image(image)
        except Exception as error:  # decoders raise anything
            return None, str(error) or type(error).__name__
        try:
            pixels = process_images([opened], self.image_processor, self.config)[0]
        except (OSError, ValueError) as error:  # decoded late, or of an impossible shape
            return None, f"{image}: {error}"
        first = opened[0] if isinstance(opened, list) else opened
        return (pixels, first.size), None


@contextmanager
def read_ahead(
    images: Sequence[Any],
    loader: Callable[[Any], LoadedImage],
    num_workers: int | None = None,
    known: Callable[[Any], Any | None] | None = None,
    warn: Callable[[str], Any] | None = None,
    pin: bool = False,
    ahead: int = 0,
) -> Iterator[Iterator[LoadedImage]]:
    """Yield an iterator over the loaded `images` in order, with a bounded number loaded ahead.

    Args:
        num_workers: Processes; 0 for threads, None to decide by cores and number of images.
        known: image -> content to use without loading, or None; called when loading would start, and the
            result is held from then on.
        warn: Called once if processes cannot be used or one dies; threads then do their work.
        pin: Put pixels into page-locked memory, from which a GPU reads while the host goes on.
        ahead: Images that are loaded before they are needed, at least twice the processes or threads.
    """
    count = sensible_workers(len(images)) if num_workers is None else num_workers
    source = _Source(loader, count, warn or (lambda message: print(message, file=sys.stderr)), pin)
    ahead = max(4, ahead, 2 * max(count, source.threads))
    waiting: deque[tuple[Any, Any, Future | None]] = deque()

    def stream() -> Iterator[LoadedImage]:
        for position in range(len(images) + ahead):
            if position < len(images):
                image = images[position]
                found = known(image) if known is not None else None
                waiting.append((image, found, source.submit(image) if found is None else None))
            if position >= ahead and waiting:
                image, found, future = waiting.popleft()
                yield (found, None) if future is None else source.result(image, future)

    try:
        yield stream()
    finally:
        source.close()


def sensible_workers(images: int) -> int:
    """Return the number of processes that pays for so many images; 0 means threads.

    Always 0 in programs that are not ours: starting a process runs the main module again, and only ours are
    known to tolerate that.
    """
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    if main is None or not main.name.startswith("llava."):
        return 0
    cores = usable_cores()
    return 0 if cores <= FEW_CORES or images < MANY_IMAGES else min(8, cores - 2)


def usable_cores() -> int:
    """Return the cores for this process: a share, if a launcher started several processes on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    siblings = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or "1"
    return max(1, cores // max(1, int(siblings) if siblings.isdigit() else 1))


class _Source:
    """Loads images with processes while they live, else with threads."""

    def __init__(
        self,
        loader: Callable[[Any], LoadedImage],
        workers: int,
        warn: Callable[[str], Any],
        pin: bool = False,
    ) -> None:
        self.loader, self.warn, self.pin = loader, warn, pin
        self.threads = max(1, min(4, usable_cores() - 1))
        self.pool: Executor | None = None
        self.local = ThreadPoolExecutor(self.threads, thread_name_prefix="images")
        if workers > 0:
            self._start(workers)

    def _start(self, workers: int) -> None:
        try:
            packed = pickle.dumps(self.loader)
        except Exception as error:  # picklers raise anything
            self.warn(f"images are loaded by threads: the loader cannot be sent to a process ({error})")
            return
        # spawn: forking a process that has run torch's threads or CUDA may hang the child
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(packed,))

    def submit(self, image: Hashable) -> Future:
        if self.pool is not None:
            try:
                return self.pool.submit(_work, image)
            except BrokenProcessPool:
                self._give_up()
        return self.local.submit(self._load, image)

    def _load(self, image: Any) -> LoadedImage:
        """Load an image in this process."""
        return self._pinned(self.loader(image))

    def _pinned(self, loaded: LoadedImage) -> LoadedImage:
        content, error = loaded
        if self.pin and error is None and isinstance(content, tuple):
            return (content[0].pin_memory(), content[1]), None
        return loaded

    def result(self, image: Any, future: Future) -> LoadedImage:
        try:
            found = future.result()
        except BrokenProcessPool:  # also for images that another image's process took down
            self._give_up()
            return self.local.submit(self._load, image).result()
        if found[1] is None and isinstance(found[0], tuple) and not isinstance(found[0][0], torch.Tensor):
            return self._pinned(((torch.from_numpy(found[0][0]), found[0][1]), None))
        return found

    def _give_up(self) -> None:
        if self.pool is not None:
            self.warn("an image loading process died (out of memory?); threads continue")
            self.pool.shutdown(wait=False, cancel_futures=True)
            self.pool = None

    def close(self) -> None:
        for pool in (self.pool, self.local):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)


_loader: Callable[[Any], LoadedImage] | None = None  # of a worker process


def _begin(packed: bytes) -> None:
    global _loader
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _loader = pickle.loads(packed)


def _end_with_parent() -> None:
    """Exit when the parent process is gone, however it ended: a killed parent cannot shut down its pool."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _work(image: Any) -> LoadedImage:
    assert _loader is not None
    found, error = _loader(image)
    # As an array, so that pixels go through a pipe: tensors use shared memory, which is scarce in containers.
    return (None, error) if error is not None else ((found[0].numpy(), found[1]), None)
