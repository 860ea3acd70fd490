"""`llava.prune` on the -hf conversion of an original checkpoint equals our own class on the original."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import llava
from helpers.golden_model import CHECKPOINT, DATA, golden_image
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images

IMAGES = ("land640x480", "port480x640")
PROMPT = [1, 300, 301, IMAGE_TOKEN_INDEX, 302, 17, 303]


def converted(key: str):
    """Return the checkpoint as LlavaForConditionalGeneration."""
    folder = DATA / CHECKPOINT[key]
    entries = json.loads((folder / "config.json").read_text())
    tower = DATA / entries["mm_vision_tower"].rsplit("/")[-1]
    vision = json.loads((tower / "config.json").read_text())
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "rms_norm_eps max_position_embeddings rope_theta bos_token_id eos_token_id pad_token_id"
    )
    text = {name: entries[name] for name in names.split()}
    text |= {"model_type": "llama", "vocab_size": entries["vocab_size"] + 64}
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=entries["vocab_size"],
        vision_feature_layer=entries["mm_vision_select_layer"],
        tie_word_embeddings=False,
    )
    model = transformers.LlavaForConditionalGeneration(config).float().eval()
    weights = {}
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    for file in sorted(set(index["weight_map"].values())):
        weights |= torch.load(folder / file, weights_only=True)
    for name, weight in load_file(tower / "model.safetensors").items():
        weights[f"model.vision_tower.{name}"] = weight
    known = model.state_dict()
    for name in list(weights):
        weight = weights.pop(name).float()
        new = name.replace("model.mm_projector.0.", "model.multi_modal_projector.linear_1.")
        new = new.replace("model.mm_projector.2.", "model.multi_modal_projector.linear_2.")
        if new.startswith(("model.layers.", "model.embed_tokens.", "model.norm.")):
            new = new.replace("model.", "model.language_model.", 1)
        new = new if new in known else new.replace("vision_tower.vision_model.", "vision_tower.")
        if new.endswith(("embed_tokens.weight", "lm_head.weight")):  # rows of the placeholder
            weight = torch.cat([weight, weight.new_zeros(64, weight.shape[1])])
        weights[new] = weight
    missing = set(known) - set(weights)
    assert not {name for name in missing if "position_ids" not in name}
    model.load_state_dict({name: weights[name] for name in known if name in weights}, strict=False)
    return model


@pytest.mark.parametrize("tokens", [0, 1, 8, 64, None])
def test_the_conversion_keeps_the_same_tokens_and_gives_the_same_logits(tokens, models):
    own, processor, host = models
    images = [golden_image(name) for name in IMAGES]
    pixels = process_images(images, processor, own.config)
    pixels = torch.stack(list(pixels)) if isinstance(pixels, list) else pixels
    own.set_pruner("vispruner", tokens, 0.5)
    patches = (host.config.vision_config.image_size // host.config.vision_config.patch_size) ** 2
    expanded = [i for i in PROMPT for i in ([host.config.image_token_id] * patches if i < 0 else [i])]
    for image in pixels[:, None]:
        with torch.no_grad():
            (vision,) = own.encode_vision(image, [golden_image(IMAGES[0]).size])
            visual = own.visual_tokens(vision)
            expected = own(torch.tensor([PROMPT]), images=image).logits
        with llava.pruned(host, tokens=tokens if tokens is not None else patches) as pruning, torch.no_grad():
            ids = torch.tensor([expanded])
            found = host(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=image).logits
        assert pruning.last.rows[0].kept.tolist() == visual.kept.indices[0].tolist()
        if tokens is not None and tokens < patches:
            assert pruning.last.rows[0].important.tolist() == visual.kept.important[0].tolist()
        size = expected.shape[-1]
        assert found.shape[1] == expected.shape[1]
        torch.testing.assert_close(found[..., :size], expected, rtol=0, atol=2e-5)


@pytest.fixture(scope="module", params=["15", "15s"])
def models(request):
    _, own, processor, _ = llava.load_pretrained_model(DATA / CHECKPOINT[request.param], device="cpu")
    return own.float(), processor, converted(request.param)
