"""Every method on models: careful, deferred and batched ways agree; crops as each method defines."""

from __future__ import annotations

import pytest
import torch

from helpers.checkpoints import IMAGE, NEXT, SOURCE, load
from llava.pruning import get_pruner, list_pruners
from llava.pruning.base import CLS_PLACE

TOKENS = 16  # of 64 patches
METHODS = [name for name in list_pruners() if get_pruner(name).acts_in == "image"]
MERGING = {"downsample", "prumerge", "prumerge+", "tome", "visionzip"}
CROPS = torch.randn(5, 3, 336, 336, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return load(SOURCE)


@pytest.fixture(scope="module")
def crops_model():
    return load(NEXT)


def tokens_of(model, name, images, sizes=None, anyres=None):
    """Return the visual tokens of each image, after checking that both ways agree."""
    model.set_pruner(get_pruner(name, tokens=TOKENS), anyres=anyres)
    visions = model.encode_vision(images, sizes)
    careful = [model.visual_tokens(vision) for vision in visions]
    for one, other in zip(careful, model.visual_tokens_deferred(visions), strict=True):
        assert other.doubt is None or not other.doubt
        assert torch.equal(one.embeds, other.embeds)
        assert torch.equal(one.kept.indices, other.kept.indices)
    return careful


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_one_crop(model, name):
    if name == "cdpruner":
        with pytest.raises(ValueError, match="Download the whole CLIP"):
            tokens_of(model, name, IMAGE)
        return
    pair = torch.cat([IMAGE, IMAGE.flip(3)])
    first, second = tokens_of(model, name, pair)
    count = 64 if name == "none" else TOKENS
    assert first.count == second.count == count and torch.isfinite(first.embeds).all()
    (alone,) = tokens_of(model, name, pair[1:])
    assert torch.equal(alone.embeds, second.embeds)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("cdpruner", "none")])
@torch.no_grad()
def test_crops(crops_model, name):
    (paper,) = tokens_of(crops_model, name, [CROPS], [(640, 480)], "paper")
    assert paper.count == 5 * TOKENS
    if get_pruner(name).per_image:
        assert paper.kept.indices.shape == (1, 5 * TOKENS)
    if name == "visionzip":  # the base image's tokens first, then [CLS] of the tiles after their patches
        assert (paper.kept.indices[:, 0] == CLS_PLACE).all()
    if name in MERGING:
        with pytest.raises(ValueError, match="Set anyres='paper'"):
            tokens_of(crops_model, name, [CROPS], [(640, 480)], "llava")
        return
    (own,) = tokens_of(crops_model, name, [CROPS], [(640, 480)], "llava")
    if get_pruner(name).per_image:  # the same share of the sequence of 268 tokens, newlines included
        assert own.count == round(TOKENS / 64 * 268)
    else:  # 12 newlines, one per row that is not padding, and the tokens that are not padding
        assert 12 + TOKENS < own.count <= 12 + 5 * TOKENS


@torch.no_grad()
def test_a_method_without_its_cue_says_what_to_do(model):
    model.set_pruner("none")
    (vision,) = model.encode_vision(IMAGE)
    with pytest.raises(ValueError, match="encoded without 'received'.*cues=pruner.cues"):
        model.visual_tokens(vision, get_pruner("hiprune", tokens=4))


@torch.no_grad()
def test_generate_with_another_method_computes_its_cues(model):
    ids = torch.tensor([[1, 292, -200, 554, 13]])
    model.set_pruner("none")
    wanted = {"do_sample": False, "max_new_tokens": 3}
    other = model.generate(ids, images=IMAGE, pruner=get_pruner("hiprune", tokens=8), **wanted)
    model.set_pruner("hiprune", tokens=8)
    assert torch.equal(other, model.generate(ids, images=IMAGE, **wanted))


@torch.no_grad()
def test_cues_of_several_crops_are_joined_by_patches(crops_model):
    seen = {}

    class PerImage(get_pruner("uniform").__class__):
        name, per_image, cues = "per-image", True, ("attention@1", "received", "features@2")

        def choose(self, features, cues, tokens):
            seen.update(cues, features=features)
            return super().choose(features, cues, tokens)

    class Keys(PerImage):
        cues = ("keys",)

    crops_model.set_pruner("none", anyres="paper")
    (vision,) = crops_model.encode_vision([CROPS], [(640, 480)], PerImage.cues + Keys.cues)
    crops_model.visual_tokens(vision, PerImage(TOKENS))
    heads = vision.attention.shape[1]
    assert seen["features"].shape[:2] == (1, 320) and seen["attention@1"].shape == (1, heads, 320)
    assert torch.equal(seen["attention@1"][0, :, 64:128], vision.cues["attention@1"][1])
    assert torch.equal(seen["received"][0, 64:128], vision.cues["received"][1])
    assert torch.equal(seen["features@2"][0, 64:128], vision.cues["features@2"][1])
    with pytest.raises(ValueError, match="per image by 'keys', which has no row per patch"):
        crops_model.visual_tokens(vision, Keys(TOKENS))


@torch.no_grad()
def test_a_method_that_chooses_by_the_question_says_so_where_there_is_none(model):
    class ByQuestion(get_pruner("uniform").__class__):
        name, cues, needs_question = "by-question", ("projected", "text_embeds"), True

    with pytest.raises(ValueError, match="'by-question' chooses by the question, got None"):
        model.generate(torch.tensor([[1, -200, 13]]), images=IMAGE, pruner=ByQuestion(8), max_new_tokens=1)


@torch.no_grad()
def test_the_name_of_a_method_is_not_a_method(model):
    ids = torch.tensor([[1, -200, 13]])
    for wrong in ("vispruner", 64):
        with pytest.raises(ValueError, match=f"pruner: {wrong!r} is not a Pruner. Pass get_pruner"):
            model.generate(ids, images=IMAGE, pruner=wrong, max_new_tokens=1)


def test_the_layer_after_the_select_layer_can_be_moved_after_inference_mode():
    model = load(SOURCE, method="prumerge", visual_token_num=8)
    model.get_vision_tower()._next_layer.clear()
    with torch.inference_mode():
        (before,) = model.encode_images(IMAGE)
    model.to(torch.bfloat16)
    (after,) = model.encode_images(IMAGE)
    assert after.dtype == torch.bfloat16 and after.shape == before.shape


def test_a_budget_that_the_tower_cannot_merge_to_is_refused_when_loading():
    with pytest.raises(ValueError, match="tome: tokens: got 3, but .* Use 8 tokens or more"):
        load(SOURCE, method="tome", visual_token_num=3)


def test_an_image_without_crops_is_refused(model):
    empty = torch.zeros(0, 3, 336, 336)
    model.set_pruner("visionzip", tokens=8)
    assert model.encode_vision(empty) == [] == model.encode_vision([])
    for images, place in (([IMAGE, empty], 1), (empty[None], 0)):
        with pytest.raises(
            ValueError, match=rf"images\[{place}\]: shape is \(0, 3, 336, 336\), without a crop"
        ):
            model.encode_vision(images)


@torch.no_grad()
def test_an_unknown_cue_is_named(model):
    class Misspelled(get_pruner("uniform").__class__):
        name, cues = "misspelled", ("recieved",)

    with pytest.raises(
        ValueError, match="misspelled: cue 'recieved' is unknown. Choose from attention, received"
    ):
        model.check_pruner(Misspelled(8))
    with pytest.raises(ValueError, match="cue 'recieved' is unknown"):
        model.generate(torch.tensor([[1, -200, 13]]), images=IMAGE, pruner=Misspelled(8), max_new_tokens=1)
