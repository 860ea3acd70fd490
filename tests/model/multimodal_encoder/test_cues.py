"""Cues of a vision tower, against transformers' own model under eager attention and plain formulas."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, Dinov2Model

from helpers.checkpoints import load_vision_tower
from helpers.golden_model import DATA
from llava.model.multimodal_encoder.cues import tower_cues

CLIP = DATA / "ckpt_clip336p42"
CUES = (
    "attention@1",
    "cls",
    "features@2",
    "keys",
    "last_keys",
    "last_query",
    "received",
    "received@9/24",
)


def plain(model_class, folder, images, select):
    """Compute all cues from whole attention matrices, hidden states and the key and query modules."""
    model = model_class.from_pretrained(folder, attn_implementation="eager").eval()
    seen: dict[str, list[torch.Tensor]] = {"q": [], "k": []}
    for name, module in model.named_modules():
        for kind, ends in (("q", ("q_proj", "query")), ("k", ("k_proj", "key"))):
            if name.endswith(ends):
                module.register_forward_hook(lambda _, __, out, kind=kind: seen[kind].append(out))
    with torch.no_grad():
        out = model(images, output_hidden_states=True, output_attentions=True)
    depth, heads = len(out.attentions), out.attentions[0].shape[1]
    block = select - 1
    batch, tokens = seen["k"][0].shape[:2]
    early = max(1, int(9 * depth / 24 + 0.5)) - 1

    def received(number):
        return out.attentions[number].mean(dim=(1, 2))[:, 1:]

    return {
        "attention@1": out.attentions[0][:, :, 0, 1:],
        "cls": out.hidden_states[select][:, 0],
        "features@2": out.hidden_states[2][:, 1:],
        "keys": seen["k"][block].view(batch, tokens, heads, -1).mean(2),
        "last_keys": seen["k"][-1],
        "last_query": seen["q"][-1][:, 0],
        "received": received(block),
        "received@9/24": received(early),
    }


@pytest.mark.parametrize("select", [-1, -2])
@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_cues_equal_those_of_whole_matrices(kind, select, dinov2):
    model_class, folder, side = (
        (CLIPVisionModel, CLIP, 336) if kind == "clip" else (Dinov2Model, dinov2[0], 56)
    )
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    tower = load_vision_tower(folder, select)
    with torch.no_grad():
        features, attention, *found = tower(images, cues=CUES)
        alone = tower(images)
    assert torch.equal(features, alone[0]) and torch.equal(attention, alone[1])
    want = plain(model_class, folder, images, tower.config.num_hidden_layers + 1 + select)
    for name, cue in zip(CUES, found, strict=True):
        scale = want[name].abs().max().item()
        torch.testing.assert_close(cue, want[name], atol=3e-6 * scale, rtol=0, msg=name)


def test_the_next_layer_is_read_when_it_is_needed_and_only_then(tmp_path):
    tower = load_vision_tower(CLIP)
    before = {name for name, _ in tower.named_parameters()}
    with torch.no_grad():
        tower(torch.zeros(1, 3, 336, 336), cues=("last_query",))
    assert {name for name, _ in tower.named_parameters()} == before == set(tower.state_dict())

    shutil.copytree(CLIP, tmp_path / "tower")
    state = load_file(CLIP / "model.safetensors")
    state = {k: v for k, v in state.items() if ".layers.3.self_attn.k_proj" not in k}
    save_file(state, tmp_path / "tower" / "model.safetensors", {"format": "pt"})
    short = load_vision_tower(tmp_path / "tower")
    with pytest.raises(ValueError, match="layer 4 is not in the tower's files"):
        short.prepare(("last_keys",))


def test_invalid_cues_are_refused():
    tower = load_vision_tower(CLIP, -3)
    for cue, reason in (
        ("taste", "unknown"),
        ("keys@", "unknown"),
        ("keys@4", "after the tower's select layer 2"),
        ("last_keys", "after the tower's select layer 2"),
        ("features@3", "layer 3 is after the tower's select layer 2"),
        ("received@0", "layers count from 1. Choose one from 1 to 2"),
    ):
        with pytest.raises(ValueError, match=reason):
            tower.prepare((cue,))
    assert tower_cues(("projected", "keys", "attention", "keys", "cls")) == ("cls", "keys")


def test_a_tower_without_texts_says_so(tmp_path, dinov2):
    with pytest.raises(ValueError, match="no text encoder"):
        load_vision_tower(dinov2[0]).clip  # noqa: B018
    with pytest.raises(ValueError, match="visual_projection.weight is missing"):
        load_vision_tower(CLIP).clip  # noqa: B018


def test_patches_and_texts_are_those_of_clip(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    vision = json.loads((CLIP / "config.json").read_text())
    text = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text["projection_dim"] = 12
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefgh", *(f"{one}</w>" for one in "abcdefgh")]
    text |= {"vocab_size": len(words), "max_position_embeddings": 7, "bos_token_id": 0, "eos_token_id": 1}
    model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)).eval()
    folder = tmp_path / "clip"
    model.save_pretrained(folder)
    shutil.copyfile(CLIP / "preprocessor_config.json", folder / "preprocessor_config.json")
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    tower = load_vision_tower(folder)
    features = torch.randn(2, 64, 64)
    with torch.no_grad():
        post = model.vision_model.post_layernorm(features)
        assert torch.allclose(tower.clip.image_embeds(features), model.visual_projection(post), atol=1e-5)
        one, long = tower.clip.text_embeds("abc"), tower.clip.text_embeds("a b c d e f")
        want = model.get_text_features(input_ids=torch.tensor([[0, 2, 3, 12, 1]]))
        want = getattr(want, "pooler_output", want)
    assert one.shape == (1, 12) and torch.allclose(one, want, atol=1e-6)
    assert long.shape == (2, 12)  # 7 positions: 5 tokens at once
