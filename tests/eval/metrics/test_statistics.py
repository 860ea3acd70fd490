"""Bootstrap over images: against a plain loop, known intervals, and pairing."""

from __future__ import annotations

import numpy as np
import pytest

from llava.eval.benchmarks.base import PerImageCounts
from llava.eval.metrics.statistics import bootstrap_interval, paired_bootstrap, resampled_sums


def mean(counts: np.ndarray) -> np.ndarray:
    """(..., 2) of right and all -> percent."""
    return 100 * counts[..., 0] / counts[..., 1]


def tallies(right: np.ndarray, names: str = "image") -> PerImageCounts:
    counts = np.stack([right, np.full_like(right, 10)], axis=-1).astype(float)
    return PerImageCounts(tuple(f"{names}{number}" for number in range(len(right))), counts)


def test_sums_are_those_of_drawn_images():
    counts = np.eye(6)  # the sum over drawn images is then how often each was drawn
    sums = resampled_sums(counts, 500, seed=3)
    assert sums.shape == (500, 6) and (sums.sum(1) == 6).all() and (sums >= 0).all()
    assert sums.mean(0) == pytest.approx(np.ones(6), abs=0.15)
    assert (sums == resampled_sums(counts, 500, seed=3)).all()


def test_interval_is_that_of_the_mean():
    rng = np.random.default_rng(0)
    right = rng.binomial(10, 0.8, 400)
    low, high = bootstrap_interval(tallies(right), mean, resamples=4000)
    error = 10 * right.std() / np.sqrt(400)  # percent, of the mean of right/10
    center = 10 * right.mean()
    assert low == pytest.approx(center - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(center + 1.96 * error, abs=0.15 * error)


def test_images_are_resampled_not_questions():
    alike = tallies(np.repeat([0, 10], 50))  # ten questions of an image fail together
    low, high = bootstrap_interval(alike, mean)
    assert high - low > 15  # by question it would be about 6


def test_pairing_sees_what_single_intervals_hide():
    rng = np.random.default_rng(1)
    hard = rng.binomial(10, rng.uniform(0.1, 0.9, 300))
    a, b = tallies(np.minimum(hard + rng.binomial(1, 0.3, 300), 10)), tallies(hard)
    result = paired_bootstrap(a, b, mean)
    assert result.significant and result.ci_low > 0 and result.images == 300
    assert result.difference == pytest.approx(10 * (a.counts[:, 0] - b.counts[:, 0]).mean())
    (_, high_b), (low_a, _) = bootstrap_interval(b, mean), bootstrap_interval(a, mean)
    assert low_a < high_b  # the two intervals overlap


def test_pairing_is_by_image_name():
    right = np.arange(10)
    a = tallies(right)
    b = PerImageCounts(a.images[::-1], a.counts[::-1])
    result = paired_bootstrap(a, b, mean)
    assert (result.difference, result.ci_low, result.ci_high) == (0, 0, 0) and not result.significant
    with pytest.raises(ValueError, match="different images: 20 occur in only one"):
        paired_bootstrap(a, tallies(right, "other"), mean)
