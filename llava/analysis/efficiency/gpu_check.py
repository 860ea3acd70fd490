"""Check and measure on one GPU everything that the documents claim about GPUs; write a report.

    bash scripts/gpu_check.sh                                       # all parts, in less than nine minutes
    bash scripts/gpu_check.sh selection tower --again               # these parts, measured again
    bash scripts/gpu_check.sh --device cpu --dummy-model tiny --output DIR    # a rehearsal without a GPU

All models have random weights of published sizes. Measurements of the folder --output are kept as long as
card, driver and versions are the same; a part that was interrupted continues with its next measurement. A
measurement that raises an error is reported, and the others are measured nevertheless. After every part the
folder contains report.md (goals first, then tables and all measurements) and gpu_check.json.

The exit code is 1 if a test or a measurement failed; a goal that is not met does not change it.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.analysis.efficiency import gpu_report, options
from llava.argtypes import at_least
from llava.eval.store.answer_file import fcntl
from llava.eval.store.atomic import write_atomically
from llava.paths import REPOSITORY

if TYPE_CHECKING:
    from llava.analysis.efficiency.gpu_context import CheckContext, CheckPart

WRITES_FOLDER = True  # --output is a folder, which `run` fills
RESULTS, PREVIOUS, REPORT = "gpu_check.json", "gpu_check.previous.json", "report.md"
# Name -> (what it measures, seconds after which no further measurement of the part starts).
PARTS = {
    "tests": ("every test marked gpu", 120),
    "peak": ("matrix rate and bandwidth of the card", 20),
    "selection": ("selection: loop, eager, captured", 40),
    "tower": ("tower with row and selection: bare, eager, captured", 60),
    "first-token-1.5": ("time to first token of one crop: baseline, eager, captured; batches", 100),
    "decode": ("one decoded token and long answers", 60),
    "engine": ("questions per second, and how long the card is busy", 120),
    "first-token-next": ("time to first token of five crops", 60),
    "compile": ("the most important measurements with compiled layers", 150),
    "video": ("time to first token of eight frames", 50),
    "prefill": ("prefill at exact and at padded lengths", 40),
    "prefix": ("attention over a shared prefix: copied, or merged by log-sum-exp", 30),
    "memory": ("images that fit into 24 and 80 GB", 30),
    "pope": ("the bundled POPE questions on the card and on a CPU", 90),
    "cpu": ("time to first token on the processor of this machine", 60),
}
_STARTED = time.monotonic()  # before torch is imported
_SHARE_OF_LIMIT = 0.25  # a part starts only if this share of its own limit is left of the whole limit
_ENVIRONMENT = (
    "device",
    "name",
    "driver",
    "torch",
    "cuda",
    "triton",
    "transformers",
    "python",
    "memory_bytes",
    "threads",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"parts to run, of {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--again", action="store_true", help="measure again what the folder contains already")
    parser.add_argument("--device", help="cuda, cuda:1 ... or cpu (default: cuda if available, else cpu)")
    options.add_dummy_model(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=REPOSITORY / "outputs" / "gpu",
        help=f"folder for {REPORT} and {RESULTS} (default: outputs/gpu in the repository)",
    )
    parser.add_argument(
        "--limit",
        type=at_least(0, float),
        default=520.0,
        help="seconds after which no further measurement starts (default: %(default)g)",
    )
    parser.add_argument(
        "--repeats",
        type=at_least(1),
        help="measured passes, reported by their median (default: 7 on CUDA, else 1)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights and images (default: %(default)s)"
    )


def check(args: argparse.Namespace) -> None:
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        raise ValueError(f"unknown part {unknown[0]!r} (choose from {', '.join(PARTS)})")
    options.check_device(args)
    cpu = args.device == "cpu"
    args.dummy_model = args.dummy_model or ("tiny" if cpu else "llava-1.5-7b")
    args.repeats = args.repeats or (1 if cpu else 7)
    args.parts = [name for name in PARTS if name in args.parts or not args.parts]
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output}: not a folder. Give the name of a folder")
    read_results(args.output / RESULTS)


def read_results(path: Path) -> dict[str, Any] | None:
    """Read the results of an earlier run; None if there are none.

    Raises:
        ValueError: the file was not written by this command.
    """
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document["environment"], dict) and all(map(_is_record, document["parts"].values())):
            return document
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path}: not a result of this command. Move it away, or choose another --output")


def _is_record(part: Any) -> bool:
    """Return whether a part of a file has the form of what `run_part` returns."""
    named = [part[key].values() for key in ("measurements", "errors", "not_measured")]
    kinds = {"state": str, "seconds": int | float, "reason": str | None}
    return all(isinstance(part[key], kind) for key, kind in kinds.items()) and all(
        isinstance(one, dict) for one in named[0]
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    args.output.mkdir(parents=True, exist_ok=True)
    with _alone(args.output):
        return _run(args)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder of results.

    Raises:
        BlockingIOError: another process holds it. Two at once would slow each other down, and the last one
            would overwrite the results of the first.
    """
    descriptor = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    try:
        if descriptor is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(
                    f"{folder}: another gpu_check writes to this folder, and two at once would measure each "
                    "other. Wait until it has ended."
                ) from error
            except OSError:  # a file system without locks
                pass
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    from llava.analysis.efficiency.gpu_context import CheckContext
    from llava.analysis.efficiency.gpu_parts import FUNCTIONS

    document = _start(args)
    context = CheckContext.prepare(args)
    budgets = {form: list(context.sizes(form).budgets) for form in ("1.5", "next", "video")}
    document |= {"code": code_digest(REPOSITORY / "llava"), "kernels": context.kernels(), "budgets": budgets}
    _write(args.output, document)  # before anything was measured, in case that it cannot be written
    for name in args.parts:
        what, limit = PARTS[name]
        left = args.limit - (time.monotonic() - _STARTED)
        before = {} if args.again else document["parts"].get(name, {})
        if before.get("state") == "done":
            print(f"{name}: kept ({before['seconds']:.0f} s)", file=sys.stderr)
            continue
        if left < _SHARE_OF_LIMIT * limit:
            record = {
                "state": "not run",
                "reason": f"time: {max(left, 0):.0f} s of {args.limit:g} s were left",
            }
            document["parts"][name] = {**record, **_measured(before), "seconds": 0.0}
        else:
            print(f"[{time.monotonic() - _STARTED:.0f} s] {name}: {what}", file=sys.stderr, flush=True)
            record = run_part(FUNCTIONS[name], context, before, min(limit, left))
            document["parts"][name] = {**record, "code": document["code"]}
            print(f"{name}: {record['state']}, {record['seconds']:.0f} s", file=sys.stderr, flush=True)
        _write(args.output, document)
    document["total_seconds"] = round(time.monotonic() - _STARTED, 1)
    document["failed"] = [name for name, part in document["parts"].items() if part.get("errors")]
    _write(args.output, document)
    return document


