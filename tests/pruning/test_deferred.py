"""`keep_deferred`: the tokens of `keep` without a device sync, and a flag for unusual inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.cues import QUESTION, keep, make_cues
from helpers.no_syncs import NoSyncs
from helpers.selection_inputs import EXACT_TIES, make_inputs
from llava.pruning import Kept, Pruner, TextCue, base, diversity, get_pruner, list_pruners
from llava.pruning.base import NO_PLACE

METHODS = [name for name in list_pruners() if name != "random"]  # it reads identities on the host


def deferred(pruner, features, attention):
    """Call `keep_deferred` under `NoSyncs`, after a first call that may fill caches as a warm-up does."""
    cues = make_cues(pruner, features, attention)
    pruner.keep_deferred(features, attention, None, QUESTION, cues)
    with NoSyncs():
        kept, doubt = pruner.keep_deferred(features, attention, None, QUESTION, cues)
    assert doubt.shape == () and doubt.dtype == torch.bool
    return kept, bool(doubt)


def assert_same(kept, expected):
    assert torch.equal(kept.indices, expected.indices) and torch.equal(kept.important, expected.important)
    if expected.features is not None:
        assert torch.equal(kept.features, expected.features) and torch.equal(kept.groups, expected.groups)


def inputs(kind="gauss", rows=2, n=100, channels=48, heads=3):
    return map(torch.from_numpy, make_inputs(kind, 5, rows, n, channels, heads))


def test_the_mode_notices_syncs():
    values = torch.rand(3)
    for look in (
        lambda: values.sum().item(),
        lambda: bool(values.any()),
        lambda: values[values > 0.5],
        lambda: values.nonzero(),
        lambda: values.unique(),
        lambda: values.masked_select(values > 0.5),
        lambda: torch.tensor([1, 2]),
        lambda: values.new_tensor(3),
        lambda: values.to("meta"),
    ):
        with NoSyncs(), pytest.raises(AssertionError):
            look()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["gauss", "cluster", "spatial", "outlier", "tie_attn"])
def test_ordinary_inputs_keep_the_same_without_doubt(method, kind):
    features, attention = inputs(kind)
    for tokens, ratio in [(64, 0.5), (33, 0.1), (20, 1), (7, 0), (0, 0.5), (200, 0.5)]:
        if ratio in (0, 0.1, 1) and not get_pruner(method).uses_ratio and tokens != 33:
            continue
        pruner = get_pruner(method, tokens, ratio)
        kept, doubt = deferred(pruner, features, attention)
        assert not doubt
        assert_same(kept, keep(pruner, features, attention))


@st.composite
def cases(draw):
    """Draw inputs of which some have equal tokens, zero norms or values that are not finite."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows, n = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    features = torch.randn(rows, n, draw(st.integers(1, 6)), generator=generator)
    attention = torch.rand(rows, draw(st.integers(1, 3)), n, generator=generator)
    features = draw(st.sampled_from([features, features.round(), features * 1e-60, features.half()]))
    if draw(st.booleans()):
        target = draw(st.sampled_from([features, attention]))
        target.view(-1)[draw(st.integers(0, target.numel() - 1))] = draw(
            st.sampled_from([float("nan"), float("inf"), float("-inf"), 0.0])
        )
    return features, attention, draw(st.integers(0, n + 2)), draw(st.sampled_from([0, 0.1, 0.5, 1]))


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(METHODS))
def test_tokens_are_equal_where_there_is_no_doubt_and_valid_everywhere(case, method):
    features, attention, tokens, ratio = case
    pruner = get_pruner(method, tokens, ratio)
    kept, doubt = deferred(pruner, features, attention)
    n = features.shape[1]
    if kept.features is None:
        assert (kept.indices.diff(dim=1) > 0).all() and (kept.indices >= 0).all()
    assert ((kept.indices >= NO_PLACE) & (kept.indices < n)).all()
    try:
        expected = keep(pruner, features, attention)
    except ValueError:
        assert doubt
    else:
        assert kept.indices.shape == expected.indices.shape
        if not doubt:
            assert_same(kept, expected)


def spoiled(change):
    features, attention = inputs(rows=3)
    change(features, attention)
    return features, attention


