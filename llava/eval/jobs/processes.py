"""Several processes for one run: rank of this process, shards of questions, starting and ending processes.

`rank_info` reads the rank from the environment that torchrun, accelerate launch, mpirun and srun set; nothing
is initialized and no process communicates with another. `shard` assigns questions to processes by image, and
whole batches of a single process where there are enough, so that any number of processes uses identical
batches and gets identical answers. `start` runs this program once per GPU and waits.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava.eval.benchmarks import Question

# rank, size, rank on this machine; srun's size is the step's: in a batch script alone there is no step
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
STOPPED = 79  # exit code of a process that `start` created and that found too many failures
_CHILD = """\
import sys
sys.path[:] = {path!r}
import runpy
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""
_PATIENCE = 10.0  # seconds between asking a process to end and ending it


@dataclass(frozen=True)
class RankInfo:
    """Rank of this process among all that share a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those on this machine

    @property
    def neighbors(self) -> range:
        """Return the ranks before this one on the same machine."""
        return range(max(0, self.rank - self.local_rank), self.rank)


ALONE = RankInfo()


def rank_info(environment: Mapping[str, str]) -> RankInfo:
    """Return the rank that a launcher gave this process. Raises ValueError for an impossible one."""
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
            raise ValueError(f"{said} in the environment: not a valid rank. Unset these variables")
        if size > 1:
            return RankInfo(rank, size, local)
    return ALONE


def shard(questions: Sequence[Question], batch_size: int, size: int) -> tuple[list[set[int]], bool]:
    """Assign questions to processes; depends on the arguments alone.

    The largest batch goes to the process with the fewest questions so far. If there are few batches, single
    images are assigned instead: balance matters more then, and on a CPU in float32 the composition of a batch
    does not change an answer.

    Returns:
        Question indices of every process, and whether whole batches of a single process were assigned.
    """
    from llava.eval.inference.engine import plan

    units: list[Sequence[int]] = []
    for group in plan(questions, batch_size):
        if group.images == (None,):  # text-only questions share no image: batch by batch
            units += group.batches
        else:
            units.append([position for batch in group.batches for position in batch])
    whole_batches = len(units) >= 4 * size
    if not whole_batches:
        by_image: dict[object, list[int]] = {}
        for position, question in enumerate(questions):
            key = ("text", position) if question.image is None else question.image
            by_image.setdefault(key, []).append(position)
        units = [*by_image.values()]
    shares: list[set[int]] = [set() for _ in range(size)]
    for unit in sorted(units, key=len, reverse=True):
        smallest = min(range(size), key=lambda rank: len(shares[rank]))
        shares[smallest].update(questions[position].index for position in unit)
    return shares, whole_batches


def start(module: str, arguments: Sequence[str], count: int, gpus: Sequence[str]) -> list[str]:
    """Run `python -m MODULE ARGUMENTS` in `count` processes and wait for all of them.

    A process that fails does not stop the others. All of them end with this process, however it ends.

    Args:
        gpus: Names for CUDA_VISIBLE_DEVICES, assigned in turn; none on a CPU, where cores are divided.

    Returns:
        One line per failed process.
    """
    from llava.eval.inference.image_loading import usable_cores

    # Not `-m`, which searches the working directory first: a child imports from where this process does.
    path = [folder or os.getcwd() for folder in sys.path]
    command = [sys.executable, "-c", _CHILD.format(path=path, module=module), *arguments]
    children: list[subprocess.Popen] = []
    wrong: dict[int, str] = {}
    try:
        for rank in range(count):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(count),  # divides the cores among image loading processes
            }
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[rank % len(gpus)]
            else:
                environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // count)))
            # A session of its own, so that Ctrl-C reaches only this process, which then ends the others. The
            # pipe on stdin closes when this process is gone, however it ended.
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
                    stop = code == STOPPED
                    how = "stopped, as too many questions failed" if stop else how
                    wrong[rank] = f"process {rank} of {count} {how}"
                    others = f"; the others {'are ended' if stop else 'continue'}" if running else ""
                    print(f"{wrong[rank]}{others}", file=sys.stderr, flush=True)
                    running = set() if stop else running
                    if stop:
                        break
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
    """Make a process that `start` created exit when its parent is gone."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(143)  # as after SIGTERM; written answers are kept

    threading.Thread(target=watch, daemon=True).start()
