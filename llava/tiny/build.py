"""Write the embedded benchmarks, in the official file layouts and formats, and check what was shipped.

    python -m llava.tiny.build                                               # the 200 pictures that ship
    python -m llava.tiny.build --pictures 1000 --output playground/tiny/eval-1000     # enough to rank methods
    python -m llava.tiny.build --benchmarks gqa,mme           # only these; pictures that are there are kept
    python -m llava.tiny.build --check                                     # compare the files with SHA256SUMS

Pictures come from seeds that no training run uses. Rendering is repeatable on one platform but not promised
across library versions, so the shipped pictures are files with checksums, and this command is for larger
sets. POPE is written here, the other sets in `suites_short` and `suites_choice`. Knows the world and the
files; nothing about models.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np

from . import suites_choice, suites_short, world
from .questions import SHORT, existence
from .suites import LINKS, PICTURES, Picture, image_name, write_jsonl

# POPE numbers its categories in blocks; the label files start again at 1.
OFFSETS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
PER_IMAGE = 6  # POPE: three things that are there, three that are not, in turn
CHECKSUMS = "SHA256SUMS"
SHIPPED = Path(__file__).parents[2] / "playground" / "tiny" / "eval"
# the sets beside POPE: all but TextVQA, which draws pictures of its own, look at POPE's
SUITES = {
    "vqav2": suites_short.vqav2,
    "gqa": suites_short.gqa,
    "vizwiz": suites_short.vizwiz,
    "scienceqa": suites_choice.scienceqa,
    "textvqa": suites_short.textvqa,
    "mme": suites_choice.mme,
    "mmbench": suites_choice.mmbench,
    "mmbench_cn": suites_choice.mmbench_cn,
    "mmvet": suites_short.mmvet,
}
BENCHMARKS = ("pope", *SUITES)


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


def save_pictures(folder: Path, drawn: list, keep: bool, quality: int = 70) -> None:
    """Write the pictures that all sets share; `keep`: only those that are not there."""
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, _) in enumerate(tqdm(drawn, desc="writing pictures", unit="picture"), 1):
        path = folder / image_name(number)
        if not (keep and path.is_file()):
            image.save(path, quality=quality, method=6)


def pope(folder: Path, drawn: list) -> int:
    """Write POPE's files into `folder`: llava_pope_test.jsonl, coco/coco_pope_*.json.

    Returns:
        Number of questions.
    """
    appear = Counter(name for _, scene in drawn for name in scene.names())
    together = Counter(frozenset(pair) for _, scene in drawn for pair in combinations(scene.names(), 2))
    popular = sorted(world.SPRITES, key=lambda name: -appear[name])
    (folder / "coco").mkdir(parents=True, exist_ok=True)
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


def checksums(root: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file below `root` that a set consists of; links are not followed."""
    found: dict[str, str] = {}
    for folder, _, names in os.walk(root):
        for path in (Path(folder, name) for name in names if name != CHECKSUMS):
            if "answers" not in path.relative_to(root).parts:
                found[path.relative_to(root).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return dict(sorted(found.items()))


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
    lines = [
        f"{root / name}: {'missing' if name not in found else 'changed'}"
        for name in wanted
        if found.get(name) != wanted[name]
    ]
    return lines + [
        f"{root / name}: should be a link to the folder {root / PICTURES}, which a copy without links "
        "loses; link or copy that folder there"
        for name in LINKS
        if (root / name).parent.is_dir() and not (root / name).is_dir()
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llava.tiny.build", description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--output", type=Path, default=SHIPPED)
    parser.add_argument(
        "--check", action="store_true", help="compare the files under --output with their checksums"
    )
    parser.add_argument(
        "--benchmarks", default=",".join(BENCHMARKS), help="of %(default)s (default: all of them)"
    )
    args = parser.parse_args(argv)
    chosen = [name.strip() for name in args.benchmarks.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in BENCHMARKS]
    if unknown or not chosen:
        parser.error(f"--benchmarks {args.benchmarks}: there are {', '.join(BENCHMARKS)}")
    if args.pictures < 1:
        parser.error(f"--pictures {args.pictures}: at least 1")
    if args.check:
        wrong = check(args.output)
        print("\n".join(wrong) or f"all files under {args.output} are as they were written")
        return int(bool(wrong))
    drawn = scenes(args.pictures)
    save_pictures(args.output / PICTURES, drawn, keep="pope" not in chosen)
    pictures = [Picture(number, scene) for number, (_, scene) in enumerate(drawn, 1)]
    counts = {}
    for name in chosen:
        if name == "pope":
            counts[name] = pope(args.output / "pope", drawn)
        else:
            counts[name] = SUITES[name](args.output, pictures)
        print(f"{name}: {counts[name]} questions", flush=True)
    sums = checksums(args.output)
    (args.output / CHECKSUMS).write_text(
        "".join(f"{digest}  {name}\n" for name, digest in sums.items()), encoding="utf-8"
    )
    print(json.dumps({"output": str(args.output), "pictures": args.pictures, "questions": counts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
