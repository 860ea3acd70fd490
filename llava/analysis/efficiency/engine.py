"""Measure questions per second of the evaluation engine, compared with one question at a time without reuse.

    python -m llava.analysis.efficiency engine --device cpu --vs baseline
    python -m llava.analysis.efficiency engine --dtype bfloat16 --flips
    python -m llava.analysis.efficiency engine --dummy-model llava-1.5-7b --device cuda --vs baseline

By default --model answers all bundled POPE questions about a few images. With --dummy-model, a model with
random weights answers questions like GQA's, 31 per image with answers of 4 tokens, and the time is
extrapolated to GQA's whole testdev split. Engine and baseline both start from image files and end at answer
texts, which are compared. In every round the engine answers all questions and the baseline its next share of
them, so that the baseline answers each question once in the whole measurement; a rate is the median of
rounds.

--flips counts answers that differ between the engine and the same engine without shared prefixes, one
question at a time (none may differ in float32), for comparison between two batch sizes of the latter, and
between captured graphs (with --compile of compiled layers) and eager stages.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.analysis.efficiency import options
from llava.argtypes import at_least
from llava.paths import BUNDLED_DATA, BUNDLED_MODEL, require_bundled

if TYPE_CHECKING:
    from llava.analysis.efficiency.workload import EngineWorkload

GQA_QUESTIONS, GQA_IMAGES = 12578, 398
CHECKPOINT_GOAL, DUMMY_MODEL_GOAL = 8.0, 10.0  # speedups


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_measuring(parser, repeats=3)
    group = parser.add_argument_group("engine")
    model = group.add_mutually_exclusive_group()
    options.add_dummy_model(model)
    model.add_argument(
        "--model", type=Path, default=BUNDLED_MODEL, help="checkpoint folder (default: the bundled model)"
    )
    group.add_argument(
        "--data", type=Path, default=BUNDLED_DATA / "pope", help="POPE folder (default: the bundled one)"
    )
    group.add_argument(
        "--num-images",
        "--pictures",
        type=at_least(1),
        help="images of a checkpoint's workload (default: 2; former name of the option: --pictures)",
    )
    group.add_argument(
        "--questions", type=at_least(1), help="questions of a dummy model's workload (default: 1000)"
    )
    group.add_argument(
        "--baseline-questions",
        "--plain-questions",
        type=at_least(1),
        help="questions for the baseline (default: all, 24 for a dummy model; "
        "former name of the option: --plain-questions)",
    )
    options.add_dtypes(group)
    options.add_budget(group)
    group.add_argument(
        "--batch-size",
        type=at_least(1),
        help="questions per batch (default: as in an evaluation, by the free memory of the GPU; 64 on a CPU)",
    )
    options.add_runtime(group)
    group.add_argument(
        "--flips", action="store_true", help="count answers that change with sharing and with the batch size"
    )


def check(args: argparse.Namespace) -> None:
    options.check_device(args)
    options.check_runtime(args)
    if args.questions and not args.dummy_model:
        raise ValueError("--questions requires --dummy-model; for a checkpoint use --num-images")
    if args.num_images and args.dummy_model:
        raise ValueError("--num-images requires a checkpoint; for --dummy-model use --questions")
    if args.dummy_model:
        return
    for path, option in ((args.model, "--model or --dummy-model"), (args.data, "--data")):
        if BUNDLED_DATA.parent in path.parents:
            require_bundled(path, option)
    if not (args.model / "config.json").is_file():
        raise ValueError(f"--model {args.model}: no config.json there")
    if not args.data.is_dir():
        raise ValueError(f"--data {args.data}: no such folder")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from llava.analysis.efficiency.timing import machine
    from llava.analysis.efficiency.workload import EngineWorkload
    from llava.model.transformers_compat import attention_of

    with tempfile.TemporaryDirectory() as folder:
        if args.dummy_model:
            load = EngineWorkload.from_dummy_model(args, Path(folder))
        else:
            load = EngineWorkload.from_checkpoint(args)
        if args.no_graphs or args.compile:
            load.model.set_runtime(graphs=False if args.no_graphs else None, compiled=args.compile)
        document: dict[str, Any] = {
            "machine": machine(args.device),
            "model": args.dummy_model or args.model.name,
            "weights": "random" if args.dummy_model else "of the checkpoint",
            "dtype": str(load.model.dtype).removeprefix("torch."),
            "tower_dtype": str(load.model.get_vision_tower().dtype).removeprefix("torch."),
            "kernels": attention_of(load.model.config),
            "tokens": args.tokens,
            "important_ratio": args.ratio,
            "questions": len(load.questions),
            "images": len({question.image for question in load.questions}),
            "runtime": {"graphs": load.model.runtime.graphs, "compiled": load.model.runtime.compiled},
            "batch_size": load.rows_at_once,
            "max_new_tokens": load.decoding.max_new_tokens,
            **_measure(args, load),
        }
        if args.flips:
            document["flip_counts"] = load.flips()
    return document


def _measure(args: argparse.Namespace, load: EngineWorkload) -> dict[str, Any]:
    """Run interleaved rounds of the engine and the baseline."""
    from llava.analysis.efficiency.timing import seconds_of

    count = len(load.questions)
    wanted = min(count, args.baseline_questions or (24 if args.dummy_model else count)) if args.vs else 0
    asked = [load.questions[count * number // wanted] for number in range(wanted)]
    rounds = min(args.repeats, wanted) if args.vs else args.repeats
    for _ in range(args.warmup):
        load.ask()
        load.ask_baseline(asked[:1])
    answers: dict[str, dict[int, str]] = {"engine": {}, "baseline": {}}
    rates: dict[str, list[tuple[float, float | None]]] = {"engine": [], "baseline": []}
    reports = []

    def engine() -> None:
        found, report = load.ask()
        answers["engine"] |= found
        reports.append(report)

    for number in range(rounds):
        share = asked[number::rounds]
        runs: dict[str, tuple[Callable[[], Any], int]] = {"engine": (engine, count)}
        if share:
            runs["baseline"] = (
                lambda share=share: answers["baseline"].update(load.ask_baseline(share)),
                len(share),
            )
        for name in list(runs) if number % 2 == 0 else list(runs)[::-1]:
            function, questions = runs[name]
            wall, busy = seconds_of(function, args.device)
            rates[name].append((questions / wall, questions / busy if busy else None))

    def rate(name: str, which: int = 0) -> float | None:
        found = [one[which] for one in rates[name] if one[which] is not None]
        return round(statistics.median(found), 3) if found else None

    vision = statistics.median(report.vision_seconds / report.images for report in reports)
    other = statistics.median((report.seconds - report.vision_seconds) / count for report in reports)
    document = {
        "questions_per_second": {name: rate(name) for name in rates if rates[name]},
        "rounds": rounds,
        "warmup": args.warmup,
        "vision_seconds_per_image": round(vision, 5),
        "other_seconds_per_question": round(other, 6),
        "protocol": f"{rounds} interleaved rounds, medians; from image files to texts; in every round the "
        f"engine answers all {count} questions in batches of {load.rows_at_once}"
        + (f", the baseline {wanted / rounds:.3g} of {wanted}, one by one" if wanted else ""),
    }
    if args.dummy_model:
        document["extrapolated"] = {
            "questions": GQA_QUESTIONS,
            "images": GQA_IMAGES,
            "seconds": round(vision * GQA_IMAGES + other * GQA_QUESTIONS, 2),
            "from_questions": count,
        }
    if args.vs:
        document["speedup"] = round(rate("engine") / rate("baseline"), 3)
        if rate("engine", 1) and rate("baseline", 1):
            document["speedup_processor"] = round(rate("engine", 1) / rate("baseline", 1), 3)
        document["goal"] = DUMMY_MODEL_GOAL if args.dummy_model else CHECKPOINT_GOAL
        document |= load.agreement(asked, answers["engine"], answers["baseline"])
        if args.dummy_model:
            document["extrapolated"]["baseline_seconds"] = round(GQA_QUESTIONS / rate("baseline"), 1)
    return document


def render(document: dict[str, Any]) -> str:
    columns = {
        "variant": lambda row: row[0],
        "questions/s": lambda row: row[1],
        "ms/question": lambda row: 1000 / row[1],
    }
    lines = [
        f"Engine: {document['model']} ({document['weights']} weights), {document['dtype']}, "
        f"{document['tokens']} tokens, on {document['machine']['name']}\n{document['protocol']}",
        options.table(columns, list(document["questions_per_second"].items())),
        f"engine: {1000 * document['vision_seconds_per_image']:.4g} ms of vision per image, "
        f"{1000 * document['other_seconds_per_question']:.4g} ms of everything else per question",
    ]
    if "speedup" in document:
        lines.append(
            "speedup {speedup:.3g} (goal {goal:g}); {flips} of {answers_compared} answers differ from the "
            "baseline, {flips_in_images_with_equal_tokens} of them about the {images_with_equal_tokens} of "
            "{images_compared} images with equal kept tokens;\n"
            "{flips_against_one_at_a_time_with_equal_tokens} differ from answers to one question at a time "
            "with the engine's tokens".format_map(document)
        )
    if "extrapolated" in document:
        found = document["extrapolated"]
        baseline = f", baseline {found['baseline_seconds']:.0f} s" if "baseline_seconds" in found else ""
        lines.append(
            f"extrapolated to GQA's testdev ({found['questions']} questions, {found['images']} images): "
            f"{math.ceil(found['seconds'])} s{baseline}"
        )
    if "flip_counts" in document:
        counts = (f"{name.replace('_', ' ')} {count}" for name, count in document["flip_counts"].items())
        lines.append(f"answers that change: {', '.join(counts)}")
    return "\n".join(lines)
