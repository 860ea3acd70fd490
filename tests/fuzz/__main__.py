"""Damage every kind of input file and call the commands that read it.

    python -m tests.fuzz --calls 50000
    python -m tests.fuzz --only pope --calls 500 --seed 3
    python -m tests.fuzz --again 3/1742       # one call, with what it prints

Two things are counted, and both must be 0: tracebacks (a command that raises anything, or takes longer than
a minute), and silent changes (a score that differs from the score of the whole files although the command
ended with 0 and gave no further warning). Calls are drawn from --seed, so equal arguments give equal calls.
The last line is one JSON document {"calls": n, "tracebacks": n, "silent": n}; the exit code is 1 unless both
are 0.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # helpers, as pytest's pythonpath has it

from fuzz.mutations import MUTATIONS, form_of, mutate  # noqa: E402
from fuzz.subjects import Subject, fake_model, subjects  # noqa: E402

SECONDS = 60  # after which a call counts as hung
MEANING = ("text", "long")  # mutations that may change what an answer means, and thereby the score


@dataclass
class Outcome:
    """What one call did."""

    code: int | None  # None: it raised
    output: str
    errors: str
    raised: str = ""  # the last frame and message

    def document(self) -> Any:
        """Return the JSON document in the last line of output; None if there is none."""
        lines = self.output.strip().splitlines()
        try:
            return json.loads(lines[-1]) if lines else None
        except ValueError:
            return None

    def warned(self) -> Counter[str]:
        """Return the lines of standard error, and the counts that stand beside a score."""
        found = Counter(line for line in self.errors.splitlines() if line.startswith("warning"))
        document = self.document()
        details = document.get("details") if isinstance(document, dict) else None
        counts = {key: value for key, value in (details or {}).items() if key in ("empty", "unreadable")}
        return found + Counter([json.dumps(counts)])


@dataclass
class Finding:
    """A call that must not end as it did."""

    call: str
    kind: str
    what: str
    where: str


class Bench:
    """Subjects with their folders, and the outcomes on whole files."""

    def __init__(self, only: list[str], root: Path) -> None:
        self.subjects = [one for one in subjects() if not only or one.name in only]
        self.root = root
        self.whole: dict[tuple[str, str], Outcome] = {}
        for subject in self.subjects:
            folder = root / subject.name
            folder.mkdir()
            with _quiet():
                subject.build(folder)

    def call(self, number: int, seed: int) -> tuple[str, Outcome, Finding | None]:
        """Make one call. Returns its description, its outcome, and what is wrong with it."""
        rng = random.Random(f"{seed}/{number}")
        subject = rng.choices(self.subjects, [one.share for one in self.subjects])[0]
        folder = self.root / subject.name
        name, main, arguments = rng.choice(subject.commands)
        arguments = [one.replace("{}", str(folder)) for one in arguments]
        if (subject.name, name) not in self.whole:
            self.whole[subject.name, name] = self._run(subject, main, arguments)
        path = rng.choice(subject.files(folder))
        mutation = rng.choice(list(MUTATIONS))
        content = path.read_bytes()
        damaged = mutate(mutation, content, form_of(path, content), rng)
        kept = {one: one.read_bytes() for one in subject.files(folder)}
        try:
            path.write_bytes(damaged)
            outcome = self._run(subject, main, arguments)
        finally:
            for one, before in kept.items():
                one.write_bytes(before)
            for pattern in subject.written:
                for made in folder.glob(pattern):
                    shutil.rmtree(made) if made.is_dir() else made.unlink()
        call = f"{seed}/{number} {subject.name} {name} {path.relative_to(folder)} {mutation}"
        whole = self.whole[subject.name, name]
        if outcome.code is None:
            return call, outcome, Finding(call, "traceback", outcome.raised, outcome.raised)
        if name in ("score", "fixed") and outcome.code == 0 and mutation not in MEANING:
            found, before = outcome.document(), whole.document()
            if not isinstance(found, dict) or not _equal(found["score"], before["score"], subject.rounded):
                if not outcome.warned() - whole.warned():
                    score = found["score"] if isinstance(found, dict) else found
                    what = f"{before['score']} becomes {score} without a warning"
                    where = f"{subject.name} {path.name} {mutation}"
                    return call, outcome, Finding(call, "silent", what, where)
        return call, outcome, None

    def _run(self, subject: Subject, main: Any, arguments: list[str]) -> Outcome:
        output, errors = io.StringIO(), io.StringIO()
        code: int | None = None
        raised = ""
        with (
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
            warnings.catch_warnings(),
            fake_model() if subject.fake else contextlib.nullcontext(),
            _alarm(),
        ):
            try:
                code = main(arguments)
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException as error:  # noqa: BLE001 -- whatever it is, it is the finding
                if isinstance(error, KeyboardInterrupt):
                    raise
                last = traceback.extract_tb(error.__traceback__)
                ours = [one for one in last if "/llava/" in one.filename] or last
                place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
                raised = f"{type(error).__name__} at {place}: {str(error)[:150]}"
                errors.write("".join(traceback.format_exception(error)))
        return Outcome(code, output.getvalue(), errors.getvalue(), raised)


def _equal(one: Any, other: Any, rounded: float) -> bool:
    both = isinstance(one, float) and isinstance(other, float)
    return math.isclose(one, other, abs_tol=rounded) if both else one == other


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TimeoutError(f"no end within {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def fuzz(calls: int, seed: int = 0, only: list[str] | None = None) -> tuple[int, list[Finding]]:
    """Make the calls; return how many were made, and what was found."""
    found: list[Finding] = []
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(only or [], Path(root))
        for number in tqdm(range(calls), unit="call", disable=None):
            _, _, finding = bench.call(number, seed)
            if finding is not None:
                found.append(finding)
    return calls, found


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=2000, help="calls to make (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws (default: 0)")
    parser.add_argument("--only", nargs="+", default=[], metavar="SUBJECT", help="damage these only")
    parser.add_argument("--again", metavar="SEED/NUMBER", help="repeat one call and print its output")
    args = parser.parse_args()
    known = [one.name for one in subjects()]
    if unknown := set(args.only) - set(known):
        parser.error(f"--only {' '.join(unknown)}: choose from {', '.join(known)}")
    if args.again:
        seed, number = map(int, args.again.split("/"))
        with tempfile.TemporaryDirectory() as root:
            call, outcome, finding = Bench(args.only, Path(root)).call(number, seed)
        print(call, outcome.output, outcome.errors, finding and finding.what, sep="\n")
        return int(finding is not None)
    began = time.monotonic()
    calls, found = fuzz(args.calls, args.seed, args.only)
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in found:
        groups.setdefault((finding.kind, finding.where), []).append(finding)
    for (kind, where), members in sorted(groups.items(), key=lambda item: -len(item[1])):
        print(f"{len(members):5} x {kind}: {where}\n        first: {members[0].call}: {members[0].what}")
    kinds = Counter(finding.kind for finding in found)
    print(f"{calls / (time.monotonic() - began):.0f} calls/s")
    print(json.dumps({"calls": calls, "tracebacks": kinds["traceback"], "silent": kinds["silent"]}))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
