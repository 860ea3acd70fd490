"""The parts of `gpu_check.py`: what each of them measures, one function per part.

A part is a generator: it builds what it needs and yields (name, function) for every measurement, which the
caller runs. So every measurement can fail alone, be left out because it is known, or be the last one before a
time limit. Measurements are dictionaries ready for JSON; times are `Timing.as_json()`, in milliseconds.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from llava.analysis.efficiency.dummy_models import DUMMY_MODELS, build_model
from llava.analysis.efficiency.gpu_context import (
    TEXT_TOKENS,
    CheckContext,
    CheckPart,
    CheckStep,
    NotMeasuredError,
    answer,
    graphs_of,
    name_of,
    pruner_of,
    visual_tokens,
)
from llava.analysis.efficiency.gpu_stages import (
    measure_busy,
    measure_decode,
    measure_decoded_token,
    measure_first_token,
    measure_peak,
    measure_prefill,
    measure_selection,
    measure_shared_prefix,
    measure_tower,
)
from llava.analysis.efficiency.stages import PipelineStages, weights_bytes
from llava.analysis.efficiency.timing import peak_bytes, seconds_of
from llava.analysis.efficiency.tower import bare
from llava.analysis.efficiency.workload import EngineWorkload, count_flips
from llava.model import flops
from llava.model.decode import Decoding
from llava.paths import BUNDLED_DATA, BUNDLED_MODEL, REPOSITORY

# --- the card --------------------------------------------------------------------------------------------


def run_tests(context: CheckContext) -> Iterator[CheckStep]:
    yield "tests", partial(_run_tests, context, REPOSITORY / "tests")


def _run_tests(context: CheckContext, folder: Path) -> dict[str, Any]:
    """Run the tests marked gpu in a process of their own: an error in a kernel ends the use of CUDA."""
    if not context.on_card:
        raise NotMeasuredError("no card: the device is a CPU")
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing or not folder.is_dir():
        raise NotMeasuredError(
            f"{missing[0]} is not installed" if missing else f"there is no folder {folder}"
        )
    files = [
        one for one in sorted(folder.rglob("test_*.py")) if "mark.gpu" in one.read_text(encoding="utf-8")
    ]
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        command += [f"--junitxml={report}", *map(str, files)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        made = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=170
        )
        if not report.exists():
            raise RuntimeError(
                f"pytest ended with code {made.returncode}: {(made.stdout + made.stderr)[-300:]}"
            )
        return read_junit(report)


def read_junit(path: Path) -> dict[str, Any]:
    """Count the outcomes of a JUnit report.

    Raises:
        RuntimeError: a test failed, or none ran.
    """
    outcomes: dict[str, list[str]] = {"passed": [], "failure": [], "error": [], "skipped": []}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        kinds = [child.tag for child in case if child.tag in outcomes]
        outcomes[kinds[0] if kinds else "passed"].append(f"{case.get('classname')}::{case.get('name')}")
    failed = outcomes["failure"] + outcomes["error"]
    if failed:
        raise RuntimeError(f"{len(failed)} of {sum(map(len, outcomes.values()))} tests failed: {failed[:10]}")
    if not outcomes["passed"]:
        raise RuntimeError("no test ran")
    return {"passed": len(outcomes["passed"]), "skipped": outcomes["skipped"]}


# --- selection and tower ---------------------------------------------------------------------------------


# --- the first token -------------------------------------------------------------------------------------


# --- many questions --------------------------------------------------------------------------------------


def measure_engine(context: CheckContext) -> Iterator[CheckStep]:
    with tempfile.TemporaryDirectory() as folder:
        long = _workload(context, context.model(), folder)
        load = replace(long, questions=long.questions[: -(-len(long.questions) // 2)])
        plain = replace(load, model=context.model(graphs=False))
        middle = load.pruner.tokens
        yield "baseline", partial(_baseline_rate, context, plain)
        # the start of a run, when no image has been read yet, would be a tenth of a short one
        yield "default", partial(_rate, context, long, passes=2 if context.on_card else 1)
        for batch in (16, 64, 256) if context.on_card else (4,):
            yield f"batch {batch}", partial(_rate, context, load, batch=batch)
        yield "busy", partial(measure_busy, context, long.ask)
        yield "eager", partial(_rate, context, plain)
        for budget in context.budgets():
            if budget != middle:
                yield f"default, {name_of(budget)}", partial(_rate, context, load, budget)
        few = replace(load, questions=load.questions[: max(1, len(load.questions) // 8)])
        for budget in context.budgets():
            yield f"not shared, {name_of(budget)}", partial(_rate, context, few, budget, share_prefix=False)
        yield "flips", partial(_engine_flips, load, plain)


def _workload(context: CheckContext, model: Any, folder: str) -> EngineWorkload:
    args = argparse.Namespace(
        questions=2480 if context.on_card else 8, tokens=context.base.budgets[1], ratio=0.5, batch_size=None
    )
    args.seed = context.seed
    return EngineWorkload.from_dummy_model(args, Path(folder), model)


def _rate(
    context: CheckContext,
    load: EngineWorkload,
    budget: int | None | str = "same",
    batch: int | None = None,
    passes: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Measure questions per second: the best of some passes after one that captures."""
    load = load if budget == "same" else replace(load, pruner=pruner_of(budget))
    load = load if batch is None else replace(load, batch_size=batch)
    load.ask(**options)
    reports, seconds = [], []
    for _ in range(passes):
        seconds.append(seconds_of(lambda: reports.append(load.ask(**options)[1]), context.device)[0])
    count, best = len(load.questions), min(seconds)
    report = reports[seconds.index(best)]
    return {
        "tokens": load.pruner.tokens,
        "questions": count,
        "batch_size": load.rows_at_once,
        "questions_per_second": count / best,
        "all_questions_per_second": [count / one for one in seconds],
        "vision_seconds_per_image": report.vision_seconds / report.images,
        "other_seconds_per_question": (best - report.vision_seconds) / count,
        **graphs_of(load.model),
    }


