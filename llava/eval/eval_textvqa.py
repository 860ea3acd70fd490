"""Score TextVQA answers under LLaVA's name and arguments: a wrapper of the TextVQA benchmark.

    python -m llava.eval.eval_textvqa --annotation-file TextVQA_0.5.1_val.json --result-file answers.jsonl
    python -m llava.eval.eval_textvqa --annotation-file TextVQA_0.5.1_val.json --result-dir answers

Prints the number of answers and the accuracy of one file, or of every *.jsonl file in a folder.
"""

from __future__ import annotations

if not __package__:  # run by its path, as in LLaVA's documents: import this repository
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[2])

import sys
from collections.abc import Sequence
from pathlib import Path

from llava.eval import cli
from llava.eval.benchmarks import DataError
from llava.eval.benchmarks.textvqa import TextVQA
from llava.eval.store.run_record import FAILURES


class TextVQAFile(TextVQA):
    """TextVQA with the name of its file of reference answers."""

    def __init__(self, annotations: Path) -> None:
        self.annotations = annotations

    def truth_paths(self, data: Path) -> list[Path]:
        return [self.annotations]


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.new_parser("eval_textvqa", __doc__)
    note = "TextVQA_0.5.1_val.json, the reference answers"
    parser.add_argument("--annotation-file", type=cli.path_argument, required=True, help=note)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--result-file", type=cli.path_argument, help="answers")
    add("--result-dir", type=cli.path_argument, help="folder of answer files")
    args = parser.parse_args(argv)
    if not args.annotation_file.is_file():
        raise DataError(f"{args.annotation_file}: no such file. Set --annotation-file to {note}.")
    files = [args.result_file]
    if args.result_dir is not None:
        if not args.result_dir.is_dir():
            raise DataError(f"{args.result_dir}: no such folder. Set --result-dir to the answers' folder.")
        # Lists of questions without an answer, which the question loops write, are not answers.
        found = sorted(args.result_dir.glob("*.jsonl"))
        files = [path for path in found if not path.name.endswith(FAILURES)]
        if not files:
            raise DataError(f"{args.result_dir}: contains no *.jsonl file. Set --result-dir.")
    benchmark, wrong = TextVQAFile(args.annotation_file), []
    for file in files:
        try:
            score = benchmark.score(args.annotation_file.parent, benchmark.read_answers(file))
        except DataError as error:  # the other files are scored
            if args.result_dir is None:
                raise
            wrong.append(str(error))
            continue
        print(file.stem)
        print(f"Samples: {score.details['samples']}\nAccuracy: {score.score:.2f}%\n", flush=True)
        cli.print_score_warnings(score)
    cli.report_issues(wrong, "files were not scored")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
