"""`llava.prune` on the transformers conversion of a checkpoint equals this repository's own class."""

from __future__ import annotations

import pytest
import torch
import transformers

import llava
from helpers.checkpoints import IDS, NEXT, SOURCE, load
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.decode import Row
from llava.model.inside import prefill

# Methods that prune inside the language model, with budgets that three layers can meet
INSIDE = {"fastv": 6, "sparsevlm": 9, "pyramiddrop": 24, "vtw": 30, "dart": 12}


def converted(own, name):
    """Return a model of transformers with the weights of ours; the vocabulary's last id is the image's."""
    tower, text = own.get_vision_tower(), own.config.to_dict()
    names = set(transformers.LlamaConfig().to_dict()) - {"architectures", "model_type", "dtype"}
    config = getattr(transformers, f"{name}Config")(
        vision_config=tower.vision_tower.config,
        text_config=transformers.LlamaConfig(**{key: text[key] for key in names if key in text}),
        image_token_index=own.config.vocab_size - 1,
        vision_feature_layer=len(tower.layers()),  # later layers are not loaded
        tie_word_embeddings=False,
        **({"image_grid_pinpoints": own.config.image_grid_pinpoints} if name == "LlavaNext" else {}),
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    state = {f"model.vision_tower.{key}": one for key, one in tower.vision_tower.state_dict().items()}
    for key, one in own.state_dict().items():
        if key.startswith("model.mm_projector."):
            number, kind = key.split(".")[2:]
            state[f"model.multi_modal_projector.linear_{int(number) // 2 + 1}.{kind}"] = one
        elif key.startswith(("model.layers.", "model.embed_tokens.", "model.norm.")):
            state[f"model.language_model.{key[6:]}"] = one
        elif key in ("lm_head.weight", "model.image_newline"):
            state[key] = one
    wanted = model.state_dict()
    prefix = "model.vision_tower."
    unused = {key for key in state if key not in wanted and key.startswith(prefix)}
    found = model.load_state_dict({k: v for k, v in state.items() if k not in unused}, strict=False)
    assert not found.unexpected_keys
    assert all(key.startswith(prefix) and "post_layernorm" in key for key in found.missing_keys)
    return model


def prompt(own, placeholders):
    before, after = IDS[0, :2], IDS[0, 3:]
    image = torch.full((placeholders,), own.config.vocab_size - 1)
    ids = torch.cat([before, image, after])[None]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def question(own, host, name):
    """Return inputs of the host, and the images of the same question as our own class takes them."""
    generator = torch.Generator().manual_seed(0)
    tower = own.get_vision_tower()
    side, patches = tower.image_size, tower.num_patches
    size = (2 * side, side + side // 4)  # width, height: padding is cut off
    if name == "Llava":
        pixels = torch.randn(1, 3, side, side, generator=generator)
        inputs = {**prompt(own, patches), "pixel_values": pixels}
        return inputs, {"images": pixels, "image_sizes": [(side, side)]}
    sizes = torch.tensor([size[::-1]])
    module = transformers.models.llava_next.modeling_llava_next
    crops = module.image_size_to_num_patches(sizes[0], own.config.image_grid_pinpoints, side)
    pixels = torch.randn(1, crops, 3, side, side, generator=generator)
    features = [torch.zeros(crops, patches, 1)]
    count = host.model.pack_image_features(features, sizes, "default", torch.zeros(1))[1].item()
    inputs = {**prompt(own, count), "pixel_values": pixels, "image_sizes": sizes}
    return inputs, {"images": [pixels[0]], "image_sizes": [size]}


@pytest.mark.parametrize("name", ["Llava", "LlavaNext"])
def test_the_same_tokens_and_logits_as_our_own_class(name):
    own = load(SOURCE if name == "Llava" else NEXT)
    host = converted(own, name)
    inputs, given = question(own, host, name)
    for settings in ({"tokens": 16}, {"tokens": 9, "important_ratio": 0.7}):
        own.set_pruner("vispruner", **settings, anyres="llava")
        vision = own.encode_vision(**given)
        expected = own.visual_tokens(vision[0]).kept.indices
        with llava.pruned(host, **settings) as pruning, torch.no_grad():
            found = host(**inputs).logits
            assert torch.equal(torch.stack([row.kept for row in pruning.last.rows]), expected)
            mine = own(input_ids=IDS, **given).logits
        assert found.shape == mine.shape and (found - mine).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["Llava", "LlavaNext"])
def test_the_same_answers_as_our_own_class_with_methods_inside(name):
    """Equal answers, visual tokens after the last reduction, and counts in every layer."""
    own = load(SOURCE if name == "Llava" else NEXT)
    host = converted(own, name)
    inputs, given = question(own, host, name)
    (one,) = own.encode_vision(**given)
    length, start = inputs["input_ids"].shape[1], IDS[0].tolist().index(IMAGE_TOKEN_INDEX)
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": 2, "pad_token_id": 0}
    answers = set()
    for method, tokens in INSIDE.items():
        own.set_pruner(method, tokens=tokens, anyres="llava")
        expected = own.generate(IDS, **given, **options)
        visual = own.visual_tokens(one)
        row = Row(tuple(IDS[0].tolist()), visual.embeds, crops=len(one.features))
        reduction = prefill(own, [row], own.pruner).reductions[0][-1]
        left = reduction.ids[reduction.ids < len(visual.embeds)] + start
        with llava.pruned(host, method, tokens=tokens) as pruning:
            found = host.generate(**inputs, **options)
            plan = pruning.last
        assert torch.equal(found[:, :length], inputs["input_ids"])
        assert torch.equal(found[:, length:], expected), method
        layers = own.pruner.visual_per_layer(own.config.num_hidden_layers, len(visual.embeds), row.crops)
        made = [0 if count == len(visual.embeds) else reduction.stage.new for count in layers]
        assert [len(places) for places in plan.layers[0]] == [
            a - b for a, b in zip(layers, made, strict=True)
        ]
        assert torch.equal(plan.layers[0][-1], left), method
        text = [*range(start), *range(start + len(visual.embeds), length)]
        assert plan.sel[0].tolist() == sorted([*text, *left.tolist()])
        kept = torch.cat([one.places[one.kept] for one in plan.rows])
        of_patches = {place for one in plan.rows for place in one.places.tolist()}  # not newlines
        assert set(kept.tolist()) == set(left.tolist()) & of_patches
        answers.add(tuple(expected[0].tolist()))
    assert len(answers) > 2
