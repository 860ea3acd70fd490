"""Ask a video set and score the answers, or score answers that another program generated.

    python -m llava.eval.video --benchmark msvd --model CHECKPOINT --data playground/data/eval --tokens 227
    python -m llava.eval.video --benchmark msvd --answers merge.jsonl --data playground/data/eval
    python -m llava.eval.video --benchmark msvd --tokens 227 --ratio 0.5 --judge gpt-3.5-turbo

The first form is `python -m llava.eval.run`, whose options it takes as well: the same engine, answer files
and resumption. Without --model or --data the bundled ones are used. --tokens is the budget of a whole clip.

Answers of another program are scored where --answers names them, and where answers.jsonl or merge.jsonl of
OUTPUT_DIR/BENCHMARK/MODEL/SETTING is one; score.json, which the tables read, is then written next to it.

The score is that of a judge (`llava.eval.judge`): --judge asks it now, and replies stored next to the answers
are used as well; without replies only the offline matches are reported.
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
from llava.eval import cli, judge, run
from llava.eval.benchmarks import DataError, get_benchmark
from llava.eval.jobs.job import model_name, setting_name
from llava.eval.jobs.processes import rank_info
from llava.eval.metrics.scorecard import Scorecard
from llava.eval.score import print_score
from llava.eval.store.shards import ANSWERS
from llava.paths import BUNDLED_CLIPS, BUNDLED_VIDEO_MODEL

VIDEO = ("activitynet", "msrvtt", "msvd", "tgif")
NAMES = (ANSWERS, "merge.jsonl")
_USUAL = "Video-LLaVA-7B"  # whose answers are looked for without --model


def build_parser() -> argparse.ArgumentParser:
    data = ", or of all benchmarks (default: the bundled clips; required to score answers made elsewhere)"
    answers = ", made elsewhere (default: ask the model, or what is found by the setting)"
    parser = cli.answer_parser("video", __doc__, VIDEO, data, answers)
    add = parser.add_argument
    add("--tokens", type=argtypes.tokens, help="token budget of a clip, or none (default: none)")
    add("--ratio", type=argtypes.ratio, default=0.5, help="r of the setting (default: 0.5)")
    add("--method", default="vispruner", help="pruning method (default: vispruner)")
    usual = f"checkpoint (default: the bundled one); of answers made elsewhere its name ({_USUAL})"
    add("--model", help=usual)
    add("--output-dir", type=Path, default=Path("outputs"), help="results folder (default: outputs)")
    add("--output", type=Path, help="folder of a run (default: OUTPUT_DIR/BENCHMARK/MODEL/SETTING)")
    add("--judge", help="judge model to ask at OPENAI_BASE_URL (default: use stored replies)")
    parser.allow_abbrev = False  # --num is an option of run
    parser.epilog = "Further options are those of python -m llava.eval.run, where the model is asked."
    return parser


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    from llava.pruning import get_pruner

    parser = build_parser()
    args, others = parser.parse_known_args(argv)
    benchmark = get_benchmark(args.benchmark)
    full = args.tokens in (None, "none") or args.method == "none"
    try:
        pruner = get_pruner("none") if full else get_pruner(args.method, args.tokens, args.ratio)
    except ValueError as error:
        parser.error(str(error))
    setting = {"model": model_name(args.model or _USUAL), "setting": setting_name(pruner)}
    folder = args.output_dir.joinpath(benchmark.name, *setting.values())
    found = (folder / one for one in NAMES if args.output is None and (folder / one).is_file())
    answers = args.answers or next((one for one in found if not _is_own(one)), None)
    if answers is None:
        name = model_name(args.model or BUNDLED_VIDEO_MODEL)
        return _ask(args, others, args.output or folder.parents[1] / name / folder.name)
    if others:
        parser.error(f"{' '.join(others)}: not used to score {answers}, only to ask a model")
    if args.data is None:
        raise DataError(
            f"{benchmark.title}: {answers} was made elsewhere, and only the benchmark's own files can score "
            f"it. Set --data (DATA_DIR) to the folder above {benchmark.folder}."
        )
    data = benchmark.locate(args.data)
    if args.judge and (code := _judge(args, data, answers)):
        return code
    rows = benchmark.read_answers(answers)
    score = benchmark.score(data, rows)
    document = {**score.document(), "answered": len(rows), "answers_file": str(answers)}
    if args.tokens is not None or args.answers is None:  # otherwise the setting is unknown
        document |= {key: value for key, value in pruner.config().items() if key != "seed"} | setting
    card = Scorecard.of_document(document)
    if args.answers is None and score.score is not None:
        card.write(folder)
    if not args.judge:
        print_score(score.document())
    print(json.dumps({**card.document(), "answers": str(answers)}))
    return 0


def _is_own(path: Path) -> bool:
    """Return True if an answer file begins with an answer of `llava.eval.run`, which can resume it."""
    with path.open("rb") as file:
        line = file.readline(1 << 20)
    try:
        row: Any = json.loads(line)
    except ValueError:  # nothing or the beginning of a line, which a run that was stopped may leave
        return path.name == ANSWERS
    metadata = row.get("metadata") if isinstance(row, dict) else None
    return isinstance(metadata, dict) and "config" in metadata


def _ask(args: argparse.Namespace, others: Sequence[str], folder: Path) -> int:
    """Ask the model, then the judge; score again with its replies."""
    command = ["--benchmark", args.benchmark, f"--output={folder}"]
    command += ["--tokens", str(args.tokens or "none")]
    if args.tokens not in (None, "none"):
        command += ["--method", args.method, "--ratio", str(args.ratio)]
    for option in ("model", "data"):
        if (value := getattr(args, option)) is not None:
            command += [f"--{option}={value}"]
    command += others
    code = run.main(command)
    if not args.judge or code not in (0, 1):
        return code
    if rank_info(os.environ).size > 1 or not (folder / ANSWERS).is_file():
        print("the judge was not asked: run the same command again in one process", file=sys.stderr)
        return code
    benchmark = get_benchmark(args.benchmark)
    data = benchmark.locate(args.data or BUNDLED_CLIPS / benchmark.folder)
    return _judge(args, data, folder / ANSWERS) or run.main(command)


def _judge(args: argparse.Namespace, data: Path, answers: Path) -> int:
    given = ["--benchmark", args.benchmark, "--data", str(data), "--answers", str(answers)]
    return judge.main([*given, "--model", args.judge])


if __name__ == "__main__":
    sys.exit(main())
