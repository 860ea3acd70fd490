"""Score answers to the video sets that another program generated; no model of this package takes videos yet.

    python -m llava.eval.video --benchmark msvd --answers merge.jsonl --data playground/data/eval
    python -m llava.eval.video --benchmark msvd --tokens 227 --ratio 0.5 --judge gpt-3.5-turbo

Without --answers, answers.jsonl or merge.jsonl in OUTPUT_DIR/BENCHMARK/MODEL/SETTING is used, and score.json,
which the tables read, is written next to it. The score is that of a judge (`llava.eval.judge`): --judge asks
it now, and replies stored next to the answers are used as well; without replies only the offline matches are
reported. Exit code 2: no answers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llava import argtypes
from llava.eval import cli, judge
from llava.eval.benchmarks import DataError, get_benchmark
from llava.eval.jobs.job import model_name, setting_name
from llava.eval.metrics.scorecard import Scorecard
from llava.eval.score import print_score

VIDEO = ("activitynet", "msrvtt", "msvd", "tgif")
NAMES = ("answers.jsonl", "merge.jsonl")


def build_parser() -> argparse.ArgumentParser:
    data, answers = ", or of all benchmarks (required to score)", " (default: found by the setting)"
    parser = cli.answer_parser("video", __doc__, VIDEO, data, answers)
    add = parser.add_argument
    add("--tokens", type=argtypes.tokens, help="token budget of the answers, or none (default: none)")
    add("--ratio", type=argtypes.ratio, default=0.5, help="r of their setting (default: 0.5)")
    add("--method", default="vispruner", help="their pruning method (default: vispruner)")
    add("--model", default="Video-LLaVA-7B", help="their checkpoint, or its name (default: %(default)s)")
    add("--output-dir", type=Path, default=Path("outputs"), help="results folder (default: outputs)")
    add("--judge", help="judge model to ask at OPENAI_BASE_URL (default: use stored replies)")
    return parser


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    from llava.pruning import get_pruner

    parser = build_parser()
    args = parser.parse_args(argv)
    benchmark = get_benchmark(args.benchmark)
    full = args.tokens in (None, "none") or args.method == "none"
    try:
        pruner = get_pruner("none") if full else get_pruner(args.method, args.tokens, args.ratio)
    except ValueError as error:
        parser.error(str(error))
    setting = {"model": model_name(args.model), "setting": setting_name(pruner)}
    folder = args.output_dir.joinpath(benchmark.name, *setting.values())
    answers = args.answers or next((folder / one for one in NAMES if (folder / one).is_file()), None)
    if answers is None:
        print(
            f"error: {benchmark.title}: no model of this package takes videos yet, and {folder} has no "
            f"answers ({' or '.join(NAMES)}). Put answers there, or pass --answers.",
            file=sys.stderr,
        )
        return 2
    if args.data is None:
        raise DataError(
            f"{benchmark.title} is not bundled. Set --data (DATA_DIR) to the folder above {benchmark.folder}."
        )
    data = benchmark.locate(args.data)
    if args.judge:
        given = ["--benchmark", args.benchmark, "--data", str(data), "--answers", str(answers)]
        if code := judge.main([*given, "--model", args.judge]):
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


if __name__ == "__main__":
    sys.exit(main())
