"""Visual tokens of a clip: pruned frame by frame or over all frames, projected, in the order of the prompt.

Mixed into the model below `visual.py`. A clip is F frames of N patches; its `VisionFeatures` have frames in
place of crops. Every frame has an <image> tag of its own.

Budgets. `clip_budget` says what `Pruner.tokens` is for a clip: "frame": patches to keep of every frame;
"total": of the clip, split over the frames so that they add up exactly (`frame_budgets`); "clip": of the
clip, chosen among all frames at once, so that what stays the same is not kept once per frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.features import VisionFeatures, VisualTokens
from llava.pruning import Kept, Pruner
from llava.pruning.base import NO_TOKEN

CLIP_BUDGETS = ("frame", "total", "clip")


def frame_budgets(tokens: int, frames: int) -> list[int]:
    """Split a clip's budget over its frames: floor(B (t + 1) / F) - floor(B t / F) for frame t."""
    return [tokens * (t + 1) // frames - tokens * t // frames for t in range(frames)]


def join_frame_tags(ids: Sequence[int], tags: Sequence[int]) -> list[int] | None:
    """Replace the <image> tags of every clip by a single one, for its tokens in one piece.

    A prompt then has one tag per image or clip, and prompts about one clip can share its prefix.

    Args:
        ids: of a prompt.
        tags: how many tags each image (1) or clip (F) has, in the order of the prompt.

    Returns:
        The ids; None if text stands between the tags of a clip.

    Raises:
        ValueError: the prompt has another number of tags.
    """
    found = [place for place, one in enumerate(ids) if one == IMAGE_TOKEN_INDEX]
    if len(found) != sum(tags):
        raise ValueError(
            f"input_ids: {len(found)} <image> tag(s), but the images and clips have {sum(tags)}."
        )
    dropped: set[int] = set()
    for count in tags:
        own, found = found[:count], found[count:]
        if own and own[-1] - own[0] != count - 1:
            return None
        dropped |= set(own[1:])
    return [one for place, one in enumerate(ids) if place not in dropped]


def join_tags(
    input_ids: Tensor, attention_mask: Tensor | None, tokens: Sequence[VisualTokens]
) -> tuple[Tensor, Tensor | None]:
    """Replace the tags of every clip in a batch of prompts (B, L) by one (see `join_frame_tags`).

    Returns:
        Ids and mask, padded on the left; as they were if there is no clip.

    Raises:
        ValueError: tags and images differ in number, or text stands between the tags of a clip.
    """
    if all(one.lengths is None for one in tokens):
        return input_ids, attention_mask
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows, left = [], [len(one.parts) for one in tokens]
    for row, keep in zip(input_ids.cpu(), mask.bool().cpu(), strict=True):
        ids = row[keep].tolist()
        count, own = ids.count(IMAGE_TOKEN_INDEX), []
        while left and sum(own) < count:
            own.append(left.pop(0))
        joined = join_frame_tags(ids, own)
        if joined is None:
            raise ValueError(
                "input_ids: text stands between the <image> tags of a clip, which a method inside the "
                "language model cannot prune. Write the tags without spaces."
            )
        rows.append(joined)
    if left:
        raise ValueError(
            f"input_ids: {len(left)} more images or clips than prompts have tags. Leave them out."
        )
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids.to(input_ids.device), mask.to(input_ids.device)


class ClipTokenMixin:
    """Mixed into a model with `get_model()`, `get_video_tower()`, `_cues` and `_join`."""

    clip_budget = "frame"

    def _tokens_of_clip(self, vision: VisionFeatures, pruner: Pruner, question: object) -> VisualTokens:
        """Prune and project a clip.

        Without pruning, and for methods inside the language model, every frame also has its [CLS], first.
        """
        if self.keeps_positions(pruner):
            raise ValueError(
                "positions: 'original' is set, which is not defined for clips. Set positions='contiguous'."
            )
        projector, patches = self.get_model().mm_projector, vision.features[:, 1:]
        frames, count, _ = patches.shape
        if pruner.acts_in == "decoder" or (pruner.tokens is None and not pruner.is_adaptive):
            every = torch.arange(frames * count, device=patches.device)[None]
            kept = Kept(every, torch.zeros_like(every, dtype=torch.bool))
            embeds = projector(vision.features.flatten(0, 1))
            return VisualTokens(embeds, kept, lengths=(count + 1,) * frames)
        cues = self._cues(pruner, patches, vision.cues, question, self.get_video_tower())
        asked = {"question": question} if pruner.needs_question else {}
        if self.clip_budget == "clip":
            row = self._join(pruner, patches, vision.attention, cues, frames)
            kept = pruner.keep(*row[:2], cues=row[2], **asked, crop_ids=["".join(vision.keys)])
            if bool((kept.indices < 0).any()):
                raise ValueError(
                    f"clip_budget: {pruner.name!r} merges tokens to ones that have no place, and so no "
                    "frame. Set clip_budget='total'."
                )
            lengths = (kept.indices[0] // count).bincount(minlength=frames).tolist()
        else:
            kept, lengths = _keep_per_frame(
                pruner, self._budgets(pruner, frames), patches, vision, cues, asked
            )
        if kept.features is not None:
            weight = self._projector_place
            embeds = projector(kept.features[0].to(device=weight[0], dtype=weight[1]))
        elif "projected" in cues:
            embeds = cues["projected"].flatten(0, 1)[kept.indices[0]]
        else:
            embeds = projector(patches.flatten(0, 1)[kept.indices[0]])
        return VisualTokens(embeds, kept, lengths=tuple(lengths))

    def _budgets(self, pruner: Pruner, frames: int) -> list[int | None]:
        if self.clip_budget == "frame" or pruner.tokens is None:
            return [pruner.tokens] * frames
        return list(frame_budgets(pruner.tokens, frames))


def _keep_per_frame(
    pruner: Pruner,
    budgets: list[int | None],
    patches: Tensor,
    vision: VisionFeatures,
    cues: Mapping[str, Tensor],
    asked: Mapping[str, object],
) -> tuple[Kept, list[int]]:
    """Prune frames (F, N, C) to one budget each; return all kept tokens as one row, and how many per frame.

    Frames of one budget are rows of one call: rows never influence each other.
    """
    found: dict[int, Kept] = {}
    for budget in dict.fromkeys(budgets):
        rows = [frame for frame, one in enumerate(budgets) if one == budget]
        kept = replace(pruner, tokens=budget).keep(
            patches[rows],
            vision.attention[rows],
            [vision.keys[frame] for frame in rows],
            cues={name: cue if name == "text_embeds" else cue[rows] for name, cue in cues.items()},
            **asked,
        )
        found |= {frame: kept[place : place + 1] for place, frame in enumerate(rows)}
    count, parts = patches.shape[1], [found[frame] for frame in range(len(budgets))]
    here = [(part.indices != NO_TOKEN)[0] for part in parts]
    indices = [
        torch.where(part.indices < 0, part.indices, part.indices + frame * count)[:, mask]
        for frame, (part, mask) in enumerate(zip(parts, here, strict=True))
    ]
    important = [part.important[:, mask] for part, mask in zip(parts, here, strict=True)]
    lengths = [one.shape[1] for one in indices]
    merged: dict[str, Tensor] = {}
    if parts[0].features is not None:
        merged["features"] = torch.cat([p.features[:, mask] for p, mask in zip(parts, here, strict=True)], 1)
    if all(part.groups is not None for part in parts):
        starts = [sum(lengths[:frame]) for frame in range(len(lengths))]
        groups = [
            torch.where(p.groups < 0, p.groups, p.groups + s) for p, s in zip(parts, starts, strict=True)
        ]
        merged["groups"] = torch.cat(groups, 1)
    return Kept(torch.cat(indices, 1), torch.cat(important, 1), **merged), lengths
