"""Reference cases of the original Video-LLaVA through the library; mistakes that they have to find."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from helpers import golden_video
from helpers.video_llava import DATA


def test_all_reference_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert golden_video.main([str(DATA)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == {"cases": 42, "equal": 42, "failed": []}


@pytest.fixture(scope="module")
def reference() -> golden_video.Reference:
    return golden_video.Reference(Path(DATA))


def differs(reference: golden_video.Reference, kind: str, name: str) -> bool:
    """Return whether an entry of a fresh cache fails."""
    reference.encoded.clear()
    check = {"pixels": reference.check_pixels, "towers": reference.check_tower}[kind]
    try:
        check(name, reference.document[kind][name])
    except golden_video.Mismatch:
        return True
    finally:
        reference.encoded.clear()
    return False


@pytest.mark.parametrize("mistake", ["antialias", "floor crop"])
def test_mistakes_in_pixels_are_found(
    reference: golden_video.Reference, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    from llava.model import image_processor

    name = "video/w231" if mistake != "antialias" else "image/land640x480/pad"
    assert not differs(reference, "pixels", name)
    if mistake == "antialias":
        plain = functional.interpolate
        monkeypatch.setattr(functional, "interpolate", lambda *a, **k: plain(*a, **k, antialias=True))
    else:
        monkeypatch.setattr(image_processor, "round", int, raising=False)
    assert differs(reference, "pixels", name)


@pytest.mark.parametrize("mistake", ["no temporal part", "spatial norm", "embedding only in the attention"])
def test_mistakes_in_the_tower_are_found(
    reference: golden_video.Reference, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    from llava.model.multimodal_encoder.video_encoder import VideoTower

    plain = VideoTower.enter

    def enter(self: VideoTower, layer: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        if mistake == "no temporal part":
            return hidden
        if mistake == "spatial norm":
            own, layer.temporal_layer_norm1 = layer.temporal_layer_norm1, layer.layer_norm1
            found = plain(self, layer, hidden)
            layer.temporal_layer_norm1 = own
            return found
        return plain(self, layer, hidden) - layer.temporal_embedding.transpose(0, 1)

    monkeypatch.setattr(VideoTower, "enter", enter)
    assert differs(reference, "towers", "video/h233")
