"""Commands that make a larger result, one after the other, each run once: what `llava.eval.paper` does.

A step is skipped where its record says that the same command, with the same inputs and the same code, ended
well, and all that it wrote is still there. A step that fails keeps its log and does not stop the others. A
step that was interrupted has no record, so that it runs again and its command resumes its own files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llava.eval.benchmarks import DataError
from llava.eval.store.atomic import write_atomically
from llava.paths import REPOSITORY

DONE, FAILED, TO_RUN, MISSING = "done", "failed", "to run", "missing"
_HASHED = 4 << 20  # bytes; larger files are known by size and time
_SHOWN = {".md", ".csv", ".html", ".png", ".svg", ".jpg", ".json"}  # outputs that a record lists
_PATIENCE = 60  # seconds that an interrupted command has to stop
_TAIL = 12  # lines of a log that a record keeps


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: Unique; also the name of its log and record, with / for folders.
        folder: Everything that it writes is below this folder.
        inputs: Files, or folders with their files, whose change runs it again.
        needs: Files or folders that earlier steps write.
        missing: Why it cannot run here; empty if it can.
        environment: Variables beside those of this process.
    """

    name: str
    title: str
    command: tuple[str, ...]
    folder: Path
    inputs: tuple[Path, ...] = ()
    needs: tuple[Path, ...] = ()
    missing: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    def shown(self) -> str:
        """Return the command as one would type it in the repository."""
        words = list(self.command)
        if words[:2] == [sys.executable, str(REPOSITORY / "scripts" / "_launch.py")]:
            words[:2] = ["python", "-m"]
        words = [word.replace(f"{REPOSITORY}{os.sep}", "") for word in words]
        return shlex.join([*(f"{name}={value}" for name, value in self.environment.items()), *words])


