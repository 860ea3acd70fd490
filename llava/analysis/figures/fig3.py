"""Figure 3: the dispersion of attention. How many tokens share it, by kind of attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llava.analysis.attention import AttentionStatistics, Curves
from llava.analysis.figures import drawing
from llava.analysis.figures.drawing import KIND_STYLES, PUBLISHED, Table, depth_share, label_layers
from llava.analysis.figures.fig2 import shown_layer
from llava.analysis.figures.kept import SOURCES, KeptByScore
from llava.analysis.figures.scores import MEAN, PanelScore
from llava.eval.benchmarks import get_benchmark
from llava.eval.tables.published import published_figure
from llava.pruning import Pruner, get_pruner, scaled_layer

KINDS = ("cls", "last", "equi_last")
BUDGET = 128  # tokens of a crop of 576
_SHARES = np.linspace(0, 1, 101)


def _layer(kind: str, curves: Curves, depth: int) -> int:
    """Return the row of a kind's curves that panels (a) and (b) show."""
    return 0 if kind == "cls" else shown_layer(depth)


def tables(statistics: AttentionStatistics) -> dict[str, Table]:
    """Return the data of the panels about attention, and the published one."""
    cumulative: list[list[Any]] = []
    densities: list[list[Any]] = []
    entropies: list[list[Any]] = []
    for kind in KINDS:
        curves = statistics.curves[kind]
        for layer in range(len(curves.mean)):
            name = "tower" if kind == "cls" else layer
            for share, value in zip(_SHARES, curves.cumulated(_SHARES)[layer], strict=True):
                cumulative.append(["ours", kind, name, float(share), float(value)])
            pooled = curves.density[layer].sum()
            for number, count in enumerate(curves.density[layer]):
                low = number / curves.density.shape[1]
                row = [kind, name, low, int(count), float(count / pooled), float(curves.maximum[layer])]
                densities.append(row)
            row = [kind, name, float(curves.entropy[layer]), float(curves.relative_entropy[layer])]
            entropies.append(row)
    published = published_figure("figure-3a")
    for kind, values in published.rows.items():
        for share, value in zip(published.columns, values, strict=True):
            cumulative.append(["published", kind, "", share / 100, value / 100])
    return {
        "cumulative": (["source", "kind", "layer", "share_of_tokens", "share_of_attention"], cumulative),
        "densities": (["kind", "layer", "bin_low", "count", "proportion", "maximum"], densities),
        "entropy": (["kind", "layer", "entropy_nats", "entropy_over_ln_n"], entropies),
    }


