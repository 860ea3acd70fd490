"""Draw what a method keeps: pruned patches gray, important ones framed orange, diverse ones blue.

Patches that are merged into one token have their mean color and one outline.

    python -m llava.analysis.overlay --image photo.jpg --tokens 64
    python -m llava.analysis.overlay --image a.jpg b.jpg --method random vispruner --tokens 128 64 32 \\
        --output sheet.png                                     # several make a contact sheet
    python -m llava.analysis.overlay --question-file llava_pope_test.jsonl --answers RUN_A RUN_B --only-flips

The second form shows the questions that two answer files answer differently: image, what each method kept,
and both answers, marked right or wrong where the ground truth is beside the question file. Method and budget
come from the metadata of the answers; --model has to be the checkpoint that gave them.

The image that is drawn is the input of the model: the padded square, or the crops of an anyres checkpoint.
The selection is the one that an evaluation uses (see `kept_tokens`). Of methods that act inside the language
model, the tokens that are left after their last stage are shown; they depend on the question, as do those of
methods that read it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from llava.argtypes import at_least, ratio
from llava.paths import BUNDLED_MODEL, require_bundled

if TYPE_CHECKING:
    from llava.analysis.flips import AnswerSet, AskedQuestions, Flip
    from llava.analysis.kept_tokens import CropTokens
    from llava.eval.inference.engine import Engine
    from llava.pruning import Pruner

IMPORTANT, DIVERSE, MERGED = (255, 128, 0), (0, 140, 255), (170, 51, 119)
GAP, HEADER = 8, 22
ROWS = 20  # questions on a sheet, unless --limit is given
QUESTION = "Describe the image."  # for methods that depend on one, unless --question is given


def shade(
    crop: Image.Image,
    side: int,
    kept: np.ndarray,
    important: np.ndarray,
    scale: int = 2,
    groups: np.ndarray | None = None,
) -> Image.Image:
    """Gray out the pruned patches of one crop.

    Args:
        crop: RGB square, the input of the tower.
        side: Patches along one side.
        kept: (K,) patch indices in raster order.
        important: (K,) bool; False is diverse.
        scale: Enlargement of the result, so that frames do not hide patches.
        groups: (side ** 2,) token that a patch was merged into with others, -1 for other patches.
    """
    size = crop.width * scale
    sharp = crop.resize((size, size), Image.Resampling.BICUBIC)
    gray = np.asarray(sharp.convert("L").convert("RGB"), np.float32)
    shaded = Image.fromarray((0.35 * gray + 0.65 * 225).astype(np.uint8))
    step = size / side
    pen = ImageDraw.Draw(shaded)
    if groups is not None:
        _draw_merged(shaded, sharp, side, groups)
    for index, is_important in zip(kept.tolist(), important.tolist(), strict=True):
        box = _box(index, side, step)
        shaded.paste(sharp.crop(box), box[:2])
        frame = [box[0], box[1], box[2] - 1, box[3] - 1]
        pen.rectangle(frame, outline=IMPORTANT if is_important else DIVERSE, width=max(1, round(step / 14)))
    return shaded


def _box(index: int, side: int, step: float) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a patch in pixels."""
    row, column = divmod(index, side)
    left, top = round(column * step), round(row * step)
    return left, top, round((column + 1) * step), round((row + 1) * step)


