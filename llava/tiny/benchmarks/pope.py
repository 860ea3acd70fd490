"""The bundled POPE: three questions about present and three about absent objects per image and category."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np

from llava.tiny import world
from llava.tiny.world.questions import SHORT, existence

from .common import BenchmarkImage, write_jsonl

# POPE numbers its categories in blocks; question ids in the label files restart at 1.
OFFSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
PER_IMAGE = 6  # half of the questions per image and category are about present objects


def negatives(
    present: list[str], category: str, popular: list[str], together: Counter, rs: np.random.RandomState
) -> list[str]:
    """Choose three absent sprites by the rule of a category (POPE, section 3)."""
    absent = [name for name in world.SPRITES if name not in present]
    if category == "popular":
        return [name for name in popular if name in absent][:3]
    if category == "adversarial":
        score = {name: sum(together[frozenset((name, other))] for other in present) for name in absent}
        return sorted(absent, key=lambda name: -score[name])[:3]
    return [str(name) for name in rs.permutation(absent)[:3]]


def pope(root: Path, images: list[BenchmarkImage]) -> int:
    """Write POPE: llava_pope_test.jsonl and coco/coco_pope_*.json; return the number of questions."""
    folder, scenes = root / "pope", [image.scene for image in images]
    appear = Counter(name for scene in scenes for name in scene.names())
    together = Counter(frozenset(pair) for scene in scenes for pair in combinations(scene.names(), 2))
    popular = sorted(world.SPRITES, key=lambda name: -appear[name])
    (folder / "coco").mkdir(parents=True, exist_ok=True)
    questions = []
    for category, offset in OFFSETS.items():
        labels = []
        for image in images:
            present, rs = image.scene.names(), np.random.RandomState([image.number, 2718])
            there = [str(name) for name in rs.permutation(present)[: PER_IMAGE // 2]]
            missing = negatives(present, category, popular, together, rs)
            for pair in zip(there, missing, strict=True):
                for name, label in zip(pair, ("yes", "no"), strict=True):
                    text = existence(name)
                    row = {"question_id": len(labels) + 1, "image": image.file, "text": text}
                    labels.append(row | {"label": label})
                    row |= {"question_id": offset + len(labels), "text": text + SHORT, "category": category}
                    questions.append(row)
        write_jsonl(folder / "coco" / f"coco_pope_{category}.json", labels)
    write_jsonl(folder / "llava_pope_test.jsonl", questions)
    return len(questions)
