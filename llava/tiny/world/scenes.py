"""Scenes of the synthetic dataset: 336-pixel images of many objects with exact labels.

An image is a busy background with sprites (40 objects of five themes, up to two of them large), colored
shapes and, sometimes, a sign with a word.

Everything is a function of an integer seed through `numpy.random.RandomState`, whose stream never changes.
Seeds below `HELD_OUT` are for training; benchmarks use seeds from `HELD_OUT` on, so no training run sees
their images. Decisions about a model in development use images from `DEVELOPMENT` on, which no bundled
benchmark has. Independent of questions, models and benchmark files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from .background import background
from .foreground import font, paint_shape, sprite
from .vocabulary import COLORS, POPULARITY, SHAPES, SPRITES, THEMES, WORDS

HELD_OUT = 1_000_000_000
DEVELOPMENT = 1_500_000_000
SIDE = 336


@dataclass(frozen=True)
class World:
    """Number and size of the objects of an image, in pixels. Ranges are minimum and exclusive maximum."""

    names: tuple[int, int] = (3, 7)  # draws of a sprite, some of which repeat
    single: float = 0.72  # probability that a sprite has one copy; others have 2 to 4
    heroes: int = 2  # sprites that may be large
    hero_share: float = 0.85  # probability of each of them
    hero_side: tuple[int, int] = (105, 151)
    side: tuple[int, int] = (42, 80)  # of the other sprites, uniform in its logarithm
    shape_side: tuple[int, int] = (42, 66)


WORLDS = {
    "standard": World(),  # of the training images and the bundled benchmarks
    "many-small": World(names=(7, 12), single=0.6, heroes=0, side=(28, 48), shape_side=(28, 44)),
    "few-large": World(
        names=(3, 5),
        single=0.9,
        heroes=3,
        hero_share=1.0,
        hero_side=(95, 136),
        side=(70, 100),
        shape_side=(60, 84),
    ),
}


@dataclass(frozen=True)
class SceneObject:
    """One labelled object: `kind` is sprite, shape or word; `box` is (left, top, right, bottom) in pixels."""

    kind: str
    name: str
    box: tuple[int, int, int, int]
    color: str | None = None

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass
class Scene:
    """Labels of an image: its seed, size (width, height), objects in painting order, and world."""

    seed: int
    size: tuple[int, int]
    objects: list[SceneObject] = field(default_factory=list)
    world: str = "standard"

    def count(self, name: str) -> int:
        """Count the objects with this name."""
        return sum(item.name == name for item in self.objects)

    def names(self, kind: str = "sprite") -> list[str]:
        """Return the distinct names of a kind, in order of first appearance."""
        return list(dict.fromkeys(item.name for item in self.objects if item.kind == kind))


def _place(rs: np.random.RandomState, taken: list, size: tuple[int, int], width: int, height: int):
    """Find a free box of `size` (width, height) with a margin of 3 pixels; return None after 40 tries."""
    for _ in range(40):
        left, top = rs.randint(2, width - size[0] - 1), rs.randint(2, height - size[1] - 1)
        box = (left, top, left + size[0], top + size[1])
        if all(
            box[2] + 3 < b[0] or b[2] + 3 < box[0] or box[3] + 3 < b[1] or b[3] + 3 < box[1] for b in taken
        ):
            return box
    return None


def _plan(rs: np.random.RandomState, world: World) -> list[tuple[str, str, int, str | None]]:
    """Choose (kind, name, side in pixels, color) of all objects to place, the largest first."""
    plan: list[tuple[str, str, int, str | None]] = []
    theme = list(THEMES)[rs.randint(len(THEMES))]
    names: list[str] = []
    for _ in range(rs.randint(*world.names)):
        name = (
            THEMES[theme][rs.randint(8)]
            if rs.rand() < 0.5
            else SPRITES[rs.choice(len(SPRITES), p=POPULARITY)]
        )
        if name not in names:
            names.append(name)
    heroes = rs.binomial(world.heroes, world.hero_share)
    for rank, name in enumerate(names):
        copies = 1 if rs.rand() < world.single else rs.randint(2, 5)
        for copy in range(copies):
            side = (
                rs.randint(*world.hero_side)
                if rank < heroes and copy == 0
                else int(round(math.exp(rs.uniform(*map(math.log, world.side)))))
            )
            plan.append(("sprite", name, side, None))
    for name in rs.permutation(SHAPES)[: rs.choice(4, p=[0.3, 0.35, 0.25, 0.1])]:
        color = list(COLORS)[rs.randint(len(COLORS))]
        plan.append(("shape", str(name), rs.randint(*world.shape_side), color))
    if rs.rand() < 0.35:
        plan.append(("word", WORDS[rs.randint(len(WORDS))], rs.randint(40, 52), None))
    return sorted(plan, key=lambda item: -item[2])


def draw(seed: int, world: str = "standard") -> tuple[Image.Image, Scene]:
    """Draw the image of a seed (about 15 ms).

    Args:
        seed: 0 or more; training uses seeds below `HELD_OUT`.
        world: A name of `WORLDS`.
    Returns:
        The RGB image and its `Scene`.
    """
    rs = np.random.RandomState(np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32))
    width, height = ((SIDE, SIDE), (SIDE, 252), (252, SIDE))[rs.choice(3, p=[0.7, 0.15, 0.15])]
    image = background(rs, width, height)
    scene, taken = Scene(seed, (width, height), world=world), []
    for kind, name, side, color in _plan(rs, WORLDS[world]):
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
            stamp = sprite(name).resize((side, side), Image.Resampling.BICUBIC)
            if rs.rand() < 0.5:
                stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            image.paste(stamp, box[:2], stamp)
        elif kind == "shape":
            paint_shape(pen, name, box, COLORS[color])
        else:
            pen.rectangle(box, fill=(250, 250, 245), outline=(20, 20, 20), width=3)
            pen.text((box[0] + 8 - left, box[1] + 7 - top), name, fill=(20, 20, 20), font=glyphs)
        scene.objects.append(SceneObject(kind, name, box, color))
    return image, scene
