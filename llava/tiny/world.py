"""The embedded world: busy 336-pixel pictures of things, with full knowledge of what is where.

    python -m llava.tiny.world --seed 7 --count 12 --output sheet.png       # look at it

A picture is a mosaic of unrelated textures strewn with clutter that no question asks about; on it lie sprites
(40 things of five themes, one of them sometimes large), coloured shapes and, sometimes, a sign with a word.
Things of a theme come together and some things are popular, so that POPE's adversarial and popular negatives
mean something. Backgrounds are busy on purpose: on smooth ones pure diversity finds every thing at once, and
importance is worth nothing.

Everything is a function of an integer seed through `numpy.random.RandomState` (a frozen stream). Seeds below
`HELD_OUT` are for training; benchmarks use seeds from `HELD_OUT` on, so no training run sees their pictures.
This module knows nothing about questions, models or files of benchmarks.
"""

from __future__ import annotations

import argparse
import functools
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HELD_OUT = 1_000_000_000
SIDE = 336
THEMES = {
    "farm": ("dog", "cat", "horse", "cow", "sheep", "pig", "chicken", "rabbit"),
    "wild": ("elephant", "giraffe", "lion", "zebra", "bear", "owl", "turtle", "penguin"),
    "street": ("car", "bus", "bicycle", "truck", "train", "airplane", "boat", "motorcycle"),
    "kitchen": ("apple", "banana", "pizza", "cake", "bread", "carrot", "pear", "hamburger"),
    "home": ("chair", "clock", "book", "umbrella", "guitar", "camera", "telephone", "key"),
}
SPRITES = tuple(name for names in THEMES.values() for name in names)
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
COLORS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (250, 215, 40),
    "green": (44, 150, 60),
    "blue": (40, 90, 220),
    "purple": (140, 60, 180),
    "pink": (245, 130, 190),
    "black": (25, 25, 25),
}
WORDS = (
    "STOP",
    "OPEN",
    "EXIT",
    "TAXI",
    "CAFE",
    "BANK",
    "SALE",
    "ZOO",
    "BUS",
    "HOTEL",
    "FIRE",
    "GAS",
    "MILK",
    "SHOP",
    "PARK",
    "FOOD",
    "HELP",
    "LOVE",
    "STAR",
    "HOME",
)
THINGS = SPRITES + SHAPES
REGIONS = (8, 20)  # textures of a background, from .. below
CLUTTER = (60, 110)  # strokes and scraps that no question asks about
HERO_SHARE, HERO_SIDE = 0.85, (105, 151)  # two chances of a large sprite, and its side in pixels
# Popularity: a few things are everywhere, most are not (weights 1/rank over a fixed shuffle of all sprites).
_ORDER = np.random.RandomState(20241218).permutation(len(SPRITES))
POPULARITY = np.zeros(len(SPRITES))
POPULARITY[_ORDER] = 1.0 / (3.0 + np.arange(len(SPRITES)))
POPULARITY /= POPULARITY.sum()


@dataclass(frozen=True)
class Thing:
    """One thing in a picture: `kind` is sprite, shape or word; `box` (left, top, right, bottom) in pixels."""

    kind: str
    name: str
    box: tuple[int, int, int, int]
    color: str | None = None

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass
class Scene:
    """What is where: the picture's seed, size (w, h) and things in the order they were painted."""

    seed: int
    size: tuple[int, int]
    things: list[Thing] = field(default_factory=list)

    def count(self, name: str) -> int:
        return sum(thing.name == name for thing in self.things)

    def names(self, kind: str = "sprite") -> list[str]:
        """Distinct names of a kind, in order of first appearance."""
        return list(dict.fromkeys(thing.name for thing in self.things if thing.kind == kind))


@functools.cache
def sprite(name: str) -> Image.Image:
    """The 64 x 64 RGBA picture of a sprite."""
    atlas = Image.open(Path(__file__).with_name("sprites") / "atlas.png").convert("RGBA")
    row, column = divmod(SPRITES.index(name), 8)
    return atlas.crop((64 * column, 64 * row, 64 * column + 64, 64 * row + 64))


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans Bold, as matplotlib ships it."""
    import matplotlib

    return ImageFont.truetype(
        Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf", size
    )


def _muted(rs: np.random.RandomState) -> np.ndarray:
    """A background colour: any hue, little saturation, so that it is no thing's colour."""
    grey = rs.randint(60, 200)
    return np.clip(grey + rs.randint(-38, 39, size=3), 0, 255).astype(np.float32)


