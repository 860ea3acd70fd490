"""Score answers to the video sets that were made elsewhere: no model here takes videos yet.

    python -m llava.eval.video --benchmark msvd --answers merge.jsonl --data playground/data/eval
    python -m llava.eval.video --benchmark msvd --tokens 227 --ratio 0.5 --judge gpt-3.5-turbo

Without --answers they are looked for where the other benchmarks have theirs, as answers.jsonl or merge.jsonl
in OUTPUT_DIR/BENCHMARK/MODEL/SETTING; what lies there gets a score.json, which the tables read. The number is
a judge's (`llava.eval.judge`, an OpenAI-compatible endpoint): --judge asks it now, replies that lie beside
the answers count as well; without either there are the offline matches alone. Exit code 2: there are no
answers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llava import argtypes
from llava.eval import judge
from llava.eval.benchmarks import DataError, benchmark_name, get_benchmark
from llava.eval.cli import guarded
from llava.eval.jobs.job import model_name, setting_name
from llava.eval.score import print_score
from llava.eval.store.atomic import write_atomically

VIDEO = ("activitynet", "msrvtt", "msvd", "tgif")
NAMES = ("answers.jsonl", "merge.jsonl")
MODEL = "Video-LLaVA-7B"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.video",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--benchmark", required=True, type=benchmark_name, choices=VIDEO)
    parser.add_argument("--data", type=Path, help="folder of the benchmarks, or the benchmark's own")
    parser.add_argument("--answers", type=Path, help="merge.jsonl, an answer file, or judge replies")
    parser.add_argument("--tokens", type=argtypes.tokens, help="setting that the answers were made with")
    parser.add_argument("--ratio", type=argtypes.ratio, default=0.5)
    parser.add_argument("--method", default="vispruner")
    parser.add_argument("--model", default=MODEL, help="checkpoint, or its name (default %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    parser.add_argument("--judge", help="model to judge the answers with, at OPENAI_BASE_URL")
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    benchmark = get_benchmark(args.benchmark)
    from llava.pruning import get_pruner

    full = args.tokens in (None, "none") or args.method == "none"
    try:
        pruner = get_pruner("none") if full else get_pruner(args.method, args.tokens, args.ratio)
    except ValueError as error:
        parser.error(str(error))
    name = model_name(args.model)
    folder = args.output_dir / benchmark.name / name / setting_name(pruner)
    answers = args.answers or next((folder / one for one in NAMES if (folder / one).is_file()), None)
    if answers is None:
        print(
            f"error: {benchmark.title}: no model here takes videos yet, and no answers made elsewhere lie "
            f"in {folder} ({' or '.join(NAMES)}); put them there or name the file",
            file=sys.stderr,
        )
        return 2
    if args.data is None:
        raise DataError(
            f"there is no embedded {benchmark.title}; give --data (DATA_DIR), the folder above "
            f"{benchmark.folder}"
        )
    data = benchmark.locate(args.data.expanduser())
    if args.judge:
        code = judge.main(
            [
                "--benchmark",
                args.benchmark,
                "--data",
                str(data),
                "--answers",
                str(answers),
                "--model",
                args.judge,
            ]
        )
        if code:
            return code
    rows = benchmark.read_answers(answers)
    score = benchmark.score(data, rows)
    document = {**score.document(), "answers": str(answers)}
    if args.tokens is not None or args.answers is None:  # only then it is known how they were made
        settings = {key: value for key, value in pruner.config().items() if key != "seed"}
        document |= {"model": name, **settings, "answered": len(rows)}
    if args.answers is None and score.score is not None:
        write_atomically(folder / "score.json", json.dumps(document, indent=1) + "\n")
    if not args.judge:
        print_score(score)
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
