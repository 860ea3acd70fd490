"""vispruner+: what it maximizes, what it does not depend on, and its ties; not its plain version."""

from itertools import combinations

import pytest
import torch

from llava.pruning import get_pruner


def inputs(rows=1, n=60, channels=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, n, channels, generator=generator, dtype=torch.float64)
    return features, torch.rand(rows, 3, n, generator=generator, dtype=torch.float64)


def kept(features, attention, tokens):
    return get_pruner("vispruner+", tokens).select(features, attention, cues={"projected": features})


def objective(features, attention, chosen):
    def cosines(x):
        unit = torch.nn.functional.normalize(x, dim=1)
        return unit @ unit.T

    unlike = -cosines(features).mean(dim=1)
    unlike = (unlike - unlike.min()) / (unlike.max() - unlike.min())
    explained = cosines(features - features.mean(dim=0)).clamp(min=0).square()
    return (attention.mean(dim=0) * unlike * explained[:, list(chosen)].amax(dim=1)).sum().item()


@pytest.mark.parametrize("seed", range(4))
def test_the_greedy_set_is_within_the_bound_of_the_best_set(seed):
    features, attention = inputs(n=11, channels=4, seed=seed)
    best = max(objective(features[0], attention[0], chosen) for chosen in combinations(range(11), 4))
    found = objective(features[0], attention[0], kept(features, attention, 4)[0].tolist())
    assert (1 - 1 / 2.718281828) * best <= found <= best * (1 + 1e-9)


def test_every_budget_continues_the_smaller_one():
    features, attention = inputs(rows=2)
    sets = [[set(row.tolist()) for row in kept(features, attention, tokens)] for tokens in (5, 6, 20, 59)]
    for smaller, larger in zip(sets, sets[1:], strict=False):
        assert all(a < b for a, b in zip(smaller, larger, strict=True))


def test_the_scales_of_tokens_and_attention_do_not_matter():
    features, attention = inputs(rows=2)
    expected = kept(features, attention, 13)
    assert torch.equal(kept(features * 1e20, attention * 1e-30, 13), expected)


def test_it_reads_projected_tokens():
    features, attention = inputs()
    other, _ = inputs(seed=1)
    found = get_pruner("vispruner+", 9).select(other, attention, cues={"projected": features})
    assert torch.equal(found, kept(features, attention, 9))
    with pytest.raises(ValueError, match="'projected' is missing"):
        get_pruner("vispruner+", 9).select(features, attention)


def test_attention_is_the_demand_and_not_the_weight_of_the_candidate():
    """Two similar patches that are attended to are represented by the one between them, which is not."""
    directions = torch.tensor([[1.0, 0.3, 0], [1.0, -0.3, 0], [1.0, 0, 0], [-1, 0, 1], [-2, 0, -1]]).double()
    attention = torch.tensor([[[0.5, 0.5, 0.0, 0.0, 0.0]]]).double()
    assert kept(directions[None], attention, 1).tolist() == [[2]]


def test_neighbors_of_each_other_tie_and_the_lower_index_wins():
    """With flat attention, both patches of an isolated pair gain the same, whatever the order of the sum."""
    axes = torch.eye(8, dtype=torch.float64)
    pairs = [axes[k] + sign * 0.3 * axes[4 + k] for k in range(4) for sign in (1, -1)]
    for seed in range(8):  # in every direction
        generator = torch.Generator().manual_seed(seed)
        rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
        turned = torch.stack(pairs) @ rotation
        assert kept(turned[None], torch.ones(1, 2, 8), 3).tolist() == [[0, 2, 4]]


def test_a_patch_at_the_mean_is_chosen_last():
    features, attention = inputs(n=20)
    features[0, 4] = 0
    features[0, 4] = features[0].sum(dim=0) / 19  # the mean of all, itself included
    attention[0, :, 4] = 50
    order = [kept(features, attention, tokens)[0].tolist() for tokens in range(1, 20)]
    assert 4 not in order[10]


def test_no_attention_at_all_keeps_the_first_patches():
    features, attention = inputs()
    assert kept(features, attention * 0, 4).tolist() == [[0, 1, 2, 3]]
