"""The baselines that every table needs: random, uniform, fastervlm, none."""

import pytest
import torch

from llava.pruning import get_pruner


def blank(rows, n):
    return torch.zeros(rows, n, 1), torch.zeros(rows, 1, n)


def test_random_depends_on_seed_and_key_alone():
    features, attention = torch.randn(3, 100, 4), torch.rand(3, 2, 100)
    pruner = get_pruner("random", 20, seed=5)
    kept = pruner.select(features, attention, keys=["a", "b", 7])
    assert torch.equal(pruner.select(*blank(3, 100), keys=["b", "7", "a"]), kept[[1, 2, 0]])
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(get_pruner("random", 20, seed=6).select(*blank(1, 100), keys=["a"])[0], kept[0])
    assert torch.equal(get_pruner("random", 20, seed=5).select(*blank(1, 100), keys=["a"])[0], kept[0])


def test_random_stream_never_changes():
    """Pinned, because answers on disk have to stay repeatable: another stream is another baseline."""
    kept = get_pruner("random", 8, seed=0).select(*blank(1, 576), keys=["000000310196"])
    assert kept.tolist() == [[88, 94, 131, 179, 233, 292, 303, 544]]


def test_random_without_keys_goes_by_the_attention():
    features, attention = torch.randn(2, 64, 4), torch.rand(2, 2, 64)
    pruner = get_pruner("random", 16)
    kept = pruner.select(features, attention)
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(pruner.select(torch.zeros_like(features), attention.double()), kept)


def test_random_smaller_budgets_are_subsets():
    chosen = [set(get_pruner("random", t).select(*blank(1, 64), keys=["x"])[0].tolist()) for t in range(65)]
    assert all(small < large for small, large in zip(chosen, chosen[1:], strict=False))


def test_random_is_uniform():
    """Inclusion of single patches and of pairs over 4000 images: within five standard deviations."""
    images, n, k = 4000, 12, 4
    kept = get_pruner("random", k).select(*blank(images, n), keys=range(images))
    chosen = torch.zeros(images, n).scatter_(1, kept, 1.0)
    single, pair = k / n, k * (k - 1) / (n * (n - 1))
    assert ((chosen.mean(0) - single).abs() < 5 * (single * (1 - single) / images) ** 0.5).all()
    together = (chosen.T @ chosen / images)[~torch.eye(n, dtype=torch.bool)]
    assert ((together - pair).abs() < 5 * (pair * (1 - pair) / images) ** 0.5).all()


def grid(n, k):
    return get_pruner("uniform", k).select(*blank(1, n))[0].tolist()


def test_uniform_squares_are_the_lattice():
    assert grid(576, 64) == [row * 24 + column for row in range(1, 24, 3) for column in range(1, 24, 3)]
    assert grid(576, 1) == [12 * 24 + 12]
    assert grid(16, 4) == [5, 7, 13, 15]


@pytest.mark.parametrize("n", [1, 4, 9, 64, 256, 576, 729, 2, 30, 577])
def test_uniform_gives_exactly_k_distinct(n):
    for k in range(n + 1):
        kept = grid(n, k)
        assert len(kept) == len(set(kept)) == k and all(0 <= i < n for i in kept)


def test_uniform_leaves_no_hole_and_no_cluster():
    """Every patch has a kept one about as near as k evenly spread ones allow, for k up to half the grid."""
    at = torch.stack(torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij"), -1).view(576, 2)
    for k in range(4, 289):
        kept = at[grid(576, k)]
        spacing = 24 / k**0.5
        assert torch.cdist(at, kept).amin(1).max() <= 0.5**0.5 * spacing + 1.3
        apart = torch.cdist(kept, kept).fill_diagonal_(99).min()
        assert apart >= max(1.0, spacing - 2.8)
        assert ((kept.mean(0) - 11.5).abs() < 0.7 + 3 / k**0.5).all()


def test_uniform_spreads_the_holes_when_most_stay():
    for k in (289, 400, 552, 575):
        holes = sorted(set(range(576)) - set(grid(576, k)))
        assert holes == grid(576, 576 - k)


def test_uniform_off_a_square_grid_steps_evenly():
    assert grid(30, 5) == [3, 9, 15, 21, 27]


def test_uniform_is_the_same_for_every_image():
    kept = get_pruner("uniform", 10).select(torch.randn(3, 64, 2), torch.rand(3, 1, 64))
    assert (kept == kept[0]).all()


@pytest.mark.parametrize("tokens", [0, 1, 17, 64, 80])
def test_fastervlm_is_vispruner_at_ratio_one(tokens):
    features = torch.randn(4, 64, 8)
    attention = (torch.rand(4, 3, 64) * 8).round()  # with ties
    ours = get_pruner("fastervlm", tokens).keep(features, attention)
    pure = get_pruner("vispruner", tokens, 1.0).keep(features, attention)
    assert torch.equal(ours.indices, pure.indices) and torch.equal(ours.important, pure.important)


def test_fastervlm_takes_the_top_and_the_lower_index_of_a_tie():
    attention = torch.tensor([[[0.0, 2, 1, 2, 1, 0], [1, 1, 2, 1, 1, 1]]])
    assert get_pruner("fastervlm", 3).select(torch.zeros(1, 6, 1), attention).tolist() == [[1, 2, 3]]
    assert get_pruner("fastervlm", 4).select(torch.zeros(1, 6, 1), attention).tolist() == [[1, 2, 3, 4]]


def test_equal_columns_of_attention_tie_exactly():
    """Values without an exact sum, over 16 heads: another order of summation per column would break ties."""
    values = torch.rand(16, 1) / 3
    attention = values.expand(16, 577)[None]
    kept = get_pruner("fastervlm", 100).select(torch.zeros(1, 577, 1), attention)
    assert kept.tolist() == [list(range(100))]


def test_none_keeps_all_whatever_the_budget():
    pruner = get_pruner("none", 5)
    assert pruner.tokens is None and pruner.config() == {"method": "none", "tokens": None}
    assert pruner.select(torch.zeros(2, 7, 3), torch.zeros(2, 1, 7)).tolist() == [list(range(7))] * 2
