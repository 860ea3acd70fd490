"""Backgrounds of the synthetic dataset: a mosaic of unrelated textures with clutter and pixel noise.

Backgrounds are busy on purpose: on smooth ones, removing duplicates alone finds every object, and selecting
by importance adds nothing.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

REGIONS = (8, 20)  # textures per background: minimum, exclusive maximum
CLUTTER = (60, 110)  # strokes and polygons per background, never asked about: minimum, exclusive maximum


def _muted(rs: np.random.RandomState) -> np.ndarray:
    """Sample a background color: any hue at low saturation, so that it is not the color of a shape."""
    gray = rs.randint(60, 200)
    return np.clip(gray + rs.randint(-38, 39, size=3), 0, 255).astype(np.float32)


def _texture(rs: np.random.RandomState, width: int, height: int) -> np.ndarray:
    """Paint one of six textures; return (height, width, 3) float32 in 0..255."""
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
    """Paint an RGB background: 8 to 19 textures, then noise and clutter."""
    regions = rs.randint(*REGIONS)
    centers = rs.rand(regions, 2) * (width, height)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    nearest = np.argmin([(x - cx) ** 2 + (y - cy) ** 2 for cx, cy in centers], axis=0)
    canvas = np.zeros((height, width, 3), np.float32)
    for region in range(regions):
        mask = nearest == region
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):  # compute the region's bounding box only
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
