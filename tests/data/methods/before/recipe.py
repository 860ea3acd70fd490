"""Inputs of the reference cases for visual-token reduction before the language model.

Plain numpy.  make_inputs(case) -> dict of little-endian float32 arrays, in a fixed order;
crc(inputs) must equal case["crc"] before the case is used.

Everything is drawn from np.random.Generator(PCG64(seed)) in float64, rounded to a multiple of
2**-16 (features, weights) or 2**-34 (attention), and cast to float32 at the end; the rounding makes
the result independent of the last bit of exp/sin on different machines.
T = N + 1 everywhere: position 0 is the [CLS] token, positions 1..N the patches in raster order.
"""

import zlib

import numpy as np

KINDS = ("iid", "cluster", "smooth", "outlier", "tie")


def _q(x, bits=16):
    s = 2.0**bits
    return np.round(np.asarray(x, dtype=np.float64) * s) / s


def _softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _grid(n):
    side = int(round(n**0.5))
    assert side * side == n
    y, x = np.divmod(np.arange(n), side)
    return x / side, y / side


def _tokens(rng, kind, n, c):
    """n x c patch vectors."""
    z = rng.standard_normal((n, c))
    if kind == "iid":
        return z
    if kind == "cluster":  # near-duplicates: few centres, 5 % noise
        k = 5 if n <= 16 else 12
        cen = rng.standard_normal((k, c))
        return cen[rng.integers(0, k, size=n)] + 0.05 * z
    if kind == "smooth":  # smooth field over the grid
        x, y = _grid(n)
        fx, fy, ph = rng.uniform(-6, 6, c), rng.uniform(-6, 6, c), rng.uniform(0, 6.28, c)
        return np.sin(x[:, None] * fx + y[:, None] * fy + ph) + 0.1 * z
    if kind == "outlier":  # common direction, a few tokens of large norm
        z = z + 2.0 * rng.standard_normal((1, c))
        m = rng.uniform(size=n) < 0.05
        return np.where(m[:, None], 6.0 * z, z)
    if kind == "tie":  # +-1 entries, each token has an exact duplicate
        z = rng.integers(0, 2, size=(n, c)) * 2.0 - 1.0
        return z[np.argsort(rng.uniform(size=n), kind="stable") // 2]
    raise ValueError(kind)


def _saliency(rng, kind, tok):
    """n logits, correlated with the tokens or the grid where the kind says so."""
    n, c = tok.shape
    z = rng.standard_normal(n)
    if kind == "cluster":
        return 1.5 * (tok @ rng.standard_normal(c)) / c**0.5 + 0.5 * z
    if kind == "smooth":
        x, y = _grid(n)
        cx, cy = rng.uniform(0.2, 0.8, 2)
        return 4.0 * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 0.04) + 0.5 * z
    if kind == "outlier":
        return 2.0 * (np.linalg.norm(tok, axis=1) > 2.5 * np.median(np.linalg.norm(tok, axis=1))) + z
    return 1.5 * z


def _cls_attention(rng, kind, h, tok):
    """h x (n + 1) rows of probabilities: [CLS] -> ([CLS], patches)."""
    n = tok.shape[0]
    s = _saliency(rng, kind, tok)
    if kind == "tie":
        a = np.floor(rng.uniform(1, 9, size=n)) / 4096.0
        return np.concatenate([np.full((h, 1), 0.25), np.repeat(a[None], h, 0)], axis=1)
    lg = s[None] + 0.7 * rng.standard_normal((h, n))
    return _softmax(np.concatenate([np.full((h, 1), 1.0), lg], axis=1))


def _full_attention(rng, kind, h, tok):
    """h x (n + 1) x (n + 1) rows of probabilities."""
    n = tok.shape[0]
    s = np.concatenate([[1.0], _saliency(rng, kind, tok)])
    if kind == "tie":
        a = np.floor(rng.uniform(1, 9, size=n + 1)) / 4096.0
        return np.broadcast_to(a, (h, n + 1, n + 1))
    return _softmax(s + 0.7 * rng.standard_normal((h, n + 1, n + 1)))


