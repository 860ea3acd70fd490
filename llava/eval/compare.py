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
from llava.eval.benchmarks import DataError, benchmark_name, get_benchmark, list_benchmarks
from llava.eval.benchmarks.files import Row
from llava.eval.metrics.comparison import compare, other_prompts
from llava.eval.metrics.scorecard import NAME, Scorecard
from llava.eval.store.atomic import write_atomically
from llava.eval.tables.table import text_table


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser("compare", __doc__)
    add = parser.add_argument
    add("a", metavar="A", type=Path, help="answer file, or the folder that contains it")
    add("b", metavar="B", type=Path, help="answer file, or the folder that contains it")
    add(
        "--benchmark",
        type=benchmark_name,
        choices=list_benchmarks(),
        help="benchmark of both files (default: by the score.json beside A or B)",
    )
    data = "folder of the benchmark, or the one above it (default: the bundled data)"
    add("--data", type=cli.user_path, help=data)
    add(
        "--show",
        "--flips",
        type=argtypes.at_least(0),
        default=10,
        metavar="N",
        help="list the first N differing questions for each side (default: 10)",
    )
    add("--output", type=Path, help="write a CSV of all questions there")
    add(
        "--bootstrap-iters",
        "--resamples",
        type=argtypes.at_least(100),
        default=2000,
        help="bootstrap iterations (default: 2000)",
    )
    add("--seed", type=int, default=0, help="seed of the bootstrap (default: 0)")
    return parser


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    files = [inside if (inside := path / "answers.jsonl").is_file() else path for path in (args.a, args.b)]
    benchmark = get_benchmark(args.benchmark or _benchmark_of(files))
    data = args.data or paths.require_bundled(paths.BUNDLED_DATA, "--data (DATA_DIR)") / benchmark.folder
    cli.announce_bundled(False, args.data is None)
    answers = [benchmark.read_answers(path) for path in files]
    found = compare(benchmark, benchmark.locate(data), *answers, args.bootstrap_iters, args.seed)
    if other := other_prompts(*answers):
        cli.print_warnings(
            [f"{other} questions of A have a different prompt in B: another prompt, or another release"]
        )
    sides = zip("ab", files, (found.score_a, found.score_b), (found.better_a, found.better_b), strict=True)
    differing, scored = {}, {}
    for side, path, score, better in sides:
        scored[side] = {"answers_file": str(path), "answers": str(path), "score": score}
        differing[side] = [
            {"question": a.key, "image": a.image, "a": a.value, "b": b.value} for a, b in better[: args.show]
        ]
    document = {
        "benchmark": benchmark.name,
        "unit": benchmark.unit,
        "questions": len(found.pairs),
        "images": found.difference.images,
        **scored,
        **found.difference.document(),
        "flips": len(found.better_a) + len(found.better_b),
        "better_a": len(found.better_a),
        "better_b": len(found.better_b),
        "ties": found.ties,
        "alike": found.ties,  # its name in earlier versions
        "test": "mcnemar" if found.binary else "sign",
        "p": found.p_value,
        "differing": differing,
    }
    rows = [
        [side.upper(), f"{document[side]['score']:.2f}", str(document[f"better_{side}"]), _made_by(rows[0])]
        for side, rows in zip("ab", answers, strict=True)
    ]
    table = text_table(["", benchmark.metric, "better answers", "made by"], rows)
    print(_report(document, benchmark.title, table))
    if args.output:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["question", "image", "a", "b", "difference"])
        writer.writerows([a.key, a.image, a.value, b.value, a.value - b.value] for a, b in found.pairs)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output, out.getvalue())
    print(json.dumps(document))
    return 0


def _benchmark_of(files: list[Path]) -> str:
    """Return the benchmark named by the score.json beside these files. Raises DataError."""
    cards = [path.with_name(NAME) for path in files]
    found = {Scorecard.read(card).benchmark for card in cards if card.is_file()}
    if len(found) != 1 or not found <= set(list_benchmarks()):
        names = ", ".join(sorted(map(str, found)))
        reason = f"the score.json files name {names}" if found else f"there is no {NAME} beside them"
        raise DataError(
            f"benchmark of A and B unknown: {reason}. Set --benchmark to one of "
            f"{', '.join(list_benchmarks())}"
        )
    return found.pop()


def _made_by(row: Row) -> str:
    """Return the setting recorded in an answer, if any."""
    metadata = row.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    parts = [metadata.get(key) for key in ("model", "method", "tokens", "important_ratio")]
    return " ".join(str(part) for part in parts if part is not None)


def _report(found: dict[str, Any], title: str, table: str) -> str:
    """Return what is printed above the JSON document."""
    lines = [
        f"{title}: {found['questions']} questions, {found['images']} images\n{table}\n",
        f"A - B: {found['difference']:+.2f} [{found['ci_low']:+.2f}, {found['ci_high']:+.2f}], 95% paired "
        f"bootstrap over images: {'significant' if found['significant'] else 'not significant'}",
        f"{'McNemar' if found['test'] == 'mcnemar' else 'sign test'}, exact: {found['better_a']} against "
        f"{found['better_b']}, {found['ties']} ties: p = {found['p']:.3g}",
    ]
    for side, shown in found["differing"].items():
        if shown:
            total = found[f"better_{side}"]
            lines.append(f"\nbetter in {side.upper()}, the first {len(shown)} of {total}:")
            lines += ["  {question}  {image}  A {a:.2g}  B {b:.2g}".format(**one) for one in shown]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
