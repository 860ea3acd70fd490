"""Conversations about a scene for training: captions, and turns with short answers or whole sentences.

    caption(scene, rs)            # "A dog, two cats and a red circle."
    turns(scene, rs, 8)           # [(question, answer), ...]

Questions of the benchmarks keep their wording and instruction (`questions`). The same questions without the
instruction for a short answer are answered in a sentence. Every question is drawn independently of those
before it, so that earlier answers of a conversation do not reveal later ones. Independent of images, files
and models.
"""

from __future__ import annotations

import re

import numpy as np

from .questions import (
    SHORT,
    Maker,
    Pair,
    article,
    choice,
    choice_color,
    color,
    color_check,
    count,
    count_check,
    exist,
    inventory,
    mme,
    plural,
    position,
    read,
    science,
    unanswerable,
)
from .scenes import Scene, SceneObject
from .vocabulary import THEMES

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
KINDS = {  # a word for every sprite of some themes
    "animal": THEMES["farm"] + THEMES["wild"],
    "vehicle": THEMES["street"],
    "food": THEMES["kitchen"],
}
DESCRIBE = (
    "Describe the image in one sentence.",
    "What does the image show? Answer in one sentence.",
    "Describe what you see.",
    "Write a sentence about the image.",
)
CAPTION_PROMPTS = (
    "Describe the image briefly.",
    "Provide a brief description of the given image.",
    "What is in the image?",
    "Give a short caption of the image.",
    "Write a short summary of what the image shows.",
)
_OPENINGS = ("The image shows {}.", "There is {} in the image.", "I see {}.", "This is an image of {}.")
_CAPTIONS = ("{}.", "an image of {}.", "a picture with {}.", "{}, on a busy background.")
_TRIES = 12


def phrases(scene: Scene) -> list[str]:
    """Word the objects of a scene, the largest first: "a dog", "two cats", "a red circle"."""
    largest: dict[tuple[str, str, str | None], int] = {}
    counts: dict[tuple[str, str, str | None], int] = {}
    for item in scene.objects:
        key = (item.kind, item.name, item.color)
        largest[key] = max(largest.get(key, 0), _area(item))
        counts[key] = counts.get(key, 0) + 1
    return [_phrase(*key, counts[key]) for key in sorted(largest, key=lambda key: -largest[key])]


def _area(item: SceneObject) -> int:
    left, top, right, bottom = item.box
    return (right - left) * (bottom - top)


def _phrase(kind: str, name: str, shade: str | None, number: int) -> str:
    if kind == "word":
        return f"a sign with the word {name}"
    shade = f"{shade} " if shade else ""
    return article(f"{shade}{name}") if number == 1 else f"{NUMBERS[number]} {shade}{plural(name)}"