def _texture(rs: np.random.RandomState, width: int, height: int) -> np.ndarray:
    """One of six textures, (height, width, 3) float32 in 0..255."""
    first, second = _muted(rs), _muted(rs)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    kind = rs.randint(6)
    if kind == 0:  # stripes
        angle, period = rs.uniform(0, math.pi), rs.uniform(6, 36)
        mix = 0.5 + 0.5 * np.sin((x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period))
    elif kind == 1:  # checks
        cell = rs.randint(6, 28)
        mix = ((x // cell + y // cell) % 2).astype(np.float32)
    elif kind == 2:  # dots
        cell = rs.randint(10, 28)
        mix = (
            ((x % cell) - cell / 2) ** 2 + ((y % cell) - cell / 2) ** 2 < (cell * rs.uniform(0.2, 0.45)) ** 2
        ) * 1.0
    elif kind == 3:  # coarse random tiles
        cell = rs.randint(5, 20)
        tiles = rs.rand(height // cell + 1, width // cell + 1)
        mix = np.kron(tiles, np.ones((cell, cell)))[:height, :width]
    elif kind == 4:  # clouds: three octaves of bilinear noise
        mix = np.zeros((height, width), np.float32)
        for octave, weight in ((4, 0.5), (9, 0.3), (24, 0.2)):
            noise = Image.fromarray((rs.rand(octave, octave) * 255).astype(np.uint8))
            mix += (
                weight
                / 255
                * np.asarray(noise.resize((width, height), Image.Resampling.BILINEAR), np.float32)
            )
    else:  # ripples
        cx, cy, period = rs.uniform(0, width), rs.uniform(0, height), rs.uniform(8, 30)
        mix = 0.5 + 0.5 * np.sin(np.hypot(x - cx, y - cy) * (2 * math.pi / period))
    mix = np.asarray(mix, np.float32)[..., None]
    return first * mix + second * (1 - mix)


def background(rs: np.random.RandomState, width: int, height: int) -> Image.Image:
    """A mosaic of 3 to 8 textures with clutter and pixel noise; RGB."""
    regions = rs.randint(*REGIONS)
    centers = rs.rand(regions, 2) * (width, height)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    nearest = np.argmin([(x - cx) ** 2 + (y - cy) ** 2 for cx, cy in centers], axis=0)
    canvas = np.zeros((height, width, 3), np.float32)
    for region in range(regions):
        mask = nearest == region
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):  # only the region's own rectangle is worth computing
            window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
            texture = _texture(rs, columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0])
            canvas[window] = np.where(mask[window][..., None], texture, canvas[window])
    canvas += rs.randint(-10, 11, size=(height, width, 1))
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(rs.randint(*CLUTTER)):
        color = tuple(int(v) for v in _muted(rs))
        cx, cy, size = rs.uniform(0, width), rs.uniform(0, height), rs.uniform(6, 34)
        kind = rs.randint(3)
        if kind == 0:
            angles = np.sort(rs.uniform(0, 2 * math.pi, size=rs.randint(3, 7)))
            pen.polygon([(cx + size * math.cos(a), cy + size * math.sin(a)) for a in angles], fill=color)
        elif kind == 1:
            pen.line(
                [(cx, cy), (cx + rs.uniform(-90, 90), cy + rs.uniform(-90, 90))],
                fill=color,
                width=rs.randint(1, 6),
            )
        else:
            pen.arc(
                [cx - size, cy - size, cx + size, cy + size],
                rs.randint(360),
                rs.randint(360),
                color,
                rs.randint(2, 6),
            )
    return image


def _paint_shape(
    pen: ImageDraw.ImageDraw, name: str, box: tuple[int, int, int, int], color: tuple[int, int, int]
) -> None:
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
        raise ValueError(f"unknown shape {name!r}")


def _place(rs: np.random.RandomState, taken: list, size: tuple[int, int], width: int, height: int):
    """A free box for something of `size` (w, h), or None after 40 tries; a little air around it."""
    for _ in range(40):
        left, top = rs.randint(2, width - size[0] - 1), rs.randint(2, height - size[1] - 1)
        box = (left, top, left + size[0], top + size[1])
        if all(
            box[2] + 3 < b[0] or b[2] + 3 < box[0] or box[3] + 3 < b[1] or b[3] + 3 < box[1] for b in taken
        ):
            return box
    return None


def _plan(rs: np.random.RandomState) -> list[tuple[str, str, int, str | None]]:
    """(kind, name, side in pixels, colour) of everything to place, the largest first."""
    plan: list[tuple[str, str, int, str | None]] = []
    theme = list(THEMES)[rs.randint(len(THEMES))]
    names: list[str] = []
    for _ in range(rs.randint(3, 7)):
        name = (
            THEMES[theme][rs.randint(8)]
            if rs.rand() < 0.5
            else SPRITES[rs.choice(len(SPRITES), p=POPULARITY)]
        )
        if name not in names:
            names.append(name)
    heroes = rs.binomial(2, HERO_SHARE)
    for rank, name in enumerate(names):
        copies = 1 if rs.rand() < 0.72 else rs.randint(2, 5)
        for copy in range(copies):
            side = (
                rs.randint(*HERO_SIDE)
                if rank < heroes and copy == 0
                else int(round(math.exp(rs.uniform(math.log(42), math.log(80)))))
            )
            plan.append(("sprite", name, side, None))
    for name in rs.permutation(SHAPES)[: rs.choice(4, p=[0.3, 0.35, 0.25, 0.1])]:
        color = list(COLORS)[rs.randint(len(COLORS))]
        plan.append(("shape", str(name), rs.randint(42, 66), color))
    if rs.rand() < 0.35:
        plan.append(("word", WORDS[rs.randint(len(WORDS))], rs.randint(40, 52), None))
    return sorted(plan, key=lambda item: -item[2])


def draw(seed: int) -> tuple[Image.Image, Scene]:
    """Draw the picture of a seed: (RGB image, Scene). Deterministic; about 15 ms."""
    rs = np.random.RandomState(np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32))
    width, height = ((SIDE, SIDE), (SIDE, 252), (252, SIDE))[rs.choice(3, p=[0.7, 0.15, 0.15])]
    image = background(rs, width, height)
    scene, taken = Scene(seed, (width, height)), []
    for kind, name, side, color in _plan(rs):
        if kind == "word":
            glyphs = font(side)
            left, top, right, bottom = glyphs.getbbox(name)
            size = (right - left + 16, bottom - top + 14)
        else:
            size = (side, side)
        box = _place(rs, taken, size, width, height) if size[0] < width - 4 and size[1] < height - 4 else None
        if box is None:
            continue
        taken.append(box)
        pen = ImageDraw.Draw(image)
        if kind == "sprite":
            picture = sprite(name).resize((side, side), Image.Resampling.BICUBIC)
            if rs.rand() < 0.5:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            image.paste(picture, box[:2], picture)
        elif kind == "shape":
            _paint_shape(pen, name, box, COLORS[color])
        else:
            pen.rectangle(box, fill=(250, 250, 245), outline=(20, 20, 20), width=3)
            pen.text((box[0] + 8 - left, box[1] + 7 - top), name, fill=(20, 20, 20), font=glyphs)
        scene.things.append(Thing(kind, name, box, color))
    return image, scene


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llava.tiny.world", description="Draw a contact sheet of the world."
    )
    parser.add_argument("--seed", type=int, default=HELD_OUT)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    columns = min(args.count, 4)
    sheet = Image.new("RGB", (columns * (SIDE + 8), -(-args.count // columns) * (SIDE + 8)), "white")
    for k in range(args.count):
        sheet.paste(draw(args.seed + k)[0], (k % columns * (SIDE + 8), k // columns * (SIDE + 8)))
    sheet.save(args.output)
    print(args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
