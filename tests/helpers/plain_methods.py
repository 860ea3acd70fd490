"""The pruning methods step by step for one image, in numpy: what the fast versions have to equal.

    choose = PLAIN["divprune"]
    choose(row, tokens)      # row: one image's arrays by cue, with "features" (N, C) and "attention" (H, N)

Each returns the kept patches in the order of choice, or for merging methods (places, features) in the order
of the columns. Ties go to the lower index; a vector of zero norm has cosine 0 with every vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Row = dict[str, np.ndarray]
CLS_PLACE, NO_PLACE = -1, -2


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    xx, yy = float(np.dot(x, x)), float(np.dot(y, y))
    return 0.0 if xx < 1e-100 or yy < 1e-100 else float(np.dot(x, y)) / math.sqrt(xx * yy)


def cosines(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    # np.dot of two vectors may depend on their alignment: equal tokens share one vector
    first = {row.tobytes(): i for i, row in reversed(list(enumerate(x + 0.0)))}
    x = [x[first[(row + 0.0).tobytes()]] for row in x]
    return np.array([[cosine(a, b) for b in x] for a in x])


def mean_attention(row: Row) -> np.ndarray:
    return sum_attention(row) / len(row["attention"])


def sum_attention(row: Row) -> np.ndarray:
    total = row["attention"][0].astype(np.float64)
    for head in row["attention"][1:]:
        total = total + head
    return total


def best(scores: dict[int, float]) -> int:
    return max(sorted(scores), key=lambda i: scores[i])


def scaled(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return np.ones_like(values) if low == high else (values - low) / (high - low)


def farthest_first(similarity: np.ndarray, first: int, tokens: int, score: Callable[[int, float], float]):
    chosen = [first]
    while len(chosen) < tokens:
        rest = [i for i in range(len(similarity)) if i not in chosen]
        chosen.append(best({i: score(i, max(similarity[s, i] for s in chosen)) for i in rest}))
    return chosen


def most_isolated(similarity: np.ndarray) -> int:
    n = range(len(similarity))
    return best({i: min(1 - similarity[i, j] for j in n if j != i) for i in n})


def divprune(row: Row, tokens: int) -> list[int]:
    s = cosines(row["projected"])
    return farthest_first(s, most_isolated(s), tokens, lambda i, closest: 1 - closest)


def divprune_cen(row: Row, tokens: int) -> list[int]:
    x = row["projected"].astype(np.float64)
    raw = cosines(x)
    n = len(x)
    g = scaled(np.array([-math.fsum(raw[i, j] for j in range(n) if j != i) / (n - 1) for i in range(n)]))
    centered = x - x.mean(axis=0)
    at_mean = (centered**2).sum(1) < 1e-12 * (x**2).sum(1)
    s = cosines(np.where(at_mean[:, None], 0.0, centered))
    return farthest_first(s, most_isolated(s), tokens, lambda i, closest: g[i] * (1 - closest))


def score(row: Row, tokens: int, exponent: float = 0.8) -> list[int]:
    a = mean_attention(row)
    first = best(dict(enumerate(a)))
    return farthest_first(
        cosines(row["features"]), first, tokens, lambda i, closest: (1 - closest) * a[i] ** exponent
    )


def farthest(row: Row, tokens: int) -> list[int]:
    return score(row, tokens, 0.0)


def mmr(row: Row, tokens: int) -> list[int]:
    importance = scaled(mean_attention(row))
    first = best(dict(enumerate(importance)))
    return farthest_first(
        cosines(row["features"]), first, tokens, lambda i, closest: 0.5 * importance[i] - 0.5 * closest
    )


def idsel(row: Row, tokens: int) -> list[int]:
    s, similarity = mean_attention(row), cosines(row["features"])
    chosen: list[int] = []
    for _ in range(tokens):
        i = best({j: s[j] for j in range(len(s)) if j not in chosen})
        chosen.append(i)
        s = s - np.array([math.exp(-20 * (1 - similarity[i, j]) ** 2) for j in range(len(s))]) * s[i]
    return chosen


def scope(row: Row, tokens: int, alpha: float = 1.0) -> list[int]:
    weight, s = sum_attention(row) ** alpha, cosines(row["features"])
    covered, chosen = np.zeros(len(s)), []
    for _ in range(tokens):
        gains = {
            j: weight[j] * math.fsum(max(0.0, s[i, j] - covered[i]) for i in range(len(s)))
            for j in range(len(s))
            if j not in chosen
        }
        chosen.append(best(gains))
        covered = np.maximum(covered, s[chosen[-1]])
    return chosen


def cdpruner(row: Row, tokens: int) -> list[int]:
    """Choose by determinants: the reference for the incremental Cholesky factor."""
    texts = row["text_embeds"].astype(np.float64)
    relevance = np.array(
        [-sum(cosine(x, t) for t in texts) / len(texts) for x in row["image_embeds"].astype(np.float64)]
    )
    low, high = relevance.min(), relevance.max()
    q = np.ones_like(relevance) if low == high else (relevance - low + 1e-6) / (high - low)
    kernel = q[:, None] * cosines(row["projected"]) * q
    chosen: list[int] = []
    while len(chosen) < tokens:
        left = {}
        for j in set(range(len(q))) - set(chosen):
            volume = kernel[j, j]
            if chosen:
                inner = np.linalg.lstsq(kernel[np.ix_(chosen, chosen)], kernel[chosen, j], rcond=None)[0]
                volume = volume - kernel[j, chosen] @ inner
            if volume > 1e-9 * kernel[j, j]:
                left[j] = volume
        if not left:  # the rank is exhausted
            rest = [j for j in np.argsort(-relevance, kind="stable").tolist() if j not in chosen]
            return chosen + rest[: tokens - len(chosen)]
        chosen.append(best(left))
    return chosen


def hiprune(row: Row, tokens: int, alpha: float = 0.1) -> list[int]:
    deep = np.argsort(-row["received"].astype(np.float64), kind="stable").tolist()
    middle = np.argsort(-row["received@9/24"].astype(np.float64), kind="stable").tolist()
    n = len(deep)
    side = math.isqrt(n)
    anchors = middle[: round(alpha * tokens / 5)]
    neighbors = set()
    for anchor in anchors:
        for step in (1, side) if side * side == n else (1,):
            neighbors |= {max(anchor - step, 0), min(anchor + step, n - 1)}
    kept = [i for i in deep if i in anchors]
    kept += [i for i in deep if i in neighbors and i not in anchors]
    kept += [i for i in deep if i not in kept]
    return kept[:tokens]


def visionzip(row: Row, tokens: int, dominant: int | None = None) -> tuple[list[int], np.ndarray]:
    contextual = tokens * 5 // 32 if dominant is None else tokens - dominant
    dominant = tokens - contextual
    order = np.argsort(-mean_attention(row), kind="stable").tolist()
    patches, rest = sorted(order[: dominant - 1]), sorted(order[dominant - 1 :])
    v, keys = row["features"].astype(np.float64), row["keys"][1:].astype(np.float64)
    columns = [row["cls"].astype(np.float64), *(v[i] for i in patches)]
    if contextual:
        step = max(1, len(rest) // contextual)
        targets = [rest[place] for place in range(0, len(rest), step)][:contextual]
        members: dict[int, list[int]] = {t: [] for t in targets}
        near = cosines(keys)
        for i in rest:
            if i not in members:
                place = best({place: near[i, t] for place, t in enumerate(targets)})
                members[targets[place]].append(i)
        columns += [v[t] + v[members[t]].mean(axis=0) if members[t] else v[t] for t in targets]
    return [CLS_PLACE, *patches, *[NO_PLACE] * contextual], np.array(columns)


def prumerge(
    row: Row, tokens: int | None, plus: bool = False, adaptive: bool = False
) -> tuple[list[int], np.ndarray]:
    q, keys, v = (row[name].astype(np.float64) for name in ("last_query", "last_keys", "features"))
    n = len(v)
    first = {key.tobytes(): i for i, key in reversed(list(enumerate(keys)))}
    logits = np.array([np.dot(keys[first[key.tobytes()]], q) for key in keys]) / math.sqrt(len(q))
    weight = np.exp(logits - logits.max())
    weight = (weight / weight.sum())[1:]
    falling = np.argsort(-weight, kind="stable").tolist()
    q1, q3 = np.percentile(weight, [25, 75])
    outliers = int((weight > q3 + 1.5 * (q3 - q1)).sum())
    if adaptive:
        share = max(1, outliers) / n
        picked = falling[: int(n * share)]
        if plus:
            grid = range(0, max(n - 1, 1), max(1, int(int(1 / share) / 3)))
            picked = picked + [i for i in grid if i not in picked]
    elif not plus:
        picked = falling[: tokens - 1]
    else:
        top = falling[: min(outliers, math.ceil((tokens - 1) / 4))]
        left = [i for i in range(n) if i not in top]
        count = tokens - 1 - len(top)
        picked = top + [left[(2 * i + 1) * len(left) // (2 * count)] for i in range(count)]
    similarity = cosines(keys[1:])
    columns = []
    for i in picked:
        others = sorted((j for j in range(n) if j != i), key=lambda j: (-similarity[i, j], j))
        columns.append(v[i] + sum((weight[j] * v[j] for j in others[:32]), np.zeros(v.shape[1])))
    rest = [i for i in range(n) if i not in picked]
    columns.append(sum((weight[j] * v[j] for j in rest), np.zeros(v.shape[1])))
    return [*picked, NO_PLACE], np.array(columns)


def downsample(row: Row, tokens: int) -> tuple[list[int], np.ndarray]:
    """Average cells that are found by going through all patches of all cells."""
    v = row["features"].astype(np.float64)
    n = len(v)
    side = math.isqrt(n)
    cells: list[list[int]] = []
    if side * side != n:
        cells = [[i for i in range(n) if i * tokens // n == cell] for cell in range(tokens)]
    else:
        bands = math.floor(math.sqrt(tokens) + 0.5)
        for band in range(bands):
            count = (band + 1) * tokens // bands - band * tokens // bands
            for cell in range(count):
                cells.append(
                    [
                        i
                        for i in range(n)
                        if i // side * bands // side == band and i % side * count // side == cell
                    ]
                )
    return [], np.array([v[cell].mean(axis=0) for cell in cells])


def merge_tokens(
    x: np.ndarray, metric: np.ndarray, sizes: np.ndarray, groups: list[list[int]], r: int
) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Merge the r best even tokens of (T, C) into their most similar odd ones; `groups` are their members."""
    size = len(x)
    r = min(r, (size - 1) // 2)
    if r == 0:
        return x, sizes, groups
    similarity = np.round(cosines(metric) * 2.0**40)
    even, odd = range(2, size, 2), range(1, size, 2)
    partner = {i: best({j: similarity[i, j] for j in odd}) for i in even}
    merged = sorted(even, key=lambda i: (-similarity[i, partner[i]], i))[:r]
    order = [i for i in range(0, size, 2) if i not in merged] + list(odd)
    joined = {i: [i, *(m for m in merged if partner[m] == i)] if i % 2 else [i] for i in order}
    total = np.array([sum(sizes[m] for m in joined[i]) for i in order])
    mean = np.array([sum(x[m] * sizes[m] for m in joined[i]) for i in order]) / total[:, None]
    return mean, total, [sorted(p for m in joined[i] for p in groups[m]) for i in order]


PLAIN: dict[str, Callable] = {
    "divprune": divprune,
    "divprune_cen": divprune_cen,
    "score": score,
    "farthest": farthest,
    "mmr": mmr,
    "idsel": idsel,
    "scope": scope,
    "cdpruner": cdpruner,
    "hiprune": hiprune,
    "visionzip": visionzip,
    "prumerge": prumerge,
    "prumerge+": lambda row, tokens: prumerge(row, tokens, plus=True),
    "downsample": downsample,
}
