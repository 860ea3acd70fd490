"""Definitions of all curves of the attention analysis: pure functions and sums over samples.

Samples are read twice, because the bins of the densities depend on the largest value. Memory holds sums over
samples, whatever their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from llava.analysis.attention.rows import KINDS, AttentionSample

SELECTED = ("last", "equi_last", "cls")  # kinds that tokens are selected by
BINS = 200


@dataclass
class Curves:
    """What one kind of attention shows, over all samples; rows are layers."""

    mean: np.ndarray  # (L, N)
    counts: np.ndarray  # (L, N) int64, samples that hold the token in their top quarter
    quartiles: np.ndarray  # (L, 4) share of the selected tokens of all samples in each index quarter
    cdf: np.ndarray  # (L, N + 1) mean share of the first k values of each sample's descending order
    entropies: np.ndarray  # (L, samples) nats, of each sample's vector divided by its sum
    maximum: np.ndarray  # (L,) largest pooled value
    density: np.ndarray  # (L, BINS) int64, pooled values / maximum in equal bins over [0, 1]

    @property
    def tokens(self) -> int:
        return self.mean.shape[1]

    @property
    def samples(self) -> int:
        return self.entropies.shape[1]

    @property
    def frequency(self) -> np.ndarray:
        """(L, N) share of the samples that hold the token in their top quarter."""
        return self.counts / self.samples

    @property
    def entropy(self) -> np.ndarray:
        """(L,) mean over samples, in nats."""
        return self.entropies.mean(1)

    @property
    def relative_entropy(self) -> np.ndarray:
        """(L,) entropy divided by that of equal attention to all tokens."""
        return self.entropy / math.log(self.tokens)

    def cumulated(self, shares: np.ndarray) -> np.ndarray:
        """Return (L, len(shares)), the attention that the strongest `shares` of the tokens receive."""
        places = np.asarray(shares) * self.tokens
        return np.stack([np.interp(places, np.arange(self.tokens + 1), row) for row in self.cdf])


def top_mask(vectors: np.ndarray, count: int) -> np.ndarray:
    """Mark the `count` largest values of each row (L, N), ties to the lower index: (L, N) bool."""
    order = np.argsort(-vectors, axis=-1, kind="stable")[..., :count]
    mask = np.zeros(vectors.shape, dtype=bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return mask


def entropy(vectors: np.ndarray) -> np.ndarray:
    """Return the entropy in nats of each row (L, N), divided by its sum; 0 log 0 is 0."""
    shares = vectors / vectors.sum(-1, keepdims=True)
    return -(shares * np.log(np.where(shares > 0, shares, 1))).sum(-1)


@dataclass
class _KindSums:
    """Sums over samples of one kind."""

    total: np.ndarray
    counts: np.ndarray
    ordered: np.ndarray
    maximum: np.ndarray
    density: np.ndarray
    entropies: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def of(cls, vectors: np.ndarray) -> _KindSums:
        zeros = np.zeros(vectors.shape)
        density = np.zeros((len(vectors), BINS), dtype=np.int64)
        return cls(zeros, zeros.astype(np.int64), zeros.copy(), np.zeros(len(vectors)), density)

    def add(self, vectors: np.ndarray) -> None:
        self.total += vectors
        self.counts += top_mask(vectors, vectors.shape[1] // 4)
        ordered = -np.sort(-vectors, axis=1)
        self.ordered += ordered / vectors.sum(1, keepdims=True)
        self.maximum = np.maximum(self.maximum, ordered[:, 0])
        self.entropies.append(entropy(vectors))

    def add_density(self, vectors: np.ndarray) -> None:
        for row, values, largest in zip(self.density, vectors, self.maximum, strict=True):
            row += np.histogram(values / largest, bins=BINS, range=(0, 1))[0]

    def curves(self) -> Curves:
        samples, tokens = len(self.entropies), self.total.shape[1]
        quarter = np.arange(tokens) * 4 // tokens
        inside = np.stack([self.counts[:, quarter == one].sum(1) for one in range(4)], axis=1)
        cdf = np.cumsum(self.ordered / samples, axis=1)
        return Curves(
            self.total / samples,
            self.counts,
            inside / self.counts.sum(1, keepdims=True),
            np.concatenate([np.zeros((len(cdf), 1)), cdf], axis=1),
            np.stack(self.entropies, axis=1),
            self.maximum,
            self.density,
        )


@dataclass
class AttentionStatistics:
    """The analysis of a group of samples."""

    samples: int
    curves: dict[str, Curves]  # by the kinds of SELECTED
    means: dict[str, np.ndarray]  # by kind: (L, N), for "cls" (1, N)

    @property
    def layers(self) -> int:
        return len(self.means["last"])

    @property
    def tokens(self) -> int:
        return self.means["last"].shape[1]


def analyze(samples: Iterable[AttentionSample]) -> AttentionStatistics:
    """Compute all curves of a group of samples.

    Args:
        samples: Iterated twice; all of one number of layers and visual tokens, at least four.

    Raises:
        ValueError: There are no samples, or their shapes differ.
    """
    sums: dict[str, _KindSums] = {}
    totals: dict[str, np.ndarray] = {}
    count = 0
    for sample in samples:
        for kind in KINDS:
            vectors = sample.layers(kind)
            if kind not in totals:
                totals[kind] = np.zeros(vectors.shape)
                sums |= {kind: _KindSums.of(vectors)} if kind in SELECTED else {}
            if vectors.shape != totals[kind].shape:
                raise ValueError(
                    f"sample {count}: {kind} has shape {vectors.shape}, before it {totals[kind].shape}. "
                    "Analyze samples of one model and one number of visual tokens."
                )
            totals[kind] += vectors
            if kind in SELECTED:
                sums[kind].add(vectors)
        count += 1
    if not count:
        raise ValueError("samples: there are none. Pass at least one.")
    for sample in samples:
        for kind, one in sums.items():
            one.add_density(sample.layers(kind))
    curves = {kind: one.curves() for kind, one in sums.items()}
    return AttentionStatistics(count, curves, {kind: total / count for kind, total in totals.items()})
