"""LLaVA's question loop by its own name and arguments: a door to the engine, for scripts that know it.

    python -m llava.eval.model_vqa_loader --model-path CHECKPOINT --question-file questions.jsonl \\
        --image-folder images --answers-file answers.jsonl --visual_token_num 64 --important_ratio 0.5

Reads a plain question jsonl (no benchmark is needed) and writes the answer file in question order. Chunks
are LLaVA's: contiguous, so that `cat` of the parts is the whole. Stopped at any instant, the same command
goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava import argtypes
from llava.eval import cli
from llava.eval.benchmarks.base import DataIssue, check_questions, read_questions
from llava.eval.store.answer_file import AnswerFile


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.model_vqa_loader",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model-path", dest="model", required=True)
    parser.add_argument("--model-base")
    parser.add_argument("--question-file", type=Path, required=True)
    parser.add_argument("--image-folder", type=Path, required=True)
    parser.add_argument("--answers-file", type=Path, required=True)
    parser.add_argument("--num-chunks", type=argtypes.at_least(1), default=1)
    parser.add_argument("--chunk-idx", type=argtypes.at_least(0), default=0)
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=argtypes.at_least(1), default=128)
    parser.add_argument("--visual_token_num", "--visual-token-num", type=argtypes.tokens)
    parser.add_argument("--important_ratio", "--important-ratio", type=argtypes.ratio)
    parser.add_argument("--method", help="pruning method (default vispruner)")
    cli.add_model_arguments(parser)
    cli.add_asking_arguments(parser)
    return parser


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.chunk_idx >= args.num_chunks:
        parser.error(f"--chunk-idx {args.chunk_idx}: chunks are numbered 0 to {args.num_chunks - 1}")
    model = cli.model_folder(args, parser)
    problems: list[DataIssue] = []
    question_file, image_folder = args.question_file.expanduser(), args.image_folder.expanduser()
    questions = list(read_questions(question_file, image_folder, problems))
    if not questions:
        cli.report_problems(problems)
    for warning in check_questions(args.question_file.name, questions):
        print(f"warning: {warning}", file=sys.stderr)
    try:
        pruner = cli.resolve_pruner(args, args.method, args.visual_token_num, args.important_ratio, model)
        cli.resolve_device(args, model)
        cli.check_conv_mode(args.conv_mode)
    except ValueError as error:
        parser.error(str(error))
    made_by = cli.configuration(args, model, questions, pruner, args.max_new_tokens)
    mine = cli.chunk(questions, args.num_chunks, args.chunk_idx)
    if args.chunk_idx:  # a malformed line is chunk 0's to report, once
        problems.clear()
    with AnswerFile(args.answers_file.expanduser(), mine, made_by, made_by.model) as file:
        if file.missing:
            engine = cli.build_engine(args, cli.load(args, model), args.max_new_tokens)
            from llava.eval.inference.engine import Setting

            problems += engine.run(mine, [Setting("run", pruner, file)]).failures
        file.finalise()
    cli.report_problems(problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
