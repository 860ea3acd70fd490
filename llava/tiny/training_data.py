"""Write training data in LLaVA's format: images of the synthetic dataset, captions and conversations.

`write` draws the images of consecutive training seeds into a folder:

    images/000000000.webp ...    336-pixel images, named by their seeds
    scenes.jsonl                 what is in each, one line per image; an interrupted run resumes here
    captions.json                stage 1: one request with <image>, and a caption
    instruct.json                stage 2: several turns about one image (see `world.conversations`)
    english.json                 the same without questions in Chinese, for tokenizers of English

Independent of models. `python -m llava.tiny.build --train N` is the command.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from . import world
from .world import conversations
from .world.scenes import Scene, SceneObject

IMAGES, SCENES = "images", "scenes.jsonl"
QUESTIONS = 8  # per conversation
QUALITY = 75
_CAPTIONS_SALT, _INSTRUCT_SALT = 91, 92


class TrainingDataError(ValueError):
    """The folder contains something else; the message says what, and what to do."""


def image_name(seed: int) -> str:
    """Return the file name of a training image."""
    return f"{seed:09d}.webp"


def _draw(folder: Path, kind: str, seed: int) -> Scene:
    """Draw and write the image of a seed; an interruption leaves no incomplete image."""
    pixels, scene = world.draw(seed, kind)
    path = folder / image_name(seed)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    pixels.save(temporary, format="webp", quality=QUALITY, method=2)
    temporary.replace(path)
    return scene


def read_scenes(folder: Path, seed: int, kind: str = "standard") -> list[Scene]:
    """Read the scenes that an earlier run has written; an incomplete last line is discarded.

    Args:
        folder: What `write` writes.
        seed: First seed of the run.
        kind: World of the run.

    Raises:
        TrainingDataError: The file is of other seeds, or cannot be read.
    """
    path, found = folder / SCENES, []
    if not path.is_file():
        return found
    lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            objects = [SceneObject(**{**one, "box": tuple(one["box"])}) for one in row["objects"]]
            scene = Scene(row["seed"], tuple(row["size"]), objects, row["world"])
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingDataError(
                f"{path}:{number}: not a scene ({error!r}). Delete the folder, or name another --output."
            ) from error
        if (scene.seed, scene.world) != (seed + number - 1, kind):
            raise TrainingDataError(
                f"{path}:{number}: the scene is of seed {scene.seed} and world {scene.world!r}, expected "
                f"{seed + number - 1} and {kind!r}. The folder has images of another --seed or --world. "
                "Name another --output."
            )
        if not (folder / IMAGES / image_name(scene.seed)).is_file():
            break  # it is drawn again, with those after it
        found.append(scene)
    return found


def read_chat(path: Path) -> list[dict]:
    """Read text-only conversations in LLaVA's format.

    Raises:
        TrainingDataError: The file cannot be read, or is something else.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        turns = [one["value"] for entry in entries for one in entry["conversations"]]
        valid = all(isinstance(text, str) and "<image>" not in text for text in turns)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingDataError(
            f"{path}: cannot be read ({error!r}). Write it with python -m llava.tiny.chat --output {path}."
        ) from error
    if not turns or not valid or any("image" in entry for entry in entries):
        raise TrainingDataError(
            f"{path}: expected text-only conversations. Write them with python -m llava.tiny.chat."
        )
    return entries


def draw_scenes(
    folder: Path, count: int, seed: int = 0, kind: str = "standard", processes: int = 1
) -> list[Scene]:
    """Draw the images of `count` seeds that are missing in a folder, and return all their scenes."""
    from tqdm import tqdm

    scenes = read_scenes(folder, seed, kind)
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    lines = "".join(_line(scene) for scene in scenes)
    temporary = folder / f"{SCENES}.tmp"
    temporary.write_text(lines, encoding="utf-8")
    temporary.replace(folder / SCENES)
    seeds = range(seed + len(scenes), seed + count)
    draw = functools.partial(_draw, folder / IMAGES, kind)
    with (folder / SCENES).open("a", encoding="utf-8") as log:
        for scene in tqdm(
            _mapped(draw, seeds, processes),
            desc="drawing images",
            unit="image",
            total=count,
            initial=min(len(scenes), count),
        ):
            log.write(_line(scene))
            log.flush()
            scenes.append(scene)
    return scenes[:count]


