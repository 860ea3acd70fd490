"""Original positions: kept tokens as in the unpruned prompt, against a decoder with explicit positions."""

from __future__ import annotations

import pytest
import torch

from helpers.checkpoints import IMAGE, NEXT, SOURCE, load
from llava.constants import IMAGE_TOKEN_INDEX
from llava.pruning import get_pruner

IDS = torch.tensor([[1, 292, IMAGE_TOKEN_INDEX, 554, 13, 7]])
CROPS = torch.randn(5, 3, 336, 336, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return load(SOURCE)


@pytest.fixture(autouse=True)
def contiguous_again(model):
    yield
    model.set_pruner("none", positions="contiguous")


def plain(model, new):
    """Greedy ids: the whole sequence again for every token, with an explicit mask and positions with gaps."""
    (vision,) = model.encode_vision(IMAGE)
    tokens = model.visual_tokens(vision)
    embed, said = model.get_input_embeddings(), []
    for _ in range(new):
        before, after = embed(IDS[0, :2]), embed(torch.tensor([*IDS[0, 3:].tolist(), *said]))
        hidden = torch.cat([before, tokens.embeds, after])[None]
        places = 2 + tokens.kept.indices[0]
        positions = torch.cat([torch.arange(2), places, 2 + 64 + torch.arange(len(after))])[None]
        mask = torch.ones_like(positions)
        states = model.get_model()(inputs_embeds=hidden, attention_mask=mask, position_ids=positions)
        said.append(int(model.lm_head(states.last_hidden_state[0, -1]).argmax()))
    return said


@torch.no_grad()
def test_generate_equals_explicit_positions_and_differs_from_contiguous_ones(model):
    model.set_pruner("vispruner", tokens=16, positions="original")
    found = model.generate(IDS, images=IMAGE, do_sample=False, max_new_tokens=6, eos_token_id=None)
    assert found[0].tolist() == plain(model, 6)
    (tokens,) = [model.visual_tokens(one) for one in model.encode_vision(IMAGE)]
    assert torch.equal(tokens.places, tokens.kept.indices[0]) and tokens.span == 64
    model.set_pruner("vispruner", tokens=16)
    kept = model.generate(IDS, images=IMAGE, do_sample=False, max_new_tokens=6, eos_token_id=None)
    assert torch.equal(kept, found)  # an earlier choice stays
    model.set_pruner("vispruner", tokens=16, positions="contiguous")
    (tokens,) = [model.visual_tokens(one) for one in model.encode_vision(IMAGE)]
    assert tokens.places is None


@torch.no_grad()
def test_all_tokens_have_their_positions_anyway(model):
    model.set_pruner("vispruner", tokens=64, positions="original")
    all_kept = model.generate(IDS, images=IMAGE, do_sample=False, max_new_tokens=6)
    model.set_pruner("none")
    assert torch.equal(all_kept, model.generate(IDS, images=IMAGE, do_sample=False, max_new_tokens=6))


@torch.no_grad()
def test_places_of_crops_are_those_of_the_grid():
    model = load(NEXT)
    model.set_pruner("vispruner", tokens=64, anyres="paper", positions="original")
    (vision,) = model.encode_vision([CROPS], [(640, 480)])
    assert model.visual_tokens(vision).places.tolist() == list(range(320))
    for name in ("vispruner", "divprune"):
        model.set_pruner(name, tokens=16)
        tokens = model.visual_tokens(vision, get_pruner(name, tokens=16) if name == "vispruner" else None)
        if name == "divprune":
            tokens = model.visual_tokens(model.encode_vision([CROPS], [(640, 480)])[0])
        whole = model.visual_tokens(vision, get_pruner("vispruner", tokens=64)).embeds
        assert tokens.span == 320 and (tokens.places.diff() > 0).all()
        torch.testing.assert_close(tokens.embeds, whole[tokens.places], atol=1e-5, rtol=0)
    model.set_pruner("visionzip", tokens=16)
    with pytest.raises(ValueError, match="Set positions='contiguous'"):
        model.encode_images([CROPS], [(640, 480)])
    model.set_pruner("vispruner", tokens=16, anyres="llava")
    with pytest.raises(ValueError, match="or anyres='paper'"):
        model.encode_images([CROPS], [(640, 480)])


@torch.no_grad()
def test_what_does_not_follow_positions_is_refused(model):
    model.set_pruner("vispruner", tokens=16, positions="original")
    with pytest.raises(ValueError, match="positions='original' is set, which only generate follows"):
        model(IDS, images=IMAGE)
    with pytest.raises(ValueError, match="positions='original' is set, where only greedy search"):
        model.generate(IDS, images=IMAGE, do_sample=True, max_new_tokens=2)
    with pytest.raises(ValueError, match="Choose one of contiguous, original"):
        model.set_pruner("vispruner", tokens=16, positions="absolute")


@torch.no_grad()
def test_a_method_with_a_number_of_its_own_has_no_positions_to_keep(model):
    pruner = get_pruner("prumerge", adaptive=True)
    model.set_pruner(pruner, positions="original")
    with pytest.raises(ValueError, match="merged tokens of 'prumerge' have no original position"):
        model.generate(torch.tensor([[1, -200, 13]]), images=IMAGE, do_sample=False, max_new_tokens=1)