class StepRunner:
    """Runs steps and keeps their records and logs in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def record(self, step: Step) -> dict[str, Any] | None:
        """Return the record of the last run of a step; None if there is none that can be read."""
        try:
            found = json.loads(self._path(step, ".json").read_bytes())
            return found if isinstance(found, dict) and isinstance(found["outputs"], dict) else None
        except (OSError, ValueError, KeyError):
            return None

    def state(self, step: Step) -> str:
        """Return done, failed (and unchanged since), to run, or missing."""
        if step.missing:
            return MISSING
        record = self.record(step)
        if record is None or record.get("key") != self.key(step):
            return TO_RUN
        if record.get("state") == DONE:
            intact = all(_size(step.folder / name) == size for name, size in record["outputs"].items())
            return DONE if intact else TO_RUN
        return FAILED

    def key(self, step: Step) -> str:
        """Return the hash of everything that decides the outputs of a step."""
        parts = [step.command, sorted(step.environment.items()), code_hash()]
        parts += [fingerprint(path) for path in (*step.inputs, *step.needs)]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]

    def run(self, step: Step) -> dict[str, Any]:
        """Run a step and return its record. Raises KeyboardInterrupt after the command has stopped."""
        lacking = [path for path in step.needs if not path.exists()]
        if lacking:
            return self._end(step, FAILED, 0.0, [f"{lacking[0]}: not there; the step that writes it failed"])
        key, start = self.key(step), time.monotonic()
        step.folder.mkdir(parents=True, exist_ok=True)
        log = self._path(step, ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        self._path(step, ".json").unlink(missing_ok=True)
        environment = {**os.environ, **step.environment}
        with log.open("wb") as file, _interrupts():
            # a session of its own: Ctrl-C in the terminal reaches the command once, through us
            child = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            try:
                code = child.wait()
            except KeyboardInterrupt:
                _stop(child)
                raise
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        seconds, wrote = time.monotonic() - start, self._outputs(step)
        if code:  # what it wrote is worth showing: a sweep goes on without a setting that fails
            return self._end(step, FAILED, seconds, [*lines[-_TAIL:], f"exit code {code}"], key, wrote)
        if not wrote:
            return self._end(
                step, FAILED, seconds, [*lines[-_TAIL:], f"wrote nothing below {step.folder}"], key
            )
        return self._end(step, DONE, seconds, [], key, wrote)

    def document(self, step: Step) -> dict[str, Any]:
        """Return the JSON document on the last line that a step printed; empty if there is none."""
        try:
            with self._path(step, ".log").open("rb") as file:
                last = file.readlines()[-1]
            found = json.loads(last)
        except (OSError, ValueError, IndexError):
            return {}
        return found if isinstance(found, dict) else {}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder for this process. Raises DataError if another one does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DataError(
                    f"{self.folder}: in use by another process of this command. Wait for it, or stop it."
                ) from error
            yield

    def _path(self, step: Step, ending: str) -> Path:
        return self.folder / f"{step.name}{ending}"

    def _outputs(self, step: Step) -> dict[str, int]:
        found = sorted(path for path in step.folder.rglob("*") if path.suffix in _SHOWN and path.is_file())
        names = {path.relative_to(step.folder): path for path in found}
        return {
            str(name): path.stat().st_size
            for name, path in names.items()
            if not any(part.startswith(".") for part in name.parts)
        }

    def _end(
        self,
        step: Step,
        state: str,
        seconds: float,
        tail: Sequence[str],
        key: str = "",
        outputs: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:
        record = {"step": step.name, "state": state, "key": key, "command": step.shown()}
        record |= {"seconds": round(seconds, 2), "finished": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        record |= {
            "commit": commit(),
            "machine": machine(),
            "tail": list(tail),
            "outputs": dict(outputs or {}),
        }
        path = self._path(step, ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(record, indent=1) + "\n")
        return record


@contextmanager
def _interrupts() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, so that no command outlives this process."""
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Stop a command and all that it started: first so that it can write what it has."""
    for number, patience in ((signal.SIGINT, _PATIENCE), (signal.SIGTERM, 10), (signal.SIGKILL, None)):
        try:
            os.killpg(child.pid, number)
            child.wait(patience)
            break
        except ProcessLookupError:
            break
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            continue
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)  # what a shell started in the background ignores SIGINT


def fingerprint(path: Path) -> Any:
    """Return what changes when a file changes, or a file in a folder; None if there is nothing."""
    if path.is_dir():
        return [[str(one.relative_to(path)), *_stat(one)] for one in sorted(path.rglob("*")) if one.is_file()]
    if not path.is_file():
        return None
    small = path.stat().st_size <= _HASHED
    return hashlib.sha256(path.read_bytes()).hexdigest() if small else _stat(path)


def _stat(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


@cache
def code_hash() -> str:
    """Return the hash of this package's code and data, and of the repository's scripts."""
    files = [*(REPOSITORY / "llava").rglob("*"), *(REPOSITORY / "scripts").rglob("*.sh")]
    known = {".py", ".json", ".html", ".sh"}
    parts = [
        [str(path.relative_to(REPOSITORY)), fingerprint(path)]
        for path in sorted(files)
        if path.suffix in known
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@cache
def commit() -> str:
    """Return the commit of the repository, with + if tracked files were changed; the version without git."""
    import llava

    git = ["git", "-C", str(REPOSITORY)]
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        return f"version {llava.__version__}"
    found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    return found.stdout.strip() + "+" * bool(changed.stdout.strip()) or f"version {llava.__version__}"


@cache
def machine() -> str:
    """Describe this machine in a line: GPUs or processor, cores, memory, and versions."""
    parts = []
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")
        parts += [name for name in gpus if name]
    info = Path("/proc/cpuinfo")
    names = info.read_text().split("model name") if info.exists() else []
    parts.append(names[1].split("\n")[0].strip("\t :") if len(names) > 1 else platform.machine())
    parts.append(
        f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
    )
    parts.append(f"Python {platform.python_version()}")
    for package in ("torch", "transformers", "numpy", "pillow"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)
