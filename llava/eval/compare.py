"""Is A better than B? A paired test between two answer files to the same questions.

    python -m llava.eval.compare A.jsonl B.jsonl --benchmark pope --data playground/data/eval/pope
    python -m llava.eval.compare outputs/pope/llava-tiny/vispruner-r0.5-64 outputs/pope/llava-tiny/random-64

The benchmark may be left out where a score.json lies beside one of the files, as after the scripts.
Prints both scores, the difference with its 95% paired bootstrap interval over pictures, how many questions
one answers better than the other (flips, where an answer is right or wrong), and the exact two-sided test of
those: McNemar's, or the sign test where marks are graded (VQA accuracy). The test takes questions as
independent; questions of one picture are not, so where the two disagree the interval is the more careful. Of
many comparisons some separate by chance. Answers are joined by id (`--fixed` in the other commands).
`--output FILE.csv` keeps every question. The last line of standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava import argtypes, paths
from llava.eval import cli
from llava.eval.benchmarks import (
    Benchmark,
    DataError,
    QuestionScore,
    benchmark_name,
    get_benchmark,
    list_benchmarks,
)
from llava.eval.metrics.statistics import Difference, paired_bootstrap
from llava.eval.store.atomic import write_atomically


@dataclass(frozen=True)
class Comparison:
    """Two answer files over the same questions; scores in the benchmark's units, marks in [0, 1]."""

    score_a: float
    score_b: float
    difference: Difference
    pairs: list[tuple[QuestionScore, QuestionScore]]  # of every question

    @property
    def better_a(self) -> list[tuple[QuestionScore, QuestionScore]]:
        """Questions that A answers better."""
        return [pair for pair in self.pairs if pair[0].value > pair[1].value]

    @property
    def better_b(self) -> list[tuple[QuestionScore, QuestionScore]]:
        """Questions that B answers better."""
        return [pair for pair in self.pairs if pair[1].value > pair[0].value]

    @property
    def binary(self) -> bool:
        """True if every answer is right or wrong; then differences are flips and the test is McNemar's."""
        return all(mark.value in (0, 1) for pair in self.pairs for mark in pair)

    @property
    def p_value(self) -> float:
        """Two-sided, exact."""
        return exact_test(len(self.better_a), len(self.better_b))


def exact_test(a: int, b: int) -> float:
    """Two-sided p of `a` against `b` discordant pairs if both directions are as likely: exact binomial.

    2 x P(X <= min(a, b)), X ~ Binomial(a + b, 1/2), at most 1; exact integers until one division, so that
    no number of pairs is too large. 1.0 without discordant pairs. Raises ValueError for negative counts.
    """
    if a < 0 or b < 0:
        raise ValueError(f"counts of pairs cannot be negative: {a}, {b}")
    number, tail, term = a + b, 0, 1
    for successes in range(min(a, b) + 1):  # term = comb(number, successes), each from the one before
        tail += term
        term = term * (number - successes) // (successes + 1)
    return min(1.0, 2 * tail / 2**number)


