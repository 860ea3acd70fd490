"""VisPruner equals the oracle, ties included, and depends on nothing but its inputs."""

import numpy as np
import pytest
import torch

from helpers.oracle_vispruner import select, select_row
from helpers.selection_inputs import EXACT_TIES, make_inputs
from llava.pruning import get_pruner


def keep(features, attention, tokens, ratio):
    kept = get_pruner("vispruner", tokens, ratio).keep(torch.as_tensor(features), torch.as_tensor(attention))
    return [
        (indices.tolist(), set(indices[flags].tolist()))
        for indices, flags in zip(kept.indices, kept.important, strict=True)
    ]


def random_case(rng):
    """A small case: two thirds have exact ties in the features, half in the attention, some zero norms.

    Two channels at least: in one, all real numbers are parallel and rounding alone would rank them.
    """
    rows, n, c, h = rng.integers(1, 3), rng.integers(1, 41), rng.integers(2, 9), rng.integers(1, 4)
    kind = rng.choice(["real", "integer", "repeated"])
    if kind == "integer":  # many equal cosines between tokens that are not equal
        features = rng.integers(-2, 3, (rows, n, c)).astype(np.float64)
    else:
        n_distinct = n if kind == "real" else max(1, n // 3)
        features = rng.standard_normal((rows, n_distinct, c))[:, rng.permutation(n) % n_distinct]
    if rng.integers(4) == 0:
        features[:, rng.uniform(size=n) < 0.3] = 0.0
    attention = rng.uniform(size=(rows, h, n)) if rng.integers(2) else rng.integers(1, 5, (rows, h, n)) / 7.0
    ratio = float(rng.choice([0, 0.1, 0.5, 0.7, 1, rng.uniform()]))
    return features, attention, int(rng.integers(0, n + 3)), ratio, kind


@pytest.mark.parametrize("seed", range(20))
def test_thousands_of_random_cases_equal_the_oracle(seed):
    rng = np.random.default_rng(seed)
    for _ in range(120):
        *case, _ = random_case(rng)
        assert keep(*case) == select(*case)


def test_ties_are_those_of_exact_arithmetic():
    """Compared with rational numbers: of equal cosines none is greater by a rounding error."""
    rng = np.random.default_rng(100)
    seen = {"real": 0, "integer": 0, "repeated": 0}
    while min(seen.values()) < 25:
        *case, kind = random_case(rng)
        seen[kind] += 1
        assert keep(*case) == select(*case, exact=True)


@pytest.mark.parametrize("kind", ["gauss", "cluster", "spatial", "outlier", *EXACT_TIES, "zero"])
@pytest.mark.parametrize(("tokens", "ratio"), [(128, 0.5), (33, 0.1)])
def test_full_size_equals_the_oracle(kind, tokens, ratio):
    features, attention = make_inputs(kind, 7, 1, 576, 64, 4)
    assert keep(features, attention, tokens, ratio) == select(features, attention, tokens, ratio)


def test_equals_a_product_per_round_at_real_width():
    features, attention = make_inputs("gauss", 11, 1, 576, 1024, 16)
    expected = [select_row(features[0], attention[0], 32, 0.5, product=lambda a, b: a @ b.T)]
    assert keep(features, attention, 32, 0.5) == expected


def test_equal_tokens_tie_exactly_wherever_they_are():
    """Duplicates of real-valued features at real width: only the attention rank may decide between them."""
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randn(30, 1024, generator=generator)
    attention = torch.rand(1, 4, 196, generator=generator)
    features = distinct[torch.randint(0, 30, (196,), generator=generator)][None]
    assert keep(features, attention, 64, 0.5) == select(features.numpy(), attention.numpy(), 64, 0.5)


def test_equal_tokens_are_ranked_by_attention_alone():
    """If every similarity is 1, each round drops the first evens of the list: worked out for 12 tokens."""
    attention = torch.arange(12, 0, -1.0)[None, None]
    features = torch.tensor([0.1, 0.7, -0.3]).expand(1, 12, 3)
    # 0..11 -> all six evens go -> 1 3 5 7 9 11 -> for 4 tokens 1 and 5 go; for 2 tokens 1, 5, 9, and then
    # 3 of the list 3 7 11, whose surviving even 11 goes before the odd 7
    assert get_pruner("vispruner", 2, 0.0).select(features, attention).tolist() == [[7, 11]]
    assert get_pruner("vispruner", 4, 0.0).select(features, attention).tolist() == [[3, 7, 9, 11]]


def test_zero_norm_tokens():
    attention = torch.arange(4, 0, -1.0)[None, None]
    # evens 0 (zero) and 2; odds 1 and 3: the zero goes first although 2 equals 3
    features = torch.tensor([[[0.0, 0], [1, 0], [0, 1], [0, 1]]])
    assert get_pruner("vispruner", 3, 0.0).select(features, attention).tolist() == [[1, 2, 3]]
    # a zero odd matches no token: 0 and 2 oppose 3, but that is still nearer than the zero token 1
    features = torch.tensor([[[-1.0, 0.1], [0, 0], [-1, 0.0], [1, 0]]])
    assert get_pruner("vispruner", 3, 0.0).select(features, attention).tolist() == [[1, 2, 3]]
    # only zeros: every even has the same similarity, the list order decides
    assert get_pruner("vispruner", 3, 0.0).select(torch.zeros(1, 4, 2), attention).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("tokens", "ratio", "important"), [(10, 0.7, 7), (90, 0.7, 62), (30, 0.1, 3), (7, 0.5, 3)]
)
def test_number_of_important_tokens_is_pythons_product(tokens, ratio, important):
    features, attention = make_inputs("gauss", 3, 1, 100, 8, 2)
    kept = get_pruner("vispruner", tokens, ratio).keep(*map(torch.from_numpy, (features, attention)))
    assert kept.important.sum() == important == int(tokens * ratio)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exact_copies_in_other_dtypes_select_the_same(dtype):
    features, attention = (torch.from_numpy(x).to(dtype) for x in make_inputs("cluster", 5, 2, 256, 48, 4))
    pruner = get_pruner("vispruner", 40, 0.5)
    expected = pruner.select(features, attention)
    for wider in (torch.float32, torch.float64):
        assert torch.equal(pruner.select(features.to(wider), attention.to(wider)), expected)
        assert torch.equal(pruner.select(features, attention.to(wider)), expected)


