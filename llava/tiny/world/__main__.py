"""Draw a contact sheet of the synthetic dataset.

python -m llava.tiny.world --seed 7 --count 12 --output sheet.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from .scenes import HELD_OUT, SIDE, draw


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llava.tiny.world", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=HELD_OUT, help="first seed (default: %(default)s)")
    parser.add_argument("--count", type=int, default=12, help="number of images (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="image file to write")
    args = parser.parse_args(argv)
    columns = min(args.count, 4)
    sheet = Image.new("RGB", (columns * (SIDE + 8), -(-args.count // columns) * (SIDE + 8)), "white")
    for k in range(args.count):
        sheet.paste(draw(args.seed + k)[0], (k % columns * (SIDE + 8), k // columns * (SIDE + 8)))
    sheet.save(args.output)
    print(args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
