"""FasterVLM: the tokens with the highest [CLS] attention."""

import pytest
import torch

from llava.pruning import get_pruner


@pytest.mark.parametrize("tokens", [0, 1, 17, 64, 80])
def test_equals_vispruner_at_ratio_one(tokens):
    features = torch.randn(4, 64, 8)
    attention = (torch.rand(4, 3, 64) * 8).round()  # with ties
    ours = get_pruner("fastervlm", tokens).keep(features, attention)
    pure = get_pruner("vispruner", tokens, 1.0).keep(features, attention)
    assert torch.equal(ours.indices, pure.indices) and torch.equal(ours.important, pure.important)


def test_top_k_with_ties_to_the_lower_index():
    attention = torch.tensor([[[0.0, 2, 1, 2, 1, 0], [1, 1, 2, 1, 1, 1]]])
    assert get_pruner("fastervlm", 3).select(torch.zeros(1, 6, 1), attention).tolist() == [[1, 2, 3]]
    assert get_pruner("fastervlm", 4).select(torch.zeros(1, 6, 1), attention).tolist() == [[1, 2, 3, 4]]


def test_equal_columns_of_attention_tie_exactly():
    """Values without an exact sum, over 16 heads: another order of summation per column would break ties."""
    values = torch.rand(16, 1) / 3
    attention = values.expand(16, 577)[None]
    kept = get_pruner("fastervlm", 100).select(torch.zeros(1, 577, 1), attention)
    assert kept.tolist() == [list(range(100))]
