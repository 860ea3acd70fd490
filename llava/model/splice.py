"""Insert visual embeddings into text: pure functions on tensors, independent of the model.

A prompt's ids contain `IMAGE_TOKEN_INDEX` (-200) once for every image. Each is replaced by that image's
visual tokens, labels there become `IGNORE_INDEX` (-100), and rows are padded to one length. `ContextLimits`
says which lengths a checkpoint takes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX


@dataclass(frozen=True)
class ContextLimits:
    """How many tokens a language model takes; None is no limit.

    Attributes:
        prompt: text and visual tokens of a prompt, by tokenizer_model_max_length. LLaVA cuts longer prompts
            on the right, where the question is.
        positions: prompt and answer together, by max_position_embeddings; more if the rotary positions are
            stretched ("linear" and "dynamic" scaling leave the entry as it was).
    """

    prompt: int | None = None
    positions: int | None = None

    @classmethod
    def of(cls, config: Any) -> ContextLimits:
        """Read the limits of a model's config, or of the content of config.json.

        Raises:
            ValueError: a limit is not a number of tokens.
        """
        get = config.get if isinstance(config, dict) else lambda name: getattr(config, name, None)
        positions = _limit("max_position_embeddings", get("max_position_embeddings"))
        for name in ("rope_parameters", "rope_scaling"):
            rope = get(name)
            kind = (rope.get("rope_type") or rope.get("type")) if isinstance(rope, dict) else None
            factor = rope.get("factor") if kind in ("linear", "dynamic") else None
            if positions is not None and isinstance(factor, int | float) and factor > 1:
                positions = int(positions * factor)
                break
        return cls(_limit("tokenizer_model_max_length", get("tokenizer_model_max_length")), positions)

    def refuse(self, length: int, visual: int | None = None, new: int = 1) -> str | None:
        """Return why a prompt does not fit, None if it does.

        Args:
            length: its text and visual tokens.
            visual: the visual ones, for the message.
            new: tokens that have to fit after it.
        """
        prompt = f"the prompt has {length} tokens" + ("" if visual is None else f" ({visual} visual)")
        if self.prompt is not None and length > self.prompt:
            return (
                f"{prompt}, tokenizer_model_max_length in config.json is {self.prompt}. Cutting the prompt "
                "would remove the question. Keep fewer visual tokens, shorten the question, or raise the "
                "entry if the language model was trained with longer prompts"
            )
        if self.positions is not None and length + new > self.positions:
            return (
                f"{prompt}, which leaves no position for an answer: max_position_embeddings in config.json "
                f"is {self.positions}. Keep fewer visual tokens, or shorten the question"
            )
        return None

    def overrun(self, length: int, new: int) -> str | None:
        """Return what is wrong with an answer of `new` tokens to a prompt of `length`; None if it fits."""
        if self.positions is None or length + new <= self.positions:
            return None
        return (
            f"the answer runs past the last position: {length} tokens of the prompt and {new} new ones, "
            f"max_position_embeddings in config.json is {self.positions}. Allow at most "
            f"{self.positions - length} new tokens (max_new_tokens), or keep fewer visual tokens"
        )


def _limit(name: str, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or value < 0:
        raise ValueError(f"config.json: {name} is {value!r}, expected a number of tokens. Set a number.")
    return int(min(value, 1 << 62))  # tokenizers without a limit write 1e30


@dataclass
class Spliced:
    """A batch ready for the language model. S is the longest row."""

    embeds: Tensor  # (B, S, D)
    labels: Tensor  # (B, S) int64, -100 at visual tokens and padding
    mask: Tensor  # (B, S) bool, False at padding
    position_ids: Tensor  # (B, S) int64, 0, 1, 2 ... along each row, 0 at padding


def splice(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    visual: list[Tensor],
    embed: Callable[[Tensor], Tensor],
    side: str,
    max_length: int | None = None,
) -> Spliced:
    """Replace every image tag of a batch by its visual tokens.

    Args:
        input_ids: (B, L).
        attention_mask: (B, L), False at padding, or None.
        labels: (B, L) or None.
        visual: one (K, D) per tag, in reading order over the batch.
        embed: looks up text ids (n,) -> (n, D).
        side: of the padding, "left" or "right".
        max_length: longer rows are truncated on the right, with a warning.

    Raises:
        ValueError: tags and images differ in number (both are named), or a row is empty.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids: shape is {tuple(input_ids.shape)}, expected (B, L).")
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if keep.shape != input_ids.shape:
        shapes = f"{tuple(keep.shape)} and {tuple(input_ids.shape)}"
        raise ValueError(f"attention_mask and input_ids differ in shape: {shapes}.")
    ids = [row[m] for row, m in zip(input_ids, keep, strict=True)]
    if labels is None:
        targets = [torch.full_like(row, IGNORE_INDEX) for row in ids]
    else:
        targets = [row[m] for row, m in zip(labels, keep, strict=True)]
    check_tags(ids, len(visual))

    images = iter(visual)
    rows, row_labels = [], []
    for row, target in zip(ids, targets, strict=True):
        tags = (row == IMAGE_TOKEN_INDEX).nonzero().flatten().tolist()
        text = embed(row[row != IMAGE_TOKEN_INDEX])
        pieces, piece_labels, start = [], [], 0
        for n, tag in enumerate([*tags, len(row)]):
            pieces.append(text[start - n : tag - n])
            piece_labels.append(target[start:tag])
            if tag < len(row):
                tokens = next(images).to(device=text.device, dtype=text.dtype)
                pieces.append(tokens)
                piece_labels.append(target.new_full((len(tokens),), IGNORE_INDEX))
            start = tag + 1
        rows.append(torch.cat(pieces))
        row_labels.append(torch.cat(piece_labels))
    if max_length is not None and any(len(row) > max_length for row in rows):
        longest = max(len(row) for row in rows)
        warnings.warn(
            f"a sequence of {longest} tokens is longer than tokenizer_model_max_length={max_length}: "
            "truncated on the right",
            stacklevel=2,
        )
        rows = [row[:max_length] for row in rows]
        row_labels = [row[:max_length] for row in row_labels]
    return pad_rows(rows, row_labels, side)


