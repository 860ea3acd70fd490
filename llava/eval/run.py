"""Evaluate one model with one pruning setting on one benchmark.

    python -m llava.eval.run --benchmark pope --model CHECKPOINT --data playground/data/eval \\
        --tokens 64 --ratio 0.5 --method vispruner --output outputs/pope/llava-v1.5-7b/vispruner-64

Answers are appended to OUTPUT/answers.jsonl after each batch; the score is written to OUTPUT/score.json.
Rerunning the same command resumes an interrupted run; a finished run is only scored again. Without --model or
--data the bundled ones are used. The last line of standard output is one JSON document. Exit code: 0 if all
questions were answered, 1 if some could not be, 2 for invalid arguments, 130 if stopped.

Several processes: --num-processes N starts one per GPU on this machine; torchrun, accelerate launch, mpirun
and srun are recognized by their environment variables; --num-chunks N --chunk-idx I sets the shard by hand.
Questions are sharded by image. Process I of N appends to OUTPUT/N_I.jsonl, and the one that finds all
questions answered merges and scores. The next start answers what a failed process left open, with any number
of processes.

--server URL runs the language model on a vLLM server (--enable-mm-embeds); tower, projector and pruning run
here. Its answers are another configuration than local ones, with folders of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava import argtypes
from llava.eval import cli, submit
from llava.eval.benchmarks import DataError, benchmark_name, get_benchmark, list_benchmarks
from llava.eval.jobs import execute, processes
from llava.eval.jobs.execute import SettingRun
from llava.eval.jobs.host import host_class, host_pruning
from llava.eval.jobs.job import Job, Task, check_media, read_task, resolve_pruner, setting_name
from llava.eval.jobs.session import Session, TooManyFailures
from llava.eval.score import print_score
from llava.model.checkpoint.config import stored_config


def build_parser() -> argparse.ArgumentParser:
    parser, count = cli.new_parser("run", __doc__), argtypes.at_least(1)
    parser.add_argument("--benchmark", required=True, type=benchmark_name, choices=list_benchmarks())
    cli.add_source_arguments(parser)
    add = parser.add_argument_group("pruning").add_argument
    add("--method", help="pruning method (default: vispruner, none without --tokens)")
    budget = "visual tokens to keep per crop, of a clip in all; 0 is a blind baseline, none disables pruning "
    budget += "(default: "
    budget += "VISPRUNER_TOKENS, else config.json, else none)"
    add("--tokens", type=argtypes.tokens, metavar="N|none", help=budget)
    add("--ratio", type=argtypes.ratio, help="share selected by [CLS] attention (default: 0.5)")
    share = "share of the visual tokens to keep, above 0, for models of transformers (default: as --tokens)"
    add("--keep", type=argtypes.share, help=share)
    add = parser.add_argument
    add("--output", type=Path, help="folder (default: OUTPUT_DIR/BENCHMARK/MODEL/SETTING)")
    add("--output-dir", type=Path, default=Path("outputs"), help="(default: outputs)")
    add("--submit", action="store_true", help="also write the file that the server takes")
    add = parser.add_argument_group("several processes").add_argument
    launched = "processes to launch, one per GPU (default: 1)"
    add("--num-processes", "--processes", type=count, default=1, help=launched)
    add("--num-chunks", type=count, default=1, help="number of shards (default: 1)")
    add("--chunk-idx", type=argtypes.at_least(0), default=0, help="shard to answer (default: 0)")
    add("--part", action="store_true", help=argparse.SUPPRESS)  # started by --num-processes
    add = parser.add_mutually_exclusive_group().add_argument
    add("--fixed", action="store_true", help="work around known bugs of the official scoring rule")
    add("--strict", dest="fixed", action="store_false", help="use the official rule (default)")
    parser.set_defaults(fixed=False)
    cli.add_clip_argument(parser)
    cli.add_model_arguments(parser)
    cli.add_inference_arguments(parser)
    cli.add_server_arguments(parser)
    return parser


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.part:
        processes.end_with_parent()
    rank = _rank(args, parser)
    quiet = args.part or rank.rank > 0

    def say(text: str) -> None:
        if not quiet:
            print(text, flush=True)

    benchmark = get_benchmark(args.benchmark)
    benchmark.allow_outside = args.allow_outside_images
    if not quiet:
        cli.announce_bundled(cli.is_bundled(args.model), args.data is None)
    model = cli.model_folder(args, parser, hosts=True, media=benchmark.media)
    host = host_class(model)
    task = read_task(benchmark, args.data, args.limit)
    local_rank = rank.local_rank if rank.size > 1 else None
    try:
        if host is not None:
            pruner = host_pruning(args.method, args.tokens, args.ratio, args.keep, args.seed)
            job = cli.host_job(args, model, host, local_rank)
        else:
            job, pruner = _own_job(args, model, parser, local_rank)
    except ValueError as error:
        parser.error(str(error))
    check_media(benchmark, stored_config(model, args.model_base) if host is None else {}, model)
    if args.num_processes > 1 and ":" in job.device:
        parser.error(
            f"--device {job.device}: one GPU for {args.num_processes} processes. List several in "
            "CUDA_VISIBLE_DEVICES"
        )
    if not quiet:
        cli.print_warnings([*task.warnings, *job.warnings])
    if task.partial and not args.fixed:
        say(f"scored as with --fixed, as only {len(task.asked)} questions are evaluated")
    size = max(args.num_processes, rank.size)
    say(
        f"{benchmark.title}: {len(task.asked)} questions, {job.name}, {setting_name(pruner)}, "
        f"{job.conv_mode}, {job.dtype} on {job.device.split(':')[0]}"
        + (f", preset {job.preset}" if job.preset != "exact" else "")
        + (f", {size} processes" if size > 1 else "")
        + (f", language model {job.server_model} at {job.server}" if job.server else "")
    )
    setting = setting_name(pruner) + ("-server" if job.server else "")
    output = args.output or args.output_dir / benchmark.name / job.name / setting
    command = cli.command_of(parser, args, ("num_chunks", "chunk_idx"))
    several = {"size": size, "exclusive": args.num_processes > 1}
    run = SettingRun.open(job, task, pruner, output.expanduser(), **several, command=command)
    answered = len(task.asked) - len(run.missing(task))
    if answered == len(task.asked):
        say("all questions are already answered")
    elif answered:
        say(f"resuming: {answered} of {len(task.asked)} questions are already answered")
    if run.batch_line and answered < len(task.asked):
        say(run.batch_line)

    if not args.part and (rank.rank == 0 or args.num_chunks > 1):
        execute.record_start(task, run, command)
    session, failed = Session(job, max_failures=args.max_failures), 0
    if args.num_processes > 1:
        started = ("llava.eval.run", argv, [run], size, job.device)
        wrong = execute.start_processes(*started) if run.missing(task) else []
        missing, merged = execute.merge(task, run, size)
        if not merged:
            reason = "; ".join(wrong) or "no process answered them"
            print(
                f"error: {missing} of {len(task.asked)} questions have no answer: {reason}. Run the same "
                "command to resume",
                file=sys.stderr,
            )
            return 1
        failed = int(bool(wrong))
    elif rank.size > 1:
        finished = not run.missing(task) and not run.found.elsewhere(run.answers)
        if not finished:
            try:
                execute.answer_share(session, task, [run], rank)
            except TooManyFailures as error:
                if not args.part:
                    raise
                print(f"error: {error}", file=sys.stderr)
                return processes.STOPPED  # ends the other processes as well
        if args.part:
            shard = f"process {rank.rank} of {rank.size}"
            print(f"{shard}: asked {run.generated} questions in {run.seconds:.0f} s", flush=True)
            return 0
        own, seconds = run.generated, run.seconds
        missing, last = 0, False
        if not finished or rank.rank == 0:  # of a finished run, one process puts the answers in order
            missing, last = execute.merge(task, run, size, None if finished else rank.rank)
        if not last:
            path = run.shards.path(rank.rank, rank.size)
            document = {
                "benchmark": benchmark.name,
                "score": None,
                "process": rank.rank,
                "processes": rank.size,
                "generated": own,
                "asked": own,
                "seconds": seconds,
                "missing": missing,
                "answers_file": str(path),
                "answers": str(path),
            }
            print(json.dumps(document), flush=True)
            return 0
    else:
        execute.answer(session, task, [run])
    return max(_finish(args, task, run), failed)


def _own_job(
    args: argparse.Namespace, model: Path | str, parser: argparse.ArgumentParser, local_rank: int | None
) -> tuple[Job, Any]:
    """Return the job and the pruner of a LLaVA checkpoint. Raises ValueError and EndpointError."""
    if args.keep is not None:
        parser.error(f"--keep {args.keep:g}: only for models of transformers. Set --tokens")
    config = stored_config(model, args.model_base)
    given = (args.method, args.tokens, args.ratio, args.anyres, args.seed, args.preset)
    pruner, anyres = resolve_pruner(config, *given)
    job = cli.job_of(args, model, config, anyres, local_rank)
    if args.server is not None:
        return cli.with_server(job, pruner, args.server, args.server_model), pruner
    if args.server_model is not None:
        parser.error(f"--server-model {args.server_model}: there is no --server. Set its address")
    return job, pruner


def _rank(args: argparse.Namespace, parser: argparse.ArgumentParser) -> processes.RankInfo:
    """Return the rank of this process, by --num-chunks and --chunk-idx or by the launcher."""
    if args.chunk_idx >= args.num_chunks:
        parser.error(f"--chunk-idx {args.chunk_idx}: chunks are numbered 0 to {args.num_chunks - 1}")
    try:
        rank = processes.rank_info(os.environ)
    except ValueError as error:
        parser.error(str(error))
    if args.num_chunks > 1:
        rank = processes.RankInfo(args.chunk_idx, args.num_chunks)
    if rank.size > 1 and args.num_processes > 1:
        parser.error(f"--num-processes {args.num_processes}: this is one of {rank.size} processes already")
    return rank


def _finish(args: argparse.Namespace, task: Task, run: SettingRun) -> int:
    """Score, print a table and the JSON document, write the submission; return the exit code."""
    failures = list(dict.fromkeys([*task.issues, *run.failures]))
    cli.report_issues(failures, where=str(run.failures_file))
    extra: dict[str, Any] = {}
    if args.submit and run.answers.is_file():  # before scoring: the server needs no score of ours
        extra["submission"] = None
        try:
            made = task.benchmark.submission(task.folder, task.benchmark.read_answers(run.answers))
            path = submit.write(task.benchmark, made, run.answers)
            extra["submission"] = str(path)
            print(f"{made.rows} answers for {made.server}: {path}")
            cli.print_warnings(made.warnings)
        except DataError as error:
            cli.print_warnings([f"no file for a server: {error}"])
    if not run.answers.is_file():
        print("error: no question could be answered", file=sys.stderr)
        return 1
    card = execute.score(task, run, args.fixed or task.partial, extra=extra).card
    print_score(card.document())
    cli.print_settings(task.benchmark, [card])
    print(json.dumps({**card.document(), "answers": card.answers_file}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
