"""Compute the vision tower features of the training images.

    python -m llava.tiny.features --count 4000 --num-workers 2

An interrupted run resumes. Training does the same by itself (see `training.features`).
"""

from __future__ import annotations

import argparse

from llava.argtypes import at_least


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llava.tiny.features", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--count", type=at_least(1), default=4000, help="number of images (default: %(default)s)"
    )
    parser.add_argument(
        "--num-workers",
        "--workers",
        type=at_least(1),
        default=2,
        help="processes that encode images (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    from .training.features import prepare

    prepare(args.count, workers=args.num_workers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
