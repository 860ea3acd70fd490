"""`generate(images=...)` with methods inside the language model, on checkpoints of the original form."""

from __future__ import annotations

import pytest
import torch

from helpers.golden_model import golden_image
from helpers.recipe_images import SIZES
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.decode import Decoding, Row, generate
from llava.pruning import get_pruner

PROMPT = torch.tensor([[1, 20, IMAGE_TOKEN_INDEX, 40, 50, 60]])
NAME = SIZES[0][0]


@pytest.mark.parametrize("key", ["15s", "16s"])
@pytest.mark.parametrize("method", ["fastv", "sparsevlm", "pyramiddrop"])
def test_images_in_generate_equal_rows(golden, key, method):
    g = golden(key)
    pruner = get_pruner(method, 16)
    g.model.set_pruner(pruner)
    pixels, size = g.pixels((NAME,)), [golden_image(NAME).size]
    found = g.model.generate(PROMPT, images=pixels, image_sizes=size, do_sample=False, max_new_tokens=6)
    tokens = g.model.visual_tokens(g.vision(NAME))
    crops = len(tokens.kept.indices)
    assert crops == (1 if key == "15s" else 5) and tokens.count == 64 * crops  # all enter
    row = Row(tuple(PROMPT[0].tolist()), tokens.embeds, crops=crops)
    (expected,) = generate(g.model, g.tokenizer, [row], Decoding(6), pruner)
    said = found[0].tolist()
    assert said[: len(expected)] == expected and len(said) in (len(expected), len(expected) + 1)
    raw = {"visual": [tokens.embeds], "do_sample": False, "max_new_tokens": 6}
    assert torch.equal(g.model.generate(PROMPT, **raw), found)  # its length gives the crops
    depth = g.model.config.num_hidden_layers
    layers = pruner.visual_per_layer(depth, tokens.count, crops)
    assert layers[0] == tokens.count and layers[-1] <= 16 * crops


def test_a_budget_of_zero_is_blind(golden):
    g = golden("15s")
    given = {"images": g.pixels((NAME,)), "do_sample": False, "max_new_tokens": 6}
    g.model.set_pruner("fastv", tokens=0)
    blind = g.model.generate(PROMPT, **given)
    g.model.set_pruner("uniform", tokens=0)
    assert torch.equal(blind, g.model.generate(PROMPT, **given))


def test_a_captured_model_runs_eagerly(golden):
    g = golden("15s")
    given = {"images": g.pixels((NAME,)), "do_sample": False, "max_new_tokens": 6}
    g.model.set_pruner("fastv", tokens=4)
    eager = g.model.generate(PROMPT, **given)
    g.model.set_runtime(graphs=True)
    try:
        assert torch.equal(g.model.generate(PROMPT, **given), eager)
    finally:
        g.model.set_runtime()
