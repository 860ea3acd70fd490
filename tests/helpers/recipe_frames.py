"""Deterministic synthetic clips and pictures; integer arithmetic only (numpy), so bit-exact everywhere.

make_image(w, h, seed)            uint8 [h, w, 3]
make_frames(w, h, seed, indices)  uint8 [len(indices), h, w, 3]; frame i depends on (w, h, seed, i) only
frame_indices(n)                  the eight frames taken from a clip of n frames
"""

import zlib

import numpy as np


def make_image(w, h, seed):
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


def make_frames(w, h, seed, indices):
    base = make_image(w, h, seed).astype(np.int64)
    y, x = np.mgrid[0:h, 0:w].astype(np.int64)
    rs = np.random.RandomState(seed + 500000)
    vx, vy = rs.randint(-5, 6, size=2)  # camera pan, pixels per frame
    things = [
        (
            rs.randint(0, 2),
            rs.randint(0, w),
            rs.randint(0, h),
            rs.randint(-9, 10),
            rs.randint(-7, 8),
            rs.randint(max(3, min(w, h) // 12), max(4, min(w, h) // 5) + 1),
            rs.randint(0, 256, size=3),
        )
        for _ in range(6)
    ]
    out = np.empty((len(indices), h, w, 3), np.uint8)
    for k, i in enumerate(indices):
        f = np.roll(base, (int(vy) * i, int(vx) * i), axis=(0, 1))
        for kind, cx, cy, dx, dy, s, col in things:  # moving discs and bars, colours that change over time
            px, py = (cx + dx * i) % w, (cy + dy * i) % h
            m = (
                ((x - px) ** 2 + (y - py) ** 2 < s * s)
                if kind
                else ((abs(x - px) < s) & (abs(y - py) < s // 3 + 1))
            )
            f[m] = (col + 11 * i) % 256
        n = np.random.RandomState((seed * 7919 + i) % (1 << 31)).randint(
            -20, 21, size=((h + 3) // 4, (w + 3) // 4, 3)
        )
        f = f + np.repeat(np.repeat(n, 4, axis=0), 4, axis=1)[:h, :w] + (i * 5) % 23
        out[k] = np.clip(f, 0, 255)
    return out


def frame_indices(n, frames=8):
    return [i * (n - 1) // (frames - 1) for i in range(frames)]


def crc(a):
    return zlib.crc32(np.ascontiguousarray(a).tobytes()) & 0xFFFFFFFF
