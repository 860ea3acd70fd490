"""Images of every kind, anyres grids, prompts with images, stopping."""

import base64
import io
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

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


# --- loading -------------------------------------------------------------------------------------------
def saved(tmp_path, image, format="PNG", **options):
    file = tmp_path / f"image.{format.lower()}"
    image.save(file, format, **options)
    return file


def pixel(image, x=0, y=0):
    assert image.mode == "RGB"
    return image.getpixel((x, y))


@pytest.mark.parametrize(
    ("mode", "colour", "format", "expected"),
    [
        ("RGB", (1, 2, 3), "PNG", (1, 2, 3)),
        ("L", 77, "PNG", (77, 77, 77)),
        ("1", 1, "PNG", (255, 255, 255)),
        ("LA", (50, 0), "PNG", (50, 50, 50)),
        ("RGBA", (10, 20, 30, 0), "PNG", (10, 20, 30)),
        ("CMYK", (0, 255, 255, 0), "TIFF", (255, 0, 0)),
        ("I;16", 0x8012, "PNG", (128, 128, 128)),
        ("I;16", 0x80FF, "PNG", (128, 128, 128)),
        ("I", 0x4012, "TIFF", (64, 64, 64)),
        ("I", 200, "TIFF", (200, 200, 200)),
        ("F", 0.5, "TIFF", (127, 127, 127)),
        ("F", 200.0, "TIFF", (200, 200, 200)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, colour, format, expected):
    file = saved(tmp_path, Image.new(mode, (3, 2), colour), format)
    image = mm_utils.load_image(file)
    assert image.size == (3, 2)
    assert pixel(image) == expected
    assert pixel(mm_utils.load_image(str(file))) == expected


RAMP = np.arange(256, dtype=np.int32).reshape(16, 16)


def in_mode(mode, values):
    """Store gray values in a mode."""
    if mode == "L":
        return Image.fromarray(values.astype(np.uint8))
    if mode in ("I", "F"):
        return Image.fromarray(values.astype({"I": np.int32, "F": np.float32}[mode]))
    order = ">" if mode == "I;16B" else "<"
    return Image.frombytes(mode, values.shape[::-1], values.astype(order + "u2").tobytes())


@pytest.mark.parametrize("mode", ["L", "I", "F", "I;16", "I;16B", "I;16L"])
@pytest.mark.parametrize("factor", [1, 4, 16, 257], ids=["8", "10", "12", "16"])
def test_equal_gray_values_give_equal_images_in_every_mode(mode, factor):
    """Values that fit 8 bits were black in 16-bit files, and wider ones black or white."""
    if mode == "L" and factor > 1:
        return
    image = mm_utils.to_rgb(in_mode(mode, RAMP * factor))
    assert (np.asarray(image) == RAMP[..., None]).all()


@pytest.mark.parametrize(("mode", "format"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF")])
def test_gray_files_of_low_range_are_as_converted(tmp_path, mode, format):
    file = saved(tmp_path, in_mode(mode, RAMP), format)
    with Image.open(file) as image:
        assert mm_utils.load_image(file).tobytes() == image.convert("RGB").tobytes()
    assert (np.asarray(mm_utils.load_image(file)) == RAMP[..., None]).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 127, 255]),
        ([0.0, 0.5, 1.0001], [0, 127, 255]),  # a resized image overshoots
        ([0.5, np.nan, np.inf], [127, 0, 127]),
        ([0.25, 1.0, 6.5], [63, 255, 255]),  # HDR
        ([0.0, 2.0, 3.0], [0, 2, 3]),  # whole numbers
        ([-5.0, 100.5, 254.9], [0, 100, 254]),
        ([-np.inf, np.nan, 200.0], [0, 0, 200]),
    ],
)
def test_float_images(values, expected):
    image = mm_utils.to_rgb(Image.fromarray(np.array([values], np.float32)))
    assert np.asarray(image)[0, :, 0].tolist() == expected


