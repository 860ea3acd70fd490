"""Schedules and rules of methods inside the language model: budgets, layers, ties, recycled tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.oracle_inside import recycle
from llava.model.flops import LanguageShape, llm_prefill_macs
from llava.pruning import get_pruner, list_pruners
from llava.pruning.inside import DecoderPruner
from llava.pruning.inside.base import strongest
from llava.pruning.inside.dart import duplicates_removed
from llava.pruning.inside.pyramiddrop import solve
from llava.pruning.inside.sparsevlm import merge, raters, recycled

INSIDE = [name for name in list_pruners() if get_pruner(name).acts_in == "decoder"]


def mean(counts: list[int]) -> float:
    return sum(counts) / len(counts)


def test_all_are_registered():
    assert {"fastv", "sparsevlm", "pyramiddrop", "vtw", "dart"} <= set(INSIDE)
    assert all(isinstance(get_pruner(name, 8), DecoderPruner) for name in INSIDE)


@pytest.mark.parametrize(
    "method, tokens, expected",
    [
        ("fastv", 128, 156),
        ("fastv", 64, 96),
        ("fastv", 32, 66),
        ("sparsevlm", 192, 206.5),
        ("sparsevlm", 128, 145.40625),
        ("sparsevlm", 96, 114.09375),
        ("sparsevlm", 64, 82.25),
        ("dart", 64, 96),
        ("vtw", 270, 270),
    ],
)
def test_published_means_of_32_layers(method, tokens, expected):
    assert mean(get_pruner(method, tokens).visual_per_layer(32, 576)) == expected


@pytest.mark.parametrize("tokens, p", [(192, 0.5596), (128, 0.4197), (64, 0.1916)])
@pytest.mark.parametrize("depth", [32, 40])
def test_pyramiddrop_means_are_the_budget(tokens, p, depth):
    counts = get_pruner("pyramiddrop", tokens).visual_per_layer(depth, 576)
    assert tokens - 1 < mean(counts) <= tokens
    if depth == 32:
        assert solve((2, 8, 16), 32, tokens / 576) == pytest.approx(p, abs=1e-4)
        assert counts[2] == int(576 * p) or counts[2] == int(576 * p) + 1


def test_layers_scale_with_depth_and_stages_on_one_layer_merge():
    assert get_pruner("fastv", 64).visual_per_layer(3, 576) == [576, 64, 64]  # 2 of 32 is 1 of 3
    assert get_pruner("sparsevlm", 64).visual_per_layer(3, 576) == [576, 47, 19]  # 3, 7, 16 are 1, 1, 2
    assert get_pruner("pyramiddrop", 64).visual_per_layer(3, 576) == [576, 21, 4]  # 2, 8, 16 are 1, 1, 2
    assert get_pruner("fastv", 64).stages(40, 576)[0].layer == 3


def test_stages_that_change_nothing_are_left_out():
    pruner = get_pruner("pyramiddrop", layers=[2, 4, 6], ratios=[1.0, 0.5, 0.5])
    assert [(stage.layer, stage.keep) for stage in pruner.stages(8, 20)] == [(4, 10)]


def test_crops_multiply_the_budget():
    assert get_pruner("fastv", 64).visual_per_layer(32, 2880, crops=5)[2] == 320
    assert get_pruner("sparsevlm", 64).visual_per_layer(32, 2880, crops=5)[3:] == [320] * 29


@pytest.mark.parametrize(
    "method, tokens, depth, says",
    [
        ("pyramiddrop", 32, 32, "cannot have a mean of 32 of 576 .* Set at least 37"),
        ("pyramiddrop", 36, 3, "Set at least 37"),
        ("sparsevlm", 18, 32, "cannot have a budget of 18 of 576 .* Set at least 19"),
        ("vtw", 17, 32, "mean of 17 visual tokens over 32 layers, .* Set at least 18"),
        ("fastv", 64, 1, "fastv: it would act before layer 1 of 1"),
    ],
)
def test_budgets_that_cannot_be_had(method, tokens, depth, says):
    with pytest.raises(ValueError, match=says):
        get_pruner(method, tokens).visual_per_layer(depth, 576)


def test_the_least_budgets_can_be_had():
    for method, least in [("pyramiddrop", 37), ("sparsevlm", 19), ("vtw", 18), ("fastv", 1), ("dart", 1)]:
        assert get_pruner(method, least).visual_per_layer(32, 576)[-1] < 576


@pytest.mark.parametrize(
    "method, options, says",
    [
        ("fastv", {"layer": 8}, "before layer 8 of 8"),
        ("fastv", {"layer": 0}, "layer: 0 is not an integer >= 1"),
        ("dart", {"pivots_text": 2.5}, "pivots_text: 2.5 is not an integer >= 1"),
        ("pyramiddrop", {"layers": [2]}, "ratios: got None for layers"),
        ("pyramiddrop", {"layers": [2], "ratios": [1.5]}, "not a list of shares"),
        ("sparsevlm", {"layers": [2, 6], "counts": [9]}, "counts: got"),
        ("sparsevlm", {"layers": "26", "counts": [9, 4]}, "layers: '26' is not a list of integers"),
    ],
)
def test_options_are_checked(method, options, says):
    with pytest.raises(ValueError, match=says):
        get_pruner(method, 4, **options).visual_per_layer(8, 64)


@pytest.mark.parametrize("method", INSIDE)
def test_before_the_language_model_all_tokens_stay(method):
    features, attention = torch.randn(2, 9, 4), torch.rand(2, 3, 9)
    assert get_pruner(method, 4).select(features, attention).tolist() == [list(range(9))] * 2
    assert get_pruner(method, 0).select(features, attention).shape == (2, 0)
    assert get_pruner(method, 4).config() == {"method": method, "tokens": 4}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(INSIDE),
    st.integers(2, 48),
    st.integers(1, 700),
    st.one_of(st.none(), st.integers(0, 750)),
)
def test_counts_never_grow_and_meet_the_budget(method, depth, patches, tokens):
    pruner = get_pruner(method, tokens)
    try:
        counts = pruner.visual_per_layer(depth, patches)
    except ValueError as error:
        assert "Set at least" in str(error) and method in ("pyramiddrop", "sparsevlm", "vtw")
        return
    assert len(counts) == depth
    if tokens == 0:
        assert counts == [0] * depth
    elif tokens is None or tokens >= patches:
        assert counts == [patches] * depth and pruner.stages(depth, patches) == []
    else:
        assert counts[0] == patches and counts == sorted(counts, reverse=True)
        one_stage = method in ("fastv", "dart") or (method == "sparsevlm" and patches != 576)
        if one_stage:
            assert set(counts[1:]) <= {patches, tokens} and counts[-1] == tokens
        elif method == "vtw":
            assert counts[-1] == 0 and mean(counts) <= tokens
        elif method == "pyramiddrop" and depth >= 32:
            assert mean(counts) <= tokens


def test_ties_go_to_the_lower_column():
    assert strongest(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 1, 3]


def test_recycled_counts():
    assert [recycled(removed) for removed in (1, 5, 276, 510)] == [(1, 1), (2, 1), (83, 9), (154, 16)]


@pytest.mark.parametrize("count", [1, 7, 24])
def test_merging_equals_the_plain_version(count):
    draw = torch.Generator().manual_seed(count)
    states = torch.randn(count, 6, generator=draw)
    states[count // 2] = states[0]  # equal ones tie
    expected = np.array(recycle(list(states.double().numpy())))
    assert np.allclose(merge(states, count // 10 + 1).numpy(), expected, atol=1e-5)


def test_raters_are_above_the_mean_and_none_without_any():
    visual, text = torch.eye(3)[:2] * 5, torch.eye(3)
    assert raters(visual, text).tolist() == [0, 1]
    assert raters(visual, text[:1]) is None  # a single word has the mean


def test_dart_keeps_the_budget_for_any_number_of_tokens():
    draw = torch.Generator().manual_seed(0)
    for visual, words, keep in [(9, 0, 5), (9, 2, 3), (20, 7, 13), (5, 9, 5), (6, 1, 1)]:
        keys, states = torch.randn(2, visual + words, 8, generator=draw)
        kept = duplicates_removed(keys, states, visual, keep, start=4).tolist()
        assert len(kept) == len(set(kept)) == keep and kept == sorted(kept) and kept[-1] < visual


def test_flops_are_small_beside_the_prefill_and_zero_without_a_reduction():
    prefill = 2 * llm_prefill_macs(576 + 60, LanguageShape(32, 4096, 11008))
    for method, most in {
        "fastv": 1e-5,
        "dart": 1e-5,
        "vtw": 0,
        "sparsevlm": 1e-3,
        "pyramiddrop": 1e-2,
    }.items():
        cost = get_pruner(method, 64).flops(576, 1024, 4096)
        assert (0 < cost or method == "vtw") and cost <= most * prefill
        assert get_pruner(method).flops(576, 1024, 4096) == 0
    keys = 576 * 4096**2  # pyramiddrop: those of the first stage alone
    assert get_pruner("pyramiddrop", 64).flops(576, 1024, 4096) > 2 * keys
