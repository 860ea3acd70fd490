"""Score POPE answers under LLaVA's name and arguments: a wrapper of the POPE benchmark.

    python llava/eval/eval_pope.py --annotation-dir pope/coco --question-file pope/llava_pope_test.jsonl \\
        --result-file answers.jsonl

Prints the counts and metrics of every category and the average F1 score, which papers report. The result is
that of the official scorer, with warnings where its bugs apply (see `llava.eval.score`).
"""

from __future__ import annotations

if not __package__:  # run by its path, as in LLaVA's scripts: import this repository
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[2])

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.eval import cli
from llava.eval.benchmarks import DataError
from llava.eval.benchmarks.pope import CATEGORIES, OUTCOMES, Pope

_METRICS = {
    "Accuracy": "accuracy",
    "Precision": "precision",
    "Recall": "recall",
    "F1 score": "f1",
    "Yes ratio": "yes_ratio",
}
_ROW = ("f1", "accuracy", "precision", "recall", "yes_ratio")


class PopeFiles(Pope):
    """POPE with its files named one by one."""

    def __init__(self, annotations: Path, questions: Path) -> None:
        self.paths = [questions, *(annotations / f"coco_pope_{category}.json" for category in CATEGORIES)]

    def truth_paths(self, data: Path) -> list[Path]:
        return self.paths


def print_category(category: str, found: dict[str, Any]) -> None:
    """Print the lines of one category as LLaVA does."""
    print(f"Category: {category}, # samples: {found['n']}")
    print("\t".join(OUTCOMES))
    print("\t".join(str(found[name]) for name in OUTCOMES))
    if found["f1"] is not None:
        for title, name in _METRICS.items():
            print(f"{title}: {found[name]}")
        print(", ".join(f"{found[name]:.3f}" for name in _ROW))
    print("====================================")


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.new_parser("eval_pope", __doc__)
    add = parser.add_argument
    note = "folder of coco_pope_{adversarial,popular,random}.json"
    add("--annotation-dir", type=cli.path_argument, required=True, help=note)
    add("--question-file", type=cli.path_argument, required=True, help="LLaVA's question jsonl")
    add("--result-file", type=cli.path_argument, required=True, help="answers")
    args = parser.parse_args(argv)
    if not args.annotation_dir.is_dir():
        raise DataError(f"{args.annotation_dir}: no such folder. Set --annotation-dir to the label files.")
    benchmark = PopeFiles(args.annotation_dir, args.question_file)
    for path in benchmark.paths:
        if not path.is_file():
            raise DataError(f"{path}: no such file. It is needed to score POPE.")
    answers = benchmark.read_answers(args.result_file)
    score = benchmark.score(args.annotation_dir, answers)
    for category in CATEGORIES:
        if category in score.details:
            print_category(category, score.details[category])
    cli.print_score_warnings(score)
    if score.details["mean_f1"] is None:
        print("error: the average F1 score is undefined, see the warnings", file=sys.stderr)
        return 1
    print(f"Average F1 score: {score.details['mean_f1']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
