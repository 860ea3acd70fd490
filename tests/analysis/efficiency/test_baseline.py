"""The baseline gives the same results as the optimized code, on checkpoints in LLaVA's format."""

from __future__ import annotations

import pytest
import torch

from helpers.golden_model import DATA, golden_image
from llava.analysis.efficiency.baseline import (
    baseline_answer,
    baseline_select,
    baseline_tokens,
    baseline_tower,
)
from llava.mm_utils import process_images
from llava.model.decode import Decoding
from llava.pruning import get_pruner

PROMPT = [1, 20, 30, -200, 40, 50, 60]


@pytest.fixture(scope="module", params=["ckpt_llava15s", "ckpt_llava16s"])
def loaded(request):
    from llava.model.builder import load_pretrained_model

    return load_pretrained_model(str(DATA / request.param), device="cpu", dtype="float32")[:3]


@pytest.fixture
def pixels(loaded):
    def made(name: str) -> torch.Tensor:
        pixels = process_images([golden_image(name)], loaded[2], loaded[1].config)[0]
        return pixels if pixels.ndim == 4 else pixels[None]

    return made


def names() -> list[str]:
    from helpers.recipe_images import SIZES

    return [size[0] for size in SIZES]


def test_tower_returns_features_and_cls_row(loaded, pixels):
    model = loaded[1]
    model.set_pruner("vispruner", 8)
    for name in names()[:3]:
        features, attention = baseline_tower(model.get_vision_tower(), pixels(name))
        (seen,) = model.encode_vision([pixels(name)], [golden_image(name).size])
        torch.testing.assert_close(features, seen.features, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(attention, seen.attention, rtol=1e-4, atol=1e-6)
    assert model.get_vision_tower().attn_implementation == "sdpa"  # as it was before


def test_float64_selection_equals_the_pruner():
    draw = torch.Generator().manual_seed(0)
    for tokens, ratio in [(0, 0.5), (1, 0.5), (8, 0.5), (15, 0.0), (16, 0.3), (20, 1.0), (49, 0.5), (80, 0)]:
        features = torch.randn(3, 49, 16, generator=draw, dtype=torch.float64)
        attention = torch.rand(3, 4, 49, generator=draw, dtype=torch.float64)
        expected = get_pruner("vispruner", tokens, ratio).select(features, attention)
        assert torch.equal(baseline_select(features, attention, tokens, ratio), expected)


@pytest.mark.parametrize("tokens", [8, None])
def test_tokens_equal_the_models_in_their_order(loaded, pixels, tokens):
    model = loaded[1].double()  # so that both towers give the same ranking
    try:
        pruner = model.set_pruner("none" if tokens is None else "vispruner", tokens, 0.5)
        for name in names()[:4]:
            size = golden_image(name).size
            expected = model.encode_images([pixels(name)], [size])[0]
            found = baseline_tokens(model, pixels(name), pruner.tokens, 0.5, size)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    finally:
        model.float()


def test_an_answer_from_the_file(loaded, tmp_path):
    tokenizer, model, processor = loaded
    path = tmp_path / "image.png"
    golden_image(names()[0]).save(path)
    model.set_pruner("none")
    pixels = process_images([golden_image(names()[0])], processor, model.config)[0]
    expected = model.generate(
        torch.tensor([PROMPT]),
        images=[pixels],
        image_sizes=[golden_image(names()[0]).size],
        max_new_tokens=5,
        do_sample=False,
    )[0].tolist()
    found = baseline_answer(model, tokenizer, processor, path, PROMPT, Decoding(max_new_tokens=5))
    assert found == expected[: len(found)] and len(found) in (4, 5)
    with pytest.raises(ValueError, match="one image"):
        baseline_answer(model, tokenizer, processor, path, [1, 2, 3], Decoding(max_new_tokens=5))
    model.set_pruner("random", 8)
    with pytest.raises(ValueError, match="not random"):
        baseline_answer(model, tokenizer, processor, path, PROMPT, Decoding(max_new_tokens=5))
