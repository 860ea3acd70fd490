"""Figure 2: the attention shift. Which places of the image the last prompt token looks at."""

from __future__ import annotations

from typing import Any

import numpy as np

from llava.analysis.attention import AttentionStatistics
from llava.analysis.figures.drawing import PUBLISHED, QUARTER_STYLES, depth_share, label_layers
from llava.eval.tables.published import published_figure
from llava.pruning import scaled_layer

_BARS = 48  # groups of neighbors that the paper draws
Table = tuple[list[str], list[list[Any]]]


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
        title="(a) top quarter by last attention",
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
