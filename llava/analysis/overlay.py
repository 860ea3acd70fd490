"""Pictures of what a pruner keeps: pruned patches grey, important ones framed orange, diverse ones blue.

    python -m llava.analysis.overlay --image photo.jpg --tokens 64
    python -m llava.analysis.overlay --image a.jpg b.jpg --method random vispruner --tokens 128 64 32 \\
        --output sheet.png                                     # several of anything make a contact sheet

What is drawn is what the model is given: the padded square, or the crops of an anyres checkpoint. The choice
comes from the model's own `visual_tokens`, so picture and pruning cannot disagree. Knows nothing about
questions.
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
from llava.paths import BUNDLED_MODEL

if TYPE_CHECKING:
    from llava.pruning import Kept

IMPORTANT, DIVERSE = (255, 128, 0), (0, 140, 255)
GAP, HEADER = 8, 22


def shade(
    crop: Image.Image, side: int, kept: np.ndarray, important: np.ndarray, scale: int = 2
) -> Image.Image:
    """One crop with its pruned patches greyed.

    Args:
        crop: RGB square, what the tower sees.
        side: patches along one side.
        kept: (K,) patch indices in raster order.
        important: (K,) bool; False is diverse.
        scale: enlargement of the result, so that frames do not hide patches.
    """
    size = crop.width * scale
    sharp = crop.resize((size, size), Image.Resampling.BICUBIC)
    grey = np.asarray(sharp.convert("L").convert("RGB"), np.float32)
    picture = Image.fromarray((0.35 * grey + 0.65 * 225).astype(np.uint8))
    step = size / side
    pen = ImageDraw.Draw(picture)
    for index, is_important in zip(kept.tolist(), important.tolist(), strict=True):
        row, column = divmod(index, side)
        box = [round(column * step), round(row * step), round((column + 1) * step), round((row + 1) * step)]
        picture.paste(sharp.crop(box), box[:2])
        frame = [box[0], box[1], box[2] - 1, box[3] - 1]
        pen.rectangle(frame, outline=IMPORTANT if is_important else DIVERSE, width=max(1, round(step / 14)))
    return picture


def crops_as_pictures(pixels, processor) -> list[Image.Image]:
    """Processed pixels (crops, 3, S, S) back to RGB pictures."""
    mean, deviation = (
        np.array(v, np.float32)[:, None, None] for v in (processor.image_mean, processor.image_std)
    )
    arrays = pixels.float().cpu().numpy() * deviation + mean
    return [Image.fromarray((a.transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8)) for a in arrays]


def panel(crops: list[Image.Image], side: int, kept: Kept | None, scale: int = 2) -> Image.Image:
    """All crops of one picture: the whole first, tiles beside it. Without `kept` nothing is greyed."""
    tiles = []
    for number, crop in enumerate(crops):
        if kept is None:
            tiles.append(crop.resize((crop.width * scale,) * 2, Image.Resampling.BICUBIC))
        else:
            tiles.append(
                shade(
                    crop,
                    side,
                    kept.indices[number].cpu().numpy(),
                    kept.important[number].cpu().numpy(),
                    scale,
                )
            )
    width = tiles[0].width
    sheet = Image.new("RGB", (len(tiles) * (width + GAP) - GAP, width), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number * (width + GAP), 0))
    return sheet


def contact_sheet(rows: list[list[Image.Image]], titles: list[str], width: int) -> Image.Image:
    """Rows of equally many panels under titles, each panel scaled to `width` pixels, with a legend below."""
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
        for column, picture in enumerate(row):
            sheet.paste(picture, (GAP + column * (width + GAP), top))
        top += height + GAP
    place = GAP
    for color, text in (
        (IMPORTANT, "important ([CLS] attention)"),
        (DIVERSE, "diverse or sampled"),
        ((225,) * 3, "pruned"),
    ):
        pen.rectangle([place, top + 5, place + 12, top + 17], fill=color, outline="black")
        pen.text((place + 18, top + 11), text, "black", font, anchor="lm")
        place += 34 + int(pen.textlength(text, font))
    return sheet


def draw(
    model,
    processor,
    files: list[Path],
    methods: list[str],
    budgets: list[int],
    share: float,
    width: int,
    seed: int = 0,
):
    """Contact sheet of files x (method, budget), and what was kept: (picture, list of dicts)."""
    import torch

    from llava.mm_utils import load_image, process_images
    from llava.pruning import get_pruner

    model.set_pruner(
        get_pruner(methods[0], tokens=budgets[0], important_ratio=share, seed=seed)
    )  # decides how crops are cut
    pruners = [
        get_pruner(method, tokens=tokens, important_ratio=share, seed=seed)
        for method in methods
        for tokens in budgets
    ]
    rows, facts = [], []
    for file in files:
        image = load_image(str(file))
        pixels = process_images([image], processor, model.config)[0]
        crops = pixels if pixels.ndim == 4 else pixels[None]
        with torch.inference_mode():
            vision = model.encode_vision([pixels], [image.size])[0]
            kept = [model.visual_tokens(vision, pruner).kept for pruner in pruners]
        pictures, side = crops_as_pictures(crops, processor), model.get_vision_tower().num_patches_per_side
        shown = [panel(pictures, side, choice) for choice in kept]
        rows.append([panel(pictures, side, None), *shown])
        facts += [
            {
                "image": str(file),
                **pruner.config(),
                "kept": choice.indices.numel(),
                "important": int(choice.important.sum()),
            }
            for pruner, choice in zip(pruners, kept, strict=True)
        ]

    def title(pruner) -> str:
        return f"{pruner.name} {pruner.tokens}" + (
            f" r={pruner.important_ratio:g}" if pruner.uses_ratio and share != 0.5 else ""
        )

    return contact_sheet(rows, ["what the tower sees", *map(title, pruners)], width), facts


def main(argv: list[str] | None = None) -> int:
    from llava.pruning.registry import list_pruners

    parser = argparse.ArgumentParser(
        prog="python -m llava.analysis.overlay", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--image", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument(
        "--tokens", type=at_least(0), nargs="+", default=[64], help="budget per crop (default 64)"
    )
    parser.add_argument("--method", nargs="+", default=["vispruner"], choices=list_pruners(), metavar="NAME")
    parser.add_argument("--ratio", type=ratio, default=0.5, help="share of important tokens (default 0.5)")
    parser.add_argument("--seed", type=int, default=0, help="of the random method")
    parser.add_argument("--model", help="checkpoint folder or hub name (default: the embedded model)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--width", type=at_least(32), help="pixels per panel (default 672, 200 on contact sheets)"
    )
    parser.add_argument(
        "--output", type=Path, help="PNG or JPEG to write (default: beside nothing, named after the image)"
    )
    args = parser.parse_args(argv)
    missing = [str(file) for file in args.image if not file.is_file()]
    if missing:
        parser.error(f"--image: no such file: {', '.join(missing)}")
    single = len(args.image) * len(args.tokens) * len(args.method) == 1
    output = args.output or Path(
        f"{args.image[0].stem}_{'_'.join(args.method)}_{'_'.join(map(str, args.tokens))}.png"
    )
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        parser.error(f"--output {output}: the name must end in .png or .jpg")
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model
    from llava.model.checkpoint import CheckpointError

    path = str(args.model or BUNDLED_MODEL)
    try:
        _, model, processor, _ = load_pretrained_model(
            path, None, get_model_name_from_path(path), device=args.device
        )
        sheet, facts = draw(
            model,
            processor,
            args.image,
            args.method,
            args.tokens,
            args.ratio,
            args.width or (672 if single else 200),
            args.seed,
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(output, quality=88)
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"panels: {len(facts)}; orange = important, blue = diverse, grey = pruned")
    print(json.dumps({"output": str(output), "panels": facts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
