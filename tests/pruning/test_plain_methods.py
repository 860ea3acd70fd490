"""Every method equals its plain version, on ordinary and on nasty images."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.cues import QUESTION, make_cues
from helpers.plain_methods import PLAIN, merge_tokens, prumerge
from llava.pruning import get_pruner, list_pruners, tome
from llava.pruning.base import NO_TOKEN

OLDER = {"fastervlm", "none", "random", "uniform", "vispruner"}  # they have tests of their own
KINDS = ("random", "duplicates", "zeros", "constant", "flat attention", "all equal")


def images(kind, n=25, channels=6, heads=2, rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, n, channels, generator=generator)
    attention = torch.rand(rows, heads, n, generator=generator)
    if kind in ("duplicates", "all equal"):
        twin = torch.randint(0, n // 2, (n,), generator=generator)
        features, attention = features[:, twin], attention[:, :, twin]
    if kind == "zeros":
        features[:, torch.randperm(n, generator=generator)[: n // 3]] = 0
    if kind in ("constant", "all equal"):
        features[:] = features[:, :1]
    if kind in ("flat attention", "all equal"):
        attention[:] = 0.25
    return features, attention


def rows_of(pruner, features, attention):
    cues = make_cues(pruner, features, attention)
    every = {"features": features, "attention": attention, **cues}
    shared = {"text_embeds"}
    return cues, [
        {name: (cue if name in shared else cue[row]).numpy() for name, cue in every.items()}
        for row in range(len(features))
    ]


def assert_equal(pruner, kept, row, found, plain):
    if kept.features is None:
        assert kept.indices[row].tolist() == sorted(found)
        return
    places, features = found
    if places:
        assert kept.indices[row][: len(places)].tolist() == places
    assert np.allclose(kept.features[row][: len(features)].numpy(), features, atol=1e-5)


def test_every_method_has_a_plain_version():
    before = {name for name in list_pruners() if get_pruner(name).acts_in == "image"}
    assert set(PLAIN) | {"tome"} | OLDER == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", PLAIN)
def test_equals_the_plain_version(method, kind):
    for n, tokens in ((25, 8), (12, 11), (9, 1), (49, 33)):
        features, attention = images(kind, n=n, seed=n)
        pruner = get_pruner(method, tokens)
        cues, rows = rows_of(pruner, features, attention)
        kept = pruner.keep(features, attention, None, QUESTION, cues)
        for number, row in enumerate(rows):
            assert_equal(pruner, kept, number, PLAIN[method](row, tokens), PLAIN[method])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(PLAIN)),
    st.sampled_from(KINDS),
    st.integers(2, 30),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_random_images_equal_the_plain_version(method, kind, n, share, seed):
    features, attention = images(kind, n=n, channels=2 + seed % 7, heads=1 + seed % 3, rows=1, seed=seed)
    tokens = 1 + int(share * (n - 2))
    pruner = get_pruner(method, tokens)
    cues, (row,) = rows_of(pruner, features, attention)
    kept = pruner.keep(features, attention, None, QUESTION, cues)
    assert_equal(pruner, kept, 0, PLAIN[method](row, tokens), PLAIN[method])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("scope", {"alpha": 0.0}),
        ("scope", {"alpha": 2.5}),
        ("score", {"exponent": 1.5}),
        ("score", {"exponent": 1}),
    ]
    + [("hiprune", {"alpha": alpha}) for alpha in (0, 0.35, 0.7, 1)]
    + [("visionzip", {"dominant": dominant}) for dominant in (1, 5, 12)],
)
@pytest.mark.parametrize("kind", ["random", "duplicates"])
def test_options_equal_the_plain_version(method, options, kind):
    features, attention = images(kind, n=25, seed=3)
    pruner = get_pruner(method, 12, **options)
    cues, rows = rows_of(pruner, features, attention)
    kept = pruner.keep(features, attention, None, QUESTION, cues)
    for number, row in enumerate(rows):
        assert_equal(pruner, kept, number, PLAIN[method](row, 12, **options), PLAIN[method])


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [16, 64])
def test_adaptive_prumerge_equals_the_plain_version(plus, kind, n):
    features, attention = images(kind, n=n, rows=3, seed=n)
    pruner = get_pruner("prumerge+" if plus else "prumerge", adaptive=True)
    assert pruner.is_adaptive and pruner.reads_values
    cues, rows = rows_of(pruner, features, attention)
    cues["last_query"] = cues["last_query"] * torch.tensor([[0.0], [1.0], [3.0]])
    kept = pruner.choose(features, Every(attention, cues), n)
    for number, row in enumerate(rows):
        row["last_query"] = cues["last_query"][number].numpy()
        places, merged = prumerge(row, None, plus, adaptive=True)
        assert_equal(pruner, kept, number, (places, merged), prumerge)
        padding = kept.indices[number][len(places) :]
        assert (padding == NO_TOKEN).all() and not kept.features[number][len(places) :].any()
        assert kept.groups[number].max() < len(places)


class Every(dict):
    """Cues without the checks of `Pruner.keep`."""

    def __init__(self, attention, cues):
        super().__init__(cues)
        self.attention = attention


def test_visionzip_has_the_published_splits_and_a_sane_one_for_every_budget():
    splits = {192: (162, 30), 128: (108, 20), 64: (54, 10), 32: (27, 5), 1: (1, 0), 6: (6, 0), 7: (6, 1)}
    for tokens, (dominant, contextual) in splits.items():
        features, attention = images("random", n=225, rows=1)
        pruner = get_pruner("visionzip", tokens)
        cues, _ = rows_of(pruner, features, attention)
        places = pruner.keep(features, attention, None, None, cues).indices
        assert (places >= 0).sum() == dominant - 1 and (places == -2).sum() == contextual
        assert places[0, 0] == -1


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("visionzip", {"dominant": 0}, r"dominant, contextual: got 0 and 12 for 12 tokens"),
        ("visionzip", {"dominant": 8, "contextual": 5}, "whose sum is the budget"),
        ("visionzip", {"contextual": 13}, "got -1 and 13"),
        ("visionzip", {"contextual": True}, "must be an integer, got True"),
        ("visionzip", {"dominant": 2.0}, "dominant must be an integer, got 2.0"),
        ("scope", {"alpha": -1}, r"alpha must be a finite number >= 0, got -1"),
        ("scope", {"alpha": float("nan")}, "got nan"),
        ("score", {"exponent": "1"}, "exponent must be a finite number >= 0, got '1'"),
        ("score", {"exponent": True}, "got True"),
        ("farthest", {"exponent": 0.5}, "'farthest' has no option exponent"),
        ("hiprune", {"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ("prumerge", {"adaptive": "yes"}, "adaptive must be True or False, got 'yes'"),
        ("tome", {"dominant": 3}, "no option dominant"),
    ],
)
def test_bad_options(method, options, message):
    with pytest.raises(ValueError, match=message):
        get_pruner(method, 12, **options)


@pytest.mark.parametrize("options", [{"dominant": 54}, {"contextual": 0}, {"dominant": 54, "contextual": 10}])
def test_options_that_would_do_nothing_are_refused(options):
    with pytest.raises(ValueError, match="tokens: None keeps all tokens, so dominant and contextual"):
        get_pruner("visionzip", **options)


def test_more_targets_than_tokens_is_an_error():
    from llava.pruning.visionzip import merge_into_targets

    with pytest.raises(ValueError, match="contextual: got 5, but only 4 tokens are not dominant"):
        merge_into_targets(torch.ones(1, 4, 2).double(), torch.ones(1, 4, 2).double(), 5)


def test_the_groups_of_merged_tokens_name_their_columns():
    """Means of the groups' members are the features, for methods whose features are such means."""
    features, attention = images("random", n=36)
    for method in ("downsample", "visionzip", "prumerge", "prumerge+", "tome"):
        pruner = get_pruner(method, 10)
        cues, _ = rows_of(pruner, features, attention)
        kept = pruner.keep(features, attention, None, None, cues)
        assert kept.groups.shape == (2, 36) and kept.groups.min() >= 0 and kept.groups.max() == 9
        own = kept.groups.gather(1, kept.indices.clamp(min=0))
        at_place = (own == torch.arange(10)) | (kept.indices < 0)
        assert at_place.all()  # a token's place is one of its patches
        if method == "downsample":
            for cell in range(10):
                mean = features[0][kept.groups[0] == cell].mean(0)
                assert torch.allclose(mean, kept.features[0, cell], atol=1e-6)


