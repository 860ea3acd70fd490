"""The shared base: settings, checks of inputs and results, top-k selection."""

import json
import subprocess
import sys

import pytest
import torch

from helpers.cues import keep
from llava.pruning import Kept, Pruner, get_pruner, list_pruners


def good(rows=2, n=9, channels=3, heads=2):
    return torch.randn(rows, n, channels), torch.rand(rows, heads, n)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": -1}, "tokens must be 0 or more.*-1"),
        ({"tokens": 1.5}, "tokens must be an integer, got 1.5"),
        ({"tokens": "64"}, "tokens must be an integer, got '64'"),
        ({"tokens": True}, "tokens.*True"),
        ({"important_ratio": 1.01}, r"\[0, 1\], got 1.01"),
        ({"important_ratio": -0.1}, "got -0.1"),
        ({"important_ratio": float("nan")}, "got nan"),
        ({"important_ratio": "0.5"}, "a number, got '0.5'"),
        ({"important_ratio": None}, "must be a number, got None"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"temperature": 1}, "no option temperature"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        get_pruner("vispruner", **settings)


def nan_in(which):
    features, attention = good()
    (features if which == "features" else attention)[1, 0, 2] = float("nan")
    return features, attention


def infinite():
    features, attention = good()
    features[0, 3, 1] = float("inf")
    return features, attention


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nan_in("features"), r"features.*NaN.*rows \[1\]"),
        (lambda: nan_in("attention"), r"attention.*NaN.*rows \[1\]"),
        (infinite, r"features.*rows \[0\]"),
        (lambda: (good()[0][0], good()[1]), r"features must be \(B, N, C\).*\(9, 3\)"),
        (lambda: (good()[0], good()[1][:, 0]), r"attention must be \(B, H, N\).*\(2, 9\)"),
        (lambda: (good()[0], good()[1][:, :0]), "H, C > 0"),
        (lambda: (good()[0][..., :0], good()[1]), "H, C > 0"),
        (lambda: (good()[0], good(n=10)[1]), r"disagree.*\(2, 9, 3\) and \(2, 2, 10\)"),
        (lambda: (good()[0], good(rows=3)[1]), "disagree"),
        (lambda: (good()[0].long(), good()[1]), "features must be floating point, got torch.int64"),
        (lambda: (good()[0], good()[1].bool()), "attention must be floating point, got torch.bool"),
        (lambda: (good()[0].to(torch.complex64), good()[1]), "complex64"),
        (lambda: (good()[0].numpy(), good()[1]), "features must be a tensor, got ndarray"),
        (lambda: (good()[0], good()[1].to("meta")), "features are on cpu, attention is on meta"),
    ],
)
@pytest.mark.parametrize("method", ["vispruner", "none", "random"])
@pytest.mark.parametrize("tokens", [4, 9])
def test_bad_inputs(make, message, method, tokens):
    with pytest.raises(ValueError, match=message):
        get_pruner(method, tokens).select(*make())


@pytest.mark.parametrize("crop_ids", [["a"], "ab", ["a", "b", "c"]])
def test_crop_ids_are_one_per_row(crop_ids):
    with pytest.raises(ValueError, match="one identity per row: expected 2"):
        get_pruner("random", 4).select(*good(), crop_ids=crop_ids)


@pytest.mark.parametrize("method", list_pruners())
@pytest.mark.parametrize("tokens", [None, 0, 3, 50])
def test_empty_batches_empty_grids_and_no_budget(method, tokens):
    pruner = get_pruner(method, tokens)
    k = 9 if tokens is None or method == "none" else min(tokens, 9)
    k = 9 if pruner.acts_in == "decoder" and k else k  # all of them enter the language model
    none = keep(pruner, torch.zeros(0, 9, 3), torch.zeros(0, 2, 9))
    assert none.indices.shape == none.important.shape == (0, k)
    assert keep(pruner, torch.zeros(2, 0, 3), torch.zeros(2, 2, 0)).indices.shape == (2, 0)
    kept = keep(pruner, *good())
    assert kept.indices.shape == (2, k)
    if k == 9:
        assert kept.indices.tolist() == [list(range(9))] * 2 and kept.features is None


def test_config_contains_what_affects_the_result_and_is_json():
    assert json.loads(json.dumps(get_pruner("vispruner", 64).config())) == {
        "method": "vispruner",
        "tokens": 64,
        "important_ratio": 0.5,
    }
    assert get_pruner("random", 8, seed=3).config() == {"method": "random", "tokens": 8, "seed": 3}
    assert get_pruner("uniform", 8, 0.3, seed=3).config() == {"method": "uniform", "tokens": 8}


def test_settings_are_frozen_and_comparable():
    pruner = get_pruner("vispruner", 64, 1)
    with pytest.raises(AttributeError):
        pruner.tokens = 32
    same = get_pruner("vispruner", 64, 1.0)
    assert pruner == same and hash(pruner) == hash(same)
    assert pruner != get_pruner("vispruner", 64, 0.5) and pruner != get_pruner("fastervlm", 64, 1.0)


def test_the_base_keeps_the_greatest_scores_with_ties_to_the_lower_index():
    class Fixed(Pruner):
        def score(self, features, cues):
            return torch.tensor([[1.0, 3, 2, 3, 2, 0]])

    attended = type("Attended", (Fixed,), {"scores_attention": True})
    inputs = torch.zeros(1, 6, 1), torch.zeros(1, 1, 6)
    assert [Fixed(k).select(*inputs).tolist() for k in (1, 3)] == [[[1]], [[1, 2, 3]]]
    assert not Fixed(3).keep(*inputs).important.any() and attended(3).keep(*inputs).important.all()


def test_a_method_that_keeps_the_wrong_number_is_refused():
    class OneShort(Pruner):
        name = "one-short"

        def choose(self, features, cues, tokens):
            return Kept.from_selected(torch.zeros(len(features), tokens - 1, dtype=torch.int64), 0)

    with pytest.raises(RuntimeError, match=r"one-short.*\(2, 3\) indices.*expected \(2, 4\)"):
        OneShort(4).select(*good())
    with pytest.raises(TypeError, match="must define score or choose"):
        Pruner(tokens=4).select(*good())


def test_pruning_imports_torch_and_nothing_else_of_llava():
    """`import llava` itself only installs the import hook of transformers' Auto classes."""
    code = (
        "import sys, llava; before = set(sys.modules); import llava.pruning; "
        "ours = [m for m in set(sys.modules) - before if m.startswith('llava.') "
        "and not m.startswith('llava.pruning')]; "
        "print(ours, 'torch' in before, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "False", "False"]
