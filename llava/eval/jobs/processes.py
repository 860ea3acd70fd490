"""Several processes for one run: which one am I, whose questions are mine, start the others and end them.

`world` reads the place of this process from the environment that torchrun, accelerate launch, mpirun and
srun set; nothing is initialised and no process talks to another. `deal` gives every process its questions:
those of one picture stay together, and the pictures of one batch of a lone process as well, so that any
number of processes asks in the same company and gets the same answers. `start` runs this program once per
GPU and waits. Knows neither benchmarks nor answer files.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava.eval.benchmarks.base import Question
from llava.paths import REPOSITORY

# rank, size, rank on this machine; srun's size is the step's: in a batch script alone there is no step
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
_PATIENCE = 10.0  # seconds between asking a process to end and ending it


@dataclass(frozen=True)
class World:
    """The place of this process among all that share a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those on this machine

    @property
    def neighbours(self) -> range:
        """Ranks before this one on the same machine."""
        return range(max(0, self.rank - self.local_rank), self.rank)


def world(environment: Mapping[str, str]) -> World:
    """The place that a launcher has given this process; alone without one. Raises ValueError."""
    for names in _LAUNCHERS:
        if not (environment.get(names[0]) and environment.get(names[1])):
            continue
        try:
            rank, size = int(environment[names[0]]), int(environment[names[1]])
            local = int(environment.get(names[2]) or rank)
        except ValueError:
            rank, size, local = 0, 0, 0
        if not (0 <= rank < size and local >= 0):
            said = " ".join(f"{name}={environment.get(name, '')}" for name in names)
            raise ValueError(f"{said} in the environment: no place among processes; unset them")
        if size > 1:
            return World(rank, size, local)
    return World()


def deal(questions: Sequence[Question], batch_size: int, size: int) -> tuple[list[set[int]], bool]:
    """(question indices of every process, whether whole batches of a lone process were dealt out).

    Depends on its arguments alone. The largest lot goes to the process with the least so far. Where there are
    few batches, single pictures are dealt out instead: balance counts for more, and on a CPU in float32 the
    company of a question does not change its answer.
    """
    from llava.eval.inference.engine import plan

    lots: list[Sequence[int]] = []
    for wave in plan(questions, batch_size):
        # text alone shares no picture: batch by batch
        lots += (
            wave.batches if wave.images == (None,) else [[place for batch in wave.batches for place in batch]]
        )
    whole_batches = len(lots) >= 4 * size
    if not whole_batches:
        by_image: dict[object, list[int]] = {}  # what has no picture, each for itself
        for place, question in enumerate(questions):
            key = ("alone", place) if question.image is None else question.image
            by_image.setdefault(key, []).append(place)
        lots = [*by_image.values()]
    shares: list[set[int]] = [set() for _ in range(size)]
    for lot in sorted(lots, key=len, reverse=True):
        least = min(range(size), key=lambda rank: len(shares[rank]))
        shares[least].update(questions[place].index for place in lot)
    return shares, whole_batches


def start(arguments: Sequence[str], count: int, gpus: Sequence[str]) -> list[str]:
    """Run `python -m llava.eval.run ARGUMENTS` `count` times at once; what went wrong, a line per process.

    gpus: names for CUDA_VISIBLE_DEVICES, dealt out in turn; none on a CPU, where the cores are shared out.
    One that fails does not stop the others. Interrupted, or killed, this process takes all with it.
    """
    command = [sys.executable, "-m", "llava.eval.run", *arguments]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    children: list[subprocess.Popen] = []
    wrong: dict[int, str] = {}
    try:
        for rank in range(count):
            environment = {
                **os.environ,
                "PYTHONPATH": path,
                "RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_RANK": str(rank),
            }
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[rank % len(gpus)]
            else:
                environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // count)))
            # A session of its own, so that Ctrl-C reaches this process alone, which then ends the others; the
            # pipe tells them when this one is no more, however it ended.
            children.append(
                subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)
            )
        running = set(range(count))
        while running:
            time.sleep(0.05)
            for rank in sorted(running):
                code = children[rank].poll()
                if code is None:
                    continue
                running.discard(rank)
                if code:
                    how = f"was killed by signal {-code}" if code < 0 else f"failed (exit code {code})"
                    wrong[rank] = f"process {rank} of {count} {how}"
                    others = "; the others go on" if running else ""
                    print(f"{wrong[rank]}{others}", file=sys.stderr, flush=True)
    finally:
        _end(children)
    return [wrong[rank] for rank in sorted(wrong)]


def _end(children: Sequence[subprocess.Popen]) -> None:
    for child in children:
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + _PATIENCE
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if child.stdin is not None:
            child.stdin.close()


def end_with_parent() -> None:
    """In a process that `start` made: end when the one that started it is no more."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(143)  # as after SIGTERM: what was written stands, nothing else is to be put in order

    threading.Thread(target=watch, daemon=True).start()


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this platform
        return os.cpu_count() or 1
