"""Opening image files of every kind."""

import base64
import io
import os
import warnings

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from llava import image_files


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
    image = image_files.load_image(file)
    assert image.size == (3, 2)
    assert pixel(image) == expected
    assert pixel(image_files.load_image(str(file))) == expected


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
    image = image_files.to_rgb(in_mode(mode, RAMP * factor))
    assert (np.asarray(image) == RAMP[..., None]).all()


@pytest.mark.parametrize(("mode", "format"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF")])
def test_gray_files_of_low_range_are_as_converted(tmp_path, mode, format):
    file = saved(tmp_path, in_mode(mode, RAMP), format)
    with Image.open(file) as image:
        assert image_files.load_image(file).tobytes() == image.convert("RGB").tobytes()
    assert (np.asarray(image_files.load_image(file)) == RAMP[..., None]).all()


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
    image = image_files.to_rgb(Image.fromarray(np.array([values], np.float32)))
    assert np.asarray(image)[0, :, 0].tolist() == expected


def test_images_without_a_value(tmp_path):
    file = saved(tmp_path, Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF")
    with pytest.raises(ValueError, match=r"image\.tiff: no pixel has a finite value"):
        image_files.load_image(file)
    with pytest.raises(ValueError, match="0 x 3 pixels"):
        image_files.to_rgb(Image.new("RGB", (0, 3)))
    negative = Image.fromarray(np.array([[-1000, 0, 200]], np.int32))  # as of computed tomography
    assert np.asarray(image_files.to_rgb(negative))[0, :, 0].tolist() == [0, 0, 200]


@pytest.mark.parametrize("mode", ["La", "RGBa", "HSV", "LAB", "YCbCr", "I;16B", "PA"])
def test_rare_modes_do_not_crash(mode):
    assert image_files.to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


def test_palettes_with_transparency_convert_quietly(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    file = saved(tmp_path, image, transparency=b"\x00\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = image_files.load_image(file)
    assert (pixel(loaded), pixel(loaded, 1)) == ((10, 20, 30), (40, 50, 60))


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert image_files.load_image(saved(tmp_path, Image.new("RGB", (6, 4)), "JPEG", exif=exif)).size == (6, 4)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    file = saved(tmp_path, frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixel(image_files.load_image(file)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_truncated_files(tmp_path, format):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    file = saved(tmp_path, noise, format)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=file.name):
        image_files.load_image(file)


def test_files_that_are_not_images(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"absent\.jpg"):
        image_files.load_image(tmp_path / "absent.jpg")
    with pytest.raises(ValueError, match=tmp_path.name):
        image_files.load_image(tmp_path)
    with pytest.raises(ValueError, match="Download it"):
        image_files.load_image("https://example.org/a.jpg")
    file = saved(tmp_path, Image.new("RGB", (50, 50)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"image\.png: too large to open"):
        image_files.load_image(file)


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
        image_files.load_image(file)
    assert str(caught.value).startswith(f"{file}: {says}") and "\n" not in str(caught.value)
    if content:
        with pytest.raises(ValueError, match="^base64 image: "):
            image_files.load_image_from_base64(base64.b64encode(content))


def test_valid_images_with_long_texts_are_not_called_corrupt(tmp_path):
    info = PngInfo()
    info.add_text("history", "x" * 2_000_000, zip=True)
    file = saved(tmp_path, Image.new("RGB", (3, 2)), pnginfo=info)
    with pytest.raises(ValueError, match=r"image\.png: a PNG whose compressed text .* exiftool"):
        image_files.load_image(file)


def test_names_that_cannot_be_opened(tmp_path):
    with pytest.raises(ValueError, match=r"x\.\.\. \(5000 characters\): cannot be opened"):
        image_files.load_image("x" * 5000)
    with pytest.raises((ValueError, FileNotFoundError), match="Check the image folder"):
        image_files.load_image("a\0b.jpg")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="no such image"):
        image_files.load_image(tmp_path / "file" / "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match=r"pipe\.jpg: a pipe or device, not a file"):
        image_files.load_image(tmp_path / "pipe.jpg")


def test_base64():
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (9, 8, 7)).save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue())
    for given_as in (encoded, encoded.decode()):
        assert pixel(image_files.load_image_from_base64(given_as)) == (9, 8, 7)
    with pytest.raises(ValueError, match="base64 image: a text, not an image"):
        image_files.load_image_from_base64("aGVsbG8=")
    with pytest.raises(ValueError, match="base64 image: not readable"):
        image_files.load_image_from_base64("a")
