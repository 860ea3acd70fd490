"""Shared parts of the bundled benchmarks: images, question sampling, balancing, files and links.

All benchmarks except TextVQA use the images of POPE. Where an official layout has an image folder of its own,
there is a relative link to that of POPE (`link_images`), so that every image is stored once. Questions come
from `world.questions`; they are sampled again until they have a required answer and occur only once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from llava.tiny import world
from llava.tiny.world import questions
from llava.tiny.world.questions import Maker

Item = TypeVar("Item")
IMAGES = Path("pope", "val2014")  # relative to the root of all benchmarks
IMAGE_LINKS = (
    "vqav2/val2014",
    "gqa/data/images",
    "vizwiz/val",
    "scienceqa/images/test",
    "mm-vet/images",
    "MME/MME_Benchmark_release_version/existence/images",
    "MME/MME_Benchmark_release_version/count/images",
    "MME/MME_Benchmark_release_version/position/images",
    "MME/MME_Benchmark_release_version/color/images",
)
_TRIES = 400
_OBJECT_NAME = re.compile(
    r"\b(" + "|".join(f"{questions.plural(name)}|{name}" for name in world.OBJECTS) + r")\b"
)


def image_name(number: int) -> str:
    """Return the file name of an image in the style of COCO; numbers start at 1."""
    return f"TINY_val_{number:012d}.webp"


@dataclass(frozen=True, eq=False)
class BenchmarkImage:
    """A held-out image: its number, which starts at 1, its pixels and its scene."""

    number: int
    pixels: Image.Image
    scene: world.Scene

    @property
    def file(self) -> str:
        return image_name(self.number)

    def save(self, folder: Path, quality: int = 70) -> None:
        """Write the image as WebP into `folder`."""
        self.pixels.save(folder / self.file, quality=quality, method=6)


def held_out_images(
    count: int, least: int = 3, seed: int = world.HELD_OUT, kind: str = "standard"
) -> list[BenchmarkImage]:
    """Draw `count` images, from `seed` on, that have at least `least` different sprites.

    Args:
        count: Number of images.
        least: Images with fewer different sprites are left out.
        seed: First seed that is tried.
        kind: A name of `world.WORLDS`.
    """
    found: list[BenchmarkImage] = []
    while len(found) < count:
        pixels, scene = world.draw(seed, kind)
        if len(scene.names()) >= least:
            found.append(BenchmarkImage(len(found) + 1, pixels, scene))
        seed += 1
    return found


def save_images(folder: Path, images: list[BenchmarkImage], keep: bool) -> None:
    """Write the images that the benchmarks share; with `keep`, only those that are missing."""
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    for image in tqdm(images, desc="writing images", unit="image"):
        if not (keep and (folder / image.file).is_file()):
            image.save(folder)


class QuestionSampler:
    """Samples the questions of one benchmark, each at most once per image."""

    def __init__(self, salt: int) -> None:
        self.salt = salt
        self._asked: set[tuple[int, str]] = set()

    def sample(
        self,
        maker: Maker,
        image: BenchmarkImage,
        fits: Callable[[str, str], bool] = lambda text, answer: True,
    ) -> tuple[str, str] | None:
        """Sample a new question about an image that satisfies `fits(question, answer)`.

        Samples depend on the salt, the image number and the number of earlier questions about the image, so
        that a larger benchmark starts like a smaller one.

        Returns:
            Question with its instruction, and answer; None if the scene allows none or none was found in
            400 attempts.
        """
        before = sum(number == image.number for number, _ in self._asked)
        rs = np.random.RandomState([self.salt, image.number, before])
        for _ in range(_TRIES):
            pair = maker(image.scene, rs)
            if pair is None:
                return None
            if fits(*pair) and (image.number, pair[0]) not in self._asked:
                self._asked.add((image.number, pair[0]))
                return pair
        return None

    def yes_no(self, maker: Maker, images: Iterable[BenchmarkImage]) -> list[tuple[BenchmarkImage, str, str]]:
        """Sample one question per image where possible: (image, question, Yes or No), both equally often."""
        found: list[tuple[BenchmarkImage, str, str]] = []
        for image in images:
            wanted = ("Yes", "No")[len(found) % 2]
            pair = self.sample(maker, image, lambda _, answer, wanted=wanted: answer == wanted)
            if pair:
                found.append((image, *pair))
        return found[: len(found) // 2 * 2]


def mentioned_objects(text: str) -> frozenset[str]:
    """Return the names of all objects in a question, in the singular."""
    singular = {questions.plural(name): name for name in world.OBJECTS}
    return frozenset(singular.get(name, name) for name in _OBJECT_NAME.findall(text))


def balanced(groups: Mapping[Hashable, list[Item]], number: int) -> list[Item]:
    """Take at most `number` items in total, spread evenly over the groups; small groups are taken whole."""
    taken: dict[Hashable, list[Item]] = {}
    left = number
    for position, key in enumerate(sorted(groups, key=lambda key: (len(groups[key]), str(key)))):
        taken[key] = groups[key][: left // (len(groups) - position)]
        left -= len(taken[key])
    return [item for key in groups for item in taken[key]]


def shuffled(items: list[Item], salt: int) -> list[Item]:
    """Shuffle the items; the order depends only on the salt and the number of items."""
    return [items[index] for index in np.random.RandomState(salt).permutation(len(items))]


def link_images(root: Path, name: str) -> None:
    """Make the folder `name` (one of IMAGE_LINKS) below `root` a relative link to the shared images."""
    if name not in IMAGE_LINKS:
        raise ValueError(f"{name}: not in IMAGE_LINKS, so --check would not cover it. Add it there.")
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.is_file():  # git writes a file where links are not supported
        path.unlink()
    if not path.is_dir():
        path.symlink_to(os.path.relpath(root / IMAGES, path.parent), target_is_directory=True)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, document: object) -> None:
    """Write a JSON document with one line per entry of its first two levels, for readable diffs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_spread(document, 2) + "\n", encoding="utf-8")


def _spread(value: object, levels: int) -> str:
    if levels and isinstance(value, dict) and value:
        inside = (f"{json.dumps(key)}: {_spread(part, levels - 1)}" for key, part in value.items())
        return "{\n" + ",\n".join(inside) + "\n}"
    if levels and isinstance(value, list) and value:
        return "[\n" + ",\n".join(_spread(part, 0) for part in value) + "\n]"
    return json.dumps(value)


def reference_answers(answer: str) -> list[dict[str, object]]:
    """Return ten identical reference answers in the format of VQAv2."""
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": number} for number in range(1, 11)]
