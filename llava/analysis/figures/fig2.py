"""Figure 2: the attention shift. Which places of the image the last prompt token looks at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llava.analysis.attention import AttentionStatistics
from llava.analysis.figures import drawing
from llava.analysis.figures.drawing import PUBLISHED, QUARTER_STYLES, Table, depth_share, label_layers
from llava.analysis.figures.kept import KeptQuarter
from llava.analysis.figures.scores import MEAN, PanelScore
from llava.eval.benchmarks import get_benchmark
from llava.eval.tables.published import published_figure
from llava.pruning import Pruner, get_pruner, scaled_layer

_BARS = 48  # groups of neighbors that the paper draws


def shown_layer(depth: int) -> int:
    """Return the layer of panel (a), from 0: index 1 of 32, scaled to the decoder's depth."""
    return scaled_layer(2, 32, depth) - 1


def tables(statistics: AttentionStatistics) -> dict[str, Table]:
    """Return the data of panels (a) and (b), and the published one."""
    curves, layer = statistics.curves["last"], shown_layer(statistics.layers)
    rows = [
        [token, int(count), float(share), float(mean)]
        for token, (count, share, mean) in enumerate(
            zip(curves.counts[layer], curves.frequency[layer], curves.mean[layer], strict=True)
        )
    ]
    quarters = ["q1", "q2", "q3", "q4"]
    proportions = [["ours", number, *map(float, row)] for number, row in enumerate(curves.quartiles)]
    for number, values in published_figure("figure-2b").rows.items():
        proportions.append(["published", number, *(value / 100 for value in values)])
    return {
        "frequency": (["token", "samples_selected", "frequency", "mean_last_attention"], rows),
        "quartiles": (["source", "layer", *quarters], proportions),
    }


def draw_frequency(upper: Any, lower: Any, statistics: AttentionStatistics) -> None:
    """Panel (a): how often a place is in the top quarter, and its mean attention."""
    curves, layer = statistics.curves["last"], shown_layer(statistics.layers)
    tokens, bars = curves.tokens, min(_BARS, curves.tokens)
    edges = np.linspace(0, tokens, bars + 1)
    group = np.arange(tokens) * bars // tokens
    heights = np.bincount(group, curves.frequency[layer]) / np.bincount(group)
    upper.bar(
        edges[:-1], heights, np.diff(edges), align="edge", color="#56b4e9", edgecolor="white", linewidth=0.3
    )
    upper.axhline(0.25, color="#444444", linestyle=":", linewidth=1)
    upper.set(
        ylabel="selection frequency",
        ylim=(0, max(1.0, heights.max())),
        title="(a) last attention",
    )
    lower.plot(np.arange(tokens), curves.mean[layer], color="#d55e00", linewidth=0.8)
    lower.set(xlabel=f"visual token, 0 to {tokens - 1}", ylabel="mean attention", yscale="log")
    for axes in (upper, lower):
        axes.set(xlim=(0, tokens), xticks=[round(tokens * part / 4) for part in range(5)])
    upper.tick_params(axis="x", labelbottom=False)


def draw_quartiles(axes: Any, statistics: AttentionStatistics) -> None:
    """Panel (b): the share of the selected tokens in each quarter of the image, by layer."""
    published = published_figure("figure-2b").rows
    depth = statistics.layers
    quartiles = statistics.curves["last"].quartiles
    places = [depth_share(layer, depth) for layer in range(depth)]
    behind = [depth_share(layer, len(published)) for layer in published]
    for quarter, (name, color, marker) in enumerate(QUARTER_STYLES):
        curve = [values[quarter] / 100 for values in published.values()]
        axes.plot(behind, curve, color=color, alpha=0.75, **PUBLISHED)
        axes.plot(places, quartiles[:, quarter], color=color, marker=marker, markersize=4, label=name)
    axes.axhline(0.25, color="#444444", linestyle=":", linewidth=1)
    label_layers(axes, depth)
    axes.set(ylabel="share of the selected tokens", title="(b) by quarter of the image", ylim=(0, None))