def enumeration(parts: list[str]) -> str:
    """Join words: "a dog, two cats and a key"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts) or "nothing"


def _pick(rs: np.random.RandomState, items):
    return items[rs.randint(len(items))]


def caption(scene: Scene, rs: np.random.RandomState) -> str:
    """Write a caption of a scene that names every object."""
    text = _pick(rs, _CAPTIONS).format(enumeration(phrases(scene)))
    return text[0].upper() + text[1:]


def description(scene: Scene, rs: np.random.RandomState) -> Pair:
    """Ask for a description, and answer with a sentence that names every object."""
    listed, opening = phrases(scene), _pick(rs, _OPENINGS)
    if listed and listed[0].split()[0] in NUMBERS:
        opening = opening.replace("There is", "There are")
    return _pick(rs, DESCRIBE), opening.format(enumeration(listed))


def what_kind(scene: Scene, rs: np.random.RandomState) -> Pair | None:
    """Ask for the only animal, vehicle or food of a scene."""
    only = []
    for kind, members in KINDS.items():
        there = [name for name in scene.names() if name in members]
        if len(there) == 1:
            only.append((kind, there[0]))
    if not only:
        return None
    kind, name = _pick(rs, only)
    return f"What {kind} is in the image?{SHORT}", name


def what_largest(scene: Scene, rs: np.random.RandomState) -> Pair | None:
    """Ask for the largest object, where its area is half as large again as that of any other kind."""
    areas: dict[str, int] = {}
    for item in scene.objects:
        if item.kind != "word":
            areas[item.name] = max(areas.get(item.name, 0), _area(item))
    ranked = sorted(areas, key=lambda name: -areas[name])
    if not ranked or (len(ranked) > 1 and areas[ranked[0]] < 1.5 * areas[ranked[1]]):
        return None
    return f"What is the largest object in the image?{SHORT}", ranked[0]


def what_shape(scene: Scene, rs: np.random.RandomState) -> Pair | None:
    """Ask for the only shape of a color."""
    shades = [item.color for item in scene.objects if item.kind == "shape"]
    single = [item for item in scene.objects if item.kind == "shape" and shades.count(item.color) == 1]
    if not single:
        return None
    item = _pick(rs, single)
    return f"What is the {item.color} shape?{SHORT}", item.name


def what_where(scene: Scene, rs: np.random.RandomState) -> Pair | None:
    """Ask for the only kind of object in a corner, where no object is near the middle lines."""
    width, height = scene.size
    corners: dict[str, set[str]] = {}
    for item in scene.objects:
        x, y = item.center[0] / width, item.center[1] / height
        clear = item.kind != "word" and abs(x - 0.5) > 0.08 and abs(y - 0.5) > 0.08
        for row in ["top"] * (y < 0.58) + ["bottom"] * (y > 0.42):
            for side in ["left"] * (x < 0.58) + ["right"] * (x > 0.42):
                corners.setdefault(f"{row} {side}", set()).add(item.name if clear else "")
    single = [(corner, *found) for corner, found in corners.items() if len(found) == 1 and "" not in found]
    if not single:
        return None
    corner, name = _pick(rs, single)
    return f"What is in the {corner} of the image?{SHORT}", name


WHAT: tuple[Maker, ...] = (what_kind, what_largest, what_shape, what_where)

# Question without its instruction, answer in words. {0} is the group, {answer} the short answer.
_SENTENCES = (
    (
        r"Is there an? ([a-z ]+) in the image\?",
        "Yes, there is {a_0} in the image.",
        "No, there is no {0} in the image.",
    ),
    (r"Is the (\w+) (\w+)\?", "Yes, the {0} is {1}.", "No, the {0} is not {1}."),
    (r"Is the (\w+) (to .+|above .+|below .+)\?", "Yes, the {0} is {1}.", "No, the {0} is not {1}."),
    (r"What color is the (\w+)\?", "The {0} is {answer}.", ""),
    (r"How many (\w+) are there in the image\?", "There {are} {number} {named} in the image.", ""),
    (r"What (animal|vehicle|food) is in the image\?", "The {0} in the image is {a_answer}.", ""),
    (r"What is the largest object in the image\?", "The largest object in the image is {a_answer}.", ""),
    (r"What is the (\w+) shape\?", "The {0} shape is {a_answer}.", ""),
    (r"What is in the (\w+ \w+) of the image\?", "There is {a_answer} in the {0} of the image.", ""),
    (r"What word is written on the sign\?", "The sign says {answer}.", ""),
)


def in_words(question: str, answer: str) -> Pair | None:
    """Return the question without its instruction for a short answer, and its answer in a sentence.

    Returns:
        None if the question is not one that can be answered in a sentence.
    """
    bare = question.removesuffix(SHORT)
    for pattern, yes, no in _SENTENCES:
        found = re.fullmatch(pattern, bare)
        if found is None or bare == question:
            continue
        groups = found.groups()
        named, number, are = "", "", ""
        if answer.isdigit():
            number, are = NUMBERS[int(answer)], "is" if answer == "1" else "are"
            named = _SINGULAR[groups[0]] if answer == "1" else groups[0]
        text = (no if answer == "No" else yes).format(
            *groups,
            a_0=article(groups[0]) if groups else "",
            answer=answer,
            a_answer=article(answer),
            number=number,
            named=named,
            are=are,
        )
        return bare, text
    return None


_SINGULAR = {plural(name): name for theme in THEMES.values() for name in theme}

# Probabilities of the question types of a turn. A quarter of those with a sentence are asked for it.
TURNS: dict[Maker, float] = {
    exist: 0.36,
    color: 0.08,
    color_check: 0.05,
    what_kind: 0.04,
    what_largest: 0.03,
    what_shape: 0.03,
    what_where: 0.05,
    count: 0.06,
    count_check: 0.02,
    position: 0.05,
    mme: 0.06,
    choice: 0.06,
    choice_color: 0.02,
    science: 0.02,
    read: 0.02,
    unanswerable: 0.03,
}
IN_WORDS = 0.25  # of the questions with an answer in a sentence
ALONE = 0.1  # conversations that are only a description


def turns(scene: Scene, rs: np.random.RandomState, number: int) -> list[Pair]:
    """Sample a conversation of different questions of all types; half end with a description or a list.

    Questions have random order. Whatever names all objects comes last or alone, since it would answer the
    questions after it.

    Args:
        scene: What the conversation is about.
        rs: Source of all draws.
        number: Questions besides the description; fewer if the scene allows fewer different ones.
    """
    whole = (inventory(scene, rs) if rs.rand() < 0.2 else None) or description(scene, rs)
    if rs.rand() < ALONE:
        return [whole]
    makers, weights = list(TURNS), np.array(list(TURNS.values()))
    weights /= weights.sum()
    found: dict[str, str] = {}
    for _ in range(_TRIES * number):
        if len(found) == number:
            break
        pair = makers[rs.choice(len(makers), p=weights)](scene, rs)
        if pair and rs.rand() < IN_WORDS:
            pair = in_words(*pair) or pair
        if pair:
            found.setdefault(*pair)
    return [*found.items(), *([whole] if rs.rand() < 0.5 else [])]
