"""The random baseline: what the draw depends on, and its distribution."""

import torch

from llava.pruning import get_pruner


def blank(rows, n):
    return torch.zeros(rows, n, 1), torch.zeros(rows, 1, n)


def test_draw_depends_on_seed_and_crop_id_alone():
    features, attention = torch.randn(3, 100, 4), torch.rand(3, 2, 100)
    pruner = get_pruner("random", 20, seed=5)
    kept = pruner.select(features, attention, crop_ids=["a", "b", 7])
    assert torch.equal(pruner.select(*blank(3, 100), crop_ids=["b", "7", "a"]), kept[[1, 2, 0]])
    assert not torch.equal(kept[0], kept[1])
    for seed, equal in ((6, False), (5, True)):
        again = get_pruner("random", 20, seed=seed).select(*blank(1, 100), crop_ids=["a"])
        assert torch.equal(again[0], kept[0]) == equal


def test_stream_never_changes():
    """Answers on disk have to stay reproducible: another stream is another baseline."""
    kept = get_pruner("random", 8, seed=0).select(*blank(1, 576), crop_ids=["000000310196"])
    assert kept.tolist() == [[88, 94, 131, 179, 233, 292, 303, 544]]


def test_without_crop_ids_attention_identifies_a_row():
    features, attention = torch.randn(2, 64, 4), torch.rand(2, 2, 64)
    pruner = get_pruner("random", 16)
    kept = pruner.select(features, attention)
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(pruner.select(torch.zeros_like(features), attention.double()), kept)


def test_smaller_budgets_are_subsets():
    kept = [get_pruner("random", t).select(*blank(1, 64), crop_ids=["x"])[0].tolist() for t in range(65)]
    assert all(set(small) < set(large) for small, large in zip(kept, kept[1:], strict=False))


def test_inclusion_is_uniform():
    """Frequencies of patches and pairs over 4000 images are within five standard deviations."""
    images, n, k = 4000, 12, 4
    kept = get_pruner("random", k).select(*blank(images, n), crop_ids=range(images))
    chosen = torch.zeros(images, n).scatter_(1, kept, 1.0)
    single, pair = k / n, k * (k - 1) / (n * (n - 1))
    assert ((chosen.mean(0) - single).abs() < 5 * (single * (1 - single) / images) ** 0.5).all()
    together = (chosen.T @ chosen / images)[~torch.eye(n, dtype=torch.bool)]
    assert ((together - pair).abs() < 5 * (pair * (1 - pair) / images) ** 0.5).all()
