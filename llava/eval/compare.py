"""Compare two answer files to the same questions: is A better than B?

    python -m llava.eval.compare A.jsonl B.jsonl --benchmark pope --data playground/data/eval/pope
    python -m llava.eval.compare outputs/pope/llava-tiny/vispruner-r0.5-64 outputs/pope/llava-tiny/random-64

Prints both scores, the difference with its 95% paired bootstrap interval over images, how many questions one
file answers better than the other, and the exact two-sided test of those counts: McNemar's, or the sign test
where question scores are graded (VQA accuracy). The test takes questions as independent. Questions of one
image are not, so where the two disagree the interval is more careful. Among many comparisons some are
significant by chance. Answers are joined by id, as with `--fixed` in the other commands, and read by the
official rule; `empty` and `unreadable` are counted as there. The last line of standard output is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava import argtypes, paths
from llava.eval import cli
from llava.eval.benchmarks import DataError, benchmark_name, get_benchmark, list_benchmarks
from llava.eval.benchmarks.joining import is_empty
from llava.eval.metrics.comparison import compare, other_prompts
from llava.eval.metrics.scorecard import NAME, Scorecard
from llava.eval.store.atomic import check_output, write_atomically
from llava.table import csv_text, text_table


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser("compare", __doc__)
    add = parser.add_argument
    add("a", metavar="A", type=Path, help="answer file, or the folder that contains it")
    add("b", metavar="B", type=Path, help="answer file, or the folder that contains it")
    note = "benchmark of both files (default: by the score.json beside A or B)"
    add("--benchmark", type=benchmark_name, choices=list_benchmarks(), help=note)
    cli.add_data_argument(parser)
    note = "list the first N differing questions for each side (default: 10)"
    add("--show", "--flips", type=argtypes.at_least(0), default=10, metavar="N", help=note)
    add("--output", type=cli.path_argument, help="write a CSV of all questions there")
    cli.add_bootstrap_argument(parser)
    add("--seed", type=int, default=0, help="seed of the bootstrap (default: 0)")
    return parser


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    files = [inside if (inside := path / "answers.jsonl").is_file() else path for path in (args.a, args.b)]
    benchmark = get_benchmark(args.benchmark or _benchmark_of(files))
    if args.output:
        check_output(args.output, *files)
    data = args.data or paths.require_bundled(paths.BUNDLED_DATA, "--data (DATA_DIR)") / benchmark.folder
    cli.announce_bundled(False, args.data is None)
    answers = [benchmark.read_answers(path) for path in files]
    data = benchmark.locate(data)
    found = compare(benchmark, data, *answers, args.bootstrap_iters, args.seed)
    for side, rows in zip("AB", answers, strict=True):
        cli.print_warnings([f"{side}: {warning}" for warning in benchmark.join(data, rows).warnings])
    if other := other_prompts(*answers):
        cli.print_warnings(
            [f"{other} questions of A have a different prompt in B: another prompt, or another release"]
        )
    better = {"a": found.better_a, "b": found.better_b}
    document = {
        "benchmark": benchmark.name,
        "unit": benchmark.unit,
        "questions": len(found.pairs),
        "images": found.difference.images,
        **{
            side: {
                "answers_file": str(path),
                "answers": str(path),
                "score": score,
                "empty": sum(map(is_empty, rows)),
                "unreadable": benchmark.unreadable(data, rows),
            }
            for side, path, score, rows in zip(
                "ab", files, (found.score_a, found.score_b), answers, strict=True
            )
        },
        **found.difference.document(),
        "flips": len(found.pairs) - found.ties,
        "better_a": len(found.better_a),
        "better_b": len(found.better_b),
        "ties": found.ties,
        "alike": found.ties,  # its name in earlier versions
        "test": "mcnemar" if found.binary else "sign",
        "p": found.p_value,
        "differing": {
            side: [
                {"question": a.key, "image": a.image, "a": a.value, "b": b.value}
                for a, b in pairs[: args.show]
            ]
            for side, pairs in better.items()
        },
    }
    print(f"{benchmark.title}: {document['questions']} questions, {document['images']} images")
    rows = [
        [
            side.upper(),
            f"{document[side]['score']:.2f}",
            str(len(better[side])),
            *(str(document[side][name]) for name in ("empty", "unreadable")),
            _made_by(rows[0]),
        ]
        for side, rows in zip("ab", answers, strict=True)
    ]
    print(text_table(["", benchmark.metric, "better answers", "empty", "unreadable", "made by"], rows))
    _print_difference(document)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        table = [[a.key, a.image, a.value, b.value, a.value - b.value] for a, b in found.pairs]
        write_atomically(args.output, csv_text(["question", "image", "a", "b", "difference"], table))
    print(json.dumps(document))
    return 0


def _benchmark_of(files: list[Path]) -> str:
    """Return the benchmark named by the score.json beside these files. Raises DataError."""
    cards = [path.with_name(NAME) for path in files]
    found = {Scorecard.read(card).benchmark for card in cards if card.is_file()}
    known = list_benchmarks()
    if len(found) != 1:
        named = f"the score.json files name {', '.join(sorted(found))}"
        raise DataError(
            f"benchmark of A and B unknown: {named if found else f'there is no {NAME} beside them'}. Set "
            f"--benchmark to one of {', '.join(known)}"
        )
    return found.pop()


def _made_by(row: Any) -> str:
    """Return the setting recorded in an answer, if any."""
    metadata = row.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    parts = [metadata.get(key) for key in ("model", "method", "tokens", "important_ratio")]
    return " ".join(str(part) for part in parts if part is not None)


def _print_difference(found: dict[str, Any]) -> None:
    verdict = "significant" if found["significant"] else "not significant"
    test = "McNemar" if found["test"] == "mcnemar" else "sign test"
    print(
        "\nA - B: {difference:+.2f} [{ci_low:+.2f}, {ci_high:+.2f}], 95% paired bootstrap over images: {0}\n"
        "{1}, exact: {better_a} against {better_b}, {ties} ties: p = {p:.3g}".format(verdict, test, **found)
    )
    for side, shown in found["differing"].items():
        if shown:
            total = found[f"better_{side}"]
            print(f"\nbetter in {side.upper()}, the first {len(shown)} of {total}:")
        for one in shown:
            print("  {question}  {image}  A {a:.2g}  B {b:.2g}".format(**one))


if __name__ == "__main__":
    sys.exit(main())