def check_tags(ids: list[Tensor], images: int) -> None:
    """Raise `ValueError` unless the rows contain exactly `images` image tags and no other negative id."""
    text = torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64)
    tags = int((text == IMAGE_TOKEN_INDEX).sum())
    if tags != images:
        raise ValueError(
            f"input_ids: {tags} <image> tag(s), but {images} image(s) were given. Pass one image per tag, in "
            "reading order over the batch; a clip needs a tag for every frame."
        )
    invalid = text[(text < 0) & (text != IMAGE_TOKEN_INDEX)]
    if len(invalid):
        raise ValueError(f"input_ids: {int(invalid[0])} is neither a token nor {IMAGE_TOKEN_INDEX}.")


def pad_rows(rows: list[Tensor], labels: list[Tensor], side: str) -> Spliced:
    """Pad rows (S_i, D) and labels (S_i,) of different lengths on `side`, to one batch."""
    if side not in ("left", "right"):
        raise ValueError(f"padding side: expected 'left' or 'right', got {side!r}.")
    lengths = [len(row) for row in rows]
    if min(lengths) == 0:
        raise ValueError(f"input_ids: row {lengths.index(0)} of the batch has no token.")
    count, longest, device = len(rows), max(lengths), rows[0].device
    embeds = torch.stack([_pad(row, longest, side) for row in rows])
    mask = torch.zeros(count, longest, dtype=torch.bool, device=device)
    position_ids = torch.zeros(count, longest, dtype=torch.int64, device=device)
    padded = labels[0].new_full((count, longest), IGNORE_INDEX)
    for i, length in enumerate(lengths):
        place = slice(longest - length, longest) if side == "left" else slice(0, length)
        mask[i, place] = True
        position_ids[i, place] = torch.arange(length, device=device)
        padded[i, place] = labels[i]
    return Spliced(embeds, padded, mask, position_ids)


def _pad(row: Tensor, length: int, side: str) -> Tensor:
    if len(row) == length:
        return row
    empty = row.new_zeros(length - len(row), row.shape[1])
    return torch.cat([empty, row] if side == "left" else [row, empty])