def make_inputs(case):
    """case: dict with method, kind, seed, B, N, C and, where the method needs them, H, D, M, L."""
    m, kind, b, n, c = case["method"], case["kind"], case["B"], case["N"], case["C"]
    h, d = case.get("H", 4), case.get("D", 0)
    rng = np.random.Generator(np.random.PCG64(case["seed"]))
    out = {}

    def add(name, value, bits=16):
        out.setdefault(name, []).append(_q(value, bits))

    if m == "tower":  # pixels for the small CLIP tower, B x 3 x 336 x 336
        coarse = rng.standard_normal((b, 3, 12, 12))
        px = np.repeat(np.repeat(coarse, 28, axis=2), 28, axis=3)
        px = px + 0.3 * rng.standard_normal((b, 3, 336, 336))
        return {"pixels": np.ascontiguousarray(_q(px), dtype="<f4")}
    if m == "tome_blocks":

        def w(*s):
            return rng.standard_normal(s) / s[-1] ** 0.5

        tok = np.concatenate([rng.standard_normal((1, c)), _tokens(rng, kind, n, c)])
        add("x", tok)
        for _ in range(case["L"]):
            for name, v in (
                ("ln1_w", 1 + 0.1 * rng.standard_normal(c)),
                ("ln1_b", 0.1 * rng.standard_normal(c)),
                ("qkv_w", w(3 * c, c)),
                ("qkv_b", 0.1 * rng.standard_normal(3 * c)),
                ("proj_w", w(c, c)),
                ("proj_b", 0.1 * rng.standard_normal(c)),
                ("ln2_w", 1 + 0.1 * rng.standard_normal(c)),
                ("ln2_b", 0.1 * rng.standard_normal(c)),
                ("fc1_w", w(2 * c, c)),
                ("fc1_b", 0.1 * rng.standard_normal(2 * c)),
                ("fc2_w", w(c, 2 * c)),
                ("fc2_b", 0.1 * rng.standard_normal(c)),
            ):
                add(name, v)
        return {k: np.ascontiguousarray(np.stack(v), dtype="<f4") for k, v in out.items()}
    for _ in range(b):
        tok = _tokens(rng, kind, n, c)
        cls = rng.standard_normal((1, c))
        if m == "divprune":
            add("projected", tok)  # N x C
        elif m in ("fastervlm", "scope"):
            add("features", tok)  # N x C
            add("cls_attention", _cls_attention(rng, kind, h, tok), 34)  # H x T
        elif m == "visionzip":
            add("hidden", np.concatenate([cls, tok]))  # T x C
            add("cls_attention", _cls_attention(rng, kind, h, tok), 34)  # H x T
            mix = rng.standard_normal((h, c, d)) / c**0.5
            noise = 0.3 if kind != "tie" else 0.0
            keys = np.concatenate([cls, tok])[None] @ mix + noise * rng.standard_normal((h, n + 1, d))
            add("keys", keys)  # H x T x D
        elif m in ("prumerge", "prumerge+"):
            both = np.concatenate([cls, tok])
            add("features", tok)  # N x C
            mk = rng.standard_normal((c, c)) / c**0.5
            k = both @ mk + 0.3 * rng.standard_normal((n + 1, c))
            q = rng.standard_normal((n + 1, c))
            s = np.concatenate([[0.0], _saliency(rng, kind, tok)])
            kc = k - k.mean(axis=0)
            u = np.linalg.lstsq(kc.T @ kc + 0.1 * n * np.eye(c), kc.T @ s, rcond=None)[0]
            q[0] = 0.6 * q[0] + case.get("sharp", 1.0) * c**0.5 * _q(u, 10)
            add("q", q)  # T x C, last layer, heads side by side
            add("k", k)  # T x C
        elif m == "tome":
            add("x", np.concatenate([cls, tok]))  # T x C
            mk = rng.standard_normal((c, d)) / c**0.5
            noise = 0.1 if kind != "tie" else 0.0
            add("metric", np.concatenate([cls, tok]) @ mk + noise * rng.standard_normal((n + 1, d)))  # T x D
            add("size", 1.0 + rng.integers(0, 4, size=(n + 1, 1)))  # T x 1
        elif m == "cdpruner":
            mk = rng.standard_normal((c, d)) / c**0.5
            noise = 0.1 if kind != "tie" else 0.0
            add("projected", tok)  # N x C
            add("image_embeds", tok @ mk + noise * rng.standard_normal((n, d)))  # N x D
        elif m == "hiprune":
            add("attention_object", _full_attention(rng, kind, h, tok), 34)  # H x T x T
            add("attention_deep", _full_attention(rng, kind, h, tok), 34)  # H x T x T
        else:
            raise ValueError(m)
    res = {k: np.ascontiguousarray(np.stack(v), dtype="<f4") for k, v in out.items()}
    if m == "cdpruner":
        res["text_embeds"] = np.ascontiguousarray(
            _q(rng.standard_normal((case["M"], d))), dtype="<f4"
        )  # M x D
    return res


def crc(inputs):
    v = 0
    for a in inputs.values():
        v = zlib.crc32(np.ascontiguousarray(a, dtype="<f4").tobytes(), v)
    return v & 0xFFFFFFFF