def _baseline_rate(context: CheckContext, load: EngineWorkload) -> dict[str, Any]:
    count = 10 if context.on_card else 1
    asked = load.questions[:: len(load.questions) // count][:count]
    load.ask_baseline(asked[:1])
    seconds = seconds_of(lambda: load.ask_baseline(asked), context.device)[0]
    return {"questions": len(asked), "questions_per_second": len(asked) / seconds}


def _engine_flips(load: EngineWorkload, plain: EngineWorkload) -> dict[str, Any]:
    """Count the answers that change between graphs and eager."""
    graph, eager = load.ask()[0], plain.ask()[0]
    return {"answers": len(eager), "eager_against_graphs": count_flips(graph, eager)}


def measure_memory(context: CheckContext) -> Iterator[CheckStep]:
    model = context.model(graphs=False)
    stages = context.questions(model)
    for budget in context.budgets():
        yield name_of(budget), partial(_memory, context, stages, budget)


def _memory(context: CheckContext, stages: PipelineStages, budget: int | None) -> dict[str, Any]:
    """Compute how many images' KV caches fit beside the weights and the peak of one first token."""
    with torch.inference_mode():
        peak = peak_bytes(lambda: answer(stages, budget), context.device)
    shape = flops.LanguageShape.from_config(stages.model.config)
    length = TEXT_TOKENS + (context.base.patches if budget is None else budget)
    cache = flops.kv_cache_bytes(length, shape, stages.model.dtype.itemsize)
    weights = sum(weights_bytes(stages.model).values())
    fits = {f"{size} GB": max(0, int((size * 1e9 - weights - peak) // cache)) for size in (24, 80)}
    return {"tokens": budget, "peak_bytes": peak, "kv_bytes": cache, "weights_bytes": weights, "images": fits}


# --- the bundled model -----------------------------------------------------------------------------------


def measure_pope(context: CheckContext) -> Iterator[CheckStep]:
    from llava.eval.benchmarks import get_benchmark

    if not BUNDLED_MODEL.is_dir() or not (BUNDLED_DATA / "pope").is_dir():
        raise NotMeasuredError("the bundled model and questions are not there (they come with a clone)")
    questions = list(get_benchmark("pope").questions(BUNDLED_DATA / "pope", []))
    images = list(dict.fromkeys(question.image for question in questions))
    compared = images[: 40 if context.on_card else 1]
    reference: dict[str, Any] = {}
    yield "cpu float32", partial(_pope, context, "cpu", "float32", questions, compared, None, reference)
    if not context.on_card:
        yield "card", _no_card
        return
    for dtype in ("float16", "float32"):
        yield (
            f"card {dtype}",
            partial(_pope, context, context.device, dtype, questions, compared, images, reference),
        )


def _no_card() -> None:
    raise NotMeasuredError("no card: the device is a CPU")


def _pope(
    context: CheckContext,
    device: str,
    dtype: str,
    questions: list[Any],
    compared: list[Any],
    scored: list[Any] | None,
    reference: dict[str, Any],
) -> dict[str, Any]:
    """Answer bundled questions at all tokens and at 64; compare answers and kept tokens with the CPU's.

    Args:
        compared: Images whose answers and kept tokens are compared.
        scored: Images whose answers are scored, None for those that are compared.
        reference: Answers and kept tokens of the CPU; filled by the first call.
    """
    from llava.eval.benchmarks import get_benchmark
    from llava.eval.inference.vision_cache import VisionCache
    from llava.model import load_pretrained_model

    tokenizer, model, processor, _ = load_pretrained_model(
        str(BUNDLED_MODEL), device=device, dtype=dtype, tower_dtype=dtype, method="none", visual_token_num=0
    )
    pope, chosen = get_benchmark("pope"), set(scored or compared)
    asked = [question for question in questions if question.image in chosen]
    load = EngineWorkload(tokenizer, model, processor, asked, Decoding(pope.max_new_tokens), pruner_of(None))
    load.vision_cache = VisionCache(1 << 33)
    found: dict[str, Any] = {"images": len(chosen), "questions": len(asked), "images_compared": len(compared)}
    for budget in (None, 64):
        load.pruner = pruner_of(budget)
        spent: list[float] = []
        answers = {}
        spent.append(seconds_of(lambda a=answers: a.update(load.ask()[0]), device)[0])
        rows = [
            {"question_id": one.question_id, "prompt": one.text, "text": answers[one.index], **one.extra}
            for one in asked
        ]
        kept = {image: load.kept_tokens(image).cpu() for image in compared}
        mine = {one.index: answers[one.index] for one in asked if one.image in kept}
        theirs = reference.setdefault(name_of(budget), {"answers": mine, "kept": kept})
        found[name_of(budget)] = {
            "score": pope.score(BUNDLED_DATA / "pope", rows).score,
            "answers_compared": len(theirs["answers"]),
            "answers_that_differ": count_flips(mine, theirs["answers"]),
            "kept_tokens": sum(one.numel() for one in kept.values()),
            "kept_tokens_that_differ": sum(
                len(set(one.flatten().tolist()) - set(theirs["kept"][image].flatten().tolist()))
                for image, one in kept.items()
            ),
            "questions_per_second": len(asked) / sum(spent),
        }
    return found


# --- compiled layers, and the processor ------------------------------------------------------------------


def measure_compiled(context: CheckContext) -> Iterator[CheckStep]:
    model = context.model(compiled=True)
    stages, middle = context.questions(model), context.base.budgets[1]
    yield "first token, 64", partial(_compiled_first_token, context, stages, middle)
    yield "decoded token", partial(measure_decoded_token, context, {"compiled": stages}, middle)
    yield "tower, 1 crop", partial(_compiled_tower, context, stages)
    yield "first token, none", partial(_compiled_first_token, context, stages, None)
    with tempfile.TemporaryDirectory() as folder:
        load = _workload(context, model, folder)
        yield "engine", partial(_rate, context, load, passes=2 if context.on_card else 1)
        plain = replace(load, model=context.model(graphs=False))
        yield "flips", partial(_engine_flips, load, plain)
    del model, stages, load, plain
    context.release()
    following = context.questions(context.model("next", compiled=True), "next")
    yield "first token, next", partial(_compiled_first_token, context, following, context.budgets("next")[-1])


def _compiled_first_token(
    context: CheckContext, stages: PipelineStages, budget: int | None
) -> dict[str, Any]:
    found = context.compare({"compiled": partial(answer, stages, budget)})
    return {"tokens": budget, **found, **graphs_of(stages.model)}


def _compiled_tower(context: CheckContext, stages: PipelineStages) -> dict[str, Any]:
    """Time images to projected tokens as the model runs it, over the bare tower."""
    tower, budget = stages.model.get_vision_tower(), context.base.budgets[1]
    images = stages.pixels.to(context.device)
    runs = {
        "bare": lambda: bare(tower, images.to(tower.dtype)),
        "compiled": partial(visual_tokens, stages.model, images, budget),
    }
    return {**context.compare(runs), **graphs_of(stages.model)}


def measure_cpu(context: CheckContext) -> Iterator[CheckStep]:
    tiny = CheckContext(
        "cpu",
        DUMMY_MODELS["tiny"] if context.on_card else context.base,
        3 if context.on_card else 1,
        context.seed,
    )
    stages = tiny.questions(tiny.model(graphs=False))
    for budget in tiny.budgets():
        yield f"tiny, {name_of(budget)}", partial(_on_cpu, tiny, stages, budget)
    if not context.on_card:
        return
    large = CheckContext("cpu", context.base, 1, context.seed)
    card = build_model(
        context.base, context.device, context.dtype, seed=context.seed, share=context._parameters
    )
    large._parameters = {
        name: torch.nn.Parameter(one.to("cpu", torch.bfloat16), requires_grad=False)
        for name, one in card.named_parameters()
    }
    del card
    model = build_model(context.base, "cpu", torch.bfloat16, seed=context.seed, share=large._parameters)
    model.set_pruner("none", anyres="paper")
    stages = large.questions(model)
    for budget in [*large.budgets()[::-1]]:
        yield f"bfloat16, {name_of(budget)}", partial(_on_cpu, large, stages, budget)


def _on_cpu(context: CheckContext, stages: PipelineStages, budget: int | None) -> dict[str, Any]:
    visual = context.base.patches if budget is None else budget
    found = context.compare({"eager": partial(answer, stages, budget)})
    return {
        "tokens": budget,
        "flops": stages.flops(pruner_of(budget), visual),
        "threads": torch.get_num_threads(),
        **found,
    }


FUNCTIONS: dict[str, CheckPart] = {
    "tests": run_tests,
    "peak": measure_peak,
    "selection": measure_selection,
    "tower": measure_tower,
    "first-token-1.5": partial(measure_first_token, "1.5"),
    "decode": measure_decode,
    "prefill": measure_prefill,
    "prefix": measure_shared_prefix,
    "engine": measure_engine,
    "first-token-next": partial(measure_first_token, "next"),
    "video": partial(measure_first_token, "video"),
    "memory": measure_memory,
    "pope": measure_pope,
    "compile": measure_compiled,
    "cpu": measure_cpu,
}
