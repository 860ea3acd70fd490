"""Questions per second: the evaluation engine against the plain way, one question at a time without reuse.

    python -m llava.analysis.efficiency engine --device cpu --vs plain
    python -m llava.analysis.efficiency engine --dtype bfloat16 --flips
    python -m llava.analysis.efficiency engine --shapes llava-1.5-7b --device cuda --vs plain --questions 1000

Without --shapes: the embedded POPE pictures with all questions about them, asked of --model. Both ways start
at the picture files and end at answer texts, which are compared. In every round the engine asks all
questions and the plain way its next share of them, so that each question is asked once by it in the whole
measurement; a rate is the median over rounds. With --shapes: random weights and a load like GQA's, 31
questions per picture and answers of 4 tokens, extrapolated to the whole of its testdev split.

--flips counts answers that differ: of the engine against the same engine without shared prefixes, one
question at a time (in float32 none may), and as a yardstick of the latter between two batch sizes.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.analysis.efficiency.options import DTYPES, add_budget, add_measuring, check_device, table
from llava.argtypes import at_least
from llava.paths import BUNDLED_DATA, BUNDLED_MODEL

GQA_QUESTIONS, GQA_IMAGES, GQA_PER_IMAGE, GQA_NEW_TOKENS = 12578, 398, 31, 4
GOALS = {"files": 8.0, "shapes": 10.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_measuring(parser, repeats=3)
    group = parser.add_argument_group("engine")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--shapes", help="random weights of these sizes: llava-1.5-7b, ..., tiny")
    source.add_argument("--model", type=Path, default=BUNDLED_MODEL, help="checkpoint (default: embedded)")
    group.add_argument("--data", type=Path, default=BUNDLED_DATA / "pope", help="a POPE folder")
    group.add_argument(
        "--pictures",
        type=at_least(1),
        help="pictures to ask about, without --shapes; default 2, 18 questions each",
    )
    group.add_argument("--questions", type=at_least(1), help="with --shapes (default 1000)")
    group.add_argument(
        "--plain-questions",
        type=at_least(1),
        help="how many of them the plain way is asked (default all; 24 with --shapes)",
    )
    group.add_argument("--dtype", choices=DTYPES, help="default float32 on CPU, float16 on CUDA")
    group.add_argument("--tower-dtype", choices=DTYPES, help="default as --dtype")
    add_budget(group)
    group.add_argument("--batch-size", type=at_least(1), default=64, help="questions at a time")
    group.add_argument("--flips", action="store_true", help="count answers that change, and by how much less")


def check(args: argparse.Namespace) -> None:
    check_device(args)
    if args.questions and not args.shapes:
        raise ValueError("--questions goes with --shapes; the load of a checkpoint is chosen by --pictures")
    if args.pictures and args.shapes:
        raise ValueError("--pictures goes with a checkpoint; the load of --shapes is chosen by --questions")
    if args.shapes:
        from llava.analysis.efficiency.shapes import shape_named

        shape_named(args.shapes)
    elif not (args.model / "config.json").is_file():
        raise ValueError(f"--model {args.model}: no config.json there")
    elif not args.data.is_dir():
        raise ValueError(f"--data {args.data}: no such folder")


class Words:
    """A tokenizer for models with random weights: an id per word, below `size`; answers stay numbers."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
        from types import SimpleNamespace
        from zlib import crc32

        ids = [3 + crc32(word.encode()) % (self.size - 3) for word in text.split()]
        return SimpleNamespace(input_ids=[1, *ids] if add_special_tokens else ids)

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return " ".join(map(str, ids))


