"""The variant of ablations: VisPruner by default, and every choice as the plain version makes it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.oracle_vispruner import select_row
from helpers.selection_inputs import make_inputs
from llava.analysis.ablation.variant import VisPrunerVariant
from llava.eval.jobs.job import setting_name
from llava.pruning import get_pruner, list_pruners
from llava.pruning.random import _random_scores

N, C, H = 50, 16, 3


@pytest.fixture(scope="module")
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    features, attention = make_inputs("gauss", 7, 2, N, C, H)
    return torch.from_numpy(features), torch.from_numpy(attention)


@pytest.mark.parametrize("tokens, ratio", [(9, 0.5), (16, 0.0), (7, 1.0), (60, 0.3), (0, 0.5), (None, 0.5)])
@pytest.mark.parametrize("kind", ["gauss", "dup"])
def test_the_default_is_vispruner(kind, tokens, ratio):
    ours, own = VisPrunerVariant(tokens, ratio), get_pruner("vispruner", tokens, ratio)
    assert ours.config() == own.config() and setting_name(ours) == setting_name(own)
    assert (ours.cues, ours.per_image, ours.uses_seed, ours.name) == ((), False, False, "vispruner")
    features, attention = map(torch.from_numpy, make_inputs(kind, 3, 2, N, C, H))
    a, b = ours.keep(features, attention), own.keep(features, attention)
    assert torch.equal(a.indices, b.indices) and torch.equal(a.important, b.important)
    deferred, _ = ours.keep_deferred(features, attention)
    assert torch.equal(deferred.indices, b.indices) or kind == "dup"


def check(pruner, inputs, scores=None, compared=None, cues=None, **plain) -> None:
    """Compare a variant with the plain version, given other scores or features."""
    features, attention = inputs
    kept = pruner.keep(features, attention, ["a", "b"], cues=cues)
    for row in range(len(features)):
        a = attention[row].numpy() if scores is None else np.asarray(scores[row])[None]
        x = (features if compared is None else compared)[row].numpy()
        options = {key: value[row] if isinstance(value, list) else value for key, value in plain.items()}
        expected, important = select_row(x, a, pruner.tokens, pruner.important_ratio, **options)
        assert kept.indices[row].tolist() == expected
        assert set(kept.indices[row][kept.important[row]].tolist()) == important


@pytest.mark.parametrize("drop", [1, 2, 16, "all"])
@pytest.mark.parametrize("tokens", [6, 33])
def test_drop_per_round(drop, tokens, inputs):
    check(VisPrunerVariant(tokens, drop=drop), inputs, drop=N if drop == "all" else drop)


def test_order_of_the_residual_list(inputs):
    check(VisPrunerVariant(12, order="raster"), inputs, listed=lambda patch: patch)
    draws = [_random_scores(5, crop, N) for crop in "ab"]
    listed = [lambda patch, row=row: -row[patch] for row in draws]
    check(VisPrunerVariant(12, seed=5, order="random"), inputs, listed=listed)


def test_cues_of_importance(inputs):
    features, attention = inputs
    received = torch.rand(2, N, generator=torch.Generator().manual_seed(0))
    check(VisPrunerVariant(12, cue="received"), inputs, received, cues={"received": received})
    check(VisPrunerVariant(12, cue="norm"), inputs, features.double().norm(dim=-1))
    ranks = [np.argsort(np.argsort(_random_scores(0, crop, N))) for crop in "ab"]
    check(VisPrunerVariant(12, cue="random"), inputs, ranks)
    layer = attention.flip(2)
    pruner = VisPrunerVariant(12, cue="attention@3/12")
    assert pruner.cues == ("attention@3/12",)
    kept = pruner.keep(features, attention, cues={"attention@3/12": layer})
    assert torch.equal(kept.indices, get_pruner("vispruner", 12).keep(features, layer).indices)


def test_features_that_are_compared(inputs):
    projected, keys = torch.randn(2, N, 5), torch.randn(2, N + 1, 4)
    cue = {"projected": projected, "keys": keys}
    check(VisPrunerVariant(12, similarity="projected"), inputs, compared=projected, cues=cue)
    check(VisPrunerVariant(12, similarity="keys"), inputs, compared=keys[:, 1:], cues=cue)


def test_names_tell_what_was_changed():
    made = VisPrunerVariant(64, cue="attention@3/12", drop="all")
    assert setting_name(made) == "vispruner-cue=attention@3of12-drop=all-r0.5-64"
    assert made.config() == {
        "method": "vispruner-cue=attention@3of12-drop=all", "tokens": 64, "important_ratio": 0.5
    }  # fmt: skip
    assert VisPrunerVariant(64, seed=3, order="random").config()["seed"] == 3
    assert replace(made, tokens=5).name == made.name and VisPrunerVariant(8, budget="image").per_image
    assert not [name for name in list_pruners() if name.startswith("vispruner-")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cue": "keys"}, "cue: 'keys' is unknown. Choose from attention, received"),
        ({"cue": "norm@3"}, "cue: 'norm@3' is unknown"),
        ({"cue": "attention@"}, "cue 'attention@' is unknown"),
        ({"cue": "attention@x/12"}, "is unknown"),
        ({"similarity": "tower"}, "similarity: 'tower' is unknown. Choose from features, projected, keys."),
        ({"order": "attention"}, "order: 'attention' is unknown"),
        ({"budget": "pool"}, "budget: 'pool' is unknown"),
        ({"drop": 0}, "drop: expected an integer >= 1 or 'all', got 0"),
        ({"drop": 2.0}, "drop: expected"),
        ({"drop": True}, "drop: expected"),
        ({"budget": "image", "similarity": "keys"}, "budget: 'image' joins the crops"),
        ({"budget": "image", "cue": "attention@2"}, "budget: 'image' joins the crops"),
    ],
)
def test_unknown_words_are_refused(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        VisPrunerVariant(8, **options)
