"""Figure 4: how VisPruner chooses: attention, important tokens, duplicates removed round by round."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava.analysis.figures import drawing
from llava.analysis.figures.drawing import Table
from llava.analysis.kept_tokens import encode
from llava.analysis.overlay import DIVERSE, IMPORTANT, shade
from llava.eval.benchmarks import DataError, Question
from llava.eval.jobs.job import Task
from llava.eval.jobs.session import Session
from llava.model.features import VisionFeatures
from llava.pruning import Kept, attention_order
from llava.pruning.base import mean_attention
from llava.pruning.diversity import most_diverse
from llava.pruning.vispruner import VisPruner

REMOVED = (213, 94, 0)
_LEGEND = (
    ("important", IMPORTANT, None),
    ("diverse", DIVERSE, None),
    ("removed in this round", REMOVED, REMOVED),
    ("important, or removed before", (225, 225, 225), (225, 225, 225)),
)


@dataclass(frozen=True)
class Selection:
    """How VisPruner chose the tokens of one crop of N patches.

    Attributes:
        attention: (N,) float64, mean [CLS] attention over the heads.
        important: (n,) int64, the patches that are kept for their attention, in that order.
        rounds: The patches that are left for the diverse part: before the first round, and after each.
        kept: (K,) int64, the tokens that the method returned, ascending.
    """

    attention: np.ndarray
    important: np.ndarray
    rounds: Sequence[np.ndarray]
    kept: np.ndarray

    @property
    def removed_in(self) -> np.ndarray:
        """The round (from 1) that removed a patch, 0 for kept ones: (N,) int64."""
        found = np.zeros(len(self.attention), dtype=np.int64)
        for number, (before, after) in enumerate(zip(self.rounds, self.rounds[1:], strict=False), 1):
            found[np.setdiff1d(before, after)] = number
        return found


def trace(vision: VisionFeatures, pruner: VisPruner) -> Selection:
    """Repeat the selection of the first crop with the method's own steps, and record every round.

    Raises:
        RuntimeError: The steps do not give the tokens of the method itself.
    """
    features, attention = vision.features[:1], vision.attention[:1]
    kept: Kept = pruner.keep(features, attention)
    tokens = kept.indices.shape[1]
    order = attention_order(attention)
    n_important = int(tokens * pruner.important_ratio)
    important, residual = order[:, :n_important], order[:, n_important:]
    rounds = [residual]
    with torch.no_grad():
        diverse = most_diverse(features, residual, tokens - n_important, on_round=rounds.append)
    if tokens == n_important:  # there is no diverse part, and no round
        rounds = [residual, residual[:, :0]]
    if not torch.equal(torch.cat([important, diverse], 1).sort(1).values, kept.indices):
        raise RuntimeError(f"{pruner.name}: the recorded rounds do not end in the kept tokens")
    arrays = [one[0].cpu().numpy() for one in (mean_attention(attention), important, kept.indices)]
    return Selection(*arrays[:2], [one[0].cpu().numpy() for one in rounds], arrays[2])


@dataclass(frozen=True)
class TracedImage:
    """An image as the tower gets it, and how its tokens were chosen."""

    name: str
    crop: Image.Image
    side: int  # patches along a side
    selection: Selection
    is_cut: bool  # the image has further crops


def shown_rounds(count: int) -> list[int]:
    """Return the first, two middle and the last of `count` rounds, from 1."""
    return sorted({1 + place * (count - 1) // 3 for place in range(4)}) if count else []


def read_images(session: Session, found: Sequence[tuple[Task, Any]], pruner: VisPruner) -> list[TracedImage]:
    """Trace the selection of the image of every task. Raises DataError for an unreadable image."""
    images = []
    for task, _ in found:
        engine = session.engine(task)
        question: Question = task.asked[0]
        engine.model.set_pruner(pruner, anyres=engine.anyres or "auto")
        try:
            crops, vision = encode(engine, engine.load_image(question.image), [pruner])
        except ValueError as error:
            raise DataError(f"{question.image}: {error}") from error
        side = engine.model.get_vision_tower().num_patches_per_side
        name = Path(str(question.image)).name
        images.append(TracedImage(name, crops[0], side, trace(vision, pruner), len(crops) > 1))
    return images


def draw(images: Sequence[TracedImage], caption: str, folder: Path) -> list[str]:
    """Draw and write the figure."""
    height = len(images) * (2 * (7.0 / 4 + 0.22) + 0.25) + drawing.LEGEND
    with drawing.new_figure(height, caption) as figure:
        parts = drawing.blocks_above_legend(figure, len(images), _LEGEND)
        for part, one in zip(parts, images, strict=True):
            part.suptitle(drawing.literal(one.name), x=0.012, ha="left", fontsize=8.5, fontweight="bold")
            panels = list(part.subplots(2, 4).flat)
            for axes in panels:
                axes.set_axis_off()
            for axes, (title, picture) in zip(panels, _panels(one), strict=False):
                axes.imshow(picture, interpolation="antialiased")
                axes.set_title(title, loc="center", fontsize=7.5, fontweight="normal", pad=3)
        return drawing.write_figure(figure, folder, "fig4", caption, tables(images))


def _panels(one: TracedImage) -> list[tuple[str, Any]]:
    """Return the titles and pictures of an image: attention, important, rounds, kept."""
    chosen, nothing = one.selection, np.zeros(0, dtype=np.int64)
    flags = np.ones(len(chosen.important), dtype=bool)
    important = shade(one.crop, one.side, np.sort(chosen.important), flags)
    found = [
        ("input of the tower", one.crop),
        ("[CLS] attention", attention_map(one)),
        (f"important: {len(chosen.important)}", important),
    ]
    for number in shown_rounds(len(chosen.rounds) - 1):
        before, after = chosen.rounds[number - 1], chosen.rounds[number]
        title = f"round {number}: {len(before)} to {len(after)}"
        found.append((title, candidates(one, after, np.setdiff1d(before, after))))
    is_important = np.isin(chosen.kept, chosen.important)
    title = f"kept: {is_important.sum()} + {(~is_important).sum()}"
    if len(chosen.kept) == 0:
        return [*found, ("kept: none", shade(one.crop, one.side, nothing, nothing.astype(bool)))]
    return [*found, (title, shade(one.crop, one.side, chosen.kept, is_important))]


def attention_map(one: TracedImage) -> Image.Image:
    """Draw the mean [CLS] attention: the image in gray, brighter where its logarithm is greater."""
    import matplotlib

    logs = np.log(np.maximum(one.selection.attention, 1e-12)).reshape(one.side, one.side)
    low, high = np.quantile(logs, [0.02, 1.0])
    scaled = ((logs - low) / max(high - low, 1e-9)).clip(0, 1)
    colors = matplotlib.colormaps["cividis"](scaled)[:, :, :3]
    heat = Image.fromarray((colors * 255).astype(np.uint8)).resize(one.crop.size, Image.Resampling.NEAREST)
    gray = one.crop.convert("L").convert("RGB")
    return Image.blend(gray, heat, 0.7)


def candidates(one: TracedImage, left: np.ndarray, removed: np.ndarray) -> Image.Image:
    """Draw the patches that are left in color, those removed in this round filled, and all others gray."""
    shaded = shade(one.crop, one.side, np.zeros(0, np.int64), np.zeros(0, bool))
    picture = np.asarray(shaded).copy()
    sharp = np.asarray(one.crop.resize(shaded.size, Image.Resampling.BICUBIC))
    edges = [round(place * shaded.width / one.side) for place in range(one.side + 1)]
    for patches, color in ((left, None), (removed, REMOVED)):
        for row, column in zip(*np.divmod(patches, one.side), strict=True):
            here = (slice(edges[row], edges[row + 1]), slice(edges[column], edges[column + 1]))
            picture[here] = sharp[here] if color is None else color
    return Image.fromarray(picture)


def tables(images: Sequence[TracedImage]) -> dict[str, Table]:
    """Return every patch with its attention and fate, and the counts of every round."""
    patches, rounds = [], []
    for one in images:
        chosen = one.selection
        removed, important = chosen.removed_in, set(chosen.important.tolist())
        kept = set(chosen.kept.tolist())
        for patch, value in enumerate(chosen.attention.tolist()):
            fate = "important" if patch in important else "diverse" if patch in kept else "removed"
            place = divmod(patch, one.side)
            patches.append([one.name, patch, *place, value, fate, int(removed[patch]) or ""])
        for number, (before, after) in enumerate(zip(chosen.rounds, chosen.rounds[1:], strict=False), 1):
            rounds.append([one.name, number, len(before), len(before) - len(after), len(after)])
    return {
        "patches": (["image", "patch", "row", "column", "attention", "fate", "removed_in_round"], patches),
        "rounds": (["image", "round", "before", "removed", "after"], rounds),
    }


def run(args: argparse.Namespace, session: Session, found: list[tuple[Task, Any]]) -> dict[str, Any]:
    """Draw the figure of the images of `found` and return its document."""
    pruner = VisPruner(args.tokens, args.ratio)
    images = read_images(session, found, pruner)
    first = images[0].selection
    number = len(first.rounds) - 1
    crop = " of the first crop, the whole image" if images[0].is_cut else ""
    text = (
        f"{session.job.name}: how VisPruner keeps {len(first.kept)} of {len(first.attention)} tokens"
        f"{crop}, r = {pruner.important_ratio:g}. Attention: mean over the heads of the select layer, bright "
        f"is high, logarithmic. After the {len(first.important)} important tokens, {number} rounds "
        f"remove the tokens that are most similar to another one, at most 8 each; shown are the first, two "
        "middle and the last one. The rounds are those of the selection itself. A single image shows how the "
        "rule works, and where this tower looks; it does not show whether the tokens suffice for an answer."
    )
    files = draw(images, text, args.output / "fig4")
    return {
        "figure": "fig4",
        "model": session.job.name,
        "tokens": len(first.kept),
        "important_ratio": pruner.important_ratio,
        "images": [
            {
                "image": one.name,
                "important": len(one.selection.important),
                "rounds": len(one.selection.rounds) - 1,
                "kept": len(one.selection.kept),
            }
            for one in images
        ],
        "files": files,
        "caption": text,
    }