def test_images_without_a_value(tmp_path):
    file = saved(tmp_path, Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF")
    with pytest.raises(ValueError, match=r"image\.tiff: no pixel has a finite value"):
        mm_utils.load_image(file)
    with pytest.raises(ValueError, match="0 x 3 pixels"):
        mm_utils.to_rgb(Image.new("RGB", (0, 3)))
    negative = Image.fromarray(np.array([[-1000, 0, 200]], np.int32))  # as of computed tomography
    assert np.asarray(mm_utils.to_rgb(negative))[0, :, 0].tolist() == [0, 0, 200]


@pytest.mark.parametrize("mode", ["La", "RGBa", "HSV", "LAB", "YCbCr", "I;16B", "PA"])
def test_rare_modes_do_not_crash(mode):
    assert mm_utils.to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


def test_palettes_with_transparency_convert_quietly(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    file = saved(tmp_path, image, transparency=b"\x00\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = mm_utils.load_image(file)
    assert (pixel(loaded), pixel(loaded, 1)) == ((10, 20, 30), (40, 50, 60))


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert mm_utils.load_image(saved(tmp_path, Image.new("RGB", (6, 4)), "JPEG", exif=exif)).size == (6, 4)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    file = saved(tmp_path, frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixel(mm_utils.load_image(file)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_truncated_files(tmp_path, format):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    file = saved(tmp_path, noise, format)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=file.name):
        mm_utils.load_image(file)


def test_files_that_are_not_images(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"absent\.jpg"):
        mm_utils.load_image(tmp_path / "absent.jpg")
    with pytest.raises(ValueError, match=tmp_path.name):
        mm_utils.load_image(tmp_path)
    with pytest.raises(ValueError, match="Download it"):
        mm_utils.load_image("https://example.org/a.jpg")
    file = saved(tmp_path, Image.new("RGB", (50, 50)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"image\.png: too large to open"):
        mm_utils.load_image(file)


HEAD = b"\x00\x00\x00\x18"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (HEAD + b"ftypheic" + bytes(200), "a HEIC image, which Pillow cannot read. Convert it"),
        (HEAD + b"ftypmif1\0\0\0\0mif1heic" + bytes(200), "a HEIC image"),
        (HEAD + b"ftypavif" + bytes(200), "an AVIF image"),
        (HEAD + b"ftypmif1\0\0\0\0mif1avifmiaf" + bytes(200), "an AVIF image"),
        (HEAD + b"ftypisom" + bytes(200), "a video, not an image. Extract a frame"),
        (b"\xff\x0a" + bytes(50), "a JPEG XL image"),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "a JPEG XL image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- x -->\n<svg width='1'>", "an SVG drawing"),
        (b"%PDF-1.7\n%", "a PDF or PostScript document"),
        (b"\n<!DOCTYPE HTML><html><body>404<svg ></html>", "a web page, not an image. Download the image"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML or HTML document"),
        (b'{"error": "not found"}', 'a text, not an image (it starts with \'{"error": "not found"}\')'),
        (b"hello", "a text, not an image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"../.git/annex/objects/aa/SHA256E-s1.jpg", "a git-annex pointer"),
        (b"PK\x03\x04" + bytes(20), "an archive, not an image. Unpack it"),
        (bytes(128) + b"DICM" + bytes(20), "a DICOM image"),
        (bytes(5000), "only zero bytes"),
        (b"", "an empty file"),
        (b"\xff\xd8\xff\xe0" + bytes(30), "a corrupt, truncated or unsupported JPEG"),
        (bytes(range(128, 256)), "corrupt or not an image"),
    ],
)
def test_files_that_are_no_image_are_told_apart(tmp_path, content, says):
    file = tmp_path / "phone.jpg"
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        mm_utils.load_image(file)
    assert str(caught.value).startswith(f"{file}: {says}") and "\n" not in str(caught.value)
    if content:
        with pytest.raises(ValueError, match="^base64 image: "):
            mm_utils.load_image_from_base64(base64.b64encode(content))


def test_valid_images_with_long_texts_are_not_called_corrupt(tmp_path):
    info = PngInfo()
    info.add_text("history", "x" * 2_000_000, zip=True)
    file = saved(tmp_path, Image.new("RGB", (3, 2)), pnginfo=info)
    with pytest.raises(ValueError, match=r"image\.png: a PNG whose compressed text .* exiftool"):
        mm_utils.load_image(file)


def test_names_that_cannot_be_opened(tmp_path):
    with pytest.raises(ValueError, match=r"x\.\.\. \(5000 characters\): cannot be opened"):
        mm_utils.load_image("x" * 5000)
    with pytest.raises((ValueError, FileNotFoundError), match="Check the image folder"):
        mm_utils.load_image("a\0b.jpg")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="no such image"):
        mm_utils.load_image(tmp_path / "file" / "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match=r"pipe\.jpg: a pipe or device, not a file"):
        mm_utils.load_image(tmp_path / "pipe.jpg")


def test_base64():
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (9, 8, 7)).save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue())
    for given_as in (encoded, encoded.decode()):
        assert pixel(mm_utils.load_image_from_base64(given_as)) == (9, 8, 7)
    with pytest.raises(ValueError, match="base64 image: a text, not an image"):
        mm_utils.load_image_from_base64("aGVsbG8=")
    with pytest.raises(ValueError, match="base64 image: not readable"):
        mm_utils.load_image_from_base64("a")


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
