"""Pictures decoded, resized and normalised ahead of the model, by threads or by processes, in order.

    with read_ahead(images, Prepare(load_image, image_processor, model.config), workers=None) as pictures:
        for picture, error in pictures: ...

Pixels are the same bits either way. Threads start at once, and Pillow lets go of the interpreter while it
decodes and resizes; but normalising and the model's own Python share one interpreter with them. Processes
share nothing, and each takes seconds to start, as it imports torch and transformers for the image processor.
So by default processes serve only machines with more than four cores and runs with many pictures. Knows
neither the model nor what pictures are for.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

from llava.mm_utils import process_images

_SETTINGS = ("image_aspect_ratio", "image_grid_pinpoints", "anyres_protocol")
MANY_PICTURES, FEW_CORES = 1000, 4  # processes pay above both
Picture = tuple[Any, str | None]  # (what was made of it, None) or (None, what is wrong with it)


class Prepare:
    """image -> ((pixels (3, H, W) or (crops, 3, H, W) float32, (width, height)), None), or (None, error).

    Whatever `load_image` raises is the picture's fault and comes back as text, so do OSError and ValueError
    of the processor; other errors are ours and are raised. Can be sent to another process if its parts can.
    """

    def __init__(self, load_image: Callable[[Any], Any], image_processor: Any, config: Any) -> None:
        get = config.get if isinstance(config, dict) else lambda name: getattr(config, name, None)
        self.load_image, self.image_processor = load_image, image_processor
        self.config = {name: get(name) for name in _SETTINGS}

    def __call__(self, image: Any) -> Picture:
        try:
            picture = self.load_image(image)
        except Exception as error:  # whatever a decoder raises, it is this picture's fault
            return None, str(error) or type(error).__name__
        try:
            pixels = process_images([picture], self.image_processor, self.config)[0]
        except (OSError, ValueError) as error:  # decoded late, or of an impossible shape
            return None, f"{image}: {error}"
        return (pixels, picture.size), None


@contextmanager
def read_ahead(
    images: Sequence[Any],
    prepare: Callable[[Any], Picture],
    workers: int | None = None,
    known: Callable[[Any], Any | None] | None = None,
    warn: Callable[[str], Any] | None = None,
) -> Iterator[Iterator[Picture]]:
    """An iterator over the pictures of `images` in order, a bounded number of them made ahead.

    workers: processes to use; 0 uses threads; None decides by cores and number of pictures. known: image ->
    what to hand out in its place, or None; asked when the picture's turn to be made comes, and held from then
    on. warn: told once if processes cannot be used or one dies; from then on threads do their work.
    """
    count = sensible_workers(len(images)) if workers is None else workers
    source = _Source(prepare, count, warn or (lambda message: print(message, file=sys.stderr)))
    ahead = max(4, 2 * max(count, source.threads))
    waiting: deque[tuple[Any, Future]] = deque()

    def stream() -> Iterator[Picture]:
        for place in range(len(images) + ahead):
            if place < len(images):
                found = known(images[place]) if known is not None else None
                waiting.append(
                    (images[place], _done(found) if found is not None else source.submit(images[place]))
                )
            if place >= ahead and waiting:
                yield source.result(*waiting.popleft())

    try:
        yield stream()
    finally:
        source.close()


def sensible_workers(pictures: int) -> int:
    """Processes that pay for so many pictures here; 0 means threads.

    Never any in a program that is not one of ours: starting a process runs the main module again, and only
    ours are known to bear it.
    """
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    if main is None or not main.name.startswith("llava."):
        return 0
    cores = usable_cores()
    return 0 if cores <= FEW_CORES or pictures < MANY_PICTURES else min(8, cores - 2)


def usable_cores() -> int:
    """Cores this process may use; its share, where a launcher started several on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    siblings = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores // max(1, int(siblings) if siblings.isdigit() else 1))


class _Source:
    """Hands images to processes while there are any, else to threads."""

    def __init__(self, prepare: Callable[[Any], Picture], workers: int, warn: Callable[[str], Any]) -> None:
        self.prepare, self.warn = prepare, warn
        self.threads = max(1, min(4, usable_cores() - 1))
        self.pool: Executor | None = None
        self.local = ThreadPoolExecutor(self.threads, thread_name_prefix="pictures")
        if workers > 0:
            self._start(workers)

    def _start(self, workers: int) -> None:
        try:
            packed = pickle.dumps(self.prepare)
        except Exception as error:  # picklers raise anything
            self.warn(f"pictures are read by threads, as their reader cannot be sent to a process ({error})")
            return
        # spawn: forking a process that has run torch's threads or CUDA may hang the child
        self.pool = ProcessPoolExecutor(
            workers, mp_context=multiprocessing.get_context("spawn"), initializer=_begin, initargs=(packed,)
        )

    def submit(self, image: Hashable) -> Future:
        if self.pool is not None:
            try:
                return self.pool.submit(_work, image)
            except BrokenProcessPool:
                self._give_up()
        return self.local.submit(self.prepare, image)

    def result(self, image: Any, future: Future) -> Picture:
        try:
            found = future.result()
        except BrokenProcessPool:  # also those that another picture's process took with it
            self._give_up()
            return self.local.submit(self.prepare, image).result()
        if found[1] is None and isinstance(found[0], _Packed):
            return found[0].unpack(), None
        return found

    def _give_up(self) -> None:
        if self.pool is not None:
            self.warn("a process that reads pictures died (out of memory?); threads go on in its place")
            self.pool.shutdown(wait=False, cancel_futures=True)
            self.pool = None

    def close(self) -> None:
        for pool in (self.pool, self.local):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)


class _Packed:
    """Pixels on their way between processes: bytes through a pipe, not shared memory, which containers and
    clusters often allow little of."""

    def __init__(self, pixels: torch.Tensor, size: tuple[int, int]) -> None:
        self.array, self.size = pixels.numpy(), size

    def unpack(self) -> tuple[torch.Tensor, tuple[int, int]]:
        return torch.from_numpy(self.array), self.size


_prepare: Callable[[Any], Picture] | None = None  # of a worker process


def _begin(packed: bytes) -> None:
    global _prepare
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; whoever asked decides
    torch.set_num_threads(1)
    _prepare = pickle.loads(packed)


def _work(image: Any) -> Picture:
    assert _prepare is not None
    found, error = _prepare(image)
    return (None, error) if error is not None else (_Packed(*found), None)


def _done(value: Any) -> Future:
    future: Future = Future()
    future.set_result((value, None))
    return future