def draw_cumulative(axes: Any, statistics: AttentionStatistics) -> None:
    """Panel (a): the attention that the strongest tokens receive together."""
    published = published_figure("figure-3a")
    for kind in KINDS:
        name, color, _ = KIND_STYLES[kind]
        curves = statistics.curves[kind]
        behind = [value / 100 for value in published.rows[kind]]
        axes.plot([share / 100 for share in published.columns], behind, color=color, alpha=0.75, **PUBLISHED)
        curve = curves.cumulated(_SHARES)[_layer(kind, curves, statistics.layers)]
        axes.plot(_SHARES, curve, color=color, linewidth=1.6, label=name)
    axes.plot([0, 1], [0, 1], color="#444444", linestyle=":", linewidth=1)
    axes.set(xlabel="share of visual tokens, strongest first", ylabel="share of attention")
    axes.set(title="(a) cumulated attention", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(loc="lower right")


def draw_densities(axes: Any, statistics: AttentionStatistics) -> None:
    """Panel (b): how many tokens have which share of the largest attention."""
    published = published_figure("figure-3b")
    peak = published.columns.index("peak_proportion")
    for kind in KINDS:
        name, color, marker = KIND_STYLES[kind]
        curves = statistics.curves[kind]
        counts = curves.density[_layer(kind, curves, statistics.layers)]
        edges = np.linspace(0, 1, len(counts) + 1)
        heights = np.where(counts > 0, counts / counts.sum(), np.nan)
        axes.stairs(heights, edges, color=color, linewidth=1.1, baseline=None, label=name)
        axes.plot(0, published.rows[kind][peak], color=color, marker=marker, markersize=5,
                  markerfacecolor="white", clip_on=False, zorder=5)  # fmt: skip
    axes.set(xlabel="attention / largest attention", ylabel="proportion of tokens", yscale="log", xlim=(0, 1))
    axes.set(title="(b) densities")


def draw_entropy(axes: Any, statistics: AttentionStatistics) -> None:
    """Panel (c): entropy by layer; 1 is equal attention to all tokens."""
    depth = statistics.layers
    for kind in KINDS:
        name, color, marker = KIND_STYLES[kind]
        values = statistics.curves[kind].relative_entropy
        if kind == "cls":
            axes.axhline(values[0], color=color, linewidth=1.6)
            continue
        places = [depth_share(layer, depth) for layer in range(depth)]
        axes.plot(places, values, color=color, marker=marker, markersize=4, label=name)
    label_layers(axes, depth)
    axes.set(ylabel="entropy / ln N", title="(c) entropy", ylim=(None, 1.005))


def pruners(depth: int, patches: int, seed: int) -> list[Pruner]:
    """Return the settings of panel (d): no pruning, and the budget by every score, where FastV prunes.

    Args:
        patches: visual tokens of a crop; the budget is the same share of them.
        seed: of the random choice.
    """
    budget = max(1, round(BUDGET * patches / 576))
    layer = scaled_layer(2, 32, depth)
    kept = [KeptByScore(tokens=budget, seed=seed, source=source, layer=layer) for source in SOURCES]
    return [get_pruner("none"), *kept]


def score_tables(scores: list[PanelScore]) -> dict[str, Table]:
    """Return the data of panel (d), and the published one."""
    rows: list[list[Any]] = []
    for one in scores:
        kind, layer = (
            (one.pruner.source, one.pruner.layer) if isinstance(one.pruner, KeptByScore) else ("all", "")
        )
        tokens = one.pruner.tokens
        rows.append(
            ["ours", kind, layer, tokens, one.benchmark, one.score, one.ci_low, one.ci_high, one.questions]
        )
    for name, kind, value in _published_scores():
        rows.append(["published", kind, None, BUDGET, name, value, None, None, None])
    header = ["source", "kind", "layer", "tokens", "benchmark", "score", "ci_low", "ci_high", "questions"]
    return {"budget": (header, rows)}


def _published_scores() -> list[tuple[str, str, float]]:
    """Return (benchmark, kind, score) of the paper's bars, MME / 20."""
    published = published_figure("figure-3c")
    names = [str(column).removesuffix("_over_20") for column in published.columns]
    return [
        (name, str(kind), value)
        for kind, values in published.rows.items()
        for name, value in zip(names, values, strict=True)
        if value is not None
    ]


def draw_scores(axes: Any, scores: list[PanelScore]) -> None:
    """Panel (d): scores at one budget, by the score that tokens are chosen by."""
    names = [name for name in dict.fromkeys(one.benchmark for one in scores) if name != MEAN]
    published = {(name, kind): value for name, kind, value in _published_scores()}
    for number, name in enumerate(names):
        (full,) = [one.score for one in scores if one.benchmark == name and one.pruner.name == "none"]
        axes.plot([number - 0.4, number + 0.4], [full, full], color="#444444", linestyle=":", linewidth=1)
        for one in scores:
            if one.benchmark != name or not isinstance(one.pruner, KeptByScore):
                continue
            label, color, marker = KIND_STYLES[one.pruner.source]
            place = number + 0.2 * (SOURCES.index(one.pruner.source) - 1.5)
            axes.plot([place, place], [one.ci_low, one.ci_high], color=color, linewidth=1.2)
            axes.plot(place, one.score, color=color, marker=marker, markersize=5, linestyle="",
                      label=None if number else label)  # fmt: skip
            if (value := published.get((name, one.pruner.source))) is not None:
                axes.plot(place, value, color=color, marker=marker, markersize=5, markerfacecolor="white")
    titles = [get_benchmark(name).title + (" / 20" if name == "mme" else "") for name in names]
    axes.set_xticks(range(len(names)), titles)
    axes.set(ylabel="score (%)", title="(d) pruned inside the decoder", xlim=(-0.5, len(names) - 0.5))
    axes.legend(ncols=2, columnspacing=0.9, handletextpad=0.3)


def draw(
    statistics: AttentionStatistics, scores: list[PanelScore], about: list[str], folder: Path
) -> tuple[list[str], str]:
    """Draw and write Figure 3; return its files and its caption."""
    layer = shown_layer(statistics.layers)
    text = [
        *about,
        "[CLS]: attention in the vision tower. Last: of the last prompt token, in (a) and (b) in decoder "
        f"layer {layer} (from 0). Equi last: the same with all visual keys at the position of the query.",
        "(a) Attention that the strongest tokens receive together.",
        "(b) Densities of attention divided by its largest value, 200 bins; open markers: the paper's first.",
        "(c) Entropy; 1 is equal attention to all tokens.",
    ]
    if scores:
        one = scores[-1].pruner
        text += [
            f"(d) {one.tokens} tokens per crop kept by each score before layer {one.layer}, at their "
            "positions; whiskers: 95% intervals; dotted: all tokens; open markers: the paper."
        ]
    text += ["Dashed: LLaVA-1.5-7B, measured from the paper's picture."]
    caption = " ".join([*text, drawing.depth_note(statistics.layers)]).strip()
    with drawing.new_figure(4.9 if scores else 2.7, caption) as figure:
        panels = list(figure.subplots(*((2, 2) if scores else (1, 3))).flat)
        for axes, function in zip(panels, (draw_cumulative, draw_densities, draw_entropy), strict=False):
            function(axes, statistics)
        if scores:
            draw_scores(panels[3], scores)
        data = tables(statistics) | (score_tables(scores) if scores else {})
        return drawing.write_figure(figure, folder, "fig3", caption, data), caption