def compare(
    benchmark: Benchmark,
    data: Path,
    a: list[dict[str, Any]],
    b: list[dict[str, Any]],
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Answers `a` and `b` (rows of `Benchmark.read_answers`) question by question.

    Raises DataError if they are not about the same questions and pictures.
    """
    _same(
        {row["question_id"] for row in a if "question_id" in row},
        {row["question_id"] for row in b if "question_id" in row},
        "question_id",
    )
    marks_a, marks_b = ({mark.key: mark for mark in benchmark.question_scores(data, rows)} for rows in (a, b))
    _same(set(marks_a), set(marks_b), "question")
    if not marks_a:
        raise DataError(f"{benchmark.title}: no answer matches the ground truth in {data}")
    tallies_a, tallies_b = benchmark.per_image_counts(data, a), benchmark.per_image_counts(data, b)
    try:
        difference = paired_bootstrap(tallies_a, tallies_b, benchmark.score_counts, resamples, seed)
    except ValueError as error:
        raise DataError(str(error)) from error
    whole_a, whole_b = (float(benchmark.score_counts(one.counts.sum(0))) for one in (tallies_a, tallies_b))
    return Comparison(whole_a, whole_b, difference, [(mark, marks_b[key]) for key, mark in marks_a.items()])


def _same(a: set[Any], b: set[Any], what: str) -> None:
    if a == b:
        return
    only_a, only_b = (sorted(rest, key=str) for rest in (a - b, b - a))
    example = (only_a or only_b)[0]
    raise DataError(
        f"A and B answer different questions: {len(only_a)} only in A, {len(only_b)} only in B, {len(a & b)} "
        f"in both, e.g. {what} {example!r} only in {'A' if only_a else 'B'}. A paired test wants answers to "
        "the same questions: finish both runs, or run both with the same --limit"
    )


def other_prompts(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> int:
    """How many (question_id, prompt) pairs of A are not in B: another prompt, or another release."""
    pairs_a, pairs_b = (
        {(row.get("question_id"), row["prompt"]) for row in rows if "prompt" in row} for rows in (a, b)
    )
    return len(pairs_a - pairs_b) if pairs_a and pairs_b else 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", type=Path, help="answer file, or the folder that holds it")
    parser.add_argument("b", metavar="B", type=Path, help="answer file, or the folder that holds it")
    parser.add_argument(
        "--benchmark",
        type=benchmark_name,
        choices=list_benchmarks(),
        help="default: what the score.json beside A or B says",
    )
    parser.add_argument("--data", type=Path, help="the benchmark's own folder; default: the embedded one")
    parser.add_argument(
        "--flips",
        type=argtypes.at_least(0),
        default=10,
        help="how many differing questions to list for each side (default %(default)s)",
    )
    parser.add_argument("--output", type=Path, help="CSV of all questions")
    parser.add_argument("--resamples", type=argtypes.at_least(100), default=2000, help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    return parser


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    files = [inside if (inside := path / "answers.jsonl").is_file() else path for path in (args.a, args.b)]
    benchmark = get_benchmark(args.benchmark or _benchmark_beside(files))
    cli.announce_embedded(False, args.data is None)
    given = paths.BUNDLED_DATA / benchmark.folder if args.data is None else args.data.expanduser()
    data = benchmark.locate(given)
    rows_a, rows_b = (benchmark.read_answers(path) for path in files)
    found = compare(benchmark, data, rows_a, rows_b, args.resamples, args.seed)
    warned = other_prompts(rows_a, rows_b)
    if warned:
        print(
            f"warning: {warned} questions of A were put to B in other words: another prompt, or another "
            "release of the questions",
            file=sys.stderr,
        )
    _print(benchmark, found, [_setting(rows) for rows in (rows_a, rows_b)], args.flips)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output, _csv(found.pairs))
    print(json.dumps(_document(benchmark, found, files, args.flips)))
    return 0


def _benchmark_beside(files: list[Path]) -> str:
    """The benchmark that the score.json beside these answer files names; DataError where none does."""
    found = set()
    for path in files:
        try:
            found.add(json.loads((path.parent / "score.json").read_text(encoding="utf-8"))["benchmark"])
        except (OSError, ValueError, LookupError, TypeError):
            continue
    known = found & set(list_benchmarks())
    if len(found) != 1 or not known:
        names = ", ".join(sorted(map(str, found)))
        said = f"the score.json beside them say {names}" if found else "no score.json beside them"
        raise DataError(
            f"which benchmark do A and B answer? {said}; give --benchmark, one of "
            f"{', '.join(list_benchmarks())}"
        )
    return known.pop()


def _setting(rows: list[dict[str, Any]]) -> str:
    """What made these answers, as far as they say."""
    metadata = rows[0].get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    said = [metadata.get(key) for key in ("model", "method", "tokens", "important_ratio")]
    return " ".join(str(part) for part in said if part is not None)


def _print(benchmark: Benchmark, found: Comparison, settings: list[str], flips: int) -> None:
    gap, both = found.difference, len(found.pairs)
    print(f"{benchmark.title}: {both} questions, {gap.images} pictures")
    print(
        cli.table(
            ["", benchmark.metric, "better answers", "made by"],
            [
                ["A", f"{found.score_a:.2f}", str(len(found.better_a)), settings[0]],
                ["B", f"{found.score_b:.2f}", str(len(found.better_b)), settings[1]],
            ],
        )
    )
    print(
        f"\nA - B: {gap.difference:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}], 95% paired bootstrap over "
        f"pictures: {'separates' if gap.separates else 'does not separate'} A from B"
    )
    name = "McNemar, exact" if found.binary else "sign test, exact"
    print(
        f"{name}: {len(found.better_a)} against {len(found.better_b)}, "
        f"{both - len(found.better_a) - len(found.better_b)} alike: p = {found.p_value:.3g}"
    )
    for which, pairs in (("A", found.better_a), ("B", found.better_b)):
        if pairs and flips:
            print(f"\nbetter in {which}, the first {min(flips, len(pairs))} of {len(pairs)}:")
            for a, b in pairs[:flips]:
                print(f"  {a.key}  {a.image}  A {a.value:.2g}  B {b.value:.2g}")


def _csv(pairs: list[tuple[QuestionScore, QuestionScore]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["question", "image", "a", "b", "difference"])
    writer.writerows([a.key, a.image, a.value, b.value, a.value - b.value] for a, b in pairs)
    return out.getvalue()


def _document(benchmark: Benchmark, found: Comparison, files: list[Path], flips: int) -> dict[str, Any]:
    gap, better_a, better_b = found.difference, len(found.better_a), len(found.better_b)
    listed = {
        which: [{"question": a.key, "image": a.image, "a": a.value, "b": b.value} for a, b in pairs[:flips]]
        for which, pairs in (("a", found.better_a), ("b", found.better_b))
    }
    return {
        "benchmark": benchmark.name,
        "unit": benchmark.unit,
        "questions": len(found.pairs),
        "images": gap.images,
        "a": {"answers": str(files[0]), "score": found.score_a},
        "b": {"answers": str(files[1]), "score": found.score_b},
        "difference": gap.difference,
        "low": gap.low,
        "high": gap.high,
        "separates": gap.separates,
        "flips": better_a + better_b,
        "better_a": better_a,
        "better_b": better_b,
        "alike": len(found.pairs) - better_a - better_b,
        "test": "mcnemar" if found.binary else "sign",
        "p": found.p_value,
        "differing": listed,
    }


if __name__ == "__main__":
    sys.exit(main())
