"""What tokens stand for: patches of crops, merged groups, tokens inside the language model."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava.analysis.figures.kept import KeptQuarter
from llava.analysis.kept_tokens import CropTokens, counts, encode, kept_tokens
from llava.eval.benchmarks import Question
from llava.eval.inference.engine import Engine
from llava.model.builder import load_pretrained_model
from llava.pruning import Kept, Pruner, get_pruner, list_pruners
from llava.pruning.base import CLS_PLACE, NO_PLACE

MODELS = {"one": "tests/data/model/ckpt_llava15s", "crops": "tests/data/model/ckpt_llava16s"}
QUESTION = Question(0, 0, Path("x.png"), "Is there a cat in the image?")


@pytest.fixture(scope="module")
def engines():
    found = {}
    for name, path in MODELS.items():
        tokenizer, model, processor, _ = load_pretrained_model(path, None, "llava", device="cpu")
        found[name] = Engine(model, tokenizer, processor)
    return found


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.RandomState(1).randint(0, 256, (70, 160, 3), dtype=np.uint8))


def shown(engine, picture, pruner, anyres="auto"):
    engine.model.set_pruner(pruner, anyres=anyres)
    crops, vision = encode(engine, picture, [pruner])
    tokens = kept_tokens(engine, vision, pruner, QUESTION)
    assert len(crops) == len(tokens) == len(vision.features)
    return vision, tokens


METHODS = [name for name in list_pruners() if name not in ("none", "cdpruner")]


@pytest.mark.parametrize("model", MODELS)
def test_tokens_of_every_method(model, engines, picture):
    """Patches and groups are disjoint, and the tokens are as many as enter the language model."""
    engine, budget = engines[model], 40
    for name in METHODS:
        pruner = get_pruner(name, budget)
        vision, tokens = shown(engine, picture, pruner)
        number = counts(tokens)
        patches = vision.features.shape[1]
        for crop in tokens:
            assert len(crop.kept) == len(set(crop.kept.tolist())) == len(crop.important)
            assert ((crop.kept >= 0) & (crop.kept < patches)).all()
            assert crop.groups is None or (crop.groups[crop.kept] == -1).all()
        with torch.inference_mode():
            made = engine.model.visual_tokens(vision, pruner)
        if pruner.acts_in == "image":
            assert number["kept"] == len(made.embeds) == budget * len(tokens), name
            assert number["important"] == int((made.kept.important & (made.kept.indices >= 0)).sum())
        else:
            stages = pruner.stages(engine.model.config.num_hidden_layers, len(made.embeds), len(tokens))
            assert number["kept"] == stages[-1].visual, name


@pytest.mark.parametrize("anyres", ["paper", "llava"])
@pytest.mark.parametrize("name", ["vispruner", "divprune", "downsample"])
def test_tokens_are_the_features_of_their_patches(name, anyres, engines, picture):
    """The embeddings that enter the language model are those of the patches that are shown."""
    if (name, anyres) == ("downsample", "llava"):
        pytest.skip("merged tokens have no rows for newlines")
    model, pruner = engines["crops"].model, get_pruner(name, 9)
    vision, tokens = shown(engines["crops"], picture, pruner, anyres)
    with torch.inference_mode():
        made = model.visual_tokens(vision, pruner).embeds
        project = model.get_model().mm_projector
        rows = [vision.features[crop][one.kept] for crop, one in enumerate(tokens)]
        for crop, one in enumerate(tokens):
            for token in [] if one.groups is None else np.unique(one.groups[one.groups >= 0]):
                rows.append(vision.features[crop][one.groups == token].mean(0, keepdim=True))
        wanted = project(torch.cat(rows))
        newlines = sum(one.unplaced for one in tokens)
    # Not equal: the projector's product has another shape, in half precision
    distance = torch.cdist(made.float(), wanted.float()).min(1).values
    assert len(made) == len(wanted) + newlines and (newlines > 0) == (anyres == "llava")
    assert int((distance < 0.05).sum()) == len(wanted)


def test_a_method_inside_the_language_model_is_shown_at_its_patches(engines, picture):
    """The first quarter of 5 crops of 64 tokens: the whole image, then one row of the two upper tiles."""
    _, tokens = shown(engines["crops"], picture, KeptQuarter(tokens=1, layer=1, quarter=0), "paper")
    assert [one.kept.tolist() for one in tokens] == [[*range(64)], [*range(8)], [*range(8)], [], []]


class _Merging(Pruner):
    """Returns tokens that are given."""

    def __init__(self, kept, per_image):
        super().__init__()
        object.__setattr__(self, "given", kept)
        object.__setattr__(self, "per_image", per_image)


@pytest.mark.parametrize("per_image", [False, True])
def test_merged_tokens_of_crops(per_image, engines):
    """Two crops of 4 patches: a group of two, one patch, [CLS]; then a group of three and a lost patch."""
    indices = [[CLS_PLACE, 2, NO_PLACE], [NO_PLACE, NO_PLACE, 3]]
    groups = [[2, 2, 1, -1], [1, 1, 1, 2]]
    if per_image:
        indices = [[CLS_PLACE, 2, NO_PLACE, NO_PLACE, NO_PLACE, 7]]
        groups = [[2, 2, 1, -1, 4, 4, 4, 5]]
    indices, groups = torch.tensor(indices), torch.tensor(groups)
    kept = Kept(indices, indices >= 0, torch.zeros(*indices.shape, 3), groups)
    vision = SimpleNamespace(features=torch.zeros(2, 4, 3), as_crops=True, image_size=None)
    model = SimpleNamespace(
        visual_tokens=lambda *_: SimpleNamespace(kept=kept, embeds=torch.zeros(6, 3)),
        has_newlines=lambda *_: False,  # as under anyres="paper"
    )
    found = kept_tokens(SimpleNamespace(model=model), vision, _Merging(kept, per_image), QUESTION)
    assert [one.kept.tolist() for one in found] == [[2], [3]]
    assert [one.important.tolist() for one in found] == [[True], [True]]
    assert (found[0].groups[:2] >= 0).all() and found[0].groups[0] == found[0].groups[1]
    assert found[0].groups[2:].tolist() == [-1, -1]
    assert len(set(found[1].groups[:3].tolist())) == 1 and found[1].groups[3] == -1
    assert counts(found) == {"kept": 6, "important": 2, "merged": 2, "unplaced": 2}


def test_counts_of_unmerged_tokens():
    crop = CropTokens(np.array([1, 5]), np.array([True, False]), None, 3)
    assert counts([crop, crop]) == {"kept": 10, "important": 2, "merged": 0, "unplaced": 6}
