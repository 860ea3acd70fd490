"""The shared pieces of greedy methods: exact ties, zero norms, bits that the batch does not change."""

from functools import partial

import pytest
import torch

from llava.pruning import get_pruner, greedy

SIMILAR = ["cdpruner", "divprune", "divprune_cen", "farthest", "idsel", "mmr", "prumerge", "scope", "score"]
SIMILAR.append("vispruner+")


def test_equal_tokens_have_equal_cosines_to_the_bit_and_one_with_each_other():
    x = torch.randn(2, 211, 131)
    twins = torch.randint(0, 60, (211,))
    x[1] = x[1, twins]
    similarity = greedy.cosines(x)
    assert torch.equal(similarity, similarity.transpose(1, 2))
    for i in range(60):
        same = (twins == i).nonzero().flatten()
        assert (similarity[1][same] == similarity[1][same[:1]]).all()
        assert (similarity[1][same][:, same] == 1).all()
    expected = torch.nn.functional.cosine_similarity(x[0, :, None].double(), x[0, None].double(), dim=2)
    assert torch.allclose(similarity[0], expected, atol=1e-12)


def test_zero_norm_has_cosine_zero_and_a_row_has_the_same_bits_in_every_batch():
    x = torch.randn(3, 130, 77)
    x[:, 5::9] = 0
    similarity = greedy.cosines(x)
    assert similarity.isfinite().all() and not similarity[:, 5].any() and not similarity[:, :, 14].any()
    for row in range(3):
        assert torch.equal(greedy.cosines(x[row : row + 1])[0], similarity[row])


@pytest.mark.parametrize("method", SIMILAR)
def test_features_that_are_too_large_are_an_error(method):
    from helpers.cues import keep

    with pytest.raises(ValueError, match="too large for float64 similarities.*limit is 1e100"):
        keep(get_pruner(method, 4), torch.randn(1, 9, 3).double() * 1e60, torch.rand(1, 2, 9))


def test_powers_of_equal_values_are_equal():
    values = torch.rand(2, 37).double()
    values[:, 1::2] = values[:, :1]
    powers = greedy.power(values, 0.8)
    assert (powers[:, 1::2] == powers[:, :1]).all() and torch.allclose(powers, values**0.8)
    assert greedy.power(values, 1) is values


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_every_token_is_chosen_once_whatever_the_scores(bad):
    score = torch.full((2, 7), bad, dtype=torch.float64)
    chosen = greedy.greedy(score, 7, lambda last: score)
    assert chosen.sort(dim=1).values.tolist() == [list(range(7))] * 2


def test_ties_go_to_the_lower_index():
    score = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]]).double()
    assert greedy.greedy(score, 5, lambda last: score).tolist() == [[1, 2, 4, 0, 3]]


def test_the_lazy_gains_of_scope_choose_what_all_gains_choose():
    for seed, n, levels in ((0, 200, None), (1, 100, 4), (2, 64, 2)):
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(2, n, 8, generator=generator)
        attention = torch.rand(2, 3, n, generator=generator)
        if levels:
            features, attention = features.round(), (attention * levels).round()
        similarity = greedy.cosines(features)
        weight = greedy.sum_of_heads(attention)
        from llava.pruning.scope import _choose_densely, _choose_lazily

        every = _choose_densely(similarity, weight, n - 1)
        for row in range(2):
            lazy = torch.empty(n - 1, dtype=torch.int64)
            lines = partial(similarity[row].index_select, 0)
            gains = similarity[row].clamp(min=0).sum(dim=1)
            _choose_lazily(lines, torch.arange(n), gains, weight[row], lazy)
            assert lazy.tolist() == every[row].tolist()
