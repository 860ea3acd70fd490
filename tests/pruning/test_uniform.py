"""The uniform baseline: evenly spread positions, exactly T of them."""

import pytest
import torch

from llava.pruning import get_pruner


def grid(n, k):
    return get_pruner("uniform", k).select(torch.zeros(1, n, 1), torch.zeros(1, 1, n))[0].tolist()


def test_square_budgets_give_a_lattice():
    assert grid(576, 64) == [row * 24 + column for row in range(1, 24, 3) for column in range(1, 24, 3)]
    assert grid(576, 1) == [12 * 24 + 12]
    assert grid(16, 4) == [5, 7, 13, 15]


@pytest.mark.parametrize("n", [1, 4, 9, 64, 256, 576, 729, 2, 30, 577])
def test_exactly_k_distinct_positions(n):
    for k in range(n + 1):
        kept = grid(n, k)
        assert len(kept) == len(set(kept)) == k and all(0 <= i < n for i in kept)


def test_no_gaps_and_no_clusters():
    """Every patch is about as near to a kept one as k evenly spread ones allow, up to half the grid."""
    at = torch.stack(torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij"), -1).view(576, 2)
    for k in range(4, 289):
        kept = at[grid(576, k)]
        spacing = 24 / k**0.5
        assert torch.cdist(at, kept).amin(1).max() <= 0.5**0.5 * spacing + 1.3
        apart = torch.cdist(kept, kept).fill_diagonal_(99).min()
        assert apart >= max(1.0, spacing - 2.8)
        assert ((kept.mean(0) - 11.5).abs() < 0.7 + 3 / k**0.5).all()


def test_dropped_positions_are_spread_when_most_are_kept():
    for k in (289, 400, 552, 575):
        dropped = sorted(set(range(576)) - set(grid(576, k)))
        assert dropped == grid(576, 576 - k)


def test_even_steps_without_a_square_grid():
    assert grid(30, 5) == [3, 9, 15, 21, 27]


def test_same_positions_for_every_image():
    kept = get_pruner("uniform", 10).select(torch.randn(3, 64, 2), torch.rand(3, 1, 64))
    assert (kept == kept[0]).all()
