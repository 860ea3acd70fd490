"""VisPruner line by line: one row, Python lists, a similarity product per round, numpy float64.

Slow and simple on purpose. The channels of a dot product are added one after the other, so that equal
features give equal bits wherever they are, and ties in real-valued features are true ties here as well. With
`exact=True` all similarities are rational numbers without any rounding.
"""

from fractions import Fraction
from math import inf

import numpy as np


def dot(a, b):
    """Multiply (m, C), (n, C) -> (m, n), summed over channels in order; floats or Fractions."""
    total = 0
    for channel in range(a.shape[1]):
        total = total + a[:, channel, None] * b[None, :, channel]
    return total


def similarity(product, square_a, square_b):
    """Compute cos * |cos|, which orders pairs as the cosine does and is rational where the features are."""
    return product * abs(product) / (square_a * square_b)


def attention_ranking(attention):
    """Rank patches by descending head-mean, ties to the lower index: (H, N) -> list of patch indices."""
    heads, n = attention.shape
    mean = []
    for patch in range(n):
        total = 0.0
        for head in range(heads):
            total += float(attention[head, patch])
        mean.append(total / heads)
    return sorted(range(n), key=lambda patch: -mean[patch])  # sorted() is stable


def select_row(features, attention, T, r, product=dot, exact=False, drop=8, listed=None):
    """Select in one row: (N, C), (H, N) -> (kept indices ascending, set of the important ones).

    `drop` is the number of tokens to drop per round; `listed` sorts the residual list.
    """
    x = np.asarray(features, dtype=np.float64)
    if exact:
        x = np.vectorize(Fraction, otypes=[object])(x)
    order = attention_ranking(np.asarray(attention, dtype=np.float64))
    n = len(order)
    t_imp = int(T * r)
    t_div = T - t_imp
    if T >= n:
        return list(range(n)), set(order[:t_imp])
    important, rho = order[:t_imp], order[t_imp:]
    if t_div == 0:
        return sorted(important), set(important)
    rho = sorted(rho, key=listed) if listed else rho
    square = [product(x[i : i + 1], x[i : i + 1])[0, 0] for i in range(n)]
    while len(rho) > t_div:
        evens, odds = rho[0::2], rho[1::2]
        k = min(drop, len(rho) - t_div, len(evens))
        products = product(x[evens], x[odds])
        s = []
        for i, even in enumerate(evens):
            if square[even] == 0:
                s.append(inf)  # carries no information: dropped first
                continue
            best = -inf
            for j, odd in enumerate(odds):
                if square[odd] > 0:  # a zero-norm odd matches no token
                    best = max(best, similarity(products[i, j], square[even], square[odd]))
            s.append(best)
        ranked = sorted(range(len(evens)), key=lambda i: -s[i])
        rho = [evens[i] for i in ranked[k:]] + odds
    return sorted(important + rho), set(important)


def select(features, attention, T, r, product=dot, exact=False):
    """Select in every row: features (B, N, C), attention (B, H, N) -> list of `select_row` results."""
    return [select_row(f, a, T, r, product, exact) for f, a in zip(features, attention, strict=True)]
