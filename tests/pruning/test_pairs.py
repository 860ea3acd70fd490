"""Rows that are too long for the matrix of all pairs give the same tokens as with it, and no such matrix."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.cues import QUESTION, make_cues
from helpers.selection_inputs import make_inputs
from llava.pruning import base as base_module
from llava.pruning import diversity as diversity_module
from llava.pruning import get_pruner, list_pruners
from llava.pruning import pairs as pairs_module

# Methods that compare all pairs of tokens; "tome" merges inside a tower, whose rows are short
PAIRWISE = [
    "vispruner",
    "vispruner+",
    "farthest",
    "score",
    "mmr",
    "idsel",
    "scope",
    "divprune",
    "divprune_cen",
]
PAIRWISE += ["cdpruner", "prumerge", "prumerge+"]


def test_all_other_methods_compare_no_pairs():
    others = {"none", "random", "uniform", "fastervlm", "hiprune", "visionzip", "tome", "downsample"}
    images = {name for name in list_pruners() if get_pruner(name).acts_in == "image"}
    assert images - set(PAIRWISE) == others


class Largest(TorchDispatchMode):
    """Notes the most elements of a float64 tensor that an operation makes."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, torch.Tensor) and one.dtype == torch.float64:
                self.most = max(self.most, one.untyped_storage().nbytes() // 8)
        return result


@pytest.fixture
def small(monkeypatch):
    """Make rows of more than 8 tokens large, in blocks of few lines."""

    def patch(entries: int = 1000) -> None:
        monkeypatch.setattr(base_module, "LARGEST", 8)
        monkeypatch.setattr(pairs_module, "ENTRIES", entries)
        monkeypatch.setattr(diversity_module, "_NEIGHBORS", 3)
        monkeypatch.setattr(pairs_module, "AHEAD", 4)

    return patch


def inputs(kind: str, dtype: torch.dtype = torch.float32):
    features, attention = (torch.from_numpy(one).float() for one in make_inputs(kind, 3, 2, 49, 16, 2))
    return features.to(dtype), attention.to(dtype)


@pytest.mark.parametrize("kind", ["zero", "cluster", "dup", "tie_both"])
@pytest.mark.parametrize("method", PAIRWISE)
def test_long_rows_keep_the_same_tokens(method, kind, small):
    features, attention = inputs(kind)
    # 16 channels: with more tokens, all of CDPruner's determinants are rounding errors
    pruners = [get_pruner(method, tokens=tokens) for tokens in (5, 12 if method == "cdpruner" else 30)]
    cues = make_cues(pruners[0], features, attention)
    expected = [one.keep(features, attention, None, QUESTION, cues) for one in pruners]
    small()
    for pruner, plain in zip(pruners, expected, strict=True):
        found = pruner.keep(features, attention, None, QUESTION, cues)
        assert torch.equal(found.indices, plain.indices) and torch.equal(found.important, plain.important)
        if plain.features is not None:
            torch.testing.assert_close(found.features, plain.features)
            assert torch.equal(found.groups, plain.groups)


def test_adaptive_rows_and_half_precision(small):
    for method, options, dtype in (
        ("prumerge", {"adaptive": True}, torch.float32),
        ("vispruner", {}, torch.half),
    ):
        features, attention = inputs("dup", dtype)
        pruner = get_pruner(method, tokens=20, **options)
        cues = make_cues(pruner, features, attention)
        small_before = base_module.LARGEST
        plain = pruner.keep(features, attention, None, QUESTION, cues)
        small()
        found = pruner.keep(features, attention, None, QUESTION, cues)
        assert torch.equal(found.indices, plain.indices)
        base_module.LARGEST = small_before


@pytest.mark.parametrize("method", PAIRWISE)
def test_no_matrix_of_all_pairs_is_made(method, small):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 200, 8, generator=generator)
    attention = torch.rand(1, 2, 200, generator=generator)
    pruner = get_pruner(method, tokens=8)
    cues = make_cues(pruner, features, attention)
    small(entries=4000)
    with Largest() as largest:
        pruner.keep(features, attention, None, QUESTION, cues)
    assert 0 < largest.most <= 200 * 40  # some lines

    base_module.LARGEST = 1000
    with Largest() as largest:
        pruner.keep(features, attention, None, QUESTION, cues)
    assert largest.most >= 190**2  # the matrix, but for tokens that are kept by attention


def test_the_rounds_are_told_of_long_rows_as_of_short_ones(small):
    features, _ = inputs("cluster")
    order = torch.arange(49).repeat(2, 1)
    seen: list[list[torch.Tensor]] = [[], []]
    diversity_module.most_diverse(features[:1], order[:1], 10, on_round=seen[0].append)
    small()
    diversity_module.most_diverse(features[:1], order[:1], 10, on_round=seen[1].append)
    assert len(seen[0]) == len(seen[1]) > 4
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_features_too_large_are_refused(small):
    small()
    features = torch.full((1, 20, 4), 1e60, dtype=torch.float64)
    with pytest.raises(ValueError, match="features too large for float64 similarities"):
        get_pruner("vispruner", tokens=4).keep(features, torch.rand(1, 2, 20))
    with pytest.raises(ValueError, match="features too large for float64 similarities"):
        get_pruner("farthest", tokens=4).keep(features, torch.rand(1, 2, 20))
