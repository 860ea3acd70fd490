"""LLaVA's question loop under its own name and arguments: a wrapper around the engine.

    python -m llava.eval.model_vqa_loader --model-path CHECKPOINT --question-file questions.jsonl \\
        --image-folder images --answers-file answers.jsonl --temperature 0 --conv-mode vicuna_v1 \\
        --visual_token_num 64 --important_ratio 0.5

Reads a plain question jsonl (no benchmark is needed) and writes the answer file in question order. Chunks are
LLaVA's: contiguous, so that `cat` of the chunks is the whole. Rerunning the same command resumes. Defaults
are LLaVA's, so that answers are sampled unless --temperature 0 is given.
"""

from __future__ import annotations

if not __package__:  # run by its path, as in LLaVA's documents: import this repository
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava import argtypes
from llava.eval import cli
from llava.eval.benchmarks import Benchmark, DataError, DataIssue, Question
from llava.eval.benchmarks.base import check_questions, read_questions
from llava.eval.jobs.execute import answer_chunk
from llava.eval.jobs.job import Task
from llava.eval.jobs.session import Session
from llava.eval.store.run_record import FAILURES, beside
from llava.model.checkpoint.config import stored_config

TEMPERATURE = 0.2  # LLaVA's default


def build_parser(
    command: str = "model_vqa_loader",
    description: str = __doc__,
    conv_mode: str | None = "llava_v1",
    max_new_tokens: int = 128,
) -> argparse.ArgumentParser:
    """Return the parser of a command that asks the questions of a file, with the defaults of LLaVA's."""
    parser = cli.new_parser(command, description)
    add, count = parser.add_argument, argtypes.at_least(1)
    add("--question-file", type=cli.path_argument, required=True, help="questions to ask")
    add("--image-folder", type=cli.user_path, default=Path("."), help="of their images (default: .)")
    add("--answers-file", type=cli.path_argument, required=True, help="file to write, or to complete")
    add("--num-chunks", type=count, default=1, help="number of parts of the questions (default: 1)")
    add("--chunk-idx", type=argtypes.at_least(0), default=0, help="part to answer (default: 0)")
    cli.add_failure_arguments(parser)
    add_llava_arguments(parser, conv_mode, max_new_tokens)
    return parser


def add_llava_arguments(parser: argparse.ArgumentParser, conv_mode: str | None, max_new_tokens: int) -> None:
    """Add the model, its pruning and how it answers, under LLaVA's and VisPruner's names."""
    add, count = parser.add_argument, argtypes.at_least(1)
    add("--model-path", dest="model", required=True, help="checkpoint folder or Hugging Face name")
    add("--model-base", help="base checkpoint of a LoRA or projector-only folder")
    length = f"tokens per answer (default: {max_new_tokens})"
    add("--max_new_tokens", "--max-new-tokens", type=count, default=max_new_tokens, help=length)
    budget = "visual tokens to keep per crop, or none (default: VISPRUNER_TOKENS, else config.json, else all)"
    add("--visual_token_num", "--visual-token-num", type=argtypes.tokens, metavar="N|none", help=budget)
    share = "share selected by [CLS] attention (default: 0.5)"
    add("--important_ratio", "--important-ratio", type=argtypes.ratio, help=share)
    add("--method", help="pruning method (default: vispruner)")
    cli.add_model_arguments(parser)
    cli.add_inference_arguments(parser, TEMPERATURE, conv_mode)


def answer(
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    questions: Sequence[Question],
    issues: list[DataIssue],
    benchmark: Benchmark | None = None,
    warnings: Sequence[str] = (),
) -> int:
    """Answer a chunk of the questions into the answers file; return the exit code.

    Args:
        issues: Lines of the question file that cannot be used.
        benchmark: Opens the images, if they are not plain files.
        warnings: Printed with those about the questions and the model.
    """
    if args.chunk_idx >= args.num_chunks:
        parser.error(f"--chunk-idx {args.chunk_idx}: chunks are numbered 0 to {args.num_chunks - 1}")
    if args.answers_file.is_dir():
        parser.error(f"--answers-file {args.answers_file}: a folder. Give the name of a file in it")
    model = cli.model_folder(args, parser, "--model-path")
    if not questions:
        cli.report_issues(issues)
    found = [*warnings, *check_questions(args.question_file.name, questions)]
    try:
        config = stored_config(model, args.model_base)
        pruner, anyres = cli.pruner_of(args, config)
        job = cli.job_of(args, model, config, anyres)
    except ValueError as error:
        parser.error(str(error))
    if job.temperature:
        what = f"--temperature {job.temperature:g}: answers are sampled"
        found.append(f"{what}. Published numbers use --temperature 0")
    cli.print_warnings([*found, *job.warnings])
    size = -(-len(questions) // args.num_chunks)
    chunk = questions[args.chunk_idx * size : (args.chunk_idx + 1) * size]
    if args.chunk_idx:  # chunk 0 reports malformed lines, once
        issues = []
    session, task = Session(job, max_failures=args.max_failures), Task(questions, issues, benchmark)
    command = cli.command_of(parser, args)
    failures = answer_chunk(session, task, chunk, pruner, args.answers_file, command)
    cli.report_issues(failures, where=str(beside(args.answers_file, FAILURES)))
    return 1 if failures else 0


def read_plain(args: argparse.Namespace, issues: list[DataIssue]) -> list[Question]:
    """Return the questions of LLaVA's jsonl. Raises DataError if the file or the image folder is missing."""
    outside = args.allow_outside_images
    questions = list(read_questions(args.question_file, args.image_folder, issues, outside))
    check_image_folder(args.image_folder, questions)
    return questions


def check_image_folder(folder: Path, questions: Sequence[Question]) -> None:
    """Raise DataError if there are images and their folder does not exist."""
    if not folder.is_dir() and any(question.image is not None for question in questions):
        raise DataError(f"{folder}: no such folder. Set --image-folder to the folder of the images.")


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    issues: list[DataIssue] = []
    return answer(args, parser, read_plain(args, issues), issues)


if __name__ == "__main__":
    sys.exit(main())