@dataclass
class Workload:
    """A model and what it is asked."""

    tokenizer: Any
    model: Any
    processor: Any
    questions: list[Any]
    decoding: Any
    pruner: Any
    batch_size: int = 64

    def engine(self, **options: Any) -> Any:
        from llava.eval.inference.engine import Engine

        settings = {"decoding": self.decoding, "batch_size": self.batch_size, **options}
        return Engine(self.model, self.tokenizer, self.processor, **settings)

    def ask(self, questions: Sequence[Any] | None = None, **options: Any) -> tuple[dict[int, str], Any]:
        """Question index -> answer of the engine, and its report; raises ValueError for failures."""
        from llava.eval.inference.engine import Memory, Setting

        sink = Memory()
        report = self.engine(**options).run(
            questions or self.questions, [Setting("it", self.pruner, sink)], progress=False
        )
        if report.failures:
            raise ValueError(f"not answered: {report.failures[0]}")
        return sink.texts, report

    def plain(self, places: Sequence[int]) -> dict[int, str]:
        """Question index -> answer of the plain way, from picture files to texts."""
        from llava.analysis.efficiency.plain import plain_answer

        self.model.set_pruner(self.pruner, anyres="auto")
        prompts = self.engine()
        found = {}
        for question in (self.questions[place] for place in places):
            new = plain_answer(
                self.model,
                self.tokenizer,
                self.processor,
                question.image,
                prompts.prompt_ids(question),
                self.decoding,
            )
            found[question.index] = self.tokenizer.decode(new, skip_special_tokens=True).strip()
        return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    from llava.analysis.efficiency.timing import machine

    with tempfile.TemporaryDirectory() as folder:
        load = _of_shapes(args, Path(folder)) if args.shapes else _of_files(args)
        images = len({question.image for question in load.questions})
        document: dict[str, Any] = {
            "part": "engine",
            "machine": machine(args.device),
            "model": args.shapes or args.model.name,
            "weights": "random" if args.shapes else "of the checkpoint",
            "dtype": str(load.model.dtype).removeprefix("torch."),
            "tower_dtype": str(load.model.get_vision_tower().dtype).removeprefix("torch."),
            "kernels": load.model.config._attn_implementation,
            "tokens": args.tokens,
            "important_ratio": args.ratio,
            "questions": len(load.questions),
            "images": images,
            "batch_size": args.batch_size,
            "max_new_tokens": load.decoding.max_new_tokens,
        }
        document |= _measure(args, load)
        if args.flips:
            document["flip_counts"] = _flips(load)
    return document


def _of_files(args: argparse.Namespace) -> Workload:
    from llava.eval.benchmarks import get_benchmark
    from llava.eval.inference.decode import Decoding
    from llava.model import load_pretrained_model
    from llava.pruning import get_pruner

    pope = get_benchmark("pope")
    questions = list(pope.questions(args.data, []))
    first = set(list(dict.fromkeys(question.image for question in questions))[: args.pictures or 2])
    questions = [question for question in questions if question.image in first]
    tokenizer, model, processor, _ = load_pretrained_model(
        str(args.model),
        device=args.device,
        dtype=args.dtype,
        tower_dtype=args.tower_dtype,
        method="none",
        visual_token_num=0,
    )
    return Workload(
        tokenizer,
        model,
        processor,
        questions,
        Decoding(pope.max_new_tokens),
        get_pruner("vispruner", args.tokens, args.ratio),
        args.batch_size,
    )


def _of_shapes(args: argparse.Namespace, folder: Path) -> Workload:
    """Random weights; drawn pictures of a camera's size, each under a name and content of its own."""
    from random import Random

    from llava.analysis.efficiency.load import draw
    from llava.analysis.efficiency.shapes import build_model
    from llava.eval.benchmarks.base import Question
    from llava.eval.inference.decode import Decoding
    from llava.pruning import get_pruner

    model = build_model(args.shapes, args.device, args.dtype, args.tower_dtype, seed=args.seed)
    picture, chance = draw(folder / "picture.jpg").read_bytes(), Random(args.seed)
    questions = []
    for place in range(args.questions or 1000):
        path = folder / f"{place // GQA_PER_IMAGE}.jpg"
        if place % GQA_PER_IMAGE == 0:
            path.write_bytes(picture)
        words = " ".join(f"w{chance.randrange(3000)}" for _ in range(chance.randint(6, 18)))
        text = f"{words}?\nAnswer the question using a single word or phrase ."
        questions.append(Question(place, place, path, text))
    processor = model.get_vision_tower().image_processor
    return Workload(
        Words(model.config.vocab_size),
        model,
        processor,
        questions,
        Decoding(GQA_NEW_TOKENS),
        get_pruner("vispruner", args.tokens, args.ratio),
        args.batch_size,
    )


