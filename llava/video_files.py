"""Read frames of video files as 8-bit RGB images, and say what a file is that cannot be read.

    frames = read_frames("clip.mp4")    # eight PIL images, spread evenly from the first frame to the last

Frames are decoded by PyAV (the extra `video`). Independent of models and of pixel values.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from llava.image_files import check_regular_file

if TYPE_CHECKING:
    from av.container import InputContainer

# Demuxers that may open a file. Others read playlists, which name further files and addresses, and images.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"
_READABLE = "mp4, avi, mov, mkv, webm or gif"
SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
_REENCODE = f"Copy or download it again, or convert it to {_READABLE}"


def frame_indices(total: int, count: int = 8) -> list[int]:
    """Return the places of `count` frames among `total`: floor(i (total - 1) / (count - 1)).

    The first and the last frame are among them; a shorter video repeats frames. One frame is the first.

    Raises:
        ValueError: one of the two is below 1.
    """
    for name, value in (("total", total), ("count", count)):
        if value < 1:
            raise ValueError(f"{name}: {value} frames. Pass a number from 1 on.")
    return [i * (total - 1) // max(count - 1, 1) for i in range(count)]


def read_frames(path: str | Path, count: int = 8) -> list[Image.Image]:
    """Read `count` frames of a video, spread evenly (`frame_indices`), as RGB images of one size.

    The number of frames is that of the container; where it has none or another one than can be decoded (B
    frames that share a packet, edits), frames are counted. No more than `count` frames are in memory. Frames
    are turned as the file's display matrix says, as players do; pixels that are not square stay as they are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has no video or none that can be read, is truncated or corrupt, or is in another
            format than mp4, avi, mov, mkv, webm and gif; the message names it and what to do.
        ImportError: PyAV is not installed.
    """
    frame_indices(1, count)  # refuse a wrong count before opening the file
    name = check_regular_file(path, "video")
    total = _count(path, name)
    taken, found = _decode(path, name, set(frame_indices(total, count)))
    if found != total:
        taken, found = _decode(path, name, set(frame_indices(found, count)))
    sizes = {frame.size for frame in taken.values()}
    if len(sizes) > 1:
        raise ValueError(f"{name}: the frames have different sizes, {sorted(sizes)}. Re-encode the video.")
    return [taken[index] for index in frame_indices(found, count)]


def _count(path: str | Path, name: str) -> int:
    """Return the number of frames that the container declares; without one, of its packets."""
    with _open(path, name) as (container, stream):
        if stream.frames > 0:
            return stream.frames
        return sum(packet.size > 0 for packet in container.demux(stream)) or 1


def _decode(path: str | Path, name: str, wanted: Set[int]) -> tuple[dict[int, Image.Image], int]:
    """Decode a whole video; return the frames at the places `wanted`, and how many there are."""
    taken: dict[int, Image.Image] = {}
    count = packets = 0
    corrupt = False  # from a frame with errors to the next key frame
    with _open(path, name) as (container, stream):
        declared = stream.frames
        for packet in container.demux(stream):
            is_end = packet.dts is None and not packet.size
            packets += not is_end
            if container.format.name == "avi" and packet.pts is not None:
                packets = max(packets, packet.pts + 1)  # frames that repeat the one before have no packet
            if packet.is_corrupt:
                raise ValueError(
                    f"{name}: truncated or corrupt: packet {packets} is incomplete. {_REENCODE}."
                )
            if not (packet.size or is_end):
                continue  # the container repeats a frame; an empty packet would end the decoder
            for frame in packet.decode():
                corrupt = frame.is_corrupt or (corrupt and not frame.key_frame)
                if count in wanted:
                    if corrupt:
                        raise ValueError(f"{name}: corrupt: frame {count} cannot be decoded. {_REENCODE}.")
                    pixels = frame.to_ndarray(format="rgb24")
                    turns = round(frame.rotation / 90)  # counterclockwise
                    taken[count] = Image.fromarray(np.ascontiguousarray(np.rot90(pixels, turns)))
                count += 1
    if not count:
        raise ValueError(f"{name}: no frame can be decoded. {_REENCODE}.")
    if packets < declared:
        raise ValueError(
            f"{name}: truncated or corrupt: {declared} frames declared, {packets} found. {_REENCODE}."
        )
    return taken, count


@contextmanager
def _open(path: str | Path, name: str) -> Iterator[tuple[InputContainer, Any]]:
    """Open a video file and its video stream; errors of PyAV become ValueErrors that name the file."""
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "av: PyAV is not installed, but needed to read videos. Run: pip install 'vispruner[video]'"
        ) from error
    try:
        if _ends_early(Path(path)):
            raise ValueError(f"{name}: truncated: the file ends within its data. {_REENCODE}.")
        with av.open(str(Path(path).absolute()), options={"format_whitelist": _FORMATS}) as container:
            cover = av.stream.Disposition.attached_pic  # the picture of a piece of music
            streams = [one for one in container.streams.video if not one.disposition & cover]
            if not streams:
                kinds = {one.type.replace("video", "a cover") for one in container.streams}
                found = f", only {', '.join(sorted(kinds))}" if kinds else ""
                raise ValueError(f"{name}: no video in this file{found}. Replace it.")
            yield container, streams[0]
    except (av.error.FFmpegError, OSError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ValueError(f"{name}: not a readable video ({reason}). {_REENCODE}.") from error


def _ends_early(path: Path) -> bool:
    """Return whether a file ends before the media data that its headers announce does."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64).ljust(64, b"\0")
        if head[:4] == b"GIF8":
            file.seek(max(0, size - 64))
            return not file.read().rstrip(b"\0\r\n").endswith(b";")
        if head[:4] == b"\x1a\x45\xdf\xa3":
            return _segment_end(head) > size
        start = 0
        while len(head) >= 16 and head[4:8].isalnum():  # boxes of MP4 and MOV
            length, kind = struct.unpack(">I4s", head[:8])
            length = struct.unpack(">Q", head[8:16])[0] if length == 1 else length
            if length < 8:
                return False  # 0: up to the end of the file
            if start + length > size and kind in (b"mdat", b"moov", b"moof"):
                return True
            start += length
            file.seek(start)
            head = file.read(16)
    return False


def _segment_end(head: bytes) -> int:
    """Return where the segment of a Matroska file ends by its header; 0 if it is not known."""

    def number(at: int) -> tuple[int, int]:
        """Read the number of variable length at a place: (value, the place after it)."""
        length = 9 - head[at].bit_length()
        return int.from_bytes(head[at : at + length]) & ((1 << 7 * length) - 1), at + length

    length, at = number(4)
    at += length
    if head[at : at + 4] != b"\x18\x53\x80\x67":
        return 0
    length, start = number(at + 4)
    unknown = length == (1 << 7 * (start - at - 4)) - 1
    return 0 if unknown else start + length
