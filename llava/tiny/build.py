"""Write the embedded benchmarks, in the official file layouts and formats, and check what was shipped.

    python -m llava.tiny.build                                               # the 200 pictures that ship
    python -m llava.tiny.build --pictures 1000 --output playground/tiny/eval-1000     # enough to rank methods
    python -m llava.tiny.build --check                                     # compare the files with SHA256SUMS

Pictures come from seeds that no training run uses. Rendering is repeatable on one platform but not promised
across library versions, so the shipped pictures are files with checksums, and this command is for larger
sets. Knows the world and the files; nothing about models.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np

from . import world
from .questions import SHORT, existence

# POPE numbers its categories in blocks; the label files start again at 1.
OFFSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
PER_IMAGE = 6  # POPE: three things that are there, three that are not, in turn
CHECKSUMS = "SHA256SUMS"


def scenes(pictures: int, least: int = 3, first: int = world.HELD_OUT):
    """`pictures` held-out (image, scene) pairs with at least `least` different sprites."""
    found, seed = [], first
    while len(found) < pictures:
        image, scene = world.draw(seed)
        if len(scene.names()) >= least:
            found.append((image, scene))
        seed += 1
    return found


def negatives(
    present: list[str], category: str, popular: list[str], together: Counter, rs: np.random.RandomState
) -> list[str]:
    """Three sprites that are not in the picture, chosen as POPE chooses them (its paper, section 3)."""
    absent = [name for name in world.SPRITES if name not in present]
    if category == "popular":
        return [name for name in popular if name in absent][:3]
    if category == "adversarial":
        return sorted(absent, key=lambda name: -sum(together[frozenset((name, other))] for other in present))[
            :3
        ]
    return [str(name) for name in rs.permutation(absent)[:3]]


def image_name(number: int) -> str:
    """File name in COCO's fashion."""
    return f"TINY_val_{number:012d}.webp"


def pope(folder: Path, pictures: int, quality: int = 70) -> int:
    """Write POPE's layout into `folder`: llava_pope_test.jsonl, coco/coco_pope_*.json, val2014/*.webp.

    Returns:
        Number of questions.
    """
    from tqdm import tqdm

    drawn = scenes(pictures)
    appear = Counter(name for _, scene in drawn for name in scene.names())
    together = Counter(frozenset(pair) for _, scene in drawn for pair in combinations(scene.names(), 2))
    popular = sorted(world.SPRITES, key=lambda name: -appear[name])
    (folder / "val2014").mkdir(parents=True, exist_ok=True)
    (folder / "coco").mkdir(exist_ok=True)
    for number, (image, _) in enumerate(tqdm(drawn, desc="writing pictures", unit="picture"), 1):
        image.save(folder / "val2014" / image_name(number), quality=quality, method=6)
    questions = []
    for category, offset in OFFSETS.items():
        labels = []
        for number, (_, scene) in enumerate(drawn, 1):
            rs = np.random.RandomState([number, 2718])
            there = [str(name) for name in rs.permutation(scene.names())[: PER_IMAGE // 2]]
            missing = negatives(scene.names(), category, popular, together, rs)
            for pair in zip(there, missing, strict=True):
                for name, label in zip(pair, ("yes", "no"), strict=True):
                    row = {
                        "question_id": len(labels) + 1,
                        "image": image_name(number),
                        "text": existence(name),
                    }
                    labels.append(row | {"label": label})
                    questions.append(
                        row
                        | {
                            "question_id": offset + len(labels),
                            "text": row["text"] + SHORT,
                            "category": category,
                        }
                    )
        write_jsonl(folder / "coco" / f"coco_pope_{category}.json", labels)
    write_jsonl(folder / "llava_pope_test.jsonl", questions)
    return len(questions)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def checksums(root: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file below `root` that a benchmark consists of."""
    files = sorted(
        path
        for path in root.rglob("*")
        if path.is_file() and path.name != CHECKSUMS and "answers" not in path.parts
    )
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def check(root: Path) -> list[str]:
    """What differs from SHA256SUMS, a line each; empty when all is as shipped."""
    path = root / CHECKSUMS
    if not path.is_file():
        return [f"{path}: missing; write the set again with python -m llava.tiny.build --output {root}"]
    wanted = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name:
            return [f"{path}:{number}: not a line of 'sha256  name'"]
        wanted[name] = digest
    found = checksums(root)
    return [
        f"{root / name}: {'missing' if name not in found else 'changed'}"
        for name in wanted
        if found.get(name) != wanted[name]
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llava.tiny.build", description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parents[2] / "playground" / "tiny" / "eval"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare the files under --output with their checksums"
    )
    args = parser.parse_args(argv)
    if args.pictures < 1:
        parser.error(f"--pictures {args.pictures}: at least 1")
    if args.check:
        wrong = check(args.output)
        print("\n".join(wrong) or f"all files under {args.output} are as they were written")
        return int(bool(wrong))
    number = pope(args.output / "pope", args.pictures)
    sums = checksums(args.output)
    (args.output / CHECKSUMS).write_text(
        "".join(f"{digest}  {name}\n" for name, digest in sums.items()), encoding="utf-8"
    )
    print(json.dumps({"output": str(args.output), "pictures": args.pictures, "pope_questions": number}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