def _mapped(draw: Callable[[int], Scene], seeds: range, processes: int) -> Iterator[Scene]:
    if processes == 1 or len(seeds) < 2:
        yield from map(draw, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(draw, seeds, chunksize=8)


def _line(scene: Scene) -> str:
    return json.dumps(dataclasses.asdict(scene)) + "\n"


def _entry(scene: Scene, pairs: list[tuple[str, str]]) -> dict:
    return {
        "id": f"tiny_{scene.seed:09d}",
        "image": f"{IMAGES}/{image_name(scene.seed)}",
        "conversations": [
            {"from": role, "value": text}
            for pair in pairs
            for role, text in zip(("human", "gpt"), pair, strict=True)
        ],
    }


def captions(scenes: list[Scene]) -> list[dict]:
    """Build the entries of stage 1: one request with <image> before or after it, and a caption."""
    entries = []
    for scene in scenes:
        rs = _random(_CAPTIONS_SALT, scene)
        prompt = conversations.CAPTION_PROMPTS[rs.randint(len(conversations.CAPTION_PROMPTS))]
        parts = ("<image>", prompt) if rs.rand() < 0.5 else (prompt, "<image>")
        entries.append(_entry(scene, [("\n".join(parts), conversations.caption(scene, rs))]))
    return entries


def instruct(scenes: list[Scene]) -> list[dict]:
    """Build the entries of stage 2: several turns about each image; <image> is in front of the first."""
    entries = []
    for scene in scenes:
        (question, answer), *others = conversations.turns(scene, _random(_INSTRUCT_SALT, scene), QUESTIONS)
        entries.append(_entry(scene, [(f"<image>\n{question}", answer), *others]))
    return entries


def english(scenes: list[Scene]) -> list[dict]:
    """Build the entries of `instruct` without turns in other scripts, nor entries that have no other."""
    entries = []
    for scene, entry in zip(scenes, instruct(scenes), strict=True):
        texts = [turn["value"].removeprefix("<image>\n") for turn in entry["conversations"]]
        pairs = [pair for pair in zip(texts[::2], texts[1::2], strict=True) if "".join(pair).isascii()]
        if pairs:
            (question, answer), *others = pairs
            entries.append(_entry(scene, [(f"<image>\n{question}", answer), *others]))
    return entries


def _random(salt: int, scene: Scene) -> np.random.RandomState:
    return np.random.RandomState([salt, scene.seed & 0xFFFFFFFF, scene.seed >> 32])


KINDS: dict[str, Callable[[list[Scene]], list[dict]]] = {
    "captions": captions,
    "instruct": instruct,
    "english": english,
}
USUAL = ("captions", "instruct")


def write(
    folder: Path,
    count: int,
    seed: int = 0,
    kind: str = "standard",
    files: tuple[str, ...] = USUAL,
    processes: int = 1,
    chat: Path | None = None,
) -> dict[str, int]:
    """Write the training data of `count` images; a run that was interrupted resumes.

    Args:
        folder: Where to; `--image_folder` of the training.
        count: Number of images.
        seed: Seed of the first image.
        kind: A name of `world.WORLDS`.
        files: Names of `KINDS`.
        processes: Processes that draw.
        chat: File of text-only conversations to add to those of stage 2.

    Returns:
        Number of answers that each file trains.

    Raises:
        TrainingDataError: The folder contains images of other seeds, or the file of conversations is invalid.
    """
    extra = [] if chat is None else read_chat(chat)
    scenes, counts = draw_scenes(folder, count, seed, kind, processes), {}
    for name in files:
        entries = KINDS[name](scenes)
        entries += extra if name != "captions" else []
        temporary = folder / f"{name}.json.tmp"
        temporary.write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n", encoding="utf-8")
        temporary.replace(folder / f"{name}.json")
        counts[name] = sum(len(entry["conversations"]) // 2 for entry in entries)
    return counts
