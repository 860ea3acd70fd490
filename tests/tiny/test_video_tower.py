"""DINOv2 written as LanguageBind's towers: the same features, the frame code, complete folders."""

import json

import pytest
import torch

from llava.tiny import video_tower
from llava.tiny.tower import CONFIG, PREPROCESSOR
from llava.tiny.video_tower import CLIP_MEAN, CLIP_STD, DINO_WIDTH, WIDTH, convert_tower, frame_codes


@pytest.fixture
def dinov2(tmp_path, monkeypatch):
    """A random DINOv2 of two layers, saved as a tower folder."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    entries = {key: value for key, value in CONFIG.items() if key not in ("architectures", "model_type")}
    model = Dinov2Model(Dinov2Config(**{**entries, "num_hidden_layers": 2})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path / "dinov2")
    monkeypatch.setattr(video_tower, "LAYERS", 2)
    return model, tmp_path / "dinov2"


def test_features_are_those_of_dinov2(dinov2):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model, folder = dinov2
    state = convert_tower(folder)
    clip = CLIPVisionModel(CLIPVisionConfig(**video_tower.tower_config("image")["vision_config"])).eval()
    names = {name.removeprefix("vision_model."): name for name in clip.state_dict()}
    missing = clip.load_state_dict({names[name]: tensor for name, tensor in state.items()}, strict=False)
    assert not missing.unexpected_keys and all("position_ids" in name for name in missing.missing_keys)
    pixels = torch.rand(1, 3, 224, 224)

    def normalized(mean, deviation):
        return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]

    with torch.inference_mode():
        found = clip(normalized(CLIP_MEAN, CLIP_STD), output_hidden_states=True).hidden_states
        wanted = model(
            normalized(PREPROCESSOR["image_mean"], PREPROCESSOR["image_std"]), output_hidden_states=True
        ).hidden_states
    assert len(found) == len(wanted) == 3
    for ours, theirs in zip(found, wanted, strict=True):
        theirs = theirs - theirs.mean(-1, keepdim=True)
        assert (ours[..., :DINO_WIDTH] - theirs).abs().max() < 2e-4 * theirs.abs().max()
        assert not ours[..., DINO_WIDTH:].any()


def test_frames_are_marked_in_one_layer_only():
    codes, parts = frame_codes(), video_tower.temporal_parts()
    assert codes.shape == (8, WIDTH) and codes.sum(1).abs().max() < 1e-6 and not codes[:, :DINO_WIDTH].any()
    assert torch.pdist(codes).min() > 0.5
    marked = [name for name, tensor in parts.items() if "embedding" in name and tensor.any()]
    assert marked == ["encoder.layers.10.temporal_embedding"]
    assert not any(tensor.any() for name, tensor in parts.items() if "temporal_attn" in name)


def test_folders_are_complete_and_stale_ones_are_replaced(dinov2, tmp_path, monkeypatch):
    monkeypatch.setattr(video_tower, "fetch", lambda: dinov2[1])
    monkeypatch.setattr(video_tower, "_CODED_LAYER", 0)
    folder = video_tower.fetch_towers(tmp_path / "towers")
    assert video_tower.are_ready(folder)
    written = {name: (folder / name / "config.json").read_text() for name in video_tower.NAMES.values()}
    assert json.loads(written["LanguageBind_Video_merge"])["vision_config"]["num_frames"] == 8
    (folder / "LanguageBind_Image" / "model.safetensors").write_bytes(b"")
    assert not video_tower.are_ready(folder)
    assert video_tower.fetch_towers(folder) == folder and video_tower.are_ready(folder)