def test_downsample_pools_squares_where_they_fit():
    features, attention = images("random", n=576, rows=1)
    kept = get_pruner("downsample", 64).keep(features, attention)
    pooled = torch.nn.functional.avg_pool2d(features.view(24, 24, 6).permute(2, 0, 1), 3)
    assert torch.allclose(kept.features[0], pooled.permute(1, 2, 0).reshape(64, 6), atol=1e-6)
    assert kept.indices[0, :2].tolist() == [25, 28]


@pytest.mark.parametrize("n", [1, 4, 9, 64, 256, 576, 2, 30])
def test_downsample_has_exactly_k_cells(n):
    from llava.pruning.downsample import _cells

    for k in range(1, n + 1, 1 if n < 100 else 7):
        groups, places = _cells(n, k, torch.device("cpu"))
        assert groups.unique().tolist() == list(range(k)) and len(places) == k
        assert (groups[places] == torch.arange(k)).all() and (places.diff() > 0).all()


# --- token merging -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_rounds_of_merging_equal_the_plain_version(kind):
    features, _ = images(kind, n=17, rows=2, seed=5)
    x, sizes, groups = features.double(), torch.ones(2, 17).double(), torch.arange(17).repeat(2, 1)
    plain = [(row.numpy(), np.ones(17), [[i] for i in range(17)]) for row in x]
    for r in (3, 0, 4, 99, 1):
        metric = x[..., :4]
        matching = tome.match(metric, r)
        (x, sizes), groups = tome.merge(x, sizes, matching), tome.regroup(groups, matching)
        plain = [merge_tokens(p[0], p[0][:, :4], p[1], p[2], r) for p in plain]
        for row, (mean, total, members) in enumerate(plain):
            assert np.allclose(x[row].numpy(), mean, atol=1e-12) and sizes[row].tolist() == total.tolist()
            found = [(groups[row] == column).nonzero().flatten().tolist() for column in range(x.shape[1])]
            assert found == members
        assert (groups[:, 0] == 0).all()  # [CLS] stays alone in the first column
        assert ((groups == 0).sum(1) == 1).all()


