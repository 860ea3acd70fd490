"""`llava.video_files`: which frames are taken, and every kind of file that can or cannot be read."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from llava.video_files import frame_indices, read_frames

CODECS = {"mp4": "mpeg4", "avi": "mpeg4", "mov": "mpeg4", "mkv": "mpeg4", "webm": "libvpx-vp9", "gif": "gif"}
# A frame is one gray value: frame i of a clip has LEVEL * i, modulo 256.
LEVEL = 12


def write(
    path: Path,
    frames: int = 20,
    size: tuple[int, int] = (32, 16),
    gop: int = 12,
    times: Callable[[int], int] | None = None,
    **container: str,
) -> Path:
    """Write a clip in the format of the file name, its frames being gray and numbered by their value."""
    codec = CODECS[path.suffix[1:]]
    with av.open(str(path), "w", options=container) as output:
        stream = output.add_stream(codec, rate=10)
        stream.width, stream.height, stream.gop_size = *size, gop
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            pixels = np.full((size[1], size[0], 3), LEVEL * i % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times(i), Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def numbers(images: list) -> list[int]:
    """Return which frame of a clip by `write` each image is."""
    return [round(float(np.asarray(image).mean()) / LEVEL) for image in images]


def test_frames_are_spread_from_the_first_to_the_last() -> None:
    assert frame_indices(8) == list(range(8))
    assert frame_indices(1) == [0] * 8
    assert frame_indices(5) == [0, 0, 1, 1, 2, 2, 3, 4]
    assert frame_indices(100) == [0, 14, 28, 42, 56, 70, 84, 99]
    assert frame_indices(9, 1) == [0]
    for total in range(1, 300):
        exact = np.linspace(0, total - 1, 8).astype(int)
        assert frame_indices(total) == exact.tolist()


@pytest.mark.parametrize(("total", "count", "what"), [(0, 8, "total"), (5, 0, "count")])
def test_impossible_counts_are_refused(total: int, count: int, what: str) -> None:
    with pytest.raises(ValueError, match=rf"^{what}: "):
        frame_indices(total, count)


@pytest.mark.parametrize("kind", CODECS)
def test_frames_of_every_format_are_those_of_the_rule(tmp_path: Path, kind: str) -> None:
    images = read_frames(write(tmp_path / f"clip.{kind}"))
    assert [image.mode for image in images] == ["RGB"] * 8
    assert {image.size for image in images} == {(32, 16)}
    found = numbers(images)
    if kind == "gif":  # of 8 colors per channel
        assert found == sorted(found) and found[0] == 0 and found[-1] >= 17
    else:
        assert found == frame_indices(20)


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_a_short_video_repeats_frames(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"clip.{kind}", frames=3)
    assert numbers(read_frames(path)) == [0, 0, 0, 0, 1, 1, 1, 2]
    assert numbers(read_frames(write(tmp_path / f"one.{kind}", frames=1), 4)) == [0] * 4


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_the_rate_does_not_matter(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"clip.{kind}", times=lambda i: 40 * i * i)
    assert numbers(read_frames(path)) == frame_indices(20)


def test_an_avi_with_repeated_frames_is_whole(tmp_path: Path) -> None:
    """Its header counts frames that repeat the one before, which are neither stored nor decoded."""
    path = tmp_path / "clip.avi"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), LEVEL * i, np.uint8), format="rgb24")
            frame.pts = 3 * i
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    assert numbers(read_frames(path)) == frame_indices(10)


def test_odd_sizes(tmp_path: Path) -> None:
    images = read_frames(write(tmp_path / "clip.webm", frames=9, size=(37, 23)))
    assert {image.size for image in images} == {(37, 23)}


def test_the_display_matrix_turns_frames(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        pixels = np.zeros((32, 64, 3), np.uint8)
        pixels[:16, :32] = 255  # white in the top left corner
        for packet in [*stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")), *stream.encode()]:
            output.mux(packet)
    content = bytearray(path.read_bytes())
    matrix = content.index(struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30), 0)
    matrix = content.index(b"tkhd") + 4 + 40
    # (x, y) -> (-y, x): a quarter turn clockwise, as phones write it for upright videos
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30)
    path.write_bytes(content)
    image = np.asarray(read_frames(path, 1)[0])
    assert image.shape == (64, 32, 3)
    assert image[:32, 16:].mean() > 240 and image[32:].mean() < 15  # now in the top right corner


# --- files that cannot be read ---------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["mp4", "avi", "mkv", "webm", "gif"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused(tmp_path: Path, kind: str, share: float) -> None:
    options = {"movflags": "faststart"} if kind == "mp4" else {}
    path = write(tmp_path / f"clip.{kind}", gop=2, **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=rf"clip\.{kind}: .*(truncated|no frame|not a readable)") as error:
        read_frames(path)
    assert "Copy or download it again" in str(error.value)


def test_a_file_without_its_end_is_refused_although_the_index_is_lost(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4")  # moov comes last
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"clip\.mp4: truncated"):
        read_frames(path)


def test_fewer_packets_than_the_index_of_an_avi_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.avi", gop=1)
    content = path.read_bytes()
    last = content.rindex(b"00dc", 0, content.index(b"idx1"))
    path.write_bytes(content[:last])  # between two packets
    with pytest.raises(ValueError, match=r"clip\.avi: truncated or corrupt: 20 frames declared, 19 found"):
        read_frames(path)


def test_corrupt_frames_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.avi", size=(64, 48))
    content = bytearray(path.read_bytes())
    start = content.index(b"00dc", content.index(b"movi")) + 8
    content[start + 20 : start + 120] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"clip\.avi: (corrupt|not a readable|no frame)"):
        read_frames(path)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"", "empty.mp4"),
        (b"not a video at all, only text\n" * 20, "text.avi"),
        (bytes(5000), "zeros.mkv"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "pointer.webm"),
        (b"\x1a\x45\xdf\xa3\x9f" + b"\x42\x86\x81\x01" * 3, "header.mkv"),
        (b"\x1a\x45\xdf\xa3", "magic.mkv"),
        (b"GIF89a;", "header.gif"),
        (b"#EXTM3U\n#EXTINF:1\nhttp://localhost:1/a.ts\n", "playlist.mp4"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_frames(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_images_are_refused(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "photo.mp4"
    Image.new("RGB", (8, 8)).save(path, "PNG")
    with pytest.raises(ValueError, match=r"photo\.mp4: not a readable video"):
        read_frames(path)


def test_a_file_with_sound_only_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=8000, layout="mono")
        for i in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.rate, frame.pts = 8000, 1024 * i
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with pytest.raises(ValueError, match=r"sound\.mp4: no video in this file, only audio"):
        read_frames(path)


def test_the_cover_of_a_sound_file_is_not_a_video(tmp_path: Path) -> None:
    path = tmp_path / "cover.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "rgb24"
        stream.disposition = av.stream.Disposition.attached_pic.value
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")
        for packet in [*stream.encode(frame), *stream.encode()]:
            output.mux(packet)
    with pytest.raises(ValueError, match=r"cover\.mp4: no video in this file, only a cover"):
        read_frames(path)


def test_missing_files_folders_and_addresses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.mp4: no such video\. Check the video folder"):
        read_frames(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="a folder, not a file"):
        read_frames(tmp_path)
    with pytest.raises(ValueError, match="an address, not a file"):
        read_frames("https://example.org/a.mp4")


def test_without_pyav_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "clip.gif", frames=1)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"vispruner\[video\]"):
        read_frames(path)


def test_a_name_that_looks_like_a_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "clip.avi").rename(tmp_path / "concat:a.avi")
    monkeypatch.chdir(tmp_path)
    assert len(read_frames("concat:a.avi")) == 8


def test_only_frames_that_are_returned_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava import video_files

    converted = []
    real = video_files.Image.fromarray
    monkeypatch.setattr(video_files.Image, "fromarray", lambda pixels: converted.append(1) or real(pixels))
    read_frames(write(tmp_path / "clip.mkv", frames=60))
    assert len(converted) == 8
