"""Write the bundled video sets, or check the bundled files against their checksums.

    python -m llava.tiny.build_video                                        # the bundled clips
    python -m llava.tiny.build_video --num-clips 200 --output DIR           # more clips of the same kind
    python -m llava.tiny.build_video --check

Clips come from seeds that training does not use. The bytes of a video depend on the version of its encoder,
so the bundled clips are files with checksums. Independent of models.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from llava.argtypes import at_least
from llava.paths import BUNDLED_CLIPS, require_bundled

from .benchmarks.video import write_sets
from .build import CHECKSUMS, check, checksums
from .world.clips import draw_clip
from .world.scenes import HELD_OUT


def main(argv: list[str] | None = None) -> int:
    description = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m llava.tiny.build_video", description=description)
    parser.add_argument(
        "--num-clips", type=at_least(1), default=50, help="clips in each of two pools (default: %(default)s)"
    )
    folder = "folder of all sets (default: playground/tiny/video of the repository)"
    parser.add_argument("--output", type=Path, help=folder)
    parser.add_argument("--check", action="store_true", help="compare the files with their checksums")
    args = parser.parse_args(argv)
    if args.output is None:
        try:
            args.output = require_bundled(BUNDLED_CLIPS.parent, "--output DIR") / BUNDLED_CLIPS.name
        except FileNotFoundError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if args.check:
        differences = check(args.output)
        print("\n".join(differences) or f"all files under {args.output} match {CHECKSUMS}")
        return int(bool(differences))
    pools = ([], [])
    for number in range(2 * args.num_clips):  # a larger set starts like a smaller one
        pools[number % 2].append(draw_clip(HELD_OUT + number))
    try:
        counts = write_sets(args.output, pools)
    except ImportError as error:
        reason = "not installed, but needed to write videos. Run: pip install 'vispruner[video]'"
        print(f"error: {error.name}: {reason}", file=sys.stderr)
        return 1
    lines = (f"{digest}  {name}\n" for name, digest in checksums(args.output).items())
    (args.output / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
    print(json.dumps({"output": str(args.output), "clips": 2 * args.num_clips, "questions": counts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