@pytest.mark.parametrize(
    "change",
    [
        lambda f, a: f[1, 50].fill_(float("nan")),
        lambda f, a: a[2, 1, 7].fill_(float("nan")),
        lambda f, a: f[0, 3, 0].fill_(float("inf")),
        lambda f, a: a[0, 0, 0].fill_(float("-inf")),
        lambda f, a: f[1].copy_(f[1, :1].expand(100, -1)),
        lambda f, a: f[1, 10:60].copy_(f[1, 60:61].expand(50, -1)),
        lambda f, a: f[2, 20:80].copy_(f[2, 80:81] * (1 + torch.arange(60)[:, None] / 64)),  # parallel
        lambda f, a: f[0, 5:90].zero_(),
    ],
)
def test_unusual_inputs_are_doubtful(change):
    features, attention = spoiled(change)
    assert deferred(get_pruner("vispruner", 20), features, attention)[1]


@pytest.mark.parametrize("scale", [1e-60, 1e60, 1e90, 1e200])
def test_norms_out_of_range_are_doubtful(scale):
    features, attention = inputs()
    assert deferred(get_pruner("vispruner", 20), features.double() * scale, attention)[1]


@pytest.mark.parametrize("kind", [*EXACT_TIES, "zero"])
def test_the_golden_kinds_with_equal_tokens_or_zero_norms_are_doubtful(kind):
    kept, doubt = deferred(get_pruner("vispruner", 20), *inputs(kind))
    assert doubt == (kind != "tie_both")  # equal similarities of tokens that are not equal
    if not doubt:
        assert_same(kept, get_pruner("vispruner", 20).keep(*inputs(kind)))
    kept, doubt = deferred(get_pruner("fastervlm", 20), *inputs(kind))  # it has no similarities
    assert not doubt
    assert_same(kept, get_pruner("fastervlm", 20).keep(*inputs(kind)))


def test_full_size_float16_features():
    features, attention = inputs(rows=2, n=576, channels=64)
    pruner = get_pruner("vispruner", 64)
    kept, doubt = deferred(pruner, features.half(), attention.half())
    assert not doubt
    assert_same(kept, pruner.keep(features.half(), attention.half()))


def test_shapes_are_checked_and_nothing_stays_deferred_after_an_error():
    features, attention = inputs()
    with pytest.raises(ValueError, match="disagree"):
        get_pruner("vispruner", 20).keep_deferred(features, attention[:1])

    class Broken(Pruner):
        def score(self, features, cues):
            assert base.deferring()
            raise KeyError("broken")

    with pytest.raises(KeyError):
        Broken(3).keep_deferred(features, attention)
    assert not base.deferring()
    with pytest.raises(ValueError, match="too large"):  # the careful way again
        get_pruner("vispruner", 20).keep(features.double() * 1e60, attention)


def test_a_method_of_the_user_gets_its_usual_arguments():
    class Cued(Pruner):
        name = "cued"
        needs_question = True

        def choose(self, features, cues, tokens):
            assert cues.question.text == "What is it?" and cues.crop_ids == ["a", "b"]
            return Kept.from_selected(torch.arange(tokens).repeat(len(features), 1), 0)

    features, attention = inputs()
    cue = TextCue("What is it?", None)
    kept, doubt = Cued(3).keep_deferred(features, attention, ["a", "b"], cue)
    assert kept.indices.tolist() == [[0, 1, 2]] * 2 and not doubt
    with pytest.raises(ValueError, match="chooses by the question"):
        Cued(3).keep_deferred(features, attention, ["a", "b"])


def test_random_keeps_the_same_with_identities():
    features, attention = inputs()
    pruner = get_pruner("random", 20)
    kept, doubt = pruner.keep_deferred(features, attention, ["a", "b"])
    assert not doubt
    assert_same(kept, pruner.keep(features, attention, ["a", "b"]))


def test_without_float64_the_careful_way_runs(monkeypatch):
    monkeypatch.setattr(base, "has_float64", lambda device: device == "cpu" and base_calls.pop())
    base_calls = [True, False]  # not in keep_deferred, but in keep
    features, attention = inputs("dup")
    kept, doubt = get_pruner("vispruner", 20).keep_deferred(features, attention)
    assert not doubt
    monkeypatch.undo()
    assert_same(kept, get_pruner("vispruner", 20).keep(features, attention))


def test_rows_reported_outside_of_keep_deferred_stay_with_the_caller():
    assert not base.defer(torch.ones(2, dtype=torch.bool)) and not base.deferring()
    assert diversity.deferring is base.deferring
