"""Pixels equal the reference pipeline's, bit for bit."""

import copy
import json
import pickle
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.recipe_images import SIZES, crc, make_image
from llava.mm_utils import classical_resize, process_images
from llava.model.image_processor import load_image_processor

DATA = Path(__file__).parents[1] / "data/model"
TOWER = DATA / "ckpt_clip336"
IMAGES = {name: (w, h, seed) for name, w, h, seed in SIZES}
GOLDEN = {
    protocol: json.loads((DATA / file).read_text(encoding="utf-8"))["pixel_values"]
    for protocol, file in (("paper", "e2e.json"), ("llava", "e2e_vanilla.json"))
}


@cache
def processor():
    return load_image_processor(TOWER)


@cache
def golden_image(name):
    return Image.fromarray(make_image(*IMAGES[name]))


def config_of(checkpoint, protocol):
    config = json.loads((DATA / checkpoint / "config.json").read_text(encoding="utf-8"))
    return SimpleNamespace(anyres_protocol=protocol, **config)


def to_bytes(pixels):
    """The 8-bit image that was normalized into `pixels` (..., 3, H, W)."""
    mean = torch.tensor(processor().image_mean).view(3, 1, 1)
    std = torch.tensor(processor().image_std).view(3, 1, 1)
    return ((pixels * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).numpy()


def check(pixels, golden):
    assert list(pixels.shape) == golden["shape"]
    assert pixels.dtype == torch.float32
    flat = pixels.flatten()
    for index, value in golden["probe"]:
        assert flat[index].item() == pytest.approx(value, abs=2e-6)
    assert crc(pixels.numpy()) == golden["f32_crc"]


@pytest.mark.parametrize("name", sorted(IMAGES))
def test_padded_images(name):
    pixels = process_images([golden_image(name)], processor(), config_of("ckpt_llava15", "llava"))
    check(pixels[0], GOLDEN["llava"]["llava15"][name])
    assert GOLDEN["paper"]["llava15"][name]["f32_crc"] == crc(pixels[0].numpy())


@pytest.mark.parametrize("protocol", ["paper", "llava"])
@pytest.mark.parametrize("name", sorted(IMAGES))
def test_anyres_images(name, protocol):
    pixels = process_images([golden_image(name)], processor(), config_of("ckpt_llava16", protocol))
    check(pixels[0], GOLDEN[protocol]["llava16"][name])


def test_processor_of_a_clip_folder():
    assert processor().crop_size["height"] == 336
    assert processor().image_mean[0] == 0.48145466
    pixels = processor().preprocess(golden_image("land640x480"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 336, 336)
    same = load_image_processor(TOWER / "preprocessor_config.json")
    assert torch.equal(
        same.preprocess(golden_image("land640x480"), return_tensors="pt")["pixel_values"], pixels
    )


DINOV2 = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
    "resample": 3,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


@pytest.mark.parametrize("name", ["land640x480", "tall123x457", "square336"])
def test_dinov2_by_hand(name):
    """Shortest edge to 336 (bicubic), centre crop, ImageNet mean and deviation."""
    image = golden_image(name)
    width, height = image.size
    scale = 336 / min(width, height)
    size = (336, int(height * scale)) if width <= height else (int(width * scale), 336)
    resized = classical_resize(image, size)
    left, top = (size[0] - 336) // 2, (size[1] - 336) // 2
    crop = np.asarray(resized.crop((left, top, left + 336, top + 336)), dtype=np.float64)
    expected = (crop / 255 - DINOV2["image_mean"]) / DINOV2["image_std"]
    pixels = load_image_processor(DINOV2).preprocess(image, return_tensors="pt")["pixel_values"][0]
    np.testing.assert_allclose(pixels.permute(1, 2, 0).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("size", [(90, 240), (240, 90), (57, 300), (56, 56), (3, 200)])
@pytest.mark.parametrize("edges", [{"shortest_edge": 56}, {"height": 60, "width": 58}])
@pytest.mark.parametrize("kind", ["CLIP", "Bit"])
def test_clients_get_classical_pixels(kind, edges, size):
    """Pillow 13 takes the columns of portrait images first, also in a processor that clients call."""
    config = {"image_processor_type": f"{kind}ImageProcessor", "size": edges, "crop_size": 56, "resample": 3}
    processor = load_image_processor(config)
    image = Image.effect_noise(size, 80).convert("RGB")
    edge = edges.get("shortest_edge")
    longer = int(56 * max(size) / min(size))
    target = (58, 60) if edge is None else (56, longer) if size[0] <= size[1] else (longer, 56)
    resized = classical_resize(image, target)
    options = {"return_tensors": "pt", "input_data_format": "channels_last"}
    wanted = processor.preprocess(resized, do_resize=False, **options)["pixel_values"]
    for call in (processor.preprocess, processor, pickle.loads(pickle.dumps(processor))):
        for given in (image, [image], np.asarray(image)):
            assert torch.equal(call(given, **options)["pixel_values"], wanted)
    assert type(copy.deepcopy(processor)) is type(processor)
    assert processor.to_dict()["image_processor_type"].startswith(f"{kind}ImageProcessor")


def test_the_towers_side_replaces_the_files():
    stock = DINOV2 | {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}
    assert load_image_processor(stock).crop_size["height"] == 224
    image = golden_image("small50x40")
    wanted = load_image_processor(stock, image_size=336).preprocess(image, return_tensors="pt")
    given = load_image_processor(DINOV2).preprocess(image, return_tensors="pt")
    assert torch.equal(wanted["pixel_values"], given["pixel_values"])


def test_padding_is_in_the_mean_colour():
    pixels = process_images([golden_image("wide1000x300")], processor(), config_of("ckpt_llava15", "llava"))
    assert to_bytes(pixels)[0, :, 0, 0].tolist() == [122, 116, 104]


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json: no such file"):
        load_image_processor(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: not valid JSON"):
        load_image_processor(tmp_path)
    file.write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, got a list"):
        load_image_processor(tmp_path)
    file.write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    with pytest.raises(ValueError, match="ViTImageProcessor is not supported. Choose a CLIP or Bit"):
        load_image_processor(tmp_path)
