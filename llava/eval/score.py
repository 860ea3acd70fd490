"""Score an answer file of any origin in LLaVA's format.

    python -m llava.eval.score --benchmark pope --data playground/data/eval/pope --answers answers.jsonl

Prints the details and, as the last line of standard output, {"benchmark", "score", "empty", "unreadable",
"details"}; `empty` and `unreadable` count the answers without text, and those that the official rule does not
read as a person would. Answers that are all empty are an error. The score reproduces the official scorer,
including its bugs; warnings (on standard error and in the details) report where a bug applies, and `--fixed`
works around it. Loads no model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from llava.eval import cli
from llava.eval.benchmarks import get_benchmark, list_benchmarks
from llava.eval.metrics.scorecard import Scorecard


def build_parser() -> argparse.ArgumentParser:
    parser = cli.answer_parser("score", __doc__, list_benchmarks())
    rule = parser.add_mutually_exclusive_group()
    rule.add_argument("--strict", dest="fixed", action="store_false", help="use the official rule (default)")
    rule.add_argument("--fixed", action="store_true", help="work around known bugs of the official rule")
    parser.set_defaults(fixed=False)
    return parser


def print_score(document: dict[str, Any]) -> None:
    """Print the details of a score's document to standard output, and its warnings to standard error."""
    for name in ("empty", "unreadable"):
        if document.get(name) is not None:
            print(f"{name:<12} {document[name]}")
    for name, value in document["details"].items():
        if name == "warnings":
            continue
        if isinstance(value, dict):
            value = "  ".join(f"{key} {_short(part)}" for key, part in value.items())
        print(f"{name:<12} {_short(value)}")
    cli.print_warnings(document["details"]["warnings"])


def _short(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "-" if value is None else str(value)


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    benchmark = get_benchmark(args.benchmark)
    data, answers = benchmark.locate(args.data), benchmark.read_answers(args.answers)
    score = benchmark.score(data, answers, fixed=args.fixed)
    score.warnings = Scorecard.of(score, answers).details["warnings"]  # also of several runs in one file
    document = score.document()
    print_score(document)
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
