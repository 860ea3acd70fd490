"""Draw which patches a pruner keeps: pruned patches gray, important ones framed orange, diverse ones blue.

    python -m llava.analysis.overlay --image photo.jpg --tokens 64
    python -m llava.analysis.overlay --image a.jpg b.jpg --method random vispruner --tokens 128 64 32 \\
        --output sheet.png                                     # several make a contact sheet

The image that is drawn is the input of the model: the padded square, or the crops of an anyres checkpoint.
The selection comes from the model's own `visual_tokens`, so it is the one that an evaluation uses. Methods
that depend on the question are not supported.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from llava.argtypes import at_least, ratio
from llava.paths import BUNDLED_MODEL, require_bundled

if TYPE_CHECKING:
    from llava.pruning import Kept, Pruner

IMPORTANT, DIVERSE = (255, 128, 0), (0, 140, 255)
GAP, HEADER = 8, 22


def shade(
    crop: Image.Image, side: int, kept: np.ndarray, important: np.ndarray, scale: int = 2
) -> Image.Image:
    """Gray out the pruned patches of one crop.

    Args:
        crop: RGB square, the input of the tower.
        side: Patches along one side.
        kept: (K,) patch indices in raster order.
        important: (K,) bool; False is diverse.
        scale: Enlargement of the result, so that frames do not hide patches.
    """
    size = crop.width * scale
    sharp = crop.resize((size, size), Image.Resampling.BICUBIC)
    gray = np.asarray(sharp.convert("L").convert("RGB"), np.float32)
    shaded = Image.fromarray((0.35 * gray + 0.65 * 225).astype(np.uint8))
    step = size / side
    pen = ImageDraw.Draw(shaded)
    for index, is_important in zip(kept.tolist(), important.tolist(), strict=True):
        row, column = divmod(index, side)
        box = [round(column * step), round(row * step), round((column + 1) * step), round((row + 1) * step)]
        shaded.paste(sharp.crop(box), box[:2])
        frame = [box[0], box[1], box[2] - 1, box[3] - 1]
        pen.rectangle(frame, outline=IMPORTANT if is_important else DIVERSE, width=max(1, round(step / 14)))
    return shaded


def crops_as_images(pixels, processor) -> list[Image.Image]:
    """Convert processed pixels (crops, 3, S, S) back to RGB images."""
    mean, deviation = (
        np.array(v, np.float32)[:, None, None] for v in (processor.image_mean, processor.image_std)
    )
    arrays = pixels.float().cpu().numpy() * deviation + mean
    return [Image.fromarray((a.transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8)) for a in arrays]


def panel(crops: list[Image.Image], side: int, kept: Kept | None, scale: int = 2) -> Image.Image:
    """Draw all crops of one image in a row, the whole image first; without `kept` nothing is gray."""
    tiles = []
    for number, crop in enumerate(crops):
        if kept is None:
            tiles.append(crop.resize((crop.width * scale,) * 2, Image.Resampling.BICUBIC))
        else:
            selected = (part[number].cpu().numpy() for part in (kept.indices, kept.important))
            tiles.append(shade(crop, side, *selected, scale))
    width = tiles[0].width
    sheet = Image.new("RGB", (len(tiles) * (width + GAP) - GAP, width), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number * (width + GAP), 0))
    return sheet


def contact_sheet(rows: list[list[Image.Image]], titles: list[str], width: int) -> Image.Image:
    """Draw rows of panels under titles, each panel scaled to `width` pixels, with a legend below."""
    scaled = [
        [p.resize((width, round(p.height * width / p.width)), Image.Resampling.LANCZOS) for p in row]
        for row in rows
    ]
    heights = [max(p.height for p in row) for row in scaled]
    total = max(len(titles) * (width + GAP) + GAP, 460)
    sheet = Image.new("RGB", (total, HEADER * 2 + sum(heights) + GAP * (len(rows) + 1)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    top = HEADER
    for column, title in enumerate(titles):
        pen.text(
            (GAP + column * (width + GAP) + width / 2, HEADER / 2 + 2), title, "black", font, anchor="mm"
        )
    for row, height in zip(scaled, heights, strict=True):
        for column, image in enumerate(row):
            sheet.paste(image, (GAP + column * (width + GAP), top))
        top += height + GAP
    left = GAP
    for color, text in (
        (IMPORTANT, "important ([CLS] attention)"),
        (DIVERSE, "diverse or sampled"),
        ((225,) * 3, "pruned"),
    ):
        pen.rectangle([left, top + 5, left + 12, top + 17], fill=color, outline="black")
        pen.text((left + 18, top + 11), text, "black", font, anchor="lm")
        left += 34 + int(pen.textlength(text, font))
    return sheet


def draw(model, processor, files: list[Path], pruners: list[Pruner], width: int):
    """Draw a contact sheet of files x pruners.

    Returns:
        The image, and a dict per panel that describes it.
    """
    import torch

    from llava.mm_utils import load_image, process_images

    model.set_pruner(pruners[0])  # decides how crops are cut
    side = model.get_vision_tower().num_patches_per_side
    rows, panels = [], []
    for file in files:
        image = load_image(str(file))
        pixels = process_images([image], processor, model.config)[0]
        crops = crops_as_images(pixels if pixels.ndim == 4 else pixels[None], processor)
        with torch.inference_mode():
            vision = model.encode_vision([pixels], [image.size])[0]
            kept = [model.visual_tokens(vision, pruner).kept for pruner in pruners]
        rows.append([panel(crops, side, selection) for selection in (None, *kept)])
        panels += [
            {
                "image": str(file),
                **pruner.config(),
                "kept": selection.indices.numel(),
                "important": int(selection.important.sum()),
            }
            for pruner, selection in zip(pruners, kept, strict=True)
        ]
    return contact_sheet(rows, ["input of the tower", *map(_title, pruners)], width), panels


def _title(pruner: Pruner) -> str:
    ratio_shown = pruner.uses_ratio and pruner.important_ratio != 0.5
    return f"{pruner.name} {pruner.tokens}" + (f" r={pruner.important_ratio:g}" if ratio_shown else "")


def main(argv: list[str] | None = None) -> int:
    from llava.pruning import get_pruner, list_pruners

    parser = argparse.ArgumentParser(
        prog="python -m llava.analysis.overlay", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--image", type=Path, nargs="+", required=True, metavar="FILE", help="one or more image files"
    )
    parser.add_argument(
        "--tokens",
        type=at_least(0),
        nargs="+",
        default=[64],
        metavar="N",
        help="visual tokens to keep per crop, one or more budgets (default: 64)",
    )
    parser.add_argument(
        "--method",
        nargs="+",
        default=["vispruner"],
        choices=list_pruners(),
        metavar="NAME",
        help=f"one or more of {', '.join(list_pruners())} (default: vispruner)",
    )
    parser.add_argument(
        "--ratio",
        type=ratio,
        default=0.5,
        help="share of tokens kept for their attention, in [0, 1] (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for random pruning (default: %(default)s)")
    parser.add_argument("--model", help="checkpoint folder or Hub name (default: the bundled model)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: %(default)s)")
    parser.add_argument(
        "--width", type=at_least(32), help="pixels per panel (default: 672, 200 on contact sheets)"
    )
    parser.add_argument(
        "--output", type=Path, help="PNG or JPEG file to write (default: ./IMAGE_METHOD_TOKENS.png)"
    )
    args = parser.parse_args(argv)
    missing = [str(file) for file in args.image if not file.is_file()]
    if missing:
        parser.error(f"--image: no such file: {', '.join(missing)}")
    try:
        pruners = [
            get_pruner(method, tokens, args.ratio, args.seed)
            for method in args.method
            for tokens in args.tokens
        ]
    except ValueError as error:
        parser.error(str(error))
    if inside := [one.name for one in pruners if one.acts_in == "decoder"]:
        parser.error(
            f"--method: {inside[0]!r} prunes inside the language model, where what it keeps depends on the "
            "question. Choose a method that prunes before it."
        )
    single = len(args.image) * len(pruners) == 1
    output = args.output or Path(
        f"{args.image[0].stem}_{'_'.join(args.method)}_{'_'.join(map(str, args.tokens))}.png"
    )
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        parser.error(f"--output {output}: the name must end in .png or .jpg")
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model
    from llava.model.checkpoint import CheckpointError

    try:
        path = str(args.model or require_bundled(BUNDLED_MODEL, "--model"))
        _, model, processor, _ = load_pretrained_model(
            path, None, get_model_name_from_path(path), device=args.device
        )
        sheet, panels = draw(model, processor, args.image, pruners, args.width or (672 if single else 200))
        output.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(output, quality=88)
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"panels: {len(panels)}; orange = important, blue = diverse or sampled, gray = pruned")
    print(json.dumps({"output": str(output), "panels": panels}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
