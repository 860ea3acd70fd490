"""ToMe inside a tower, against a plain loop over tokens in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from helpers.checkpoints import load_vision_tower
from helpers.golden_model import DATA
from llava.model.multimodal_encoder.merging import merged_features
from llava.pruning import get_pruner
from llava.pruning.tome import schedule

CLIP = DATA / "ckpt_clip336p42"
IMAGES = torch.randn(2, 3, 336, 336, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=["clip", "dinov2"])
def tower_and_images(request, dinov2):
    if request.param == "clip":
        return load_vision_tower(CLIP), IMAGES
    return load_vision_tower(dinov2[0]), IMAGES[:, :, :56, :56]


def parts(tower, layer):
    """Return norm, the four projections and the scale of the attention of a layer."""
    if tower.kind == "clip":
        a = layer.self_attn
        return layer.layer_norm1, (a.q_proj, a.k_proj, a.v_proj, a.out_proj), torch.nn.Identity()
    a = layer.attention
    return layer.norm1, (a.q_proj, a.k_proj, a.v_proj, a.o_proj), layer.layer_scale1


def plain(tower, image, tokens):
    """One image: whole attention with log sizes, then the r best pairs of even and odd tokens."""
    x = tower.embed(image[None])[0].double()
    sizes, members = torch.ones(len(x)).double(), [[place] for place in range(len(x))]
    heads, depth = tower.config.num_attention_heads, len(tower.layers())
    for layer, r in zip(tower.layers(), schedule(tower.num_patches, tokens, depth), strict=True):
        layer = copy.deepcopy(layer).double()
        norm, (q, k, v, o), scale = parts(tower, layer)
        query, key, value = (one(norm(x)).view(len(x), heads, -1).transpose(0, 1) for one in (q, k, v))
        logits = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5 + sizes.log()
        x = x + scale(o((logits.softmax(-1) @ value).transpose(0, 1).flatten(1)))
        unit = functional.normalize(key.mean(0), dim=-1)
        even, odd = list(range(0, len(x), 2)), list(range(1, len(x), 2))
        best = {i: max(odd, key=lambda j, i=i: float(unit[i] @ unit[j])) for i in even if i}
        chosen = sorted(best, key=lambda i: -float(unit[i] @ unit[best[i]]))[:r]
        left = [i for i in even if i not in chosen]
        groups = [[i] for i in left] + [[j, *(i for i in chosen if best[i] == j)] for j in odd]
        members = [sorted(place for i in group for place in members[i]) for group in groups]
        weights = [sizes[group] for group in groups]
        merged = [weight @ x[group] / weight.sum() for weight, group in zip(weights, groups, strict=True)]
        x, sizes = torch.stack(merged), torch.stack([weight.sum() for weight in weights])
        x = tower.feed(layer, x[None])[0]
    return x[1:], members[1:]


def test_merged_features_equal_a_plain_loop(tower_and_images):
    tower, images = tower_and_images
    tokens = tower.num_patches // 4
    with torch.no_grad():
        found, groups = merged_features(tower, images, tokens)
        for row in range(2):
            want, members = plain(tower, images[row], tokens)
            got = [((groups[row] == column).nonzero().flatten() + 1).tolist() for column in range(tokens)]
            assert got == members
            torch.testing.assert_close(found[row].double(), want, atol=2e-5 * want.abs().max(), rtol=0)


def test_the_method_takes_what_the_tower_merged(tower_and_images):
    tower, images = tower_and_images
    pruner = get_pruner("tome", tokens=tower.num_patches // 2)
    with torch.no_grad():
        features, attention, *cues = tower(images, cues=pruner.cues)
        kept = pruner.keep(features, attention, cues=dict(zip(pruner.cues, cues, strict=True)))
        merged, groups = merged_features(tower, images[:1], pruner.tokens)
    assert kept.features.shape == (2, pruner.tokens, tower.hidden_size)
    assert (kept.indices.diff(dim=1) > 0).all()
    for column, place in enumerate(kept.indices[0].tolist()):
        assert (kept.groups[0] == column).nonzero().flatten()[0] == place
        assert torch.equal(kept.features[0, column], merged[0, groups[0, place]])


def test_a_budget_that_cannot_be_had_is_refused_before_the_run(tower_and_images):
    tower, images = tower_and_images
    with pytest.raises(ValueError, match="layers merge"):
        tower(images, cues=("merged@1", "merged_groups@1"))
