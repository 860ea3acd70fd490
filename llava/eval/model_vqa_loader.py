"""LLaVA's question loop under its own name and arguments: a wrapper around the engine.

    python -m llava.eval.model_vqa_loader --model-path CHECKPOINT --question-file questions.jsonl \\
        --image-folder images --answers-file answers.jsonl --visual_token_num 64 --important_ratio 0.5

Reads a plain question jsonl (no benchmark is needed) and writes the answer file in question order. Chunks are
LLaVA's: contiguous, so that `cat` of the chunks is the whole. Rerunning the same command resumes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llava import argtypes
from llava.eval import cli
from llava.eval.benchmarks import DataIssue
from llava.eval.benchmarks.base import check_questions, read_questions
from llava.eval.jobs.execute import Session
from llava.eval.jobs.job import Task, resolve_pruner
from llava.eval.store.answer_file import AnswerFile
from llava.model.checkpoint.config import stored_config


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser("model_vqa_loader", __doc__)
    add, count = parser.add_argument, argtypes.at_least(1)
    add("--model-path", dest="model", required=True)
    add("--model-base")
    for name in ("--question-file", "--image-folder", "--answers-file"):
        add(name, type=Path, required=True)
    add("--num-chunks", type=count, default=1)
    add("--chunk-idx", type=argtypes.at_least(0), default=0)
    add("--max_new_tokens", "--max-new-tokens", type=count, default=128)
    add("--visual_token_num", "--visual-token-num", type=argtypes.tokens)
    add("--important_ratio", "--important-ratio", type=argtypes.ratio)
    add("--method", help="pruning method (default: vispruner)")
    cli.add_model_arguments(parser)
    cli.add_inference_arguments(parser)
    return parser


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.chunk_idx >= args.num_chunks:
        parser.error(f"--chunk-idx {args.chunk_idx}: chunks are numbered 0 to {args.num_chunks - 1}")
    model = cli.model_folder(args, parser)
    issues: list[DataIssue] = []
    questions = list(read_questions(args.question_file.expanduser(), args.image_folder.expanduser(), issues))
    if not questions:
        cli.report_issues(issues)
    warnings = check_questions(args.question_file.name, questions)
    try:
        config = stored_config(model, args.model_base)
        pruner, anyres = resolve_pruner(
            config,
            args.method,
            args.visual_token_num,
            args.important_ratio,
            args.anyres,
            args.seed,
            args.preset,
        )
        job = cli.job_of(args, model, config, anyres)
    except ValueError as error:
        parser.error(str(error))
    cli.print_warnings([*warnings, *job.warnings])
    size = -(-len(questions) // args.num_chunks)
    chunk = questions[args.chunk_idx * size : (args.chunk_idx + 1) * size]
    if args.chunk_idx:  # chunk 0 reports malformed lines, once
        issues.clear()
    task = Task(questions)
    configuration = job.configuration(task, pruner)
    with AnswerFile(args.answers_file.expanduser(), chunk, configuration) as file:
        if file.missing:
            from llava.eval.inference.engine import PassSetting

            issues += Session(job).engine(task).run(chunk, [PassSetting("run", pruner, file)]).failures
        file.finalize()
    cli.report_issues(issues)
    return 1 if issues else 0


if __name__ == "__main__":
    sys.exit(main())