def pruners(depth: int, first: int) -> list[Pruner]:
    """Return the settings of panel (c): no pruning, and every quarter from at most nine layers on."""
    layers = [layer for layer in range(0, depth, max(1, depth // 8)) if layer >= first]
    quarters = [KeptQuarter(layer=layer, quarter=quarter) for layer in layers for quarter in range(4)]
    return [get_pruner("none"), *quarters]


def score_tables(scores: list[PanelScore]) -> dict[str, Table]:
    """Return the data of panel (c), and the published one."""
    rows: list[list[Any]] = []
    for one in scores:
        place = [one.pruner.layer, one.pruner.quarter] if isinstance(one.pruner, KeptQuarter) else ["", "all"]
        rows.append(["ours", *place, one.benchmark, one.score, one.ci_low, one.ci_high, one.questions])
    for layer, values in published_figure("figure-2c").rows.items():
        for quarter, value in enumerate(values):
            rows.append(["published", layer, quarter, MEAN, value, None, None, None])
    header = ["source", "layer", "quarter", "benchmark", "score", "ci_low", "ci_high", "questions"]
    return {"quarters": (header, rows)}


def draw_scores(axes: Any, scores: list[PanelScore], depth: int) -> None:
    """Panel (c): the mean score if only one quarter is kept from a layer on."""
    last = scores[-1].benchmark  # the mean, or the only benchmark
    published = published_figure("figure-2c").rows
    behind = [depth_share(layer, len(published)) for layer in published]
    for quarter, (_, color, marker) in enumerate(QUARTER_STYLES):
        curve = [values[quarter] for values in published.values()]
        axes.plot(
            behind, [np.nan if one is None else one for one in curve], color=color, alpha=0.75, **PUBLISHED
        )
        ours = [
            one
            for one in scores
            if one.benchmark == last and isinstance(one.pruner, KeptQuarter) and one.pruner.quarter == quarter
        ]
        shift = 0.012 * (quarter - 1.5)  # whiskers are drawn side by side
        places = [depth_share(one.pruner.layer, depth) + shift for one in ours]
        axes.plot(places, [one.score for one in ours], color=color, marker=marker, markersize=4)
        for place, one in zip(places, ours, strict=True):
            axes.plot([place, place], [one.ci_low, one.ci_high], color=color, linewidth=1)
    (full,) = [one.score for one in scores if one.benchmark == last and one.pruner.name == "none"]
    axes.axhline(full, color="#444444", linestyle=":", linewidth=1)
    label_layers(axes, depth)
    axes.set(ylabel="score (%)", title="(c) one quarter kept")


def draw(
    statistics: AttentionStatistics, scores: list[PanelScore], about: list[str], folder: Path
) -> tuple[list[str], str]:
    """Draw and write Figure 2; return its files and its caption."""
    depth = statistics.layers
    layer = shown_layer(depth)
    seen = statistics.means["last"].sum(1)[layer]
    text = [
        *about,
        f"(a) Layer {layer} (from 0), where the last prompt token gives {100 * seen:.2g} % of its attention "
        "to the image. Above: share of samples in which a token is in the top quarter (means of neighbors; "
        "dotted: evenly spread). Below: mean attention.",
        "(b) Share of the top quarter in each quarter of the image.",
    ]
    if scores:
        text += [
            f"(c) {_names(scores)} if only one quarter of the visual tokens is kept from a layer on, "
            "positions renumbered; whiskers: 95% intervals; dotted: all tokens."
        ]
    text += ["Dashed: LLaVA-1.5-7B, measured from the paper's picture, first to last of 32 layers"]
    text[-1] += "; in (c) the mean of GQA, TextVQA, POPE, MME / 20." if scores else "."
    caption = " ".join([*text, drawing.depth_note(depth)]).strip()
    with drawing.new_figure(2.7, caption) as figure:
        grid = figure.add_gridspec(2, 2 + bool(scores))
        draw_frequency(figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0]), statistics)
        axes = figure.add_subplot(grid[:, 1])
        draw_quartiles(axes, statistics)
        axes.legend(loc="upper right")
        if scores:
            draw_scores(figure.add_subplot(grid[:, 2]), scores, depth)
        data = tables(statistics) | (score_tables(scores) if scores else {})
        return drawing.write_figure(figure, folder, "fig2", caption, data), caption


def _names(scores: list[PanelScore]) -> str:
    """Return what the last score is: the mean of benchmarks, or the score of the only one."""
    names = [name for name in dict.fromkeys(one.benchmark for one in scores) if name != MEAN]
    titles = [get_benchmark(name).title + (" / 20" if name == "mme" else "") for name in names]
    return f"Mean score of {', '.join(titles)}" if len(names) > 1 else f"Score on {titles[0]}"
