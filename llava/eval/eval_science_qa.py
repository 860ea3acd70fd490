"""Score ScienceQA answers under LLaVA's name and arguments: a wrapper of the ScienceQA benchmark.

    python -m llava.eval.eval_science_qa --base-dir scienceqa --result-file answers.jsonl \\
        --output-file output.jsonl --output-result result.json

Prints both accuracies. OUTPUT-FILE is a JSON document with one entry per question under "correct" and
"incorrect"; OUTPUT-RESULT has acc, correct, count, and the option and text of every question.
"""

from __future__ import annotations

if not __package__:  # run by its path, as in LLaVA's documents: import this repository
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[2])

import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.eval import cli
from llava.eval.benchmarks import DataError
from llava.eval.benchmarks.files import Row, read_json
from llava.eval.benchmarks.scienceqa import (
    FAILED,
    PROBLEMS,
    SPLITS,
    ScienceQAFull,
    choice_index,
    parse_answer,
    read_split,
    right,
)
from llava.eval.store.atomic import check_output, write_atomically


class ScienceQASplit(ScienceQAFull):
    """ScienceQA with another split than test."""

    def __init__(self, split: str) -> None:
        self.read_truth = functools.partial(read_split, split)  # type: ignore[method-assign]


def documents(truth: Any, answers: dict[str, Row], details: Row) -> tuple[Row, Row]:
    """Return the contents of --output-file and --output-result."""
    analysis: dict[str, list[Row]] = {"correct": [], "incorrect": []}
    result: Row = {
        "acc": details["accuracy"],
        "correct": details["correct"],
        "count": details["count"],
        "results": {},
        "outputs": {},
    }
    for key, entry in truth.items():
        row = answers.get(key, {"text": FAILED, "prompt": "Unknown"})
        letter, prompt = parse_answer(row["text"]), str(row.get("prompt", ""))
        analysis["correct" if right(entry, row) else "incorrect"].append(
            {
                "question_id": key,
                "parsed_ans": letter,
                "ground_truth": chr(ord("A") + int(entry["answer"])),
                "question": prompt,
                "pred": row["text"],
                "is_multimodal": "<image>" in prompt,
            }
        )
        result["results"][key] = choice_index(letter, entry["choices"])
        result["outputs"][key] = row["text"]
    return analysis, result


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.new_parser("eval_science_qa", __doc__)
    add, path = parser.add_argument, cli.path_argument
    add("--base-dir", type=path, required=True, help=f"folder of {PROBLEMS} and {SPLITS}")
    add("--result-file", type=path, required=True, help="answers")
    add("--output-file", type=path, required=True, help="file to write: every question, right or wrong")
    add("--output-result", type=path, required=True, help="file to write: accuracy and results")
    add("--split", default="test", help=f"split of {SPLITS} (default: test)")
    args = parser.parse_args(argv)
    inputs = [args.result_file, *(args.base_dir / name for name in (SPLITS, PROBLEMS))]
    check_output(args.output_file, *inputs)
    check_output(args.output_result, *inputs)
    if os.path.abspath(args.output_file) == os.path.abspath(args.output_result):
        parser.error("--output-file and --output-result are the same file. Give two names")
    for name in (SPLITS, PROBLEMS):
        if not (args.base_dir / name).is_file():
            raise DataError(f"{args.base_dir / name}: no such file. Set --base-dir to its folder.")
    splits = read_json(args.base_dir / SPLITS, dict)
    if args.split not in splits:
        parser.error(
            f"--split {args.split}: not in {args.base_dir / SPLITS}. Choose from {', '.join(splits)}"
        )
    benchmark = ScienceQASplit(args.split)
    answers = benchmark.read_answers(args.result_file)
    score = benchmark.score(args.base_dir, answers)
    rows = benchmark.join(args.base_dir, answers).rows
    analysis, result = documents(benchmark.truth(args.base_dir), rows, score.details)
    for file, document in ((args.output_file, analysis), (args.output_result, result)):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, (json.dumps(document, indent=2) + "\n").encode())
    found = score.details
    line = f"Total: {found['count']}, Correct: {found['correct']}, Accuracy: {found['accuracy']:.2f}%"
    image = found["img_accuracy"]
    print(f"{line}, IMG-Accuracy: {'-' if image is None else f'{image:.2f}%'}")
    cli.print_score_warnings(score)
    return 0


if __name__ == "__main__":
    sys.exit(main())
