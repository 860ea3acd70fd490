"""Convert an answer file into the input of a benchmark's server or evaluator.

    python -m llava.eval.submit --benchmark vqav2 --data playground/data/eval/vqav2 --answers merge.jsonl \\
        --output answers_upload/llava-v1.5-7b.json

    vqav2       JSON over all test ids, '' for unanswered ones         EvalAI
    vizwiz      JSON by image, every image answered                    EvalAI
    gqa         predictions for GQA's eval.py
    mmbench     xlsx without images (also mmbench_cn)                  MMBench's server
    mmvet       {id: text}                                             MM-Vet's evaluator
    mme         folder with one text file per task for MME's calculator

The last line of standard output is one JSON document. Loads no model and sends nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llava.eval import cli
from llava.eval.benchmarks import Benchmark, DataError, DataIssue, get_benchmark, list_benchmarks
from llava.eval.benchmarks.base import Submission
from llava.eval.store.atomic import check_output, write_atomically


def build_parser() -> argparse.ArgumentParser:
    data = "; not needed with --questions, gqa and mmvet"
    parser = cli.answer_parser("submit", __doc__, list_benchmarks(), data)
    add = parser.add_argument
    add(
        "--questions",
        type=cli.path_argument,
        help="file that lists the questions to submit (default: the one in --data)",
    )
    note = "file to write, for mme a folder (default: ANSWERS_submission, next to the answers)"
    add("--output", type=cli.path_argument, help=note)
    note = "leave out malformed answer lines instead of stopping (default: stop)"
    add("--skip-invalid", "--skip-damaged", action="store_true", help=note)
    return parser


def write(
    benchmark: Benchmark,
    made: Submission,
    answers: Path,
    output: Path | None = None,
    questions: Sequence[Path] = (),
) -> Path:
    """Write the input of the server to `output`, by default next to the file `answers`; return the path.

    Raises OSError or DataError if that is a folder in place of a file, or the reverse, or would overwrite
    the answers or the questions.
    """
    several = len(made.files) > 1 or benchmark.name == "mme"
    suffix = "" if several else Path(next(iter(made.files), "")).suffix
    output = output or answers.with_name(f"{answers.stem}_submission{suffix}")
    if several and output.is_file():
        raise DataError(f"{output}: a file, expected a folder to write. Give the name of a folder.")
    if not several:
        check_output(output, answers, *questions)
    (output if several else output.parent).mkdir(parents=True, exist_ok=True)
    for name, content in made.files.items():
        write_atomically(output / name if several else output, content)
    return output


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    benchmark = get_benchmark(args.benchmark)
    problems: list[DataIssue] = []
    answers = benchmark.read_answers(args.answers, problems if args.skip_invalid else None)
    if args.questions and not args.questions.is_file():
        raise DataError(f"{args.questions}: no such file")
    data = benchmark.locate(args.data) if args.data else None
    made = benchmark.submission(data, answers, args.questions)
    questions = [args.questions] if args.questions else []
    output = write(benchmark, made, args.answers, args.output, questions)
    warnings = [f"{len(problems)} malformed lines are left out (first: {problems[0]})"] if problems else []
    warnings += made.warnings
    cli.print_warnings(warnings)
    print(f"{made.rows} answers for {made.server}: {output}")
    document = {"benchmark": benchmark.name, "output": str(output), "rows": made.rows, "server": made.server}
    print(json.dumps({**document, "warnings": warnings}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
