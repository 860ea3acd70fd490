"""Vision towers: equal to transformers' own model under eager attention, and never more than is needed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModel, Dinov2Model

from helpers.checkpoints import load_vision_tower
from helpers.golden_model import DATA
from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.tower import find_tower
from llava.model.multimodal_encoder.base import VisionTower, layers_to_run
from llava.model.multimodal_encoder.builder import build_vision_tower

CLIP = DATA / "ckpt_clip336p42"


def eager(model_class, folder, images, layer):
    """hidden_states[layer] without [CLS], and the [CLS] row of the layer that made it, by transformers."""
    model = model_class.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        out = model(images, output_hidden_states=True, output_attentions=True)
    depth = len(out.attentions)
    made_by = (layer if layer > 0 else depth + 1 + layer) - 1
    return out.hidden_states[layer][:, 1:], out.attentions[made_by][:, :, 0, 1:]


@pytest.mark.parametrize("kernels", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [-1, -2, -4, 1, 3])
def test_clip_equals_eager(layer, kernels):
    images = torch.randn(2, 3, 336, 336, generator=torch.Generator().manual_seed(1))
    tower = load_vision_tower(CLIP, layer, attn_implementation=kernels)
    assert tower.attn_implementation == kernels
    with torch.no_grad():
        features, attention = tower(images)
    want, row = eager(CLIPVisionModel, CLIP, images, layer)
    assert features.shape == (2, 64, 64) and attention.shape == (2, 4, 64)
    torch.testing.assert_close(features, want, atol=1e-6 * want.abs().max().item(), rtol=0)
    torch.testing.assert_close(attention, row, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_dinov2_equals_eager_with_interpolated_positions(dinov2, layer):
    folder, _ = dinov2
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    tower = load_vision_tower(folder, layer)
    assert (tower.num_patches, tower.num_patches_per_side, tower.hidden_size) == (16, 4, 32)
    with torch.no_grad():
        features, attention = tower(images)
        again, _ = tower(images)
    want, row = eager(Dinov2Model, folder, images, layer)
    torch.testing.assert_close(features, want, atol=1e-6 * want.abs().max().item(), rtol=0)
    torch.testing.assert_close(attention, row, atol=1e-6, rtol=0)
    assert torch.equal(features, again)


def test_positions_follow_the_weights(dinov2):
    """The kept interpolation is dropped when the weights change under it."""
    folder, _ = dinov2
    tower = load_vision_tower(folder)
    images = torch.zeros(1, 3, 56, 56)
    before, _ = tower(images)
    with torch.no_grad():
        tower.vision_tower.embeddings.position_embeddings.add_(1.0)
    after, _ = tower(images)
    assert not torch.allclose(before, after)


def test_only_the_needed_layers_exist():
    tower = load_vision_tower(CLIP, -2)
    assert len(tower.layers()) == 3 and tower.config.num_hidden_layers == 4
    assert not any("post_layernorm" in n or "layers.3." in n for n, _ in tower.named_parameters())


def test_no_square_attention_is_made(monkeypatch):
    """SDPA in every layer, the select layer included: once per layer, and softmax of one row only."""
    tower = load_vision_tower(CLIP, -2)
    rows, calls = [], []
    softmax, sdpa = torch.Tensor.softmax, torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda x, *a, **k: (rows.append(x.shape), softmax(x, *a, **k))[1]
    )
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: (calls.append(1), sdpa(*a, **k))[1],
    )
    tower(torch.zeros(1, 3, 336, 336))
    assert rows == [(1, 4, 1, 65)] and len(calls) == 3


def test_batch_gives_bits_of_singles():
    images = torch.randn(5, 3, 336, 336, generator=torch.Generator().manual_seed(3))
    tower = load_vision_tower(CLIP)
    features, attention = tower(images)
    for i in range(5):
        f, a = tower(images[i : i + 1])
        assert torch.equal(f[0], features[i]) and torch.equal(a[0], attention[i])
    tower.group_size = 4  # as on an accelerator: the last pass is filled up, so singles run as fours
    features, attention = tower(images)
    assert features.shape[0] == 5
    one, _ = tower(images[4:])
    assert torch.equal(one[0], features[4])
    empty, none = tower(images[:0])
    assert empty.shape == (0, 64, 64) and none.shape == (0, 4, 64)


def test_images_are_cast_at_the_door():
    tower = load_vision_tower(CLIP, dtype=torch.float32)
    images = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(4)).half()
    features, attention = tower(images)
    assert features.dtype == attention.dtype == torch.float32
    assert torch.equal(features, tower(images.float())[0])
    half = load_vision_tower(CLIP, dtype=torch.bfloat16)
    features, attention = half(images)
    assert features.dtype == torch.bfloat16 and attention.dtype == torch.float32


def test_tower_is_frozen():
    tower = load_vision_tower(CLIP)
    features, _ = tower(torch.zeros(1, 3, 336, 336))
    assert not features.requires_grad and not any(p.requires_grad for p in tower.parameters())


@pytest.mark.parametrize("layer", [0, 5, -5, 99])
def test_select_layer_out_of_range(layer):
    with pytest.raises(ValueError, match=r"mm_vision_select_layer.*4 layers"):
        layers_to_run(layer, 4)


@pytest.mark.parametrize("layer", ["-2", -2.0, True, None])
def test_select_layer_of_another_kind(layer):
    with pytest.raises(ValueError, match="mm_vision_select_layer: .* is not an integer"):
        layers_to_run(layer, 4)


def test_wrong_shapes_and_features():
    tower = load_vision_tower(CLIP)
    for shape in ((3, 336, 336), (1, 3, 224, 224), (1, 1, 336, 336)):
        with pytest.raises(ValueError, match=r"\(B, 3, 336, 336\)"):
            tower(torch.zeros(shape))
    with pytest.raises(ValueError, match="cls_patch.*only 'patch'"):
        build_vision_tower(find_tower(str(CLIP), None), select_feature="cls_patch")


def copy_tower(source, target, change=None, config=None, processor=None):
    target.mkdir(exist_ok=True)
    state = load_file(source / "model.safetensors")
    save_file(change(state) if change else state, target / "model.safetensors")
    settings = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**settings, **(config or {})}))
    saved = json.loads((source / "preprocessor_config.json").read_text())
    (target / "preprocessor_config.json").write_text(json.dumps({**saved, **(processor or {})}))
    return target


def test_missing_and_unexpected_keys(tmp_path):
    key = "vision_model.encoder.layers.1.mlp.fc1.weight"
    folder = copy_tower(CLIP, tmp_path / "a", lambda s: {k: v for k, v in s.items() if k != key})
    with pytest.raises(CheckpointError, match=r"missing keys(.|\n)*encoder\.layers\.1\.mlp\.fc1\.weight"):
        load_vision_tower(folder)
    folder = copy_tower(CLIP, tmp_path / "b", lambda s: {**s, "vision_model.surprise": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"unexpected keys(.|\n)*surprise"):
        load_vision_tower(folder)
    # layers after the select layer may be present or missing
    folder = copy_tower(
        CLIP,
        tmp_path / "c",
        lambda s: {k: v for k, v in s.items() if "layers.3." not in k and "post_" not in k},
    )
    load_vision_tower(folder)


def test_whole_clip_folder(tmp_path):
    """A folder with text half and all, as on the hub."""
    from transformers import CLIPConfig, CLIPTextConfig

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    whole = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).eval()
    whole.save_pretrained(tmp_path)
    tower = load_vision_tower(tmp_path, -2)  # no preprocessor_config.json: CLIP's own
    images = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        want = whole.vision_model(images, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(tower(images)[0], want, atol=1e-5, rtol=1e-5)
    assert tower.image_processor.crop_size["height"] == 28


def test_dinov2_keys_of_older_releases(dinov2, tmp_path):
    folder, _ = dinov2
    new = {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "o_proj": "output.dense",
    }

    def old_names(state):
        for short, long in new.items():
            state = {k.replace(f".attention.{short}.", f".attention.{long}."): v for k, v in state.items()}
        assert any("attention.attention.query" in k for k in state)
        return state

    old = load_vision_tower(copy_tower(folder, tmp_path / "old", old_names))
    images = torch.randn(1, 3, 56, 56)
    assert torch.equal(old(images)[0], load_vision_tower(folder)(images)[0])


def test_unsupported_towers(dinov2, tmp_path):
    folder, _ = dinov2
    for config, message in (
        ({"model_type": "dinov2_with_registers"}, "dinov2_with_registers.*not supported"),
        ({"model_type": "siglip_vision_model"}, "siglip_vision_model.*not supported"),
        ({"use_swiglu_ffn": True}, "swiglu"),
    ):
        with pytest.raises(ValueError, match=message):
            load_vision_tower(copy_tower(folder, tmp_path / "x", config=config))
    with pytest.raises(ValueError, match="crop_size is 50, but .*patch_size is 14"):
        load_vision_tower(copy_tower(folder, tmp_path / "y", processor={"crop_size": 50}))
    with pytest.raises(
        ValueError, match="crop_size is 224, but the vision tower expects 336\\. Set crop_size to 336"
    ):
        load_vision_tower(copy_tower(CLIP, tmp_path / "z", processor={"crop_size": 224}))


@pytest.fixture
def on_cuda(monkeypatch):
    """A tower that takes itself for one on a GPU when it chooses passes."""
    tower = load_vision_tower(CLIP)
    monkeypatch.setattr(VisionTower, "device", torch.device("cuda"))
    monkeypatch.setattr(tower, "on_device", lambda images: images.to(tower.dtype))
    return tower


def sizes_of(tower, count, counts=None):
    passes = tower.passes(torch.zeros(count, 1), counts or [1] * count)
    assert [start for start, *_ in passes] == [0, *(end for _, end, _ in passes[:-1])]
    assert passes[-1][1] == count and all(end - start == size for start, end, size in passes)
    return [size for *_, size in passes]


def test_a_float32_image_has_its_own_passes_on_a_gpu(on_cuda):
    """The bits of a crop depend on its pass, so that has to depend on the image alone."""
    assert sizes_of(on_cuda, 1) == [1] and sizes_of(on_cuda, 3) == [1, 1, 1]
    assert sizes_of(on_cuda, 11, [5, 1, 5]) == [5, 1, 5]
    assert sizes_of(on_cuda, 41, [37, 4]) == [32, 5, 4]
    assert on_cuda.crops_per_pass == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_crops_share_passes_that_keep_their_bits(on_cuda, dtype, monkeypatch):
    on_cuda.to(dtype)
    monkeypatch.setattr(on_cuda, "_checked", lambda images, size: True)
    assert sizes_of(on_cuda, 1) == [1] and sizes_of(on_cuda, 5) == [5] and sizes_of(on_cuda, 7) == [5, 2]
    assert sizes_of(on_cuda, 79, [5] * 15 + [4]) == [32, 32, 8, 5, 2]
    monkeypatch.setattr(on_cuda, "_checked", lambda images, size: size in (1, 4, 32))
    assert sizes_of(on_cuda, 42) == [32, 4, 4, 1, 1]
    on_cuda.group_size = 5
    assert [size for *_, size in on_cuda.passes(torch.zeros(7, 1), [7])] == [5, 5]


def test_a_pass_is_checked_once_per_size_and_dtype_by_images_that_are_finite(on_cuda, monkeypatch, caplog):
    calls = []

    def features(images):
        calls.append(len(images))
        return images * 2, images.float() + (len(images) == 8)

    monkeypatch.setattr(on_cuda, "forward_features", features)
    images = torch.rand(8, 3, 2, 2)
    broken = images.clone()
    broken[1, 0, 0, 0] = float("nan")
    assert not on_cuda._checked(broken, 4) and calls == [4]
    assert on_cuda._checked(images, 4) and calls[1:] == [4, 1, 1, 1]
    assert on_cuda._checked(broken, 4) and len(calls) == 5
    assert "other bits" not in caplog.text
    assert not on_cuda._checked(images, 8) and calls[5:] == [8, 1]
    assert not on_cuda._checked(images, 8) and len(calls) == 7
    assert "in a pass of 8, crops have other bits than alone" in caplog.text
    on_cuda.half()
    assert on_cuda._checked(images, 4) and calls[7:] == [4, 1, 1, 1]
