"""The bundled video sets: mp4 files, questions and answers in the layout of Video-LLaVA's evaluation.

MSRVTT-QA asks about the clips of MSVD-QA, and ActivityNet-QA about those of TGIF-QA, through a link to their
folder, so that every clip is stored once. Videos need PyAV (the extra `video`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava.tiny.world import clip_questions as ask
from llava.tiny.world.clip_questions import ClipMaker
from llava.tiny.world.clips import CLIP_SIDE, FRAMES_PER_SECOND, Clip

from .common import write_json

ROOT = "GPT_Zero_Shot_QA"
QUALITY = "28"  # x264's constant rate factor
_TRIES = 400


@dataclass(frozen=True)
class VideoSet:
    """One set: its folder, its videos' folder, the prefix of its video files, and how it asks."""

    folder: str
    videos: str
    pool: int  # which of the two pools of clips
    prefix: str  # of a file, before the video's name in the question file
    makers: tuple[ClipMaker, ...]
    per_clip: int
    salt: int
    types: dict[str, int]  # maker -> "type" in the answer file; 3 for the others
    marks: bool = True  # questions end with a question mark


_WHAT = (ask.what_moves, ask.what_enters, ask.what_leaves, ask.what_changes, ask.direction)
_COLORS = (ask.color, ask.color_at)
_PRESENT = (ask.exist, ask.exist_at)
SETS = {
    "msvd": VideoSet("MSVD_Zero_Shot_QA", "videos", 0, "", (*_WHAT, *_COLORS, *_PRESENT), 14, 31, {}),
    "msrvtt": VideoSet("MSRVTT_Zero_Shot_QA", "videos/all", 0, "", (*_WHAT, *_COLORS), 6, 32, {}),
    "tgif": VideoSet("TGIF_Zero_Shot_QA", "mp4", 1, "", (ask.action,), 3, 33, {}),
    "activitynet": VideoSet(
        *("Activitynet_Zero_Shot_QA", "all_test", 1, "v_"),
        *((*_PRESENT, *_COLORS), 6, 34, {"color": 8, "color_at": 8}, False),
    ),
}


def write_clip(path: Path, clip: Clip) -> None:
    """Write a clip as H.264 in mp4; one thread, so that the bytes depend only on the library's version."""
    import av

    temporary = path.with_suffix(".tmp")
    with av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width = stream.height = CLIP_SIDE
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": QUALITY, "preset": "slow", "threads": "1"}
        for number in range(clip.length):
            container.mux(stream.encode(av.VideoFrame.from_image(clip.frame(number))))
        container.mux(stream.encode())
    temporary.replace(path)


def video_name(pool: int, number: int) -> str:
    """Return the name of a clip's file, without its extension; numbers start at 1."""
    return f"{'v_' if pool else ''}tinyclip_{number:04d}"


def questions_of(video: VideoSet, clip: Clip, number: int) -> list[tuple[str, str, str]]:
    """Sample the questions of a set about one clip, each once: (type, question, answer)."""
    rs = np.random.RandomState([video.salt, number])
    found: dict[str, tuple[str, str, str]] = {}
    for _ in range(_TRIES):
        if len(found) == video.per_clip:
            break
        maker = video.makers[rs.randint(len(video.makers))]
        pair = maker(clip, rs)
        if pair:
            found.setdefault(pair[0], (maker.__name__, *pair))
    return list(found.values())


def write_sets(root: Path, pools: tuple[list[Clip], list[Clip]]) -> dict[str, int]:
    """Write videos, questions and answers of all sets; return the number of questions of each."""
    counts = {}
    for name, video in SETS.items():
        folder = root / ROOT / video.folder
        videos = folder / video.videos
        source = next(one for one in SETS.values() if one.pool == video.pool)
        clips = pools[video.pool]
        if source is video:
            videos.mkdir(parents=True, exist_ok=True)
            for number, clip in enumerate(clips, 1):
                path = videos / f"{video_name(video.pool, number)}.mp4"
                if not path.is_file():
                    write_clip(path, clip)
        else:
            videos.parent.mkdir(parents=True, exist_ok=True)
            videos.unlink(missing_ok=True)
            shared = root / ROOT / source.folder / source.videos
            videos.symlink_to(os.path.relpath(shared, videos.parent), target_is_directory=True)
        asked, answers = [], []
        for number, clip in enumerate(clips, 1):
            shown = video_name(video.pool, number).removeprefix(video.prefix)
            for place, (kind, question, answer) in enumerate(questions_of(video, clip, number)):
                identity = f"v_{shown.removeprefix('v_')}_{place}"
                text = question if video.marks else question.rstrip("?")
                asked.append({"video_name": shown, "question_id": identity, "question": text})
                answers.append({"answer": answer, "type": video.types.get(kind, 3), "question_id": identity})
        write_json(folder / "test_q.json", asked)
        write_json(folder / "test_a.json", answers)
        counts[name] = len(asked)
    return counts