def _measured(record: dict[str, Any]) -> dict[str, Any]:
    return {"measurements": dict(record.get("measurements", {})), "errors": {}, "not_measured": {}}


def _start(args: argparse.Namespace) -> dict[str, Any]:
    """Make the document, with the earlier parts of this card and these versions."""
    from llava import __version__
    from llava.analysis.efficiency.timing import machine

    here = machine(args.device)
    environment = {key: here[key] for key in _ENVIRONMENT if key in here}
    environment |= {"dummy_model": args.dummy_model, "vispruner": __version__}
    document = {"part": "gpu_check", "environment": environment, "machine": here, "parts": {}}
    earlier = read_results(args.output / RESULTS)
    if earlier is None:
        return document
    if earlier["environment"] == environment:
        return {**document, "parts": earlier["parts"]}
    place = args.output / PREVIOUS
    for number in itertools.count(2):  # a rehearsal on a CPU must not cost the results of a GPU
        if not place.exists():
            break
        place = args.output / PREVIOUS.replace(".json", f"{number}.json")
    os.replace(args.output / RESULTS, place)
    print(f"results of another card or other versions: moved to {place}", file=sys.stderr)
    return document


def run_part(
    part: CheckPart, context: CheckContext, before: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Run the measurements of a part that `before` does not contain.

    Args:
        part: Yields (name, function) for every measurement.
        seconds: No further measurement starts after so many.

    Returns:
        The record of the part: state (done, incomplete or not run), reason, seconds, and by name the
        measurements, the errors, and the reasons of what cannot be measured here.
    """
    record: dict[str, Any] = {"state": "done", "reason": None, **_measured(before)}
    start, steps = time.monotonic(), part(context)
    while True:
        step, error, reason = _attempt(lambda: next(steps, None))
        name = "preparation"
        if step is not None:
            name, function = step
            if name in record["measurements"]:
                continue
            if (spent := time.monotonic() - start) > seconds:
                record |= {
                    "state": "incomplete",
                    "reason": f"time: stopped after {spent:.0f} s before {name}",
                }
                break
            value, error, reason = _attempt(function)
            if value is not None:
                record["measurements"][name] = value
        if error is not None:
            record["errors"][name] = error
        if reason is not None:
            record["not_measured"][name] = reason
        if step is None:
            break
    if record["errors"]:
        failed = f"{len(record['errors'])} failed: {next(iter(record['errors'].values()))}"
        record |= {"state": "incomplete", "reason": record["reason"] or failed}
    elif record["not_measured"] and not record["measurements"]:
        record |= {"state": "not run", "reason": next(iter(record["not_measured"].values()))}
    step = function = None  # they hold the models
    steps.close()
    context.release()
    return {**record, "seconds": round(time.monotonic() - start, 2)}


def _attempt(function: Callable[[], Any]) -> tuple[Any, str | None, str | None]:
    """Call a function; returns its value, else the error, or the reason why it cannot be measured here."""
    from llava.analysis.efficiency.gpu_context import NotMeasuredError

    try:
        return function(), None, None
    except NotMeasuredError as reason:
        return None, None, str(reason)
    except Exception as error:  # whatever fails is part of the report, and the other measurements go on
        traceback.print_exc()
        frames = [one for one in traceback.extract_tb(error.__traceback__) if "llava" in one.filename]
        where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        return None, f"{type(error).__name__}: {str(error).strip()[:400]}{where}", None


def code_digest(folder: Path) -> str:
    """Return a short hash of the Python files below a folder, to tell which code was measured."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _write(folder: Path, document: dict[str, Any]) -> None:
    document["goals"] = gpu_report.goals(document)
    write_atomically(folder / RESULTS, json.dumps(document, indent=1) + "\n")
    write_atomically(folder / REPORT, gpu_report.markdown(document))


def render(document: dict[str, Any]) -> str:
    return gpu_report.summary(document)
