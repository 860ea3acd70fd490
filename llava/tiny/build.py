"""Write the bundled benchmarks or training data, or check the bundled files against their checksums.

    python -m llava.tiny.build                                             # the 200 bundled images
    python -m llava.tiny.build --num-images 1000 --output playground/tiny/eval-1000   # to rank methods
    python -m llava.tiny.build --benchmarks gqa,mme        # only these; existing images are kept
    python -m llava.tiny.build --seed 2000000000 --world many-small --output DIR   # other images
    python -m llava.tiny.build --train 4000 --output playground/data/tiny   # images, LLaVA's JSON
    python -m llava.tiny.build --check                     # compare the files with SHA256SUMS

Images of benchmarks come from seeds that training does not use; those from 1500000000 on are for development.
Rendering is repeatable on one platform but may differ
between library versions, so the bundled images are files with checksums, and this command is meant for larger
benchmarks. Independent of models.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from llava.argtypes import at_least
from llava.paths import BUNDLED_DATA, require_bundled

from . import training_data, world
from .benchmarks import WRITERS
from .benchmarks.common import IMAGE_LINKS, IMAGES, held_out_images, save_images

CHECKSUMS = "SHA256SUMS"
LAST_SEED = 2**63


def checksums(root: Path) -> dict[str, str]:
    """Map the relative path of every benchmark file below `root` to its SHA-256; links are not followed."""
    found: dict[str, str] = {}
    for folder, _, names in os.walk(root):
        for path in (Path(folder, name) for name in names if name != CHECKSUMS):
            if "answers" not in path.relative_to(root).parts:
                found[path.relative_to(root).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return dict(sorted(found.items()))


def check(root: Path) -> list[str]:
    """Compare the files below `root` with SHA256SUMS; return one line per difference."""
    path = root / CHECKSUMS
    if not path.is_file():
        return [
            f"{path}: no such file. Write the benchmarks with python -m llava.tiny.build --output {root}."
        ]
    expected = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name:
            return [f"{path}:{number}: expected 'SHA256  NAME', got {line[:80]!r}. Restore the file."]
        expected[name] = digest
    found = checksums(root)
    lines = [
        f"{root / name}: {'missing' if name not in found else 'changed'}"
        for name in expected
        if found.get(name) != expected[name]
    ]
    return lines + [
        f"{root / name}: should be a link to the folder {root / IMAGES}. The copy lost its symbolic links. "
        "Link or copy that folder there."
        for name in IMAGE_LINKS
        if (root / name).parent.is_dir() and not (root / name).is_dir()
    ]


def _names(text: str, known: Iterable[str], parser: argparse.ArgumentParser, flag: str) -> list[str]:
    """Split a comma-separated option; exit unless all names are known."""
    chosen = [name.strip() for name in text.split(",") if name.strip()]
    if not chosen or not set(known) >= set(chosen):
        parser.error(f"{flag} {text!r}: unknown {flag[2:].rstrip('s')}. Choose from {', '.join(known)}.")
    return chosen


def _train(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Write training data."""
    seed = args.seed or 0
    if args.output is None:
        parser.error("--train: --output is missing. Name the folder of the training data.")
    if seed + args.train > world.HELD_OUT:
        parser.error(
            f"--seed {seed}: {args.train} images from there reach {world.HELD_OUT}, the first seed of "
            f"benchmarks. Choose a seed of at most {world.HELD_OUT - args.train}."
        )
    files = tuple(_names(args.kind, training_data.KINDS, parser, "--kind"))
    try:
        counts = training_data.write(
            args.output, args.train, seed, args.world, files, args.num_processes, args.chat
        )
    except (OSError, training_data.TrainingDataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"output": str(args.output), "pictures": args.train, "answers": counts}))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llava.tiny.build", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--num-images",
        "--pictures",
        type=at_least(1),
        default=200,
        help="number of images that the benchmarks share (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=at_least(0),
        help=f"seed of the first image; training uses seeds below {world.HELD_OUT}, development those from "
        f"{world.DEVELOPMENT} on (default: {world.HELD_OUT}; with --train 0)",
    )
    parser.add_argument(
        "--world",
        choices=list(world.WORLDS),
        default="standard",
        help="number and size of the objects (default: %(default)s, as in training)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of all benchmarks (default: playground/tiny/eval of the repository)",
    )
    parser.add_argument(
        "--check", action="store_true", help="compare the files under --output with their checksums"
    )
    parser.add_argument(
        "--benchmarks",
        default=",".join(WRITERS),
        help="comma-separated benchmarks to write (default: %(default)s)",
    )
    parser.add_argument(
        "--train",
        type=at_least(1),
        metavar="N",
        help="write training data of N images to --output instead of benchmarks; an interrupted run resumes",
    )
    parser.add_argument(
        "--kind",
        default=",".join(training_data.USUAL),
        help=f"comma-separated files of training data, of {', '.join(training_data.KINDS)} "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--chat",
        type=Path,
        help="with --train: text-only conversations to add to those about images (llava.tiny.chat)",
    )
    parser.add_argument(
        "--num-processes",
        type=at_least(1),
        default=1,
        help="processes that draw training images (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.train:
        return _train(args, parser)
    args.seed = world.HELD_OUT if args.seed is None else args.seed
    if not world.HELD_OUT <= args.seed < LAST_SEED:
        parser.error(
            f"argument --seed: expected a seed from {world.HELD_OUT} to {LAST_SEED - 1}, got {args.seed}. "
            "Smaller seeds are of training images."
        )
    chosen = _names(args.benchmarks, WRITERS, parser, "--benchmarks")
    if args.output is None:
        try:
            args.output = require_bundled(BUNDLED_DATA.parent, "--output DIR") / BUNDLED_DATA.name
        except FileNotFoundError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if args.check:
        differences = check(args.output)
        print("\n".join(differences) or f"all files under {args.output} match {CHECKSUMS}")
        return int(bool(differences))
    if args.output.resolve() == BUNDLED_DATA.resolve() and (args.seed, args.world) != (
        world.HELD_OUT,
        "standard",
    ):
        parser.error(
            "--output: the bundled images are of the default --seed and --world. Name another folder."
        )
    images = held_out_images(args.num_images, seed=args.seed, kind=args.world)
    save_images(args.output / IMAGES, images, keep="pope" not in chosen)
    counts = {}
    for name in chosen:
        counts[name] = WRITERS[name](args.output, images)
        print(f"{name}: {counts[name]} questions", flush=True)
    sums = checksums(args.output)
    (args.output / CHECKSUMS).write_text(
        "".join(f"{digest}  {name}\n" for name, digest in sums.items()), encoding="utf-8"
    )
    print(json.dumps({"output": str(args.output), "pictures": args.num_images, "questions": counts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
