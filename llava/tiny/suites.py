"""What the embedded sets share: their pictures, questions with a wanted answer, balanced draws, files, links.

All sets ask about one folder of pictures, POPE's: where an official layout wants a folder of its own, there
is a relative link to it (`link`), so that a picture lies on the disk once and resolves to one path. The sets
are in `suites_short` and `suites_choice`; `python -m llava.tiny.build` writes them. Wording is that of
`questions`; whatever this needs beyond it (a wanted answer, no question twice) comes by drawing again.
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

from . import questions, world
from .questions import Maker

Item = TypeVar("Item")
PICTURES = Path("pope", "val2014")  # below the root of all sets
LINKS = (
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
_THING = re.compile(r"\b(" + "|".join(f"{questions.plural(name)}|{name}" for name in world.THINGS) + r")\b")


def image_name(number: int) -> str:
    """File name of a picture, in COCO's fashion; numbers count from 1."""
    return f"TINY_val_{number:012d}.webp"


@dataclass(frozen=True)
class Picture:
    """A held-out picture as a set knows it."""

    number: int
    scene: world.Scene

    @property
    def file(self) -> str:
        return image_name(self.number)


class Asker:
    """Draws questions of one set; the same question about the same picture comes once."""

    def __init__(self, salt: int) -> None:
        self.salt = salt
        self._asked: set[tuple[int, str]] = set()

    def draw(
        self, maker: Maker, picture: Picture, fits: Callable[[str, str], bool] = lambda text, answer: True
    ) -> tuple[str, str] | None:
        """(question with its tail, answer) with which `fits` is content; None if none is found.

        A picture's questions depend on the salt, its number and what was asked of it before, so that a larger
        set begins like a smaller one.
        """
        before = sum(number == picture.number for number, _ in self._asked)
        rs = np.random.RandomState([self.salt, picture.number, before])
        for _ in range(_TRIES):
            pair = maker(picture.scene, rs)
            if pair is None:
                return None
            if fits(*pair) and (picture.number, pair[0]) not in self._asked:
                self._asked.add((picture.number, pair[0]))
                return pair
        return None

    def yes_no(self, maker: Maker, pictures: Iterable[Picture]) -> list[tuple[Picture, str, str]]:
        """One question per picture that allows one: (picture, question, Yes or No), both equally often."""
        found: list[tuple[Picture, str, str]] = []
        for picture in pictures:
            wanted = ("Yes", "No")[len(found) % 2]
            pair = self.draw(maker, picture, lambda _, answer, wanted=wanted: answer == wanted)
            if pair:
                found.append((picture, *pair))
        return found[: len(found) // 2 * 2]


def subject(text: str) -> frozenset[str]:
    """The things that a question is about, in the singular."""
    singular = {questions.plural(name): name for name in world.THINGS}
    return frozenset(singular.get(name, name) for name in _THING.findall(text))


def evenly(groups: Mapping[Hashable, list[Item]], number: int) -> list[Item]:
    """At most `number` items, of every group as many as of the others or all it has; group by group."""
    taken: dict[Hashable, list[Item]] = {}
    left = number
    for place, key in enumerate(sorted(groups, key=lambda key: (len(groups[key]), str(key)))):
        taken[key] = groups[key][: left // (len(groups) - place)]
        left -= len(taken[key])
    return [item for key in groups for item in taken[key]]


def shuffled(items: list[Item], salt: int) -> list[Item]:
    """The items in an order that depends on the salt and their number alone."""
    return [items[place] for place in np.random.RandomState(salt).permutation(len(items))]


def link(root: Path, name: str) -> None:
    """Make the folder `name` (one of LINKS) below `root` a relative link to the shared pictures."""
    if name not in LINKS:
        raise ValueError(f"{name}: not among the links that are checked")
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.is_file():  # a file: what a copy without links has made of one
        path.unlink()
    if not path.is_dir():
        path.symlink_to(os.path.relpath(root / PICTURES, path.parent), target_is_directory=True)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """Objects, one a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, document: object) -> None:
    """A JSON document, an entry of its first two levels a line, so that changes to it can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_spread(document, 2) + "\n", encoding="utf-8")


def _spread(value: object, levels: int) -> str:
    if levels and isinstance(value, dict) and value:
        inside = (f"{json.dumps(key)}: {_spread(part, levels - 1)}" for key, part in value.items())
        return "{\n" + ",\n".join(inside) + "\n}"
    if levels and isinstance(value, list) and value:
        return "[\n" + ",\n".join(_spread(part, 0) for part in value) + "\n]"
    return json.dumps(value)


def humans(answer: str) -> list[dict[str, object]]:
    """Ten people of one opinion, as VQAv2 writes them."""
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": number} for number in range(1, 11)]