@pytest.mark.parametrize("channels", [7, 64, 1024])
@pytest.mark.parametrize("kind", ["gauss", "dup", "tie_attn"])
def test_a_row_does_not_depend_on_its_batch(kind, channels):
    features, attention = map(torch.from_numpy, make_inputs(kind, 9, 5, 196, channels, 4))
    pruner = get_pruner("vispruner", 33, 0.5)
    together = pruner.keep(features, attention)
    order = torch.tensor([3, 0, 4, 4, 1])
    shuffled = pruner.keep(features[order], attention[order])
    assert torch.equal(shuffled.indices, together.indices[order])
    assert torch.equal(shuffled.important, together.important[order])
    for row in range(5):
        alone = pruner.keep(features[row, None], attention[row, None])
        assert torch.equal(alone.indices[0], together.indices[row])


def test_layout_gradients_and_autocast_change_nothing():
    features, attention = map(torch.from_numpy, make_inputs("gauss", 13, 3, 144, 32, 4))
    pruner = get_pruner("vispruner", 24, 0.5)
    expected = pruner.select(features, attention)
    transposed = features.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    strided = attention.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not transposed.is_contiguous() and not strided.is_contiguous()
    assert torch.equal(pruner.select(transposed, strided), expected)
    kept = pruner.keep(features.clone().requires_grad_(), attention.clone().requires_grad_())
    assert torch.equal(kept.indices, expected) and not kept.indices.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pruner.select(features, attention), expected)
    before = features.clone(), attention.clone()
    pruner.select(features, attention)
    assert torch.equal(features, before[0]) and torch.equal(attention, before[1])


def test_important_flags_beyond_the_number_of_patches():
    """With T >= N all tokens are kept, and the flags still mark the floor(T * r) most attended."""
    attention = torch.tensor([[[0.1, 0.4, 0.2, 0.3]]])
    features = torch.randn(1, 4, 3)
    for tokens, important in ((4, [0, 1, 0, 1]), (6, [0, 1, 1, 1]), (9, [1, 1, 1, 1])):
        kept = get_pruner("vispruner", tokens, 0.5).keep(features, attention)
        assert kept.indices.tolist() == [[0, 1, 2, 3]] and kept.important.int().tolist() == [important]


def test_features_beyond_float64_similarities_are_refused():
    features, attention = torch.full((1, 4, 2), 1e90, dtype=torch.float64), torch.rand(1, 1, 4)
    for scale in (1, 1e218):  # here the squares overflow, and the sum of all values too
        with pytest.raises(ValueError, match="too large"):
            get_pruner("vispruner", 2, 0.5).select(features * scale, attention)
    largest = torch.full((1, 4, 2), torch.finfo(torch.float32).max)  # while float32 has no value too large
    smallest = torch.full((1, 4, 2), torch.finfo(torch.float32).smallest_normal)
    pruner = get_pruner("vispruner", 2, 0.0)
    assert torch.equal(pruner.select(largest, attention), pruner.select(smallest, attention))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["gauss", "cluster", "dup", "tie_both"])
def test_cuda_selects_what_the_cpu_selects(kind):
    features, attention = map(torch.from_numpy, make_inputs(kind, 15, 5, 576, 64, 4))
    pruner = get_pruner("vispruner", 64, 0.5)
    expected = pruner.keep(features, attention)
    kept = pruner.keep(features.cuda(), attention.cuda())
    assert kept.indices.is_cuda and torch.equal(kept.indices.cpu(), expected.indices)
    assert torch.equal(kept.important.cpu(), expected.important)
