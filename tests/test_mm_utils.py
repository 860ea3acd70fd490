"""Images of every kind, anyres grids, prompts with images, stopping."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llava import mm_utils
from llava.mm_utils import classical_resize, process_images
from llava.model.checkpoint.tower import clip_processor
from llava.model.image_processor import load_image_processor
from llava.model.tokenizer import load_tokenizer

DATA = Path(__file__).parent / "data/model"
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@pytest.fixture(scope="module")
def processor():
    return load_image_processor(DATA / "ckpt_clip336p42", image_size=28)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DATA / "ckpt_llava15s")


# --- geometry ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("size", "offset"), [((5, 2), (0, 1)), ((2, 5), (1, 0)), ((4, 4), (0, 0)), ((1, 4), (1, 0))]
)
def test_expand2square_centres(size, offset):
    square = mm_utils.expand2square(Image.new("RGB", size, "white"), (1, 2, 3))
    white = np.argwhere(np.asarray(square).min(-1) == 255)
    assert square.size == (max(size), max(size))
    assert tuple(white.min(0)[::-1]) == offset
    assert tuple(white.max(0)[::-1] + 1 - white.min(0)[::-1]) == size
    if size[0] != size[1]:
        assert (np.asarray(square) == (1, 2, 3)).all(-1).sum() == max(size) ** 2 - size[0] * size[1]


@pytest.mark.parametrize(
    ("size", "best"),
    [
        ((336, 336), (336, 672)),  # nothing gained by 672 x 672, least padding, first of equals
        ((640, 480), (672, 672)),
        ((1000, 300), (1008, 336)),
        ((123, 457), (336, 672)),
        ((1344, 1008), (672, 672)),
        ((10000, 1), (336, 672)),  # no row of it would be left anywhere
    ],
)
def test_best_resolution(size, best):
    assert mm_utils.select_best_resolution(size, PINPOINTS) == best
    shape = (best[0] // 336, best[1] // 336)
    assert mm_utils.get_anyres_image_grid_shape(size, PINPOINTS, 336) == shape
    assert mm_utils.get_anyres_image_grid_shape(size, str(PINPOINTS), 336) == shape


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_best_resolution_keeps_most_pixels(width, height):
    def kept(resolution):
        scale = min(resolution[0] / width, resolution[1] / height)
        return min(int(width * scale) * int(height * scale), width * height)

    best = mm_utils.select_best_resolution((width, height), PINPOINTS)
    assert kept(best) == max(map(kept, PINPOINTS))
    rivals = [w * h for w, h in PINPOINTS if kept((w, h)) == kept(best)]
    assert best[0] * best[1] == min(rivals)


@pytest.mark.parametrize("pinpoints", [None, [], "[[336", [336, 672], [[0, 336]], "all", [["a", "b"]]])
def test_bad_pinpoints(pinpoints):
    with pytest.raises(ValueError, match="image_grid_pinpoints: expected a list"):
        mm_utils.get_anyres_image_grid_shape((10, 10), pinpoints, 336)


def test_resize_and_pad_and_tiles():
    padded = mm_utils.resize_and_pad_image(Image.new("RGB", (20, 10), "white"), (56, 56))
    white = np.argwhere(np.asarray(padded).min(-1) == 255)
    assert padded.size == (56, 56)
    assert white.min(0).tolist() == [14, 0] and white.max(0).tolist() == [41, 55]
    wide = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3).repeat(2, 0).repeat(2, 1))
    assert [tile.getpixel((0, 0)) for tile in mm_utils.divide_to_patches(wide, 2)] == [0, 1, 2, 3, 4, 5]
    assert {tile.size for tile in mm_utils.divide_to_patches(wide, 2)} == {(2, 2)}


@pytest.mark.parametrize("aspect", ["pad", "anyres", None])
@pytest.mark.parametrize("protocol", ["paper", "llava"])
@pytest.mark.parametrize("size", [(1, 1), (1, 900), (3000, 1), (2, 3), (40000, 1), (3, 20000)])
def test_unusual_sizes(processor, size, aspect, protocol):
    config = {"image_aspect_ratio": aspect, "anyres_protocol": protocol}
    config["image_grid_pinpoints"] = [[28, 56], [56, 28]]
    image = Image.new("RGB", size, (200, 100, 50))
    pixels = mm_utils.process_images([image], processor, config)
    crops = {"paper": (5,), "llava": (3,)}[protocol] if aspect == "anyres" else ()
    assert pixels.shape == (1, *crops, 3, 28, 28)
    assert torch.isfinite(pixels).all()
    if aspect != "pad":  # part of the image is seen
        mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        colour = (torch.tensor([200, 100, 50]) / 255 - mean) / std
        first = pixels[0, 0] if crops else pixels[0]
        torch.testing.assert_close(first[:, 14, 14], colour, atol=1e-5, rtol=0)


def test_thin_images_show_their_middle(processor):
    """Beyond the largest aspect ratio the middle is cut out first, which must not move it."""
    stripes = np.zeros((4, 1200, 3), np.uint8)
    stripes[:, 600:] = 255
    for width in (200, 600):  # one below and one above the limit
        image = Image.fromarray(stripes[:, 600 - width // 2 : 600 + width // 2])
        pixels = mm_utils.process_images([image], processor, {"image_aspect_ratio": None})[0, 0, 14]
        assert pixels[:13].max() < pixels[15:].min()


def test_shapes_that_differ_come_as_a_list(processor):
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=[[28, 56], [56, 56]])
    thin, square = Image.new("RGB", (28, 56)), Image.new("RGB", (56, 56))
    assert [list(p.shape) for p in mm_utils.process_images([thin, square], processor, config)] == [
        [3, 3, 28, 28],
        [5, 3, 28, 28],
    ]
    assert mm_utils.process_images([square, square], processor, config).shape == (2, 5, 3, 28, 28)
    config.anyres_protocol = "paper"
    assert mm_utils.process_images([thin, square], processor, config).shape == (2, 5, 3, 28, 28)
    assert mm_utils.process_images([], processor, config) == []


def test_modes_are_converted_on_the_way(processor):
    grey = Image.new("L", (30, 20), 90)
    config = {"image_aspect_ratio": "pad"}
    assert torch.equal(
        mm_utils.process_images([grey], processor, config),
        mm_utils.process_images([grey.convert("RGB")], processor, config),
    )


# --- prompts -------------------------------------------------------------------------------------------
def test_tokenizer_image_token(tokenizer):
    ids = mm_utils.tokenizer_image_token("a <image>b<image>", tokenizer)
    plain = [tokenizer(piece).input_ids for piece in ("a ", "b")]
    assert ids == [*plain[0], -200, *plain[1][1:], -200]
    tensor = mm_utils.tokenizer_image_token("a <image>b<image>", tokenizer, -7, return_tensors="pt")
    assert tensor.dtype == torch.int64
    assert tensor.tolist() == [-7 if i == -200 else i for i in ids]
    with pytest.raises(ValueError, match="return_tensors: 'np'"):
        mm_utils.tokenizer_image_token("a", tokenizer, return_tensors="np")


def test_tokenizer_without_bos_loses_nothing():
    tokenizer = load_tokenizer(DATA / "ckpt_llava15s")
    tokenizer.add_bos_token = False
    # a literal <s> at the start of a piece is the prompt's own and stays
    assert mm_utils.tokenizer_image_token("<s><image><s>", tokenizer) == [1, -200, 1]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("liuhaotian/llava-v1.5-7b", "llava-v1.5-7b"),
        ("/data/llava-v1.5-7b/", "llava-v1.5-7b"),
        ("runs/llava-lora/checkpoint-200", "llava-lora_checkpoint-200"),
        ("runs/llava-lora/checkpoint-200//", "llava-lora_checkpoint-200"),
        ("checkpoint-3", "checkpoint-3"),
        (Path("a/b"), "b"),
    ],
)
def test_model_names(path, name):
    assert mm_utils.get_model_name_from_path(path) == name


@pytest.mark.parametrize("with_prompt", [True, False])
def test_keywords_stop_row_by_row(tokenizer, with_prompt):
    prompt = tokenizer("Human: stop ### here", return_tensors="pt").input_ids
    stop = mm_utils.KeywordsStoppingCriteria(["###"], tokenizer, prompt)
    texts = ["An answer of some length ###", "An answer of some length and more of it"]
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    length = min(map(len, rows))
    new = torch.tensor([rows[0][-length:], rows[1][-length:]])
    output = torch.cat([prompt.expand(2, -1), new], 1) if with_prompt else new
    assert stop(output, None).tolist() == [True, False]
    assert stop(output[:, :-6]).tolist() == [False, False]


@pytest.mark.parametrize("size", [(300, 500), (500, 300), (77, 336), (336, 336)])
def test_images_are_resized_rows_first_under_every_pillow(size):
    """The order decides the rounding between the passes; Pillow 13 reverses it for portrait images."""
    image = Image.effect_noise(size, 80).convert("RGB")
    for target in ((100, 77), (33, 200), (336, 336)):
        rows = image.resize((target[0], size[1]), Image.Resampling.BICUBIC)
        expected = rows.resize(target, Image.Resampling.BICUBIC)
        assert classical_resize(image, target).tobytes() == expected.tobytes()


def test_every_resize_of_an_image_takes_rows_first(monkeypatch):
    """Base crop, tiles of the grid, shortest edge: none calls Pillow for both directions at once."""
    resize = Image.Image.resize

    def checked(self, size, *more, **options):
        assert size[0] == self.width or size[1] == self.height, f"{self.size} -> {size} in one call"
        return resize(self, size, *more, **options)

    monkeypatch.setattr(Image.Image, "resize", checked)
    processor = load_image_processor(clip_processor(56))
    image = Image.effect_noise((90, 240), 80).convert("RGB")
    for config in (
        {"image_aspect_ratio": "pad"},
        {"image_aspect_ratio": None},
        {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[56, 112], [112, 112]]},
        {"image_aspect_ratio": "anyres", "anyres_protocol": "paper"},
    ):
        assert process_images([image], processor, config).shape[-2:] == (56, 56)
