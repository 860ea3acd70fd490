"""Deterministic synthetic RGB pictures, bit-exact everywhere: the reference pipeline was run on these.

Integer arithmetic only.
"""

import zlib

import numpy as np

SIZES = [
    ("square336", 336, 336, 1),
    ("land640x480", 640, 480, 2),
    ("port480x640", 480, 640, 3),
    ("wide1000x300", 1000, 300, 4),
    ("tall123x457", 123, 457, 5),
    ("small50x40", 50, 40, 6),
    ("big1344x1008", 1344, 1008, 7),
    ("odd337x335", 337, 335, 8),
]


def make_image(w, h, seed):
    """uint8 [h, w, 3]"""
    y, x = np.mgrid[0:h, 0:w].astype(np.int64)
    rs = np.random.RandomState(seed)
    img = np.zeros((h, w, 3), np.int64)
    for c in range(3):
        a, b, d = rs.randint(1, 8, size=3)
        img[..., c] = (a * x * 255 // max(w - 1, 1) + b * y * 255 // max(h - 1, 1)) // (a + b) + 16 * (
            (x // (8 * d) + y // (8 * d)) % 2
        )
    for _ in range(24):  # rectangles and discs of random colour
        kind, cx, cy = rs.randint(0, 2), rs.randint(0, w), rs.randint(0, h)
        s = rs.randint(max(2, min(w, h) // 16), max(3, min(w, h) // 4) + 1)
        col = rs.randint(0, 256, size=3)
        m = (
            ((x - cx) ** 2 + (y - cy) ** 2 < s * s)
            if kind
            else ((abs(x - cx) < s) & (abs(y - cy) < s // 2 + 1))
        )
        img[m] = col
    n = rs.randint(-12, 13, size=(h, w, 1))
    t = rs.randint(-56, 57, size=((h + 5) // 6, (w + 5) // 6, 3))  # 6 x 6 pixel colour texture
    img += np.repeat(np.repeat(t, 6, axis=0), 6, axis=1)[:h, :w]
    return np.clip(img + n, 0, 255).astype(np.uint8)


def crc(a):
    return zlib.crc32(np.ascontiguousarray(a).tobytes()) & 0xFFFFFFFF
