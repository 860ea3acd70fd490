"""`host_inputs` without processors: models take it, and it equals the processors where torchvision is."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from helpers.host_parts import STRINGS, family, parts_of
from helpers.hosts import HOSTS
from llava.integrations import inputs as module
from llava.integrations.inputs import HostParts, fitting_size, host_inputs, load_processor, takes_argument
from llava.integrations.tiny_hosts import VIDEO
from llava.video_files import read_frames

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CROPS = ("llava_next", "llava_next_video", "llava_onevision", "llava_onevision_interpolated")
NAMES = ["llava", "llava_siglip", *CROPS, "video_llava", "internvl", *QWEN]


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Make a smooth image, on which resizing libraries agree."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [np.sin(x / (9 + c + seed) + seed) + np.cos(y / (11 + c) - seed) for c in range(3)]
    return Image.fromarray(np.uint8(127 + 60 * np.stack(planes, -1)))


def request(name: str):
    """Return text, images and videos: a row of one image, a row of two, and rows of videos where taken."""
    kind = family(name)
    image, video = {
        "qwen": [f"<|vision_start|>{p}<|vision_end|>" for p in STRINGS["qwen"][:2]],
        "internvl": ["<IMG_CONTEXT>", "<video>"],
        "llava": ["<image>", "<video>"],
    }[kind]
    text = [f"USER: {image}\nwhat?", f"one {image} two {image} or {image}"]
    images = [picture(1, 40, 20), picture(2, 30, 60), picture(3, 50, 50), picture(4, 33, 31)]
    videos = []
    if HOSTS[name].video:
        text += [f"see {video} now", f"{image} then {video} and {video}!"]
        images.append(picture(5, 44, 28))
        videos = [[picture(10 * v + f, 40, 24) for f in range(5)] for v in range(3)]
    return text, images, videos


@pytest.mark.parametrize("name", NAMES)
def test_models_take_the_inputs_of_parts(name):
    parts, model = parts_of(name), HOSTS[name].build()
    text, images, videos = request(name)
    inputs = host_inputs(parts, text, images, videos, fps=2.0)
    with torch.no_grad():
        logits = model(**inputs).logits
        right = host_inputs(parts, text, images, videos, fps=2.0, padding_side="right")
        again = model(**right).logits
    assert logits.shape[:2] == inputs["input_ids"].shape and logits.isfinite().all()
    for a, m, b, n in zip(logits, inputs["attention_mask"], again, right["attention_mask"], strict=True):
        torch.testing.assert_close(a[m == 1], b[n == 1], rtol=0, atol=2e-5)
    single = host_inputs(parts, text[0], images[:1])
    assert torch.equal(single["input_ids"][0], inputs["input_ids"][0][inputs["attention_mask"][0] == 1])


VIDEO_PROCESSORS = {
    "llava_next_video": "LlavaNextVideoVideoProcessor",
    "llava_onevision": "LlavaOnevisionVideoProcessor",
    "video_llava": "VideoLlavaVideoProcessor",
    "internvl": "InternVLVideoProcessor",
    "qwen2_vl": "Qwen2VLVideoProcessor",
    "qwen2_5_vl": "Qwen2VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor",
}


@pytest.mark.parametrize("name", NAMES)
def test_inputs_of_parts_equal_those_of_the_processor(name):
    parts = parts_of(name)
    kind = parts.config.model_type
    options: dict = {}
    if kind in VIDEO_PROCESSORS:
        pytest.importorskip("torchvision")
        settings = dict(parts.video)
        if kind in QWEN:
            settings |= {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
        if kind in ("llava_next_video", "video_llava"):
            settings["do_center_crop"] = True
        options["video_processor"] = getattr(transformers, VIDEO_PROCESSORS[kind])(**settings)
    if kind in ("llava", "llava_next", "llava_next_video", "video_llava"):
        has_cls = parts.config.vision_config.model_type.startswith("clip")
        options["patch_size"] = parts.config.vision_config.patch_size
        options["num_additional_image_tokens"] = int(has_cls)
        options["vision_feature_select_strategy"] = parts.config.vision_feature_select_strategy
    if kind == "llava_onevision":
        options["num_image_tokens"] = 49
        options["vision_feature_select_strategy"] = "full"
        options["vision_aspect_ratio"] = parts.config.vision_aspect_ratio
    if kind == "internvl":
        options["image_seq_length"] = parts.config.image_seq_length
    class_name = HOSTS[name].class_name.replace("ForConditionalGeneration", "Processor")
    processor = getattr(transformers, class_name)(
        image_processor=parts.image_processor, tokenizer=parts.tokenizer, **options
    )
    text, images, videos = request(name)
    ours = host_inputs(parts, text, images, videos, fps=2.0)
    theirs = host_inputs(processor, text, images, videos, fps=2.0)
    theirs.pop("token_type_ids", None)
    renamed = {"pixel_values_images": "pixel_values"}
    names = [{renamed.get(key, key) for key in got} - {"mm_token_type_ids"} for got in (ours, theirs)]
    assert names[0] == names[1]
    for key, value in ours.items():
        other = theirs.get(key, theirs.get("pixel_values_images"))
        assert value.shape == other.shape, key
        if key == "pixel_values_videos" or (key == "pixel_values" and name == "internvl"):
            worst = (value - other).abs()
            assert worst.max() < 0.06 and worst.mean() < 0.01, (key, worst.max(), worst.mean())
        else:
            assert torch.equal(value.to(other.dtype), other), key


@pytest.mark.parametrize("name", QWEN)
def test_a_still_has_the_patches_of_an_image(name):
    parts = parts_of(name)
    still = picture(3, 32, 24)  # of a size that needs no resizing, so limits of videos do not matter
    video = STRINGS["qwen"][1]
    inputs = host_inputs(parts, f"a {video} b", videos=[[still] * 3], fps=1.0)
    image = host_inputs(parts, STRINGS["qwen"][0], images=[still])
    assert inputs["video_grid_thw"].tolist() == [[2, 6, 8]]
    assert image["image_grid_thw"].tolist() == [[1, 6, 8]]
    assert torch.equal(inputs["pixel_values_videos"], image["pixel_values"].repeat(2, 1))
    assert (inputs["input_ids"] == VIDEO).sum() == 2 * 12
    if takes_argument(parts.config, "mm_token_type_ids"):
        assert (inputs["mm_token_type_ids"] == 2).sum() == 24


def test_an_odd_last_frame_is_repeated_and_times_are_middles():
    parts = parts_of("qwen3_vl")
    clip = [picture(i, 32, 24) for i in range(3)]
    inputs = host_inputs(parts, STRINGS["qwen"][1], videos=[clip], fps=0.5)
    padded = host_inputs(parts, STRINGS["qwen"][1], videos=[[*clip, clip[-1]]], fps=0.5)
    assert torch.equal(inputs["pixel_values_videos"], padded["pixel_values_videos"])
    text = parts.tokenizer.decode(inputs["input_ids"][0]).replace(" ", "")
    assert re.findall(r"<([\d.]+)seconds>", text) == ["1.0", "4.0"]  # (0 + 2) / 2 and (4 + 4) / 2


def test_sizes_fit_the_limits():
    assert fitting_size(100, 50, 28, 56 * 56, 10**6) == (112, 56)
    assert fitting_size(2000, 1000, 28, 56 * 56, 28 * 28 * 100) == (392, 196)  # 14 x 7 tokens
    assert fitting_size(10, 20, 28, 56 * 56, 10**6) == (56, 84)
    assert fitting_size(64, 64, 32, 0, 32 * 32 * 8, 4, 2) == (32, 32)


@pytest.mark.parametrize("height", [1, 3])
def test_thin_pictures_of_video_llava_have_their_pixels(height):
    thin = picture(1, 40, height)
    found = host_inputs(parts_of("video_llava"), "<image>", [thin])
    tall = host_inputs(parts_of("video_llava"), "<image>", [thin.transpose(Image.Transpose.TRANSPOSE)])
    names = [name for name in found if name.startswith("pixel_values")]
    assert names and torch.allclose(found[names[0]], tall[names[0]].transpose(-1, -2), atol=0.03)  # rounding


def test_what_is_asked_wrongly_is_refused():
    parts = parts_of("qwen2_5_vl")
    image, video = STRINGS["qwen"][:2]
    with pytest.raises(
        ValueError, match=r"images: 1 given, but the text has 2 placeholders '<\|image_pad\|>'"
    ):
        host_inputs(parts, f"{image} {image}", [picture(1, 20, 20)])
    with pytest.raises(ValueError, match="fps: not given, but qwen2_5_vl uses the time"):
        host_inputs(parts, video, videos=[[picture(1, 20, 20)]])
    for fps in (0, -1, float("nan"), float("inf"), "2"):
        with pytest.raises(ValueError, match="fps: expected a number above 0, got"):
            host_inputs(parts, video, videos=[[picture(1, 20, 20)]], fps=fps)
    with pytest.raises(ValueError, match="images: got .*, expected a list"):
        host_inputs(parts, image, picture(1, 20, 20))
    with pytest.raises(ValueError, match="videos: got 'clip.mp4', expected a list"):
        host_inputs(parts, video, videos="clip.mp4", fps=1.0)
    with pytest.raises(ValueError, match="text: no prompts"):
        host_inputs(parts, [])
    with pytest.raises(ValueError, match="a video without frames"):
        host_inputs(parts, video, videos=[[]], fps=1.0)
    with pytest.raises(ValueError, match="frames of a video have different sizes"):
        host_inputs(parts, video, videos=[[picture(1, 20, 20), picture(1, 30, 20)]], fps=1.0)
    with pytest.raises(ValueError, match="model_type: no inputs for 'gemma3' without its processor"):
        HostParts(HOSTS["gemma3"].make_config(), None, None)
    parts = parts_of("video_llava")
    clips = [[picture(1, 20, 20)] * 2, [picture(1, 20, 20)]]
    with pytest.raises(ValueError, match=r"numbers of frames differ, \[1, 2\]"):
        host_inputs(parts, "<video> <video>", videos=clips)


def test_parts_are_loaded_where_the_processor_cannot_be(tmp_path, monkeypatch):
    parts = parts_of("qwen2_5_vl")
    for part in (parts.config, parts.tokenizer, parts.image_processor):
        part.save_pretrained(tmp_path)
    entries = {"min_pixels": 256, "max_pixels": 1024, "image_mean": [0.5] * 3}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(entries))

    monkeypatch.setattr(module, "is_torchvision_available", lambda: False)
    loaded = load_processor(str(tmp_path))
    assert loaded.video == {"size": {"shortest_edge": 256, "longest_edge": 1024}, "image_mean": [0.5] * 3}
    text, images, _ = request("qwen2_5_vl")
    a = host_inputs(loaded, text[:2], images[:4])
    b = host_inputs(parts, text[:2], images[:4])
    assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(
        a["image_grid_thw"], b["image_grid_thw"]
    )
    torch.testing.assert_close(a["pixel_values"], b["pixel_values"], rtol=0, atol=0.06)  # with any library
    (tmp_path / "video_preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="video_preprocessor_config.json: not valid JSON"):
        load_processor(str(tmp_path))


def test_frames_of_video_files_are_spread_evenly(tmp_path):
    from tests.test_video_files import write

    clip = write(tmp_path / "clip.mp4", frames=13, size=(32, 24))
    parts = parts_of("video_llava")
    inputs = host_inputs(parts, "<video> <video>", videos=[clip, str(clip)], frames=4)
    frames = read_frames(clip, 4)
    expected = host_inputs(parts, "<video> <video>", videos=[frames, frames])
    assert inputs["pixel_values_videos"].shape[:2] == (2, 4)
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    with pytest.raises(FileNotFoundError, match="none.mp4"):
        host_inputs(parts, "<video>", videos=[tmp_path / "none.mp4"])
