"""How figures look, and how they are written: PNG, SVG and the data as CSV. matplotlib is imported on use."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llava.eval.store.atomic import write_atomically
from llava.table import csv_text

# Colors of Okabe and Ito, which most color-blind people can tell apart; line styles and markers repeat them.
KIND_STYLES = {
    "cls": ("[CLS]", "#0072b2", "o"),
    "last": ("last", "#d55e00", "s"),
    "equi_last": ("equi last", "#009e73", "^"),
    "random": ("random", "#7f7f7f", "D"),
}
QUARTER_STYLES = (
    ("first quarter", "#0072b2", "o"),
    ("second quarter", "#56b4e9", "s"),
    ("third quarter", "#e69f00", "^"),
    ("last quarter", "#d55e00", "D"),
)
Table = tuple[list[str], list[list[Any]]]  # header and rows of a CSV file
PUBLISHED = {"linestyle": (0, (4, 2.5)), "linewidth": 1.0}
LEGEND = 0.25  # inches of a legend below all panels
_WIDTH = 130  # characters of a caption's line in a figure of 7.2 inches
_STYLE = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "font.sans-serif": ["DejaVu Sans", "Arial"],
    "svg.fonttype": "none",  # text stays text
}
NO_MATPLOTLIB = "figures need matplotlib, which is not installed. Run: pip install 'vispruner[plot]'"


def check_matplotlib() -> None:
    """Raise OSError that names the extra if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise OSError(NO_MATPLOTLIB)


@contextmanager
def new_figure(height: float, caption: str) -> Iterator[Any]:
    """Yield a figure for print, 7.2 inches wide, with a caption below; within, all text has one style."""
    import matplotlib
    from matplotlib.figure import Figure

    lines = textwrap.wrap(caption, _WIDTH)
    below = 0.128 * len(lines) + 0.1  # inches
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, height + below), dpi=200, layout="constrained")
        share = below / (height + below)
        figure.get_layout_engine().set(rect=(0, share, 1, 1 - share), w_pad=0.06, h_pad=0.06)
        figure.text(
            0.012,
            share - 0.04 / (height + below),
            literal("\n".join(lines)),
            va="top",
            fontsize=7.5,
        )
        yield figure


def write_figure(
    figure: Any,
    folder: Path,
    name: str,
    caption: str,
    tables: Mapping[str, Table],
) -> list[str]:
    """Write NAME.png, NAME.svg, the caption as NAME.md, and a CSV per table (header, rows); return the paths.

    Equal figures give equal files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, str | bytes] = {**render(figure, name), f"{name}.md": caption + "\n"}
    for table, (header, rows) in tables.items():
        contents[f"{table}.csv"] = csv_text(header, rows)
    for file, content in contents.items():
        write_atomically(folder / file, content)
    return [str(folder / file) for file in contents]


def render(figure: Any, name: str) -> dict[str, str | bytes]:
    """Return NAME.png and NAME.svg."""
    import matplotlib

    found: dict[str, str | bytes] = {}
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        for form, facts in (("png", ("Software",)), ("svg", ("Creator", "Date"))):
            out = io.BytesIO()
            figure.savefig(out, format=form, metadata=dict.fromkeys(facts))
            found[f"{name}.{form}"] = out.getvalue()
    return found


def blocks_above_legend(
    figure: Any, count: int, styles: Sequence[tuple[str, tuple[int, int, int], tuple[int, int, int] | None]]
) -> list[Any]:
    """Divide a figure into `count` blocks, one below the other, above a legend of patches; return the blocks.

    Args:
        styles: Label, RGB of the frame, and of the area (None: white), of every entry.
    """
    from matplotlib.patches import Patch

    colors = [[tuple(value / 255 for value in one or (255,) * 3) for one in style[1:]] for style in styles]
    handles = [
        Patch(label=style[0], edgecolor=edge, facecolor=face, linewidth=1.5)
        for style, (edge, face) in zip(styles, colors, strict=True)
    ]
    share = count * LEGEND / (figure.get_figheight() - LEGEND)
    *blocks, last = figure.subfigures(count + 1, 1, height_ratios=[*[1] * count, share])
    last.legend(handles=handles, loc="center left", ncols=len(handles), handlelength=1.2)
    return blocks


def literal(text: str) -> str:
    """Return a text in which matplotlib reads no formula."""
    return text.replace("$", r"\$")


def depth_share(layer: int, depth: int) -> float:
    """Return where a layer is between the first (0) and the last (1), so that decoders can be compared."""
    return layer / (depth - 1) if depth > 1 else 0.0


def label_layers(axes: Any, depth: int) -> None:
    """Label an axis of `depth_share` with the layers of a decoder."""
    shown = range(depth) if depth <= 8 else range(0, depth, 4)
    axes.set_xticks([depth_share(layer, depth) for layer in shown], [str(layer) for layer in shown])
    axes.set_xlabel(f"decoder layer, 0 to {depth - 1}")
    axes.set_xlim(-0.06, 1.06)


def depth_note(depth: int, published: int = 32) -> str:
    """Return what a decoder that is much shallower than the published one can and cannot show."""
    if depth > published // 2:
        return ""
    return (
        f"This decoder has {depth} layers: the figure shows where a small trained model looks, and how that "
        f"differs between its {depth} layers. It cannot show how a shift builds up over {published} layers, "
        "and neither the size of the effects nor the scores can be compared with LLaVA-1.5-7B's."
    )
