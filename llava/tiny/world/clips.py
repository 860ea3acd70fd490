"""Clips of the synthetic dataset: 224-pixel videos of objects that enter, leave, move and change color.

    clip = draw_clip(7)
    frames = [clip.frame(number) for number in range(clip.length)]     # RGB images

Everything is a function of an integer seed, as in `scenes`; seeds from `HELD_OUT` on are for benchmarks. Each
clip has one background, which moves in a quarter of the clips. Independent of questions, models and files.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .background import background
from .foreground import paint_shape, sprite
from .vocabulary import COLORS, SHAPES, SPRITES

CLIP_SIDE = 224
FRAMES_PER_SECOND = 8
LENGTHS = (20, 33)  # frames of a clip: minimum, exclusive maximum
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PANNING = 0.25  # probability that the background moves
SLIDING = 0.15  # share of the clip in which an object enters or leaves
_MARGIN = 3  # pixels between objects, at all times
_INSTANTS = np.linspace(0, 1, 17)


@dataclass(frozen=True)
class ClipObject:
    """One labelled object of a clip.

    Attributes:
        kind: sprite or shape; a shape has a color.
        place: (left, top) in pixels: at the start if it moves, else where it stays.
        role: What it does: "stays", "moves", "enters", "leaves" or "changes" (its color).
        direction: Where it moves to, or the edge through which it enters or leaves.
        distance: Pixels that it moves.
        when: Time in [0, 1] at which it enters, leaves or changes.
    """

    kind: str
    name: str
    side: int
    place: tuple[int, int]
    role: str
    color: str | None = None
    new_color: str | None = None
    direction: str = ""
    distance: int = 0
    when: float = 0.0
    mirrored: bool = False

    def corner(self, time: float) -> tuple[float, float] | None:
        """Return (left, top) at a time in [0, 1]; None while the object is not in the clip."""
        left, top = self.place
        if self.role == "moves":
            way = self.distance * min(1.0, max(0.0, (time - 0.1) / 0.8))
        elif self.role in ("enters", "leaves"):
            hidden = (time - self.when) / SLIDING  # share of the way out
            hidden = 1 - hidden if self.role == "enters" else hidden
            if hidden >= 1:
                return None
            x, y = DIRECTIONS[self.direction]
            out = {-1: left + self.side, 1: CLIP_SIDE - left}.get(x, 0) + {
                -1: top + self.side,
                1: CLIP_SIDE - top,
            }.get(y, 0)
            way = max(0.0, hidden) * out
        else:
            return left, top
        x, y = DIRECTIONS[self.direction]
        return left + x * way, top + y * way

    def color_at(self, time: float) -> str | None:
        """Return the color at a time in [0, 1]."""
        return self.new_color if self.role == "changes" and time >= self.when else self.color


@dataclass(frozen=True)
class Clip:
    """A clip: its seed, number of frames, objects, and the pixels that the background moves in all."""

    seed: int
    length: int
    objects: tuple[ClipObject, ...]
    pan: tuple[int, int]

    def time(self, frame: int) -> float:
        """Return the time of a frame: 0 for the first, 1 for the last."""
        return frame / (self.length - 1)

    def frame(self, frame: int) -> Image.Image:
        """Draw one frame."""
        time = self.time(frame)
        left, top = (round(abs(way) * (time if way > 0 else 1 - time)) for way in self.pan)
        image = _background(self.seed, self.pan).crop((left, top, left + CLIP_SIDE, top + CLIP_SIDE))
        pen = ImageDraw.Draw(image)
        for item in self.objects:
            corner = item.corner(time)
            if corner is None:
                continue
            x, y = (round(value) for value in corner)
            if item.kind == "sprite":
                stamp = _stamp(item.name, item.side, item.mirrored)
                image.paste(stamp, (x, y), stamp)
            else:
                box = (x, y, x + item.side, y + item.side)
                paint_shape(pen, item.name, box, COLORS[item.color_at(time)])
        return image

    def names(self, role: str | None = None) -> list[str]:
        """Return the names of the objects, or of those with a role."""
        return [item.name for item in self.objects if role in (None, item.role)]


def _random(seed: int, stream: int) -> np.random.RandomState:
    return np.random.RandomState(np.array([seed & 0xFFFFFFFF, seed >> 32, stream], dtype=np.uint32))


@functools.lru_cache(2)
def _background(seed: int, pan: tuple[int, int]) -> Image.Image:
    return background(_random(seed, 2), *(CLIP_SIDE + abs(way) for way in pan))


@functools.lru_cache(256)
def _stamp(name: str, side: int, mirrored: bool) -> Image.Image:
    stamp = sprite(name).resize((side, side), Image.Resampling.BICUBIC)
    return stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else stamp


def _overlaps(first: ClipObject, second: ClipObject) -> bool:
    for time in _INSTANTS:
        a, b = first.corner(time), second.corner(time)
        if a is None or b is None:
            continue
        apart = (
            a[axis] + first.side + _MARGIN < b[axis] or b[axis] + second.side + _MARGIN < a[axis]
            for axis in (0, 1)
        )
        if not any(apart):
            return True
    return False


def _try(rs: np.random.RandomState, kind: str, name: str, role: str) -> ClipObject:
    """Draw one object at a random place; the caller keeps it if it overlaps no other."""
    side = int(rs.randint(44, 66))
    direction = list(DIRECTIONS)[rs.randint(4)]
    distance = int(rs.randint(75, 116)) if role == "moves" else 0
    low, high = np.array([2, 2]), np.array([CLIP_SIDE - side - 2] * 2)
    if distance:
        x, y = DIRECTIONS[direction]
        low += distance * np.array([x < 0, y < 0])
        high -= distance * np.array([x > 0, y > 0])
    place = tuple(int(rs.randint(a, max(a + 1, b))) for a, b in zip(low, high, strict=True))
    if role in ("enters", "leaves"):  # through the nearest edge
        ways = {"left": place[0], "right": CLIP_SIDE - side - place[0]}
        ways |= {"up": place[1], "down": CLIP_SIDE - side - place[1]}
        direction = min(ways, key=ways.__getitem__)
    colors = [str(color) for color in rs.permutation(list(COLORS))[:2]]
    when = {"enters": rs.uniform(0.15, 0.6), "leaves": rs.uniform(0.25, 0.7)}.get(
        role, rs.uniform(0.35, 0.65)
    )
    is_shape = kind == "shape"
    return ClipObject(
        kind,
        name,
        side,
        place,
        role,
        colors[0] if is_shape else None,
        colors[1] if role == "changes" else None,
        direction if role in ("moves", "enters", "leaves") else "",
        distance,
        float(when) if role in ("enters", "leaves", "changes") else 0.0,
        bool(rs.rand() < 0.5),
    )


def draw_clip(seed: int) -> Clip:
    """Draw the clip of a seed: two to six different objects, at most one of each role but "stays"."""
    rs = _random(seed, 1)
    length = int(rs.randint(*LENGTHS))
    chances = {"moves": 0.8, "changes": 0.6, "enters": 0.7, "leaves": 0.7}
    roles = [role for role, chance in chances.items() if rs.rand() < chance]
    roles += ["stays"] * int(rs.randint(1, 3))
    sprites, shapes = (list(map(str, rs.permutation(names))) for names in (SPRITES, SHAPES))
    objects: list[ClipObject] = []
    for role in roles:
        kind = "shape" if role == "changes" or rs.rand() < 0.3 else "sprite"
        name = (shapes if kind == "shape" else sprites).pop()
        tries = (_try(rs, kind, name, role) for _ in range(60))
        found = next((one for one in tries if not any(_overlaps(one, other) for other in objects)), None)
        if found is not None:
            objects.append(found)
    pan = (0, 0)
    if rs.rand() < PANNING:
        pan = tuple(int(way) for way in rs.randint(20, 61, size=2) * rs.choice([-1, 1], size=2))
    return Clip(seed, length, tuple(objects), pan)
