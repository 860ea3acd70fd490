"""Curves against their definitions, written out for small numbers."""

import math

import numpy as np
import pytest

from llava.analysis.attention import AttentionSample, analyze, top_mask
from llava.analysis.attention.statistics import entropy

LAYERS, TOKENS = 2, 10


def samples(count, tokens=TOKENS, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        stacked = rng.random((5, LAYERS, tokens)) ** 4
        yield AttentionSample(*stacked, cls=rng.random(tokens))


def test_curves_by_their_definitions():
    found = analyze(group := list(samples(5)))
    curves = found.curves["last"]
    assert (found.samples, found.layers, found.tokens) == (5, LAYERS, TOKENS)
    for layer in range(LAYERS):
        vectors = [one.last[layer].tolist() for one in group]
        best = [sorted(range(TOKENS), key=lambda j, v=v: (-v[j], j))[: TOKENS // 4] for v in vectors]
        for token in range(TOKENS):
            held = sum(token in one for one in best)
            assert curves.counts[layer, token] == held and curves.frequency[layer, token] == held / 5
            mean = sum(one[token] for one in vectors) / 5
            assert curves.mean[layer, token] == pytest.approx(mean)
        picked = [token for one in best for token in one]
        for quarter in range(4):
            inside = [one for one in picked if quarter <= one * 4 / TOKENS < quarter + 1]
            assert curves.quartiles[layer, quarter] == pytest.approx(len(inside) / len(picked))
        for k in range(TOKENS + 1):
            shares = [sum(sorted(one, reverse=True)[:k]) / sum(one) for one in vectors]
            assert curves.cdf[layer, k] == pytest.approx(sum(shares) / 5)
        values = [-sum(v / sum(one) * math.log(v / sum(one)) for v in one) for one in vectors]
        assert curves.entropy[layer] == pytest.approx(sum(values) / 5)
        assert curves.relative_entropy[layer] == pytest.approx(sum(values) / 5 / math.log(TOKENS))
        pooled = [v for one in vectors for v in one]
        bins = [min(199, int(200 * v / max(pooled))) for v in pooled]
        assert curves.density[layer].tolist() == [bins.count(number) for number in range(200)]
    assert found.curves["cls"].mean.shape == (1, TOKENS)
    np.testing.assert_allclose(found.means["text"], np.mean([one.text for one in group], axis=0))


def test_shares_between_tokens_are_interpolated():
    curve = analyze(list(samples(2))).curves["cls"]
    assert curve.cumulated([0, 0.25, 1])[0].tolist() == pytest.approx(
        [0, (curve.cdf[0, 2] + curve.cdf[0, 3]) / 2, 1]
    )


def test_ties_go_to_the_lower_token_and_zeros_have_no_entropy():
    mask = top_mask(np.array([[1.0, 3.0, 1.0, 3.0, 1.0, 0.0]]), 3)
    assert mask.tolist() == [[True, True, False, True, False, False]]
    assert entropy(np.array([[1.0, 0.0, 1.0]]))[0] == pytest.approx(math.log(2))


def test_samples_of_other_shapes_and_none_are_refused():
    with pytest.raises(ValueError, match="there are none"):
        analyze([])
    with pytest.raises(ValueError, match=r"sample 1: last has shape \(2, 8\), before it \(2, 10\)"):
        analyze([*samples(1), *samples(1, tokens=8)])