def _draw_merged(shaded: Image.Image, sharp: Image.Image, side: int, groups: np.ndarray) -> None:
    """Fill merged patches with the mean color of their token, and outline what is one token."""
    step = shaded.width / side
    small = np.asarray(sharp.resize((side, side), Image.Resampling.BOX), np.float32).reshape(-1, 3)
    for token in np.unique(groups[groups >= 0]):
        members = np.flatnonzero(groups == token)
        color = small[members].mean(0)
        for index in members.tolist():
            box = _box(index, side, step)
            texture = np.asarray(shaded.crop(box), np.float32)
            shaded.paste(Image.fromarray((0.75 * color + 0.25 * texture).astype(np.uint8)), box[:2])
    pen, width = ImageDraw.Draw(shaded), max(1, round(step / 14))
    around = np.pad(groups.reshape(side, side), 1, constant_values=-1)
    for index, token in enumerate(groups.tolist()):
        row, column = divmod(index, side)
        left, top, right, bottom = _box(index, side, step)
        if token != around[row, column + 1]:
            pen.rectangle([left, top, right - 1, top + width - 1], fill=MERGED)
        if token != around[row + 1, column]:
            pen.rectangle([left, top, left + width - 1, bottom - 1], fill=MERGED)
        if token >= 0 and row == side - 1:
            pen.rectangle([left, bottom - width, right - 1, bottom - 1], fill=MERGED)
        if token >= 0 and column == side - 1:
            pen.rectangle([right - width, top, right - 1, bottom - 1], fill=MERGED)


def panel(
    crops: list[Image.Image], side: int, tokens: Sequence[CropTokens] | None, scale: int = 2
) -> Image.Image:
    """Draw all crops of one image in a row, the whole image first; without `tokens` nothing is gray."""
    tiles = []
    for number, crop in enumerate(crops):
        if tokens is None:
            tiles.append(crop.resize((crop.width * scale,) * 2, Image.Resampling.BICUBIC))
        else:
            one = tokens[number]
            tiles.append(shade(crop, side, one.kept, one.important, scale, one.groups))
    width = tiles[0].width
    sheet = Image.new("RGB", (len(tiles) * (width + GAP) - GAP, width), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number * (width + GAP), 0))
    return sheet


