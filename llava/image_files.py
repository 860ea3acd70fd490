"""Open image files of every kind as 8-bit RGB, and say what a file is that cannot be opened.

Values decide how gray images of more than 8 bits are scaled; everything else is Pillow's `.convert("RGB")`,
as in LLaVA. Independent of models and of image processing (`llava.mm_utils`).
"""

import base64
import re
import stat
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

_CONVERT = "Convert it to PNG or JPEG first"
_DOWNLOAD = "Download the image itself"
# What a file that Pillow cannot open may be: a pattern of its first bytes, a description and what to do.
_KINDS = [
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), what, fix)
    for pattern, what, fix in (
        (rb"version https://git-lfs", "a Git LFS pointer in place of the image", "Run git lfs pull"),
        (rb"\S*/annex/objects/", "a git-annex pointer in place of the image", "Run git annex get"),
        (rb".{4}ftyp.{0,40}avi[fs]", "an AVIF image, corrupt or not supported by this Pillow", _CONVERT),
        (rb".{4}ftyp(hei|hev|mif|msf)", "a HEIC image, which Pillow cannot read", _CONVERT),
        (rb".{4}ftypcrx|FUJIFILM|II.{6}CR", "a raw photo, which Pillow cannot read", _CONVERT),
        (
            rb".{4}ftyp|\x00\x00\x01\xba|\x1aE\xdf\xa3|RIFF....AVI ",
            "a video, not an image",
            "Extract a frame as PNG or JPEG first",
        ),
        (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "a JPEG XL image, which Pillow cannot read", _CONVERT),
        (rb"\xff\xd8\xff\xf7|II\xbc", "a JPEG-LS or JPEG XR image, which Pillow cannot read", _CONVERT),
        (rb"\x76\x2f\x31\x01|#\?(RADIANCE|RGBE)", "an HDR image, which Pillow cannot read", _CONVERT),
        (rb".{128}DICM", "a DICOM image, which Pillow cannot read", _CONVERT),
        (rb"gimp xcf", "a GIMP image, which Pillow cannot read", _CONVERT),
        (rb"%PDF|%!PS|\xc5\xd0\xd3\xc6", "a PDF or PostScript document, not pixels", _CONVERT),
        (rb"\s*<(!doctype html|html|head|body)", "a web page, not an image", _DOWNLOAD),
        (rb"\s*<(.{0,1000}<)?(!doctype )?svg[\s>]", "an SVG drawing, not pixels", _CONVERT),
        (rb"\s*<[?!a-z]", "an XML or HTML document, not an image", _DOWNLOAD),
        (rb"PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf|BZh|\xfd7zXZ", "an archive, not an image", "Unpack it first"),
        (rb"\x93NUMPY", "a NumPy array, not an image", _CONVERT),
        (rb"\x00+$", "only zero bytes, as after an interrupted copy", "Copy it again"),
    )
]
_MAGIC = re.compile(
    rb"(\xff\xd8\xff)|(\x89PNG)|(GIF8)|(RIFF....WEBP)|(BM)|(II\*\0|MM\0\*|II\+\0|MM\0\+)", re.DOTALL
)
_MAGIC_NAMES = ("JPEG", "PNG", "GIF", "WebP", "BMP", "TIFF")


def load_image(image_file: "str | Path | Image.Image") -> Image.Image:
    """Open an image as 8-bit RGB; see `to_rgb`.

    As in LLaVA, only the first frame is read, and the EXIF orientation is *not* applied.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not an image, is truncated, is in a format that Pillow cannot read, or is too
            large; the message names it and what to do.
    """
    if isinstance(image_file, Image.Image):
        return to_rgb(image_file)
    name = check_regular_file(image_file, "image")
    return decode_image(image_file, name)


def check_regular_file(file: "str | Path", kind: str) -> str:
    """Return the name of a file for messages, after checking that it can be opened.

    Args:
        kind: what the file should be: "image" or "video".

    Raises:
        FileNotFoundError: no such file.
        ValueError: an address, a folder, a pipe, or a file that cannot be reached.
    """
    name = str(file)
    if name.startswith(("http://", "https://")):
        raise ValueError(f"{name}: an address, not a file. Download it and pass its path.")
    if len(name) > 300:
        name = f"{name[:100]}... ({len(name)} characters)"
    try:
        mode = Path(file).stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{name}: no such {kind}. Check the {kind} folder and the name.") from error
    except (OSError, ValueError) as error:  # too long, a null character, no permission, a circle of links
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{name}: cannot be opened ({reason}). Check the {kind} folder and the name."
        ) from error
    if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
        found = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise ValueError(f"{name}: {found}, not a file. Check the {kind} folder and the name.")
    return name


