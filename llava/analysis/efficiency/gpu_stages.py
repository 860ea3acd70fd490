"""The parts of `gpu_check.py` that measure the stages of one question, from selection to decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llava.analysis.efficiency.baseline import baseline_select
from llava.analysis.efficiency.dummy_models import build_tower
from llava.analysis.efficiency.gpu_context import (
    TEXT_TOKENS,
    CheckContext,
    CheckStep,
    NotMeasuredError,
    answer,
    graphs_of,
    name_of,
    pruner_of,
    visual_tokens,
)
from llava.analysis.efficiency.peak import bandwidth, matrix_rate
from llava.analysis.efficiency.prefix import measure_prefix
from llava.analysis.efficiency.selection import select_deferred
from llava.analysis.efficiency.stages import PipelineStages, weights_bytes
from llava.analysis.efficiency.timing import add_captured, peak_bytes, seconds_of
from llava.analysis.efficiency.tower import bare
from llava.model import flops


def measure_peak(context: CheckContext) -> Iterator[CheckStep]:
    for dtype in dict.fromkeys([context.dtype, torch.float32]):
        name = str(dtype).removeprefix("torch.")
        yield f"matrix {name}", partial(_matrix, context, dtype)
    yield "copy", lambda: {"bytes_per_second": bandwidth(context.device, 3)}


def _matrix(context: CheckContext, dtype: torch.dtype) -> dict[str, float]:
    return {"flops_per_second": matrix_rate(context.device, dtype, 3)}


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
        return {"budget": budget, **measure_busy(context, partial(answer, graph, budget))}


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


def _batch(context: CheckContext, model: Any, batch: int) -> dict[str, Any]:
    stages = context.questions(model, batch=batch)
    runs = {name_of(budget): partial(answer, stages, budget) for budget in context.budgets()}
    return {"batch": batch, **context.compare(runs, min(5, context.repeats)), **graphs_of(model)}


def measure_decode(context: CheckContext) -> Iterator[CheckStep]:
    eager = context.questions(context.model(graphs=False))
    graph = context.questions(context.model())
    runs = {"eager": eager, "graph": graph}
    for budget in (None, context.base.budgets[1]):
        yield f"token, {name_of(budget)}", partial(measure_decoded_token, context, runs, budget)
    long = 256 if context.on_card else 6
    for budget in context.budgets():
        yield f"{long} tokens, {name_of(budget)}", partial(_long_answer, context, graph, budget, long)


def measure_decoded_token(
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


def measure_busy(context: CheckContext, function: Callable[[], Any]) -> dict[str, Any]:
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
