"""The video tower against a plain one in float64, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from helpers.video_llava import FRAMES, PATCHES, VIDEO, WIDTH, clip, plain_tower, tower_state, write_tower
from llava.model.checkpoint.tower import find_tower
from llava.model.multimodal_encoder.builder import _fill as fill
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_encoder.video_encoder import VideoTower


def load(folder, select_layer: int = -2, kernels: str = "sdpa") -> VideoTower:
    source = find_tower(str(folder), None, entry="mm_video_tower")
    tower = build_vision_tower(source, select_layer, attn_implementation=kernels)
    fill(source, str(folder), tower, None)
    return tower.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return write_tower(tmp_path_factory.mktemp("tower"), VIDEO)


@pytest.fixture(scope="module")
def tower(folder) -> VideoTower:
    return load(folder)


@pytest.mark.parametrize(("layer", "kernels"), [(-2, "sdpa"), (-2, "eager"), (1, "sdpa"), (-1, "sdpa")])
@torch.no_grad()
def test_features_and_attention_are_those_of_the_plain_tower(folder, layer: int, kernels: str) -> None:
    pixels = clip(3)
    hidden, row = plain_tower(tower_state(VIDEO), pixels, layer if layer > 0 else 5 + layer)
    tower = load(folder, layer, kernels).double()
    features, attention, cls = tower(pixels.transpose(0, 1).double(), [FRAMES], cues=("cls",))
    assert features.shape == (FRAMES, PATCHES, WIDTH)
    near = {"atol": 1e-4, "rtol": 1e-4} if kernels == "eager" else {}  # whose softmax is always float32
    torch.testing.assert_close(features, hidden[:, 1:], **near)
    torch.testing.assert_close(cls, hidden[:, 0], **near)
    torch.testing.assert_close(attention, row, **near)
    features32, attention32 = tower.float()(pixels.transpose(0, 1), [FRAMES])
    torch.testing.assert_close(features32.double(), hidden[:, 1:], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(attention32.double(), row, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_frames_see_each_other_and_clips_do_not(tower: VideoTower) -> None:
    pair = torch.cat([clip(seed).transpose(0, 1) for seed in (1, 2)])
    together = tower(pair, [FRAMES, FRAMES])
    for start in (0, FRAMES):
        alone = tower(pair[start : start + FRAMES], [FRAMES])
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(one[start : start + FRAMES], other)
    changed = pair[:FRAMES].clone()
    changed[7] += 1
    assert not torch.allclose(tower(changed, [FRAMES])[0][0], together[0][0])


@torch.no_grad()
def test_the_order_of_frames_matters(tower: VideoTower) -> None:
    pixels = clip(1).transpose(0, 1)
    there, back = tower(pixels, [FRAMES])[0], tower(pixels.flip(0), [FRAMES])[0].flip(0)
    assert (there - back).abs().max() > 0.1


@pytest.mark.parametrize("counts", [[1], [4], [16], [7, 9]])
def test_other_numbers_of_frames_are_refused(tower: VideoTower, counts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"images: clips of .* frames, but the video tower takes exactly 8"):
        tower(torch.zeros(sum(counts), 3, 28, 28), counts)


@torch.no_grad()
def test_cues_of_layers_are_read_after_their_temporal_part(tower: VideoTower) -> None:
    pixels = clip(2).transpose(0, 1)
    names = ("attention@2", "received", "keys", "features@2", "last_keys")
    found = dict(zip(names, tower(pixels, [FRAMES], cues=names)[2:], strict=True))
    state = tower_state(VIDEO)
    hidden, row = plain_tower(state, clip(2), 2)
    torch.testing.assert_close(found["attention@2"].double(), row, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found["features@2"].double(), hidden[:, 1:], atol=1e-3, rtol=1e-3)
    assert found["received"].shape == (FRAMES, PATCHES)
    assert found["last_keys"].shape == (FRAMES, PATCHES + 1, WIDTH)


def test_merging_inside_the_tower_is_refused(tower: VideoTower) -> None:
    with pytest.raises(ValueError, match="merge"):
        tower(clip().transpose(0, 1), [FRAMES], cues=("merged@2", "merged_groups@2"))