def _measure(args: argparse.Namespace, load: Workload) -> dict[str, Any]:
    """Rounds of both ways in turns."""
    import statistics

    from llava.analysis.efficiency.timing import seconds_of

    count = len(load.questions)
    wanted = min(count, args.plain_questions or (24 if args.shapes else count)) if args.vs else 0
    chosen = [count * number // wanted for number in range(wanted)]
    rounds = min(args.repeats, wanted) if args.vs else args.repeats
    texts: dict[str, dict[int, str]] = {"engine": {}, "plain": {}}
    for _ in range(args.warmup):
        load.ask()
        load.plain(chosen[:1])
    rates: dict[str, list[tuple[float, float | None]]] = {"engine": [], "plain": []}
    reports = []

    def engine() -> None:
        found, report = load.ask()
        texts["engine"] |= found
        reports.append(report)

    for number in range(rounds):
        part = chosen[number::rounds]

        def plain(part: Sequence[int] = part) -> None:
            texts["plain"] |= load.plain(part)

        ways = {"engine": (engine, count), "plain": (plain, len(part))}
        for name in ("engine", "plain") if number % 2 == 0 else ("plain", "engine"):
            way, asked = ways[name]
            if asked:
                wall, busy = seconds_of(way, args.device)
                rates[name].append((asked / wall, asked / busy if busy else None))

    def rate(name: str, which: int) -> float | None:
        found = [one[which] for one in rates[name] if one[which] is not None]
        return round(statistics.median(found), 3) if found else None

    vision = statistics.median(report.vision_seconds / report.images for report in reports)
    rest = statistics.median((report.seconds - report.vision_seconds) / count for report in reports)
    document = {
        "questions_per_second": {"engine": rate("engine", 0)},
        "rounds": rounds,
        "warmup": args.warmup,
        "vision_seconds_per_image": round(vision, 5),
        "other_seconds_per_question": round(rest, 6),
        "protocol": f"{rounds} rounds in turns, medians; from picture files to texts; every round the engine "
        f"asks all {count} questions in batches of {load.batch_size}"
        + (f", the plain way {wanted / rounds:.3g} of {wanted}, one by one" if wanted else ""),
    }
    if args.shapes:
        whole = vision * GQA_IMAGES + rest * GQA_QUESTIONS
        document["extrapolated"] = {
            "questions": GQA_QUESTIONS,
            "images": GQA_IMAGES,
            "seconds": round(whole, 2),
            "from_questions": count,
        }
    if args.vs:
        said = texts["plain"]
        different = sorted(index for index in said if said[index] != texts["engine"][index])
        processor = [rate("engine", 1), rate("plain", 1)]
        document["questions_per_second"]["plain"] = rate("plain", 0)
        document["ratio"] = round(rate("engine", 0) / rate("plain", 0), 3)
        if None not in processor:
            document["ratio_processor"] = round(processor[0] / processor[1], 3)
        document |= {
            "goal": GOALS["shapes" if args.shapes else "files"],
            "flips": len(different),
            "answers_compared": len(said),
            **_agreement(load, chosen, different, texts["engine"]),
        }
        if args.shapes:
            document["extrapolated"]["plain_seconds"] = round(GQA_QUESTIONS / rate("plain", 0), 1)
    return document


def _agreement(
    load: Workload, chosen: Sequence[int], different: Sequence[int], texts: dict[int, str]
) -> dict[str, Any]:
    """Where differing answers come from: the plain way's tower rounds otherwise, and the selection makes
    other tokens of that; with the engine's own tokens, one question at a time, none may be left (in float32).
    """
    import torch

    from llava.analysis.efficiency.plain import plain_select, plain_tower
    from llava.eval.inference.image_loading import Prepare
    from llava.eval.inference.vision_cache import VisionCache
    from llava.mm_utils import load_image

    asked = [load.questions[place] for place in chosen]
    prepare = Prepare(load_image, load.processor, load.model.config)
    equal: dict[Any, bool] = {}
    for image in {question.image for question in asked}:
        (pixels, size), _ = prepare(image)
        crops = (pixels[None] if pixels.ndim == 3 else pixels).to(load.model.device)
        with torch.inference_mode():
            ours = load.model.visual_tokens(load.model.encode_vision([crops], [size])[0], load.pruner)
        plain = plain_select(*plain_tower(load.model, crops), load.pruner.tokens, load.pruner.important_ratio)
        equal[image] = torch.equal(ours.kept.indices, plain)
    there = {question.index for question in asked if equal[question.image]}
    singles = load.ask(vision_cache=VisionCache(1 << 33), share_prefix=False, batch_size=1, questions=asked)[
        0
    ]
    return {
        "images_compared": len(equal),
        "images_with_equal_tokens": sum(equal.values()),
        "flips_in_images_with_equal_tokens": len(there & set(different)),
        "flips_against_one_at_a_time_with_equal_tokens": sum(
            texts[index] != text for index, text in singles.items()
        ),
    }


def _flips(load: Workload) -> dict[str, int]:
    """Answers that change with sharing, and as a yardstick with the batch size alone; vision done once."""
    from llava.eval.inference.vision_cache import VisionCache

    cache = VisionCache(1 << 33)
    engine = load.ask(vision_cache=cache)[0]
    single = load.ask(vision_cache=cache, share_prefix=False, batch_size=1)[0]
    many = load.ask(vision_cache=cache, share_prefix=False)[0]
    return {
        "answers": len(single),
        "engine_against_singles": sum(engine[index] != single[index] for index in single),
        f"plain_engine_batches_of_{load.batch_size}_against_singles": sum(
            many[index] != single[index] for index in single
        ),
    }


def render(document: dict[str, Any]) -> str:
    speed = document["questions_per_second"]
    rows = [[name, value, None if not value else 1000 / value] for name, value in speed.items()]
    lines = [
        f"Engine: {document['model']} ({document['weights']} weights), {document['dtype']}, "
        f"{document['tokens']} tokens, on {document['machine']['name']}\n{document['protocol']}",
        table(["way", "questions/s", "ms/question"], rows),
        f"engine: {1000 * document['vision_seconds_per_image']:.4g} ms of vision per picture, "
        f"{1000 * document['other_seconds_per_question']:.4g} ms of everything else per question",
    ]
    if "ratio" in document:
        lines.append(
            f"ratio {document['ratio']:.3g} (goal {document['goal']:g}); {document['flips']} of "
            f"{document['answers_compared']} answers differ: "
            f"{document['flips_in_images_with_equal_tokens']} about the "
            f"{document['images_with_equal_tokens']} of {document['images_compared']} pictures of "
            "which both keep the same tokens;\nof one question at a time with the engine's tokens "
            f"{document['flips_against_one_at_a_time_with_equal_tokens']} differ"
        )
    if "extrapolated" in document:
        found = document["extrapolated"]
        plain = f", the plain way {found['plain_seconds']:.0f} s" if "plain_seconds" in found else ""
        lines.append(
            f"all of GQA's testdev ({found['questions']} questions, {found['images']} pictures): "
            f"{math.ceil(found['seconds'])} s{plain}"
        )
    if "flip_counts" in document:
        lines.append(
            "answers that change: "
            + ", ".join(
                f"{name.replace('_', ' ')} {count}" for name, count in document["flip_counts"].items()
            )
        )
    return "\n".join(lines)
