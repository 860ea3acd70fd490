"""Compare two answer files to the same questions: is A better than B?

    python -m llava.eval.compare A.jsonl B.jsonl --benchmark pope --data playground/data/eval/pope
    python -m llava.eval.compare outputs/pope/llava-tiny/vispruner-r0.5-64 outputs/pope/llava-tiny/random-64

Without --benchmark, it is read from a score.json beside one of the files. Prints both scores, the difference
with its 95% paired bootstrap interval over images, how many questions one file answers better than the other,
and the exact two-sided test of those counts: McNemar's, or the sign test where question scores are graded
(VQA accuracy). The test takes questions as independent. Questions of one image are not, so where the two
disagree the interval is more careful. Among many comparisons some are significant by chance. Answers are
joined by id (`--fixed` in the other commands). `--output FILE.csv` writes every question. The last line of
standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
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
from llava.eval.metrics.comparison import Comparison, compare, other_prompts
from llava.eval.metrics.scorecard import NAME
from llava.eval.store.atomic import write_atomically
from llava.eval.tables.table import text_table


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser("compare", __doc__)
    parser.add_argument("a", metavar="A", type=Path, help="answer file, or the folder that contains it")
    parser.add_argument("b", metavar="B", type=Path, help="answer file, or the folder that contains it")
    parser.add_argument(
        "--benchmark",
        type=benchmark_name,
        choices=list_benchmarks(),
        help="benchmark of both files (default: by the score.json beside A or B)",
    )
    parser.add_argument(
        "--data", type=Path, help="folder of the benchmark, or the one above it (default: the bundled data)"
    )
    parser.add_argument(
        "--show",
        "--flips",
        type=argtypes.at_least(0),
        default=10,
        metavar="N",
        help="list the first N differing questions for each side (default: 10)",
    )
    parser.add_argument("--output", type=Path, help="write a CSV of all questions there")
    parser.add_argument(
        "--bootstrap-iters",
        "--resamples",
        type=argtypes.at_least(100),
        default=2000,
        help="bootstrap iterations (default: 2000)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: 0)")
    return parser


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    files = [inside if (inside := path / "answers.jsonl").is_file() else path for path in (args.a, args.b)]
    benchmark = get_benchmark(args.benchmark or _benchmark_of(files))
    cli.announce_bundled(False, args.data is None)
    given = paths.BUNDLED_DATA / benchmark.folder if args.data is None else args.data.expanduser()
    rows_a, rows_b = (benchmark.read_answers(path) for path in files)
    found = compare(benchmark, benchmark.locate(given), rows_a, rows_b, args.bootstrap_iters, args.seed)
    other = other_prompts(rows_a, rows_b)
    if other:
        cli.print_warnings(
            [f"{other} questions of A have a different prompt in B: another prompt, or another release"]
        )
    _print(benchmark, found, [_made_by(rows) for rows in (rows_a, rows_b)], args.show)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output, _csv(found.pairs))
    print(json.dumps(_document(benchmark, found, files, args.show)))
    return 0


def _benchmark_of(files: list[Path]) -> str:
    """Return the benchmark named by the score.json beside these files. Raises DataError."""
    found = set()
    for path in files:
        try:
            found.add(json.loads((path.parent / NAME).read_bytes())["benchmark"])
        except (OSError, ValueError, LookupError, TypeError):
            continue
    known = {name for name in found if name in list_benchmarks()}
    if len(found) != 1 or not known:
        names = ", ".join(sorted(map(str, found)))
        reason = f"the score.json files name {names}" if found else f"there is no {NAME} beside them"
        raise DataError(
            f"benchmark of A and B unknown: {reason}. Set --benchmark to one of "
            f"{', '.join(list_benchmarks())}"
        )
    return known.pop()


def _made_by(rows: list[dict[str, Any]]) -> str:
    """Return the setting recorded in the answers, if any."""
    metadata = rows[0].get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    parts = [metadata.get(key) for key in ("model", "method", "tokens", "important_ratio")]
    return " ".join(str(part) for part in parts if part is not None)


def _print(benchmark: Benchmark, found: Comparison, made_by: list[str], show: int) -> None:
    gap, total = found.difference, len(found.pairs)
    better = {"A": found.better_a, "B": found.better_b}
    print(f"{benchmark.title}: {total} questions, {gap.images} images")
    rows = [
        [side, f"{score:.2f}", str(len(better[side])), setting]
        for side, score, setting in zip("AB", (found.score_a, found.score_b), made_by, strict=True)
    ]
    print(text_table(["", benchmark.metric, "better answers", "made by"], rows))
    verdict = "significant" if gap.significant else "not significant"
    print(
        f"\nA - B: {gap.difference:+.2f} [{gap.ci_low:+.2f}, {gap.ci_high:+.2f}], 95% paired bootstrap over "
        f"images: {verdict}"
    )
    print(
        f"{'McNemar' if found.binary else 'sign test'}, exact: {len(found.better_a)} against "
        f"{len(found.better_b)}, {found.ties} ties: p = {found.p_value:.3g}"
    )
    for side, pairs in better.items():
        if pairs and show:
            print(f"\nbetter in {side}, the first {min(show, len(pairs))} of {len(pairs)}:")
            for a, b in pairs[:show]:
                print(f"  {a.key}  {a.image}  A {a.value:.2g}  B {b.value:.2g}")


def _csv(pairs: list[tuple[QuestionScore, QuestionScore]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["question", "image", "a", "b", "difference"])
    writer.writerows([a.key, a.image, a.value, b.value, a.value - b.value] for a, b in pairs)
    return out.getvalue()


def _document(benchmark: Benchmark, found: Comparison, files: list[Path], show: int) -> dict[str, Any]:
    better = {"a": found.better_a, "b": found.better_b}
    listed = {
        side: [{"question": a.key, "image": a.image, "a": a.value, "b": b.value} for a, b in pairs[:show]]
        for side, pairs in better.items()
    }
    scores = (found.score_a, found.score_b)
    sides = {
        side: {"answers_file": str(path), "answers": str(path), "score": score}
        for side, path, score in zip("ab", files, scores, strict=True)
    }
    return {
        "benchmark": benchmark.name,
        "unit": benchmark.unit,
        "questions": len(found.pairs),
        "images": found.difference.images,
        **sides,
        **found.difference.document(),
        "flips": len(better["a"]) + len(better["b"]),
        "better_a": len(better["a"]),
        "better_b": len(better["b"]),
        "ties": found.ties,
        "alike": found.ties,  # its name in earlier versions
        "test": "mcnemar" if found.binary else "sign",
        "p": found.p_value,
        "differing": listed,
    }


if __name__ == "__main__":
    sys.exit(main())
