"""Foreground of the synthetic dataset: sprites, colored shapes and the font of signs."""

from __future__ import annotations

import functools
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .vocabulary import SHAPES, SPRITES


@functools.cache
def sprite(name: str) -> Image.Image:
    """Return the 64 x 64 RGBA image of a sprite."""
    atlas = Image.open(Path(__file__).with_name("sprites") / "atlas.png").convert("RGBA")
    row, column = divmod(SPRITES.index(name), 8)
    return atlas.crop((64 * column, 64 * row, 64 * column + 64, 64 * row + 64))


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans Bold, which matplotlib ships (extra tiny), at `size` pixels."""
    import matplotlib

    return ImageFont.truetype(
        Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf", size
    )


def paint_shape(
    pen: ImageDraw.ImageDraw, name: str, box: tuple[int, int, int, int], color: tuple[int, int, int]
) -> None:
    """Paint a shape of `SHAPES` that fills the square `box` (left, top, right, bottom)."""
    left, top, right, bottom = box
    cx, cy, radius = (left + right) / 2, (top + bottom) / 2, (right - left) / 2
    edge = (245, 245, 245)

    def at(k: int, n: int, r: float):
        angle = 2 * math.pi * k / n - math.pi / 2
        return cx + r * math.cos(angle), cy + r * math.sin(angle)

    if name == "circle":
        pen.ellipse(box, fill=color, outline=edge, width=2)
    elif name == "square":
        pen.rectangle(box, fill=color, outline=edge, width=2)
    elif name == "ring":
        pen.ellipse(box, outline=color, width=max(6, int(radius * 0.4)))
    elif name == "cross":
        arm = radius * 0.36
        pen.polygon(
            [
                (cx - arm, top),
                (cx + arm, top),
                (cx + arm, cy - arm),
                (right, cy - arm),
                (right, cy + arm),
                (cx + arm, cy + arm),
                (cx + arm, bottom),
                (cx - arm, bottom),
                (cx - arm, cy + arm),
                (left, cy + arm),
                (left, cy - arm),
                (cx - arm, cy - arm),
            ],
            fill=color,
            outline=edge,
        )
    elif name == "triangle":
        pen.polygon([(cx, top), (right, bottom), (left, bottom)], fill=color, outline=edge)
    elif name == "diamond":
        pen.polygon(
            [(cx, top), (cx + radius * 0.72, cy), (cx, bottom), (cx - radius * 0.72, cy)],
            fill=color,
            outline=edge,
        )
    elif name == "star":
        pen.polygon(
            [at(k, 10, radius if k % 2 == 0 else radius * 0.42) for k in range(10)], fill=color, outline=edge
        )
    elif name == "heart":
        curve = [t * 2 * math.pi / 40 for t in range(40)]
        pen.polygon(
            [
                (
                    cx + radius * math.sin(t) ** 3,
                    cy
                    - radius
                    * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
                    / 17,
                )
                for t in curve
            ],
            fill=color,
            outline=edge,
        )
    else:
        raise ValueError(f"shape {name!r}: unknown. Choose from {', '.join(SHAPES)}.")
