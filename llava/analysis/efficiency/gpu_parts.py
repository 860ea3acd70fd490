"""The parts of `gpu_check.py`: what each of them measures, one function per part.

A part is a generator: it builds what it needs and yields (name, function) for every measurement, which the
caller runs. So every measurement can fail alone, be left out because it is known, or be the last one before a
time limit. Measurements are dictionaries ready for JSON; times are `Timing.as_json()`, in milliseconds.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor

from llava.analysis.efficiency.baseline import baseline_select
from llava.analysis.efficiency.dummy_models import DUMMY_MODELS, DummyModel, build_model, build_tower
from llava.analysis.efficiency.peak import bandwidth, matrix_rate
from llava.analysis.efficiency.prefix import measure_prefix
from llava.analysis.efficiency.selection import select_deferred
from llava.analysis.efficiency.stages import PipelineStages, weights_bytes
from llava.analysis.efficiency.timing import add_captured, compare, peak_bytes, seconds_of
from llava.analysis.efficiency.tower import bare
from llava.analysis.efficiency.workload import EngineWorkload, count_flips
from llava.model import flops
from llava.model.decode import Decoding
from llava.paths import BUNDLED_DATA, BUNDLED_MODEL, REPOSITORY
from llava.pruning import Pruner, get_pruner
from llava.pruning.kernels import rounds_backend

TEXT_TOKENS = 80
CheckStep = tuple[str, Callable[[], Any]]
CheckPart = Callable[["CheckContext"], Iterator[CheckStep]]


class NotMeasuredError(RuntimeError):
    """A measurement is impossible here; the message is the reason."""


@dataclass
class CheckContext:
    """The device, the sizes of the models, and the weights that they share."""

    device: str
    base: DummyModel
    repeats: int
    seed: int
    _parameters: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def prepare(cls, args: argparse.Namespace) -> CheckContext:
        """Choose the models; on a CPU they are cut to two layers and small images, because it rehearses."""
        base = DUMMY_MODELS[args.dummy_model]
        if args.device == "cpu":
            language = {**base.language, "num_hidden_layers": 2}
            tower = {**base.tower, "num_hidden_layers": 3, "image_size": 12 * base.tower["patch_size"]}
            base = replace(base, language=language, tower=tower)
        return cls(args.device, base, args.repeats, args.seed)

    @property
    def on_card(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.on_card else torch.float32

    def kernels(self) -> dict[str, str]:
        """Name the attention kernels."""
        return {
            "language_model": "sdpa",
            "tower": "sdpa",
            "baseline_language_model": "sdpa",
            "baseline_tower": "eager",
            "selection": rounds_backend(self.device),
        }

    def sizes(self, form: str) -> DummyModel:
        """Return the sizes of a form: "1.5" (one crop), "next" (five) or "video" (eight smaller frames)."""
        if form == "1.5":
            return self.base
        like = DUMMY_MODELS["llava-next-7b" if form == "next" else "video-llava-7b"]
        tower = self.base.tower
        if form == "video":
            side = tower["image_size"] // tower["patch_size"] * 2 // 3
            tower = {**tower, "image_size": side * tower["patch_size"]}
        return replace(self.base, tower=tower, crops=like.crops, budgets=like.budgets, extra=like.extra)

    def budgets(self, form: str = "1.5") -> list[int | None]:
        """Return the budgets per crop, all tokens first; None keeps all."""
        return [None, *(budget for budget in self.sizes(form).budgets)]

    def model(self, form: str = "1.5", graphs: bool = True, compiled: bool = False) -> Any:
        """Build a model on the weights that all of them share. On a CPU a stand-in captures, not compiled."""
        made = build_model(self.sizes(form), self.device, self.dtype, seed=self.seed, share=self._parameters)
        self._parameters = dict(made.named_parameters()) | self._parameters
        made.set_runtime(graphs=graphs, compiled=compiled and self.on_card)
        made.set_pruner("none", anyres="llava" if form == "video" else "paper")
        return made

    def questions(self, model: Any, form: str = "1.5", batch: int = 1) -> PipelineStages:
        """Draw images and prompts for a model of this form."""
        return PipelineStages.random(
            model, self.device, self.sizes(form).crops, batch, TEXT_TOKENS, self.seed, video=form == "video"
        )

    def compare(self, runs: dict[str, Callable[[], Any]], repeats: int | None = None) -> dict[str, Any]:
        """Time interleaved variants; warm-up includes what is captured on first use."""
        with torch.inference_mode():
            found = compare(runs, self.device, repeats or self.repeats, 2 if self.on_card else 1)
        return {name: timing.as_json() for name, timing in found.items()}

    def release(self) -> None:
        """Free what the last part built, except for the shared weights."""
        gc.collect()
        if self.on_card:
            torch.cuda.empty_cache()


def pruner_of(budget: int | None) -> Pruner:
    """Return VisPruner at a budget, no pruning for None."""
    return get_pruner("none" if budget is None else "vispruner", budget)


def name_of(budget: int | None) -> str:
    return "none" if budget is None else str(budget)


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
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=110
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


def measure_peak(context: CheckContext) -> Iterator[CheckStep]:
    for dtype in dict.fromkeys([context.dtype, torch.float32]):
        name = str(dtype).removeprefix("torch.")
        yield f"matrix {name}", partial(_matrix, context, dtype)
    yield "copy", lambda: {"bytes_per_second": bandwidth(context.device, 3)}


def _matrix(context: CheckContext, dtype: torch.dtype) -> dict[str, float]:
    return {"flops_per_second": matrix_rate(context.device, dtype, 3)}


# --- selection and tower ---------------------------------------------------------------------------------


def graphs_of(model: Any) -> dict[str, Any]:
    """Return the graphs that a model holds, and the stages that could not be captured, with the reasons."""
    found = {"graphs": len(model.runtime.captured)}
    failed = dict(model.runtime.captured.refused)
    return {**found, "not_captured": failed} if failed else found


def measure_selection(context: CheckContext) -> Iterator[CheckStep]:
    middle = context.base.budgets[1]
    cases = [(rows, middle) for rows in (1, 5, 32)] + [(5, budget) for budget in context.base.budgets]
    for rows, budget in dict.fromkeys(cases if context.on_card else cases[:2]):
        yield f"{rows} rows, T = {budget}", partial(_selection, context, rows, budget)


def _selection(context: CheckContext, rows: int, budget: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(context.seed)
    tower = context.base.tower
    shape = (rows, context.base.patches, tower["hidden_size"])
    features = torch.randn(shape, generator=generator).to(context.device)
    attention = torch.rand(rows, tower["num_attention_heads"], shape[1], generator=generator).to(features)
    pruner = pruner_of(budget)
    expected = baseline_select(features.double(), attention.double(), budget, pruner.important_ratio)
    runs = {
        "loop": lambda: baseline_select(features, attention, budget, pruner.important_ratio),
        "eager": lambda: pruner.select(features, attention),
    }
    found: dict[str, Any] = {"rows": rows, "tokens": budget}
    with torch.inference_mode():
        found |= add_captured(runs, "graph", partial(select_deferred, pruner), (features, attention))
        for name in runs.keys() - {"loop"}:
            same = runs[name]()
            same = same if isinstance(same, Tensor) else same[0]
            found[f"equal_indices_{name}"] = torch.equal(same, expected)
    return found | context.compare(runs)


def measure_tower(context: CheckContext) -> Iterator[CheckStep]:
    towers: dict[torch.dtype, Any] = {}
    crops = (1, 5, 32) if context.on_card else (1, 2)
    cases = [(context.dtype, one) for one in crops] + [(torch.float32, 1)]
    for dtype, count in dict.fromkeys(cases):
        if dtype not in towers:
            towers[dtype] = build_tower(context.base, context.device, dtype, seed=context.seed)
        name = str(dtype).removeprefix("torch.")
        yield f"{count} crops, {name}", partial(_tower, context, towers[dtype], count)


def _tower(context: CheckContext, tower: Any, count: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(context.seed)
    images = torch.randn(count, 3, tower.image_size, tower.image_size, generator=generator)
    images = images.to(context.device, tower.dtype)
    pruner = pruner_of(context.base.budgets[1])

    def whole(images: Tensor) -> tuple[Tensor, Tensor]:
        return select_deferred(pruner, *tower(images))

    with torch.inference_mode():
        runs = {
            "bare": lambda: bare(tower, images),
            "tower": lambda: tower(images),
            "eager": lambda: pruner.select(*tower(images)),
        }
        found = {"crops": count, **add_captured(runs, "tower_graph", tower, (images,))}
        found |= add_captured(runs, "graph", whole, (images,))
        if "graph" in runs:
            found["equal_indices"] = torch.equal(runs["graph"]()[0], runs["eager"]())
    return found | context.compare(runs)


# --- the first token -------------------------------------------------------------------------------------


def answer(stages: PipelineStages, budget: int | None, new_tokens: int = 1) -> Tensor:
    """Ask the model itself, from pixels on the device to new ids (B, new)."""
    stages.model.set_pruner(pruner_of(budget))
    return stages.generate(new_tokens)


def measure_first_token(form: str, context: CheckContext) -> Iterator[CheckStep]:
    eager = context.questions(context.model(form, graphs=False), form)
    graph = context.questions(context.model(form), form)
    for budget in context.budgets(form):
        yield name_of(budget), partial(_first_token, context, eager, graph, budget)
    yield (
        "busy",
        partial(_busy_first_token, context, graph, context.budgets(form)[2 if form == "1.5" else -1]),
    )
    if form != "1.5":
        return
    yield "vision", partial(_vision, context, eager, graph)
    for batch in (8, 32) if context.on_card else (2,):
        yield f"batch {batch}", partial(_batch, context, graph.model, batch)


def _first_token(
    context: CheckContext, eager: PipelineStages, graph: PipelineStages, budget: int | None
) -> dict[str, Any]:
    runs = {
        "baseline": lambda: eager.baseline_first_token(budget),
        "eager": lambda: answer(eager, budget),
        "graph": lambda: answer(graph, budget),
    }
    with torch.inference_mode():
        equal = torch.equal(runs["eager"](), runs["graph"]())
        peak = peak_bytes(runs["eager"], context.device)
        visual = eager.model.visual_tokens(eager.vision()[0], pruner_of(budget)).count
    return {
        "tokens": budget,
        "visual_tokens": visual,
        "crops": eager.crops,
        "flops": eager.flops(pruner_of(budget), visual),
        "equal_first_token": equal,
        "peak_bytes": peak,
        "weights_bytes": weights_bytes(graph.model),
        **context.compare(runs),
        **graphs_of(graph.model),
    }


def _busy_first_token(context: CheckContext, graph: PipelineStages, budget: int | None) -> dict[str, Any]:
    """Measure how long the card works for a first token: the rest of the time it waits for the host."""
    with torch.inference_mode():
        return {"budget": budget, **_busy(context, partial(answer, graph, budget))}


def _vision(context: CheckContext, eager: PipelineStages, graph: PipelineStages) -> dict[str, Any]:
    """Time images to projected tokens as the models run it, over the bare tower of the same layers."""
    tower, budget = eager.model.get_vision_tower(), context.base.budgets[1]
    images = eager.pixels.to(context.device)
    runs = {
        "bare": lambda: bare(tower, images.to(tower.dtype)),
        "eager": partial(visual_tokens, eager.model, images, budget),
        "graph": partial(visual_tokens, graph.model, images, budget),
    }
    return {**context.compare(runs), **graphs_of(graph.model)}


def visual_tokens(model: Any, images: Tensor, budget: int | None) -> list[Any]:
    """Turn images on the device into projected tokens: tower, row, selection and projector."""
    return model.visual_tokens_deferred(model.encode_vision(images), pruner_of(budget))


def _batch(context: CheckContext, model: Any, batch: int) -> dict[str, Any]:
    stages = context.questions(model, batch=batch)
    runs = {name_of(budget): partial(answer, stages, budget) for budget in context.budgets()}
    return {"batch": batch, **context.compare(runs, min(5, context.repeats)), **graphs_of(model)}


def measure_decode(context: CheckContext) -> Iterator[CheckStep]:
    eager = context.questions(context.model(graphs=False))
    graph = context.questions(context.model())
    runs = {"eager": eager, "graph": graph}
    for budget in (None, context.base.budgets[1]):
        yield f"token, {name_of(budget)}", partial(_decoded_token, context, runs, budget)
    long = 256 if context.on_card else 6
    for budget in context.budgets():
        yield f"{long} tokens, {name_of(budget)}", partial(_long_answer, context, graph, budget, long)


def _decoded_token(
    context: CheckContext, stages: dict[str, PipelineStages], budget: int | None
) -> dict[str, Any]:
    more = 16 if context.on_card else 3
    runs = {
        (name, count): partial(_exactly, one, budget, count)
        for name, one in stages.items()
        for count in (1, 1 + more)
    }
    spent = context.compare(runs, min(5, context.repeats))
    per_token = {
        name: (spent[name, 1 + more]["median_ms"] - spent[name, 1]["median_ms"]) / more for name in stages
    }
    found = {"tokens": budget, **{f"{name}_ms": value for name, value in per_token.items()}}
    return found | {key: value for one in stages.values() for key, value in graphs_of(one.model).items()}


def _exactly(stages: PipelineStages, budget: int | None, count: int) -> None:
    """Answer with `count` new tokens, or report that the random weights ended the answer before."""
    if (found := answer(stages, budget, count).shape[1]) != count:
        raise NotMeasuredError(f"the random weights ended the answer after {found} of {count} tokens")


def _long_answer(
    context: CheckContext, stages: PipelineStages, budget: int | None, count: int
) -> dict[str, Any]:
    return {
        "tokens": budget,
        "new_tokens": count,
        **context.compare({"graph": partial(_exactly, stages, budget, count)}, 1),
    }


def measure_prefill(context: CheckContext) -> Iterator[CheckStep]:
    model = context.model(graphs=False)
    lengths = {f"1.5, {name_of(one)}": _prompt(context, "1.5", one) for one in context.budgets()}
    exact = list(lengths.values())
    if context.on_card:
        for step in (32, 64, 128):
            lengths |= {f"padded to {step}, {one}": math.ceil(one / step) * step for one in exact}
        lengths |= {f"next, {name_of(one)}": _prompt(context, "next", one) for one in context.budgets("next")}
    budgets = {name_of(one): one for one in context.budgets()}
    for name, length in lengths.items():
        budget = {} if name.startswith("padded") else {"tokens": budgets[name.split(", ")[1]]}
        yield name, partial(_prefill, context, model, length, budget)


def _prompt(context: CheckContext, form: str, budget: int | None) -> int:
    """Return the tokens of a prompt: of the text, and of the crops at a budget."""
    sizes = context.sizes(form)
    return TEXT_TOKENS + sizes.crops * (sizes.patches if budget is None else budget)


def _prefill(context: CheckContext, model: Any, length: int, budget: dict[str, Any]) -> dict[str, Any]:
    from llava.model.runtime.arena import Arena
    from llava.model.runtime.stages import run_decoder

    embeds = torch.randn(1, length, model.config.hidden_size, device=context.device).to(model.dtype) * 0.02
    places = torch.arange(length, device=context.device)[None]

    arena = Arena(model.config, embeds.device, embeds.dtype)
    arena.fit(1, length)

    def prefill(embeds: Tensor, places: Tensor) -> Tensor:
        return run_decoder(model, embeds, places, arena.cache(None, length), None)[:, -1]

    runs = {"eager": lambda: prefill(embeds, places)}
    with torch.inference_mode():
        failed = add_captured(runs, "graph", prefill, (embeds, places))
    cost = 2 * flops.llm_prefill_macs(length, flops.LanguageShape.from_config(model.config))
    return {"length": length, **budget, "flops": {"total": cost}, **failed, **context.compare(runs)}


def measure_shared_prefix(context: CheckContext) -> Iterator[CheckStep]:
    language = context.base.language
    heads = language["num_attention_heads"]
    sizes = {"heads": heads, "width": language["hidden_size"] // heads, "repeats": context.repeats}
    rows = 64 if context.on_card else 2
    for prefix in (100, 576, 2880) if context.on_card else (20,):
        for queries in (40, 1):
            measured = partial(
                _prefix,
                prefix,
                rows,
                queries,
                context.device,
                context.dtype,
                language["num_hidden_layers"],
                sizes,
            )
            yield f"{prefix} tokens, {queries} queries", measured


def _prefix(
    prefix: int, rows: int, queries: int, device: str, dtype: torch.dtype, layers: int, sizes: dict[str, int]
) -> dict[str, Any]:
    with torch.inference_mode():
        return {"layers": layers, **measure_prefix(prefix, rows, queries, device, dtype, **sizes)}


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
        yield "busy", partial(_busy, context, long.ask)
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


def _busy(context: CheckContext, function: Callable[[], Any]) -> dict[str, Any]:
    """Measure the share of a function's time in which the card computes or copies, and its longest kernels.

    The share is the union of their intervals, from a profiled pass, over the seconds of one that is not.
    """
    if not context.on_card:
        raise NotMeasuredError("no card: the device is a CPU")
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        function()
    seconds = min(seconds_of(function, context.device)[0] for _ in range(3))
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        profiled = seconds_of(function, context.device)[0]
    on_card = torch.autograd.DeviceType.CUDA
    events = [
        one
        for one in found.profiler.kineto_results.events()
        if one.device_type() == on_card and not one.is_user_annotation()
    ]
    busy = covered([(one.start_ns(), one.end_ns()) for one in events]) / 1e9
    names: dict[str, float] = {}
    for one in events:
        names[one.name()[:80]] = names.get(one.name()[:80], 0.0) + one.duration_ns() / 1e6
    return {
        "busy": busy / seconds,
        "busy_seconds": busy,
        "seconds": seconds,
        "profiled_seconds": profiled,
        "events": len(events),
        "ms_by_kernel": dict(sorted(names.items(), key=lambda item: -item[1])[:12]),
    }


def covered(intervals: Sequence[tuple[int, int]]) -> int:
    """Return the length of the union of intervals (start, end)."""
    total, until = 0, -math.inf
    for start, end in sorted(intervals):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return int(total)


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
    yield "decoded token", partial(_decoded_token, context, {"compiled": stages}, middle)
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
