"""Names of the methods: which exist, which are refused, and a method that one class adds."""

import pytest
import torch

from llava.pruning import Kept, Pruner, get_pruner, list_pruners, register_pruner, registry


def test_bundled_methods_are_listed():
    assert {"fastervlm", "none", "random", "uniform", "vispruner"} <= set(list_pruners())
    assert all(get_pruner(name).name == name for name in list_pruners())
    assert not any(get_pruner(name).needs_question for name in ("vispruner", "random", "uniform"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("VisPruner", "did you mean 'vispruner'"),
        ("vispuner", "did you mean 'vispruner'"),
        ("zzz", "choose from .*vispruner"),
        (None, "unknown pruning method None"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        get_pruner(name)


@pytest.fixture
def scratch_registry(monkeypatch):
    monkeypatch.setattr(registry, "_PRUNERS", dict(registry._PRUNERS))


def test_a_method_is_one_class(scratch_registry):
    @register_pruner("first-n")
    class FirstN(Pruner):
        def choose(self, features, cues, tokens):
            rows, n = features.shape[:2]
            return Kept.from_selected(torch.arange(min(tokens, n)).flip(0).repeat(rows, 1), 1)

    kept = get_pruner("first-n", tokens=3).keep(torch.randn(2, 9, 3), torch.rand(2, 2, 9))
    assert kept.indices.tolist() == [[0, 1, 2]] * 2 and kept.important.tolist() == [[False, False, True]] * 2
    assert "first-n" in list_pruners()
    with pytest.raises(ValueError, match="already exists"):
        register_pruner("vispruner")(FirstN)
    with pytest.raises(ValueError, match="lower-case"):
        register_pruner("FirstN")(FirstN)
