"""Write the bundled benchmarks, or check the bundled files against their checksums.

    python -m llava.tiny.build                                             # the 200 bundled images
    python -m llava.tiny.build --num-images 1000 --output playground/tiny/eval-1000   # to rank methods
    python -m llava.tiny.build --benchmarks gqa,mme        # only these; existing images are kept
    python -m llava.tiny.build --seed 2000000000 --world many-small --output DIR   # other images
    python -m llava.tiny.build --check                     # compare the files with SHA256SUMS

Images come from seeds that training does not use. Rendering is repeatable on one platform but may differ
between library versions, so the bundled images are files with checksums, and this command is meant for larger
benchmarks. Independent of models.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

from llava.argtypes import at_least
from llava.paths import BUNDLED_DATA, require_bundled

from . import world
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


def _held_out_seed(text: str) -> int:
    seed = at_least(world.HELD_OUT)(text)
    if seed >= LAST_SEED:
        raise argparse.ArgumentTypeError(f"expected a seed below {LAST_SEED}, got {text!r}")
    return seed


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
        type=_held_out_seed,
        default=world.HELD_OUT,
        help="seed of the first image; training uses seeds below %(default)s (default: %(default)s)",
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
    args = parser.parse_args(argv)
    chosen = [name.strip() for name in args.benchmarks.split(",") if name.strip()]
    if not chosen or not WRITERS.keys() >= set(chosen):
        parser.error(
            f"--benchmarks {args.benchmarks!r}: unknown benchmark. Choose from {', '.join(WRITERS)}."
        )
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
