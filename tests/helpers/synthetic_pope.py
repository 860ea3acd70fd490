"""A POPE folder with a few synthetic images and any number of questions, in the official layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

CATEGORIES = {"adversarial": 0, "popular": 20_000_000, "random": 10_000_000}
SUFFIX = "\nAnswer the question using a single word or phrase."
THINGS = ("kite", "goat", "spoon", "street lamp", "toy boat", "umbrella", "red chair")


def make_pope(folder: Path, pictures: int = 4, per_category: int = 12) -> Path:
    """Write the folder, with the questions of an image scattered over the file, and return it."""
    (folder / "val2014").mkdir(parents=True)
    (folder / "coco").mkdir()
    rng = np.random.default_rng(0)
    names = [f"COCO_val2014_{number:012d}.png" for number in range(pictures)]
    for number, name in enumerate(names):
        size = (48 + 16 * (number % 3), 64, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / "val2014" / name)
    with (folder / "llava_pope_test.jsonl").open("w") as questions:
        for category, offset in CATEGORIES.items():
            with (folder / "coco" / f"coco_pope_{category}.json").open("w") as labels:
                for number in range(1, per_category + 1):
                    text = f"Is there a {THINGS[number % len(THINGS)]} in the image?"
                    image = names[number * 7 % pictures]
                    label = {
                        "question_id": number,
                        "image": image,
                        "text": text,
                        "label": "yes" if number % 2 else "no",
                    }
                    asked = {
                        "question_id": offset + number,
                        "image": image,
                        "text": text + SUFFIX,
                        "category": category,
                    }
                    labels.write(json.dumps(label) + "\n")
                    questions.write(json.dumps(asked) + "\n")
    return folder
