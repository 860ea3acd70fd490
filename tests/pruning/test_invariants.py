"""Properties that hold for every input: counts, order, independence of rows, the important part."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.cues import keep
from helpers.oracle_vispruner import attention_ranking, select
from llava.pruning import get_pruner, list_pruners
from llava.pruning.base import CLS_PLACE, NO_PLACE

RATIOS = [tenth / 10 for tenth in range(11)]
QUICK = settings(max_examples=60, deadline=None)


@st.composite
def cases(draw, min_rows=1):
    """Draw (features, attention, T, r): float16 values, exact in every dtype; coarse ones often tie."""
    b, n = draw(st.integers(min_rows, 4)), draw(st.integers(1, 50))
    c, h = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    features = torch.randn(b, n, c, generator=generator)
    attention = torch.rand(b, h, n, generator=generator)
    if draw(st.booleans()):
        features = (2 * features).round() / 2
    if draw(st.booleans()):
        attention = (4 * attention).round() / 4
    ratio = draw(st.one_of(st.sampled_from(RATIOS), st.floats(0, 1)))
    return features.half(), attention.half(), draw(st.integers(0, n + 3)), ratio


@QUICK
@given(cases(), st.sampled_from(list_pruners()))
def test_count_order_and_uniqueness(case, method):
    features, attention, tokens, ratio = case
    kept = keep(get_pruner(method, tokens, ratio), features, attention)
    n = features.shape[1]
    count = n if method == "none" else min(tokens, n)
    count = n if get_pruner(method).acts_in == "decoder" and count else count
    assert kept.indices.shape == kept.important.shape == (len(features), count)
    assert kept.indices.dtype == torch.int64 and kept.important.dtype == torch.bool
    if kept.features is None:
        assert (kept.indices.diff(dim=1) > 0).all()  # ascending, hence unique
        assert ((kept.indices >= 0) & (kept.indices < n)).all()
        return
    assert 0 < count < n and kept.features.isfinite().all()
    assert kept.features.shape == (*kept.indices.shape, features.shape[2])
    assert kept.features.dtype == features.dtype and kept.groups.shape == features.shape[:2]
    assert ((kept.groups >= -1) & (kept.groups < count)).all()
    for places in kept.indices.tolist():
        patches = [place for place in places if place >= 0]
        assert len(set(patches)) == len(patches) and all(place < n for place in patches)
        assert {place for place in places if place < 0} <= {CLS_PLACE, NO_PLACE}


@QUICK
@given(cases())
def test_important_part_is_the_top_of_the_attention_ranking(case):
    features, attention, tokens, ratio = case
    kept = get_pruner("vispruner", tokens, ratio).keep(features, attention)
    for row in range(len(features)):
        top = attention_ranking(attention[row].double().numpy())[: int(tokens * ratio)]
        assert sorted(top) == kept.indices[row][kept.important[row]].tolist()


@QUICK
@given(cases())
def test_equals_the_oracle(case):
    features, attention, tokens, ratio = case
    expected = [indices for indices, _ in select(features.numpy(), attention.numpy(), tokens, ratio)]
    assert get_pruner("vispruner", tokens, ratio).select(features, attention).tolist() == expected


@QUICK
@given(cases(min_rows=2), st.sampled_from(list_pruners()), st.randoms(use_true_random=False))
def test_rows_are_independent_and_batch_order_is_irrelevant(case, method, random):
    features, attention, tokens, ratio = case
    pruner = get_pruner(method, tokens, ratio, seed=3)
    together = keep(pruner, features, attention)
    order = list(range(len(features)))
    random.shuffle(order)
    for rows in (order, *([row] for row in order)):
        some = keep(pruner, features[rows], attention[rows])
        assert torch.equal(some.indices, together.indices[rows])
        if some.features is not None:
            assert torch.equal(some.features, together.features[rows])
            assert torch.equal(some.groups, together.groups[rows])


@QUICK
@given(cases(), st.sampled_from(list_pruners()))
def test_float16_selects_what_its_exact_copies_select(case, method):
    features, attention, tokens, ratio = case
    pruner = get_pruner(method, tokens, ratio)
    expected = keep(pruner, features, attention)
    for dtype in (torch.float32, torch.float64):
        kept = keep(pruner, features.to(dtype), attention.to(dtype))
        assert torch.equal(kept.indices, expected.indices)
        if kept.features is not None:
            assert torch.equal(kept.features.half(), expected.features)


@QUICK
@given(cases())
def test_scaling_features_by_powers_of_two_changes_nothing(case):
    """Only directions count, to the bit."""
    features, attention, tokens, ratio = case
    pruner = get_pruner("vispruner", tokens, ratio)
    scale = 2.0 ** (torch.arange(features.shape[1]) % 7 - 3)[:, None]
    assert torch.equal(pruner.select(features * scale, attention), pruner.select(features, attention))


def count_is_exact(features, attention, tokens, ratio):
    kept = get_pruner("vispruner", tokens, ratio).keep(features, attention)
    return (
        kept.indices.shape[1] == tokens
        and bool((kept.indices.diff(dim=1) > 0).all())
        and int(kept.important.sum()) == int(tokens * ratio)
    )


@pytest.mark.parametrize("ratio", RATIOS)
def test_every_budget_of_576_patches(ratio):
    """Every T from 1 to 576, every eighth of them at each ratio in turn (all pairs would take a minute)."""
    features, attention = torch.randn(1, 576, 4), torch.rand(1, 2, 576)
    budgets = range(RATIOS.index(ratio) % 8 + 1, 577, 8)
    assert [t for t in budgets if not count_is_exact(features, attention, t, ratio)] == []


@pytest.mark.parametrize("ratio", RATIOS)
def test_every_budget_at_every_ratio_on_a_smaller_grid(ratio):
    features, attention = torch.randn(1, 100, 4), torch.rand(1, 2, 100)
    assert [t for t in range(0, 101) if not count_is_exact(features, attention, t, ratio)] == []
