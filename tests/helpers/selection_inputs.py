"""Inputs of the golden selection cases, in numpy, the same on every machine.

`make_inputs(kind, seed, B, N, C, H)` -> features (B, N, C) and attention (B, H, N), float32. The stream is
numpy's legacy RandomState, frozen by its policy; all is computed in float64 and cast once. `crc` of the two
buffers is stored with every case, so that a test can check that its inputs are those of the reference.
"""

import zlib

import numpy as np

# Features of these kinds are vectors of +-1 with 16 or 64 channels: every cosine is exact in any precision
# and order of summation, so their ties are true ties.
EXACT_TIES = ("const", "dup", "tie_both")


def _softmax(logits):
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _signs(rs, shape):
    return rs.randint(0, 2, size=shape) * 2.0 - 1.0


def make_inputs(kind, seed, B, N, C, H):
    rs = np.random.RandomState(seed)
    features = rs.standard_normal((B, N, C))
    logits = rs.standard_normal((B, H, N)) * 2.0
    with_cls = np.concatenate([np.zeros((B, H, 1)), logits], axis=-1)
    attention = _softmax(with_cls)[..., 1:]
    if kind == "cluster":  # near duplicates around 12 centers
        member = rs.randint(0, 12, size=(B, N))
        centers = rs.standard_normal((B, 12, C))
        features = np.take_along_axis(centers, member[..., None], axis=1) + 0.02 * features
    elif kind == "spatial":  # a smooth field over a square grid
        y, x = np.divmod(np.arange(N), int(round(N**0.5)))
        fx = rs.uniform(0.1, 0.6, size=(B, 1, C))
        fy = rs.uniform(0.1, 0.6, size=(B, 1, C))
        phase = rs.uniform(0.0, 6.28, size=(B, 1, C))
        features = np.sin(fx * x[None, :, None] + fy * y[None, :, None] + phase) + 0.05 * features
    elif kind == "outlier":  # a common direction, and 3 % of high norm that also take the attention
        features = features + 2.0 * rs.standard_normal((B, 1, C))
        chosen = rs.uniform(size=(B, N)) < 0.03
        features = np.where(chosen[..., None], 8.0 * features, features)
        attention = np.where(chosen[:, None, :], 10.0 * attention, attention)
        attention = attention / (attention.sum(axis=-1, keepdims=True) * 1.25)
    elif kind == "const":  # three quarters of the tokens are one vector
        features = _signs(rs, (B, N, C))
        constant = _signs(rs, (B, 1, C))
        chosen = rs.uniform(size=(B, N)) < 0.75
        features = np.where(chosen[..., None], np.broadcast_to(constant, features.shape), features)
    elif kind == "dup":  # every token has one exact duplicate
        features = _signs(rs, (B, N, C))
        partner = np.argsort(rs.uniform(size=(B, N)), axis=-1, kind="stable") // 2
        features = np.take_along_axis(features, partner[..., None], axis=1)
    elif kind == "tie_attn":  # attention on 8 levels
        attention = np.broadcast_to(rs.randint(1, 9, size=(B, 1, N)) / 1024.0, (B, H, N))
    elif kind == "tie_both":  # +-1 features and attention on 4 levels
        features = _signs(rs, (B, N, C))
        attention = np.broadcast_to(rs.randint(1, 5, size=(B, 1, N)) / 1024.0, (B, H, N))
    elif kind == "zero":  # a tenth of the tokens has zero norm
        features = np.where((rs.uniform(size=(B, N)) < 0.1)[..., None], 0.0, features)
    elif kind != "gauss":
        raise ValueError(f"unknown kind {kind!r}")
    return np.ascontiguousarray(features, dtype="<f4"), np.ascontiguousarray(attention, dtype="<f4")


def crc(*arrays):
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).tobytes(), value)
    return value