def test_schedules_meet_every_budget_that_halving_reaches():
    assert tome.schedule(576, 64, 23) == [23] * 6 + [22] * 17
    assert tome.schedule(576, 576, 3) == tome.schedule(576, 900, 3) == [0, 0, 0]
    assert tome.schedule(576, 72, 3) == [288, 144, 72]
    for layers in (1, 2, 3, 5, 11):
        least = 50
        for _ in range(layers):
            least -= least // 2
        for tokens in range(1, 51):
            if tokens < least:
                with pytest.raises(
                    ValueError, match=f"got {tokens}, but {layers} layers.*Use {least} tokens"
                ):
                    tome.schedule(50, tokens, layers)
                continue
            left = 50
            for r in tome.schedule(50, tokens, layers):
                assert 0 <= r <= left // 2
                left -= r
            assert left == tokens
    with pytest.raises(ValueError, match="0 layers merge 9 patches to 9"):
        tome.schedule(9, 3, 0)


def test_merged_tokens_are_returned_in_raster_order():
    merged = torch.tensor([[[10.0], [20.0], [30.0]]])
    groups = torch.tensor([[2, 0, 0, 1, 2]])
    pruner = get_pruner("tome", 3)
    cues = {"merged@3": merged, "merged_groups@3": groups}
    assert pruner.cues == tuple(cues)
    kept = pruner.keep(torch.zeros(1, 5, 1), torch.ones(1, 1, 5), cues=cues)
    assert kept.indices.tolist() == [[0, 1, 3]] and kept.features.flatten().tolist() == [30, 10, 20]
    assert kept.groups.tolist() == [[0, 1, 1, 2, 0]]
    assert get_pruner("tome").cues == get_pruner("tome", 0).cues == ()


def test_half_precision_is_merged_in_float32():
    x = torch.full((1, 5, 2), 2000.0, dtype=torch.float16)
    matching = tome.match(x, 2)
    merged, sizes = tome.merge(x, torch.ones(1, 5) * 100, matching)
    assert merged.dtype == torch.float16 and (merged == 2000).all() and sizes.sum() == 500