def load_image_from_base64(image: str | bytes) -> Image.Image:
    """Decode a base64 image, as sent by a web page.

    Raises:
        ValueError: the text is not base64, or not an image.
    """
    try:
        content = base64.b64decode(image)
    except ValueError as error:
        raise ValueError(
            f"base64 image: not readable ({error}). Send a PNG or JPEG file as base64."
        ) from error
    return decode_image(BytesIO(content), "base64 image")


def decode_image(file: "str | Path | BytesIO", name: str) -> Image.Image:
    """Decode the first frame of a file as RGB. Raises ValueError that starts with `name`."""
    try:
        with Image.open(file) as image:
            image.load()
    except (Image.DecompressionBombError, MemoryError) as error:
        reason = str(error) or "out of memory"
        raise ValueError(f"{name}: too large to open ({reason}). Shrink it first.") from error
    except Exception as error:  # corrupt files make Pillow's decoders raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:
            raise ValueError(
                f"{name}: cannot be read ({error.strerror}). Check the file and disk."
            ) from error
        if isinstance(file, BytesIO):
            head = file.getvalue()[:4096]
        else:
            with open(file, "rb") as opened:
                head = opened.read(4096)
        raise ValueError(f"{name}: {_why_unreadable(head, error)}.") from error
    try:
        return to_rgb(image)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _why_unreadable(head: bytes, error: Exception) -> str:
    """Describe a file that Pillow cannot open by its first bytes, and say what to do."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if "decompressed data too large" in reason.lower() or "text chunk" in reason:
        return (
            "a PNG whose compressed text or color profile is over Pillow's limit. The pixels may be valid. "
            "Remove its metadata, for example by exiftool -all= FILE"
        )
    if not head:
        return "an empty file. Copy or download it again"
    for pattern, what, fix in _KINDS:
        if pattern.match(head.removeprefix(b"\xef\xbb\xbf")):
            return f"{what}. {fix}"
    if isinstance(error, UnidentifiedImageError):
        reason = "Pillow does not know this format"
    if found := _MAGIC.match(head):
        kind = _MAGIC_NAMES[found.lastindex - 1]
        return f"a corrupt, truncated or unsupported {kind} ({reason}). Replace it, or convert it to PNG"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head[:200]):
        return f"a text, not an image (it starts with {head[:40].decode()!r}). {_DOWNLOAD}"
    return f"corrupt or not an image ({reason}). Replace it"


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL mode to 8-bit RGB.

    As `.convert("RGB")`: alpha is dropped rather than blended. Unlike it, gray values of more than 8 bits are
    scaled instead of saturating to white, by the smallest of the usual depths (8, 10, 12, 16, 24, 32 bits)
    that holds the largest value; so equal values give equal images whatever mode they are stored in. Floats
    are scaled from 0 to 1 if none is greater than 1, or than 16 where there are fractions (highlights of
    HDR images are clipped). Negative values and NaN become black.

    Raises:
        ValueError: the image has no pixels, or none with a finite value.
    """
    if 0 in image.size:
        raise ValueError(f"the image has {image.width} x {image.height} pixels. Replace it.")
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_scale_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    with warnings.catch_warnings():
        # Pillow advises RGBA for palettes with transparency; the colors are the same.
        warnings.filterwarnings("ignore", message="Palette images with Transparency")
        return image.convert("RGB")


def _scale_to_8_bits(values: np.ndarray) -> np.ndarray:
    """Scale gray values (H, W) of any integer or float type to uint8; see `to_rgb`."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("no pixel has a finite value. Replace it.")
    top = finite.max()
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=0, posinf=float(top), neginf=0)
        if top <= 1 or (top <= 16 and (finite % 1).any()):
            return (values.clip(0, 1) * 255).astype(np.uint8)
    depth = next((bits for bits in (8, 10, 12, 16, 24) if top < 2**bits), 32)
    return (values // 2 ** (depth - 8)).clip(0, 255).astype(np.uint8)