def contact_sheet(
    rows: list[list[Image.Image]],
    titles: list[str],
    width: int,
    texts: list[list[str]] | None = None,
    merged: bool = False,
) -> Image.Image:
    """Draw rows of panels under titles, each panel scaled to `width` pixels, with a legend below.

    Args:
        texts: Of every row: a line above it, then a line above each panel. Lines are cut to fit.
        merged: Explain outlines of merged tokens in the legend.
    """
    scaled = [
        [p.resize((width, round(p.height * width / p.width)), Image.Resampling.LANCZOS) for p in row]
        for row in rows
    ]
    heights = [max(p.height for p in row) for row in scaled]
    total = max(len(titles) * (width + GAP) + GAP, 460)
    above = HEADER * 2 if texts else 0  # of a row: its text, and those of its panels
    height = HEADER * 2 + sum(heights) + (GAP + above) * len(rows) + GAP
    sheet = Image.new("RGB", (total, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    top = HEADER
    lefts = [GAP + column * (width + GAP) for column in range(len(titles))]
    for left, title in zip(lefts, titles, strict=True):
        pen.text((left + width / 2, HEADER / 2 + 2), title, "black", font, anchor="mm")
    for number, (row, height) in enumerate(zip(scaled, heights, strict=True)):
        if texts:
            whole, *own = texts[number]
            shown = _fitted(pen, whole, font, total - 2 * GAP)
            pen.text((GAP, top + HEADER / 2), shown, "black", font, anchor="lm")
            for left, text in zip(lefts, own, strict=True):
                shown = _fitted(pen, text, font, width)
                pen.text((left + width / 2, top + HEADER * 1.5), shown, "black", font, anchor="mm")
            top += above
        for column, image in enumerate(row):
            sheet.paste(image, (GAP + column * (width + GAP), top))
        top += height + GAP
    left = GAP
    for color, text in (
        (IMPORTANT, "important ([CLS] attention)"),
        (DIVERSE, "diverse or other"),
        *([(MERGED, "outline: merged into one token")] if merged else []),
        ((225,) * 3, "pruned"),
    ):
        pen.rectangle([left, top + 5, left + 12, top + 17], fill=color, outline="black")
        pen.text((left + 18, top + 11), text, "black", font, anchor="lm")
        left += 34 + int(pen.textlength(text, font))
    return sheet


def _fitted(pen: ImageDraw.ImageDraw, text: str, font: Any, width: float) -> str:
    """Return a text on one line, cut to `width` pixels."""
    text = " ".join(text.split())
    if pen.textlength(text, font) <= width:
        return text
    end = len(text)
    while end and pen.textlength(text[:end] + "...", font) > width:
        end -= 1
    return text[:end] + "..."


def draw(engine: Engine, files: list[Path], pruners: list[Pruner], question: str, width: int):
    """Draw a contact sheet of files x pruners.

    Returns:
        The image, and a dict per panel that describes it.
    """
    from llava.analysis.kept_tokens import counts, encode, kept_tokens
    from llava.eval.benchmarks import Question
    from llava.mm_utils import load_image

    side = engine.model.get_vision_tower().num_patches_per_side
    # The budget decides how crops are cut, and must be one for all methods.
    engine.model.set_pruner(max(pruners, key=lambda one: one.tokens is not None))
    rows, texts, panels, merged = [], [], [], 0
    for file in files:
        crops, vision = encode(engine, load_image(str(file)), pruners)
        row, words = [panel(crops, side, None)], [file.name, f"{crops[0].width} x {crops[0].width}"]
        for pruner in pruners:
            tokens = kept_tokens(engine, vision, pruner, Question(0, 0, file, question))
            found = counts(tokens)
            row.append(panel(crops, side, tokens))
            words.append(count_text(found))
            panels.append({"image": str(file), **pruner.config(), **found})
            merged += found["merged"]
        rows.append(row)
        texts.append(words)
    titles = ["input of the tower", *map(_title, pruners)]
    return contact_sheet(rows, titles, width, texts, merged > 0), panels


def count_text(found: Mapping[str, int]) -> str:
    """Return the tokens of an image, of `kept_tokens.counts`, in words; global ones stand for no patch."""
    parts = [
        f"{found[name]} {word}"
        for name, word in (("merged", "merged"), ("unplaced", "global"))
        if found[name]
    ]
    return f"{found['kept']}: {', '.join(parts)}" if parts else f"{found['kept']} tokens"


def draw_flips(model, tokenizer, processor, asked: AskedQuestions, shown: list[Flip],
               sets: list[AnswerSet], width: int):  # fmt: skip
    """Draw a row per question: the image, then what the method of each answer file kept.

    Returns:
        The image, and a dict per question that describes it.
    """
    from llava.analysis.kept_tokens import counts, encode, kept_tokens
    from llava.eval.inference.engine import Engine

    side, merged = model.get_vision_tower().num_patches_per_side, 0
    engine = Engine(model, tokenizer, processor, sets[0].metadata.get("conv_mode", "vicuna_v1"))
    rows, texts, found = [], [], []
    for flip in shown:
        panels: list[Image.Image] = []
        document = {
            "question_id": flip.question.question_id,
            "image": str(flip.question.image),
            "question": flip.question.text,
        }
        words = [f"{flip.question.question_id}: {flip.question.text}", Path(str(flip.question.image)).name]
        for name, one, text, credit in zip("ab", sets, flip.texts, flip.credits, strict=True):
            model.set_pruner(one.pruner, anyres=one.anyres or "auto")
            crops, vision = encode(engine, asked.load_image(flip.question.image), [one.pruner])
            tokens = kept_tokens(engine, vision, one.pruner, flip.question)
            if not panels:
                panels.append(panel(crops, side, None))
            panels.append(panel(crops, side, tokens))
            mark = "" if credit is None else " (right)" if credit == 1 else f" (credit {credit:.2g})"
            words.append(text.strip() + (" (wrong)" if credit == 0 else mark))
            number = counts(tokens)
            merged += number["merged"]
            document[name] = {"answer": text, "credit": credit, "kept": number["kept"]}
        rows.append(panels)
        texts.append(words)
        found.append(document)
    titles = [
        "input of the tower",
        *(f"{name}: {_title(one.pruner)}" for name, one in zip("AB", sets, strict=True)),
    ]
    return contact_sheet(rows, titles, width, texts, merged > 0), found


def _title(pruner: Pruner) -> str:
    ratio_shown = pruner.uses_ratio and pruner.important_ratio != 0.5
    budget = "" if pruner.tokens is None else f" {pruner.tokens}"
    return f"{pruner.name}{budget}" + (f" r={pruner.important_ratio:g}" if ratio_shown else "")


def build_parser() -> argparse.ArgumentParser:
    from llava.pruning import list_pruners

    parser = argparse.ArgumentParser(
        prog="python -m llava.analysis.overlay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--image", type=Path, nargs="+", metavar="FILE", help="one or more image files")
    budgets = "visual tokens to keep per crop, one or more budgets (default: 64)"
    add("--tokens", type=at_least(0), nargs="+", metavar="N", help=budgets)
    names = f"one or more of {', '.join(list_pruners())} (default: vispruner)"
    add("--method", nargs="+", choices=list_pruners(), metavar="NAME", help=names)
    add("--ratio", type=ratio, help="share of tokens kept for their attention, in [0, 1] (default: 0.5)")
    add("--seed", type=int, help="seed for random pruning (default: 0)")
    of = "for methods that read the question or act inside the language model"
    add("--question", metavar="TEXT", help=f"{of} (default: {QUESTION})")
    add("--question-file", type=Path, metavar="FILE", help="questions of the answers, instead of --image")
    add("--answers", type=Path, nargs=2, metavar=("A", "B"), help="two answer files, or their folders")
    add("--only-flips", action="store_true", help="show only questions that A and B answer differently")
    folder = "images of --question-file (default: the benchmark's, else the folder of the file)"
    add("--image-folder", type=Path, metavar="DIR", help=folder)
    add("--allow-outside-images", action="store_true", help="accept images outside that folder")
    add("--limit", type=at_least(1), metavar="N", help=f"show only the first N questions (default: {ROWS})")
    add("--model", help="checkpoint folder or Hub name (default: the bundled model)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: %(default)s)")
    width = "pixels per panel (default: 672, 200 on contact sheets, 300 with --answers)"
    add("--width", type=at_least(32), help=width)
    output = "PNG or JPEG file to write (default: ./IMAGE_METHOD_TOKENS.png, ./flips.png with --answers)"
    add("--output", type=Path, help=output)
    return parser


def main(argv: list[str] | None = None) -> int:
    from llava.model.checkpoint import CheckpointError

    parser = build_parser()
    args = parser.parse_args(argv)
    forms = {"--image": args.image, "--answers": args.answers}
    if (args.image is None) == (args.answers is None):
        found = "both" if args.image else "neither"
        parser.error(f"{', '.join(forms)}: expected one of them, got {found}")
    of_images = {
        f"--{name}": getattr(args, name) for name in ("tokens", "method", "ratio", "seed", "question")
    }
    of_answers = {"--question-file": args.question_file, "--only-flips": args.only_flips or None}
    of_answers |= {"--image-folder": args.image_folder, "--limit": args.limit}
    for option, value in (of_answers if args.image else of_images).items():
        if value is not None:
            why = "only with --answers" if args.image else "the answers' metadata names it"
            parser.error(f"{option}: {why}. Leave it out")
    if args.answers and args.question_file is None:
        parser.error("--question-file: missing. Pass the questions that the answers belong to")
    output = args.output or Path("flips.png")
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        parser.error(f"--output {output}: the name must end in .png or .jpg")
    try:
        return (_show_images if args.image else _show_answers)(parser, args)
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _show_images(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Draw what methods keep of images."""
    from llava.eval.inference.engine import Engine
    from llava.pruning import get_pruner

    missing = [str(file) for file in args.image if not file.is_file()]
    if missing:
        parser.error(f"--image: no such file: {', '.join(missing)}")
    methods, budgets = args.method or ["vispruner"], args.tokens or [64]
    share = 0.5 if args.ratio is None else args.ratio
    try:
        pruners = [get_pruner(name, tokens, share, args.seed or 0) for name in methods for tokens in budgets]
    except ValueError as error:
        parser.error(str(error))
    single = len(args.image) * len(pruners) == 1
    name = f"{args.image[0].stem}_{'_'.join(methods)}_{'_'.join(map(str, budgets))}.png"
    output = args.output or Path(name)
    tokenizer, model, processor = _load(args)
    engine = Engine(model, tokenizer, processor, _template(args, model))
    unavailable = {}
    for pruner in pruners:
        try:
            model.check_pruner(pruner)
        except ValueError as error:
            unavailable[pruner] = str(error)
            print(f"warning: left out: {error}", file=sys.stderr)
    pruners = [pruner for pruner in pruners if pruner not in unavailable]
    if not pruners:
        raise ValueError(f"--method: none of the methods can run with {_model(args)}. Choose another method")
    question = QUESTION if args.question is None else args.question
    sheet, panels = draw(engine, args.image, pruners, question, args.width or (672 if single else 200))
    _save(sheet, output)
    print(f"panels: {len(panels)}; orange = important, blue = diverse or other, gray = pruned")
    left_out = [{**pruner.config(), "reason": reason} for pruner, reason in unavailable.items()]
    print(json.dumps({"output": str(output), "panels": panels, "unavailable": left_out}))
    return 0


def _show_answers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Draw the questions that two answer files answer, or answer differently."""
    from llava.analysis.flips import flips, read_answer_set, read_asked
    from llava.model.checkpoint.fingerprint import fingerprint_checkpoint

    asked = read_asked(args.question_file, args.image_folder, args.allow_outside_images)
    sets = [read_answer_set(path, asked) for path in args.answers]
    found = flips(asked, *sets, args.only_flips)
    shown = found[: args.limit or ROWS]
    output = args.output or Path("flips.png")
    documents: list[dict[str, Any]] = []
    if shown:
        folder, made = Path(_model(args)), sets[0].metadata.get("weights")
        if folder.is_dir() and made not in (None, "hub", fingerprint_checkpoint(folder)):
            raise ValueError(
                f"{sets[0].path}: the answers are of {sets[0].metadata.get('model')}, weights {made}, not of "
                f"{folder}. Pass --model with that checkpoint"
            )
        preset = sets[0].metadata.get("preset")
        tokenizer, model, processor = _load(args, preset=preset)
        sheet, documents = draw_flips(model, tokenizer, processor, asked, shown, sets, args.width or 300)
        _save(sheet, output)
    what = "questions with different answers" if args.only_flips else "questions"
    print(f"{what}: {len(found)}, shown: {len(shown)}; A = {sets[0].path}, B = {sets[1].path}")
    document = {
        "output": str(output) if shown else None,
        "questions": len(found),
        "flips": sum(one.differs for one in found),
        "a": _setting(sets[0]),
        "b": _setting(sets[1]),
        "shown": documents,
    }
    print(json.dumps(document))
    return 0


def _setting(answers: AnswerSet) -> dict[str, Any]:
    return {"answers_file": str(answers.path), **answers.pruner.config()}


def _model(args: argparse.Namespace) -> str:
    return str(args.model or require_bundled(BUNDLED_MODEL, "--model"))


def _template(args: argparse.Namespace, model: Any) -> str:
    """Return the conversation template that the checkpoint calls for."""
    from llava.mm_utils import get_model_name_from_path
    from llava.model.checkpoint.config import conversation_for

    return conversation_for(model.config.to_dict(), get_model_name_from_path(_model(args)))


def _load(args: argparse.Namespace, **options: Any) -> tuple[Any, Any, Any]:
    """Return tokenizer, model and image processor."""
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    path = _model(args)
    name = get_model_name_from_path(path)
    return load_pretrained_model(path, None, name, device=args.device, **options)[:3]


def _save(sheet: Image.Image, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output, quality=88)


if __name__ == "__main__":
    sys.exit(main())
