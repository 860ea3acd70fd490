"""Time spans of host and device without waiting for the device.

watch = Stopwatch(device)
with watch.span(stats, "vision_seconds"):
    ...                    # work that is only queued on a GPU
watch.settle()             # waits once; every span has been added to its field
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_PENDING = 512  # spans whose events are kept before the finished ones are read


class Stopwatch:
    """Adds the duration of spans to fields of objects.

    On CUDA a span lasts from the moment the device reaches its begin to the moment it reaches its end, by
    events in the queue: time in which the device waits for the host counts, time in which it still works on
    what was queued before does not. Spans that follow each other therefore add up to the whole time. On other
    accelerators the device is waited for at both ends; on a CPU there is nothing to wait for.
    """

    def __init__(self, device: str | torch.device) -> None:
        self._device = torch.device(device)
        self._pending: deque[tuple[Any, str, Any, Any]] = deque()

    @contextmanager
    def span(self, holder: Any, field: str) -> Iterator[None]:
        """Add the seconds of the block to `holder.field`: when it ends, or on CUDA when it is read.

        A block that raises counts as well.
        """
        begin = self._now()
        try:
            yield
        finally:
            end = self._now()
            self._pending.append((holder, field, begin, end))
            self._read(all_of_them=self._device.type != "cuda")

    def settle(self) -> None:
        """Wait for the device and add all spans that have not been added."""
        if self._pending:
            self._pending[-1][-1].synchronize()
            self._read(all_of_them=True)

    def _now(self) -> Any:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            return event
        if self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize()
        return _HostTime()

    def _read(self, all_of_them: bool) -> None:
        while self._pending and (all_of_them or len(self._pending) > _PENDING):
            holder, field, begin, end = self._pending[0]
            if not all_of_them and not end.query():
                return
            seconds = begin.elapsed_time(end) / 1000
            setattr(holder, field, getattr(holder, field) + seconds)
            self._pending.popleft()


class _HostTime:
    """A moment on the host's clock, with the methods of `torch.cuda.Event` that are used here."""

    def __init__(self) -> None:
        self._seconds = time.monotonic()

    def elapsed_time(self, end: _HostTime) -> float:
        """Return milliseconds until `end`."""
        return 1000 * (end._seconds - self._seconds)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass
