"""Confidence intervals: bootstrap over images, paired if two answer files are about the same questions.

Images are resampled, not questions: the questions of one image share its pixels and its kept tokens, so their
errors are correlated. Scores that are not plain means (POPE's mean of F1) are computed from the resampled
counts. Intervals cover the choice of images; they say nothing about other training seeds or prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from llava.eval.benchmarks.base import PerImageCounts

ScoreOf = Callable[[np.ndarray], np.ndarray]
_BLOCK = 4_000_000  # weights held at once


@dataclass(frozen=True)
class Difference:
    """Score of a minus score of b, with the 95% interval of the paired bootstrap over images."""

    difference: float
    ci_low: float
    ci_high: float
    images: int

    @property
    def significant(self) -> bool:
        """True if the interval excludes 0."""
        return self.ci_low > 0 or self.ci_high < 0

    def document(self) -> dict[str, float | bool]:
        """Return the JSON entries, under new and earlier names."""
        return {
            "difference": self.difference,
            "ci_low": self.ci_low,
            "ci_high": self.ci_high,
            "significant": self.significant,
            "low": self.ci_low,
            "high": self.ci_high,
            "separates": self.significant,
        }


def resampled_sums(counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sum `counts` (I, ...) over I images drawn with replacement, `resamples` times: (R, ...) float64."""
    images = len(counts)
    flat = counts.reshape(images, -1).astype(np.float64)
    if images * resamples <= _BLOCK:
        sums = _weights(images, resamples, seed) @ flat
    else:
        sums = np.concatenate([weights @ flat for weights in _blocks(images, resamples, seed)])
    return sums.reshape(resamples, *counts.shape[1:])


@functools.lru_cache(maxsize=8)
def _weights(images: int, resamples: int, seed: int) -> np.ndarray:
    """Return (R, I) float64, how often each image is drawn; cached, because all settings use the same."""
    return np.concatenate(list(_blocks(images, resamples, seed)))


def _blocks(images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield rows of `_weights`, at most _BLOCK entries at a time."""
    rng, step = np.random.default_rng(seed), max(1, _BLOCK // images)
    for begin in range(0, resamples, step):
        size = min(step, resamples - begin)
        yield rng.multinomial(images, np.full(images, 1 / images), size=size).astype(np.float64)


def bootstrap_interval(
    tallies: PerImageCounts, score_of: ScoreOf, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95% percentile interval of the score, in its unit, over resampled images."""
    return _percentiles(score_of(resampled_sums(tallies.counts, resamples, seed)))


def paired_bootstrap(
    a: PerImageCounts,
    b: PerImageCounts,
    score_of: ScoreOf,
    resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """Compare two scores over the same images, resampled together.

    Raises:
        ValueError: The images differ, so nothing is paired.
    """
    if set(a.images) != set(b.images):
        apart = sorted(set(a.images) ^ set(b.images))
        raise ValueError(
            f"the two answer files are about different images: {len(apart)} occur in only one "
            f"of them, e.g. {apart[0]}"
        )
    place = {image: number for number, image in enumerate(b.images)}
    both = np.stack([a.counts, b.counts[[place[image] for image in a.images]]], axis=1)  # (I, 2, ...)
    scores = score_of(resampled_sums(both, resamples, seed))  # (R, 2)
    whole = score_of(both.sum(0))
    low, high = _percentiles(scores[:, 0] - scores[:, 1])
    return Difference(float(whole[0] - whole[1]), low, high, len(a.images))


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
