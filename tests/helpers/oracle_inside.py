"""A decoder with pruning inside, written out: full attention in float64, one prompt, one layer after another.

    answer(model, before, visual, after, rule, steps) -> new ids, visual tokens per layer

A rule is a function of the layer that comes next, called with everything; it returns the kept columns of the
visual block and the new states, or None. The rules below follow the definitions line by line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray


class Weights:
    """The weights of a Llama or Mistral model in float64."""

    def __init__(self, model: Any) -> None:
        state = {key: value.double().numpy() for key, value in model.state_dict().items()}
        self.of, config = state, model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width = config.hidden_size // self.heads
        self.depth, self.eps = config.num_hidden_layers, config.rms_norm_eps
        self.base = 10000.0
        self.embed, self.head = state["model.embed_tokens.weight"], state["lm_head.weight"]

    def layer(self, number: int, name: str) -> Array:
        return self.of[f"model.layers.{number}.{name}.weight"]

    def norm(self, x: Array, weight: Array) -> Array:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.eps) * weight

    def rotate(self, x: Array, positions: Array) -> Array:
        """Rotate heads (n, H, d)."""
        half = self.width // 2
        angle = positions[:, None] * self.base ** (-np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def project(self, number: int, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """Return rotated queries and keys, and values, (n, heads, d) each."""
        x = self.norm(x, self.layer(number, "input_layernorm"))
        q, k, v = ((x @ self.layer(number, f"self_attn.{name}_proj").T) for name in "qkv")
        q = self.rotate(q.reshape(len(x), self.heads, -1), positions)
        k = self.rotate(k.reshape(len(x), self.kv_heads, -1), positions)
        return q, k, v.reshape(len(x), self.kv_heads, -1)

    def attention(self, q: Array, k: Array) -> Array:
        """Return causal attention (H, n, m) of the last n of m tokens."""
        n, m = len(q), len(k)
        k = np.repeat(k, self.heads // self.kv_heads, axis=1)
        scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(self.width)
        later = np.arange(m)[None, :] > np.arange(m - n, m)[:, None]
        scores = np.where(later, -np.inf, scores)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        return scores / scores.sum(-1, keepdims=True)

    def finish(self, number: int, x: Array, attention: Array, v: Array) -> Array:
        v = np.repeat(v, self.heads // self.kv_heads, axis=1)
        mixed = np.einsum("hij,jhd->ihd", attention, v).reshape(len(x), -1)
        x = x + mixed @ self.layer(number, "self_attn.o_proj").T
        y = self.norm(x, self.layer(number, "post_attention_layernorm"))
        gate = y @ self.layer(number, "mlp.gate_proj").T
        up = y @ self.layer(number, "mlp.up_proj").T
        return x + (gate / (1 + np.exp(-gate)) * up) @ self.layer(number, "mlp.down_proj").T


def answer(
    model: Any,
    before: list[int],
    visual: Array,
    after: list[int],
    rule: Callable[..., Any],
    steps: int,
    original_positions: bool,
) -> tuple[list[int], list[int]]:
    """Return the greedy ids, and the visual tokens that entered each layer."""
    w = Weights(model)
    embeds = [w.embed[before], visual.astype(np.float64), w.embed[after]]
    x, n = np.concatenate(embeds), len(visual)
    start, total = len(before), len(x)
    positions = np.arange(total)
    caches, counts, attention = [], [], None
    for number in range(w.depth):
        q, k, v = w.project(number, x, positions)
        if n and number:
            ahead = w.attention(q, k).mean(0)
            reduced = rule(number, n, start, x, attention, ahead, embeds)
            if reduced is not None:
                kept, new = reduced
                rows = [*range(start), *(start + np.asarray(kept, int)), *range(start + n, len(x))]
                place = start + len(kept)
                old = positions[rows]
                x = np.concatenate([x[rows][:place], new, x[rows][place:]])
                n = len(kept) + len(new)
                positions = old if original_positions else np.arange(len(x))
                q, k, v = w.project(number, x, positions)
        counts.append(n)
        caches.append([k, v])
        heads = w.attention(q, k)
        attention = heads.mean(0)
        x = w.finish(number, x, heads, v)
    said = []
    for step in range(steps):
        said.append(int((w.norm(x[-1], w.of["model.norm.weight"]) @ w.head.T).argmax()))
        x = w.embed[said[-1]][None]
        for number, cache in enumerate(caches):
            position = total + step if original_positions else len(cache[0])
            q, k, v = w.project(number, x, np.array([position]))
            cache[0], cache[1] = np.concatenate([cache[0], k]), np.concatenate([cache[1], v])
            x = w.finish(number, x, w.attention(q, cache[0]), cache[1])
    return said, counts


def best(score: Array, keep: int) -> list[int]:
    return sorted(sorted(range(len(score)), key=lambda j: (-score[j], j))[:keep])


def fastv(layer: int, keep: int) -> Callable[..., Any]:
    def rule(number, n, start, x, attention, ahead, embeds):
        if number == layer:
            return best(attention[-1, start : start + n], keep), x[:0]
        return None

    return rule


def pyramiddrop(counts: dict[int, int]) -> Callable[..., Any]:
    def rule(number, n, start, x, attention, ahead, embeds):
        if number in counts:
            return best(ahead[-1, start : start + n], counts[number]), x[:0]
        return None

    return rule


def vtw(layer: int) -> Callable[..., Any]:
    return lambda number, n, start, x, *_: ([], x[:0]) if number == layer else None


def sparsevlm(counts: dict[int, int]) -> Callable[..., Any]:
    """`counts`: layer after which it acts -> tokens that stay."""

    def rule(number, n, start, x, attention, ahead, embeds):
        if number - 1 not in counts:
            return None
        _, visual, text = embeds
        logits = visual @ text.T
        chance = np.exp(logits - logits.max(1, keepdims=True))
        relevance = (chance / chance.sum(1, keepdims=True)).mean(0)
        raters = [j for j in range(len(text)) if relevance[j] > relevance.mean()]
        score = attention[[start + n + j for j in raters], start : start + n].mean(0)
        kept = best(score, min(counts[number - 1], n - 1))
        removed = sorted(set(range(n)) - set(kept), key=lambda j: (-score[j], j))
        states = [x[start + j] for j in removed[: int(0.3 * len(removed)) + 1]]
        return kept, np.array(recycle(states))

    return rule


def recycle(states: list[Array]) -> list[Array]:
    """Return the new tokens of candidates in the order of falling scores."""
    m = len(states)
    c = int(m / 10) + 1
    distance = [[np.linalg.norm(a - b) / math.sqrt(len(a)) for b in states] for a in states]
    density = [
        math.exp(-np.mean([d**2 for d in sorted(distance[j])[:c]])) + 1e-6 * (m - j) / m for j in range(m)
    ]
    delta = []
    for j in range(m):
        denser = [distance[j][i] for i in range(m) if density[i] > density[j]]
        delta.append(min(denser) if denser else max(map(max, distance)))
    centers = sorted(range(m), key=lambda j: (-density[j] * delta[j], j))[:c]
    groups: list[list[Array]] = [[] for _ in centers]
    for j in range(m):
        if j in centers:
            groups[centers.index(j)].append(states[j])
        else:
            groups[min(range(c), key=lambda i: distance[j][centers[i]])].append(states[j])
    return [sum(group) / (len(group) + 1e-6) for group in groups]
