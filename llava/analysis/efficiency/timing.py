"""Benchmark timers: warm-up, several interleaved passes, medians; events on GPU; peak memory.

    spent = compare({"optimized": f, "baseline": g}, device, repeats=5)     # {"optimized": Timing, ...}
    quotient("speedup", spent["baseline"], spent["optimized"])              # {"speedup": 3.1, ...}

Variants are interleaved, so that other programs on the machine slow all of them down to the same degree.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one pass: median, fastest and slowest of `passes`, after `warmup` unmeasured ones.

    `processor` is the median processor time of this process (all threads), or None on a GPU. On a CPU that
    other programs use as well, it is more reliable than the time on the clock.
    """

    median: float
    fastest: float
    slowest: float
    passes: int
    warmup: int
    processor: float | None = None

    @classmethod
    def of(cls, seconds: list[tuple[float, float | None]], warmup: int) -> Timing:
        """Summarize (seconds, seconds of processor time) of every pass."""
        wall = [one for one, _ in seconds]
        busy = [one for _, one in seconds if one is not None]
        return cls(
            statistics.median(wall),
            min(wall),
            max(wall),
            len(wall),
            warmup,
            statistics.median(busy) if busy else None,
        )

    def as_json(self) -> dict[str, float | int]:
        """Return milliseconds, ready for JSON."""
        found: dict[str, float | int] = {
            f"{name}_ms": round(1000 * value, 4)
            for name, value in asdict(self).items()
            if isinstance(value, float)
        }
        return {**found, "passes": self.passes, "warmup": self.warmup}


def seconds_of(run: Callable[[], Any], device: torch.device | str = "cpu") -> tuple[float, float | None]:
    """Time one pass.

    Returns:
        Seconds and seconds of processor time; on a GPU the seconds between two events (gaps between kernels
        included) and None.
    """
    if torch.device(device).type != "cuda":
        start, busy = time.perf_counter(), time.process_time()
        run()
        return time.perf_counter() - start, time.process_time() - busy
    with torch.cuda.device(device):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1000, None


def compare(
    runs: Mapping[str, Callable[[], Any]],
    device: torch.device | str = "cpu",
    repeats: int = 5,
    warmup: int = 1,
    limit: float | None = None,
) -> dict[str, Timing]:
    """Time several functions, interleaved: every round runs each of them once.

    Args:
        limit: Seconds after which no further round starts; one round is always run.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"expected repeats >= 1 and warmup >= 0, got {repeats} and {warmup}")
    for _ in range(warmup):
        for run in runs.values():
            seconds_of(run, device)
    taken: dict[str, list[tuple[float, float | None]]] = {name: [] for name in runs}
    start = time.perf_counter()
    for turn in range(repeats):
        if turn and limit is not None and time.perf_counter() - start > limit:
            break
        names = list(runs) if turn % 2 == 0 else list(runs)[::-1]
        for name in names:
            taken[name].append(seconds_of(runs[name], device))
    return {name: Timing.of(seconds, warmup) for name, seconds in taken.items()}


def measure(
    run: Callable[[], Any], device: torch.device | str = "cpu", repeats: int = 5, warmup: int = 1
) -> Timing:
    """Time a single function."""
    return compare({"it": run}, device, repeats, warmup)["it"]


def add_captured(
    runs: dict[Any, Callable[[], Any]], name: str, function: Callable[..., Any], inputs: tuple[Any, ...]
) -> dict[str, str]:
    """Add a captured variant of a function of fixed shapes to `runs`.

    Returns:
        {}, or {f"{name}_error": reason} if it cannot be captured; then `runs` is left as it is.
    """
    from llava.model.runtime import capture

    try:
        graph = capture(function, inputs)
    except RuntimeError as error:  # CaptureError, or out of memory
        return {f"{name}_error": f"{type(error).__name__}: {error}"[:400]}
    runs[name] = lambda: graph(*inputs)
    return {}


def quotient(name: str, above: Timing, below: Timing) -> dict[str, float]:
    """Divide the medians of two timings: {name: of the clock, name_processor: of processor time, on CPU}."""
    found = {name: round(above.median / below.median, 3)}
    if above.processor and below.processor:
        found[f"{name}_processor"] = round(above.processor / below.processor, 3)
    return found


def peak_bytes(run: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Measure the most bytes that tensors of one pass use at a time, without tensors that existed before.

    On a GPU the allocator counts them. On a CPU they are counted from the allocator's events in a profile,
    which do not include the workspaces of libraries that allocate memory themselves.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.autograd.profiler import profile

    with _quiet(), profile(profile_memory=True, use_cpu=True) as found:
        run()
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence standard error: the profiler of some builds of torch writes trace marks to it."""
    sys.stderr.flush()
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


def machine(device: torch.device | str) -> dict[str, Any]:
    """Describe the machine: device, threads, versions, and load."""
    import transformers

    device = torch.device(device)
    found: dict[str, Any] = {
        "device": str(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
        try:
            import triton

            found["triton"] = triton.__version__
        except ImportError:
            found["triton"] = None
    else:
        found |= {
            "name": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": [round(one, 2) for one in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        }
    return found


def _driver() -> str | None:
    """Return the version of NVIDIA's driver, None if nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (found.stdout.split() or [None])[0]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
