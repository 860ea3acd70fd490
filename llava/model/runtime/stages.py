"""The stages from prompt to token as functions of tensors that look at no value on the device.

Layout follows from shapes, which the host knows; ids, lengths and positions stay on the device. What is wrong
with inputs becomes a flag that is read with the first token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.transformers_compat import attention_of, run_decoder_layer, run_decoder_layers

INVALID = -1  # the token of a row whose logits are not finite
PADDING = -(1 << 62)  # in ids: nothing


def bucket(length: int, least: int = 16) -> int:
    """Round a length up to a multiple of 1/32 to 1/16 of itself, so that few lengths cover all prompts.

    At least one: an image may keep no tokens.
    """
    length = max(1, length)
    step = max(least, (1 << (length.bit_length() - 1)) // 32)
    return -(-length // step) * step


def splice_on_device(
    ids: Tensor,
    mask: Tensor,
    sizes: Tensor,
    visual: Tensor,
    length: int,
    images: int,
    embed: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Insert visual tokens into prompts, as `splice` with padding on the right, without looking at the ids.

    Args:
        ids: (B, L) int64 with IMAGE_TOKEN_INDEX for every image.
        mask: (B, L) bool, False at padding (anywhere).
        sizes: (max(n, 1),) int64, visual tokens of every image in reading order over the batch.
        visual: (V, D), the visual tokens of all images one after the other; rows after them are not used.
        length: S of the result; at least that of the longest row.
        images: n, that there should be.

    Returns:
        Embeddings (B, S, D), zero at padding; lengths (B,) int64; and a bool that is True if `splice` would
        refuse the ids.
    """
    tag = (ids == IMAGE_TOKEN_INDEX) & mask
    number = (tag.flatten().cumsum(0).view_as(ids) - 1).clamp(min=0, max=len(sizes) - 1)
    count = torch.where(tag, sizes[number], mask.long())
    ends = count.cumsum(1)
    lengths = ends[:, -1]
    place = torch.arange(length, device=ids.device).expand(len(ids), -1)
    owner = torch.searchsorted(ends, place.contiguous(), right=True).clamp(max=ids.shape[1] - 1)
    of_image = tag.gather(1, owner)
    first = (sizes.cumsum(0) - sizes)[number.gather(1, owner)]
    row = first + place - (ends - count).gather(1, owner)
    text = embed(ids.gather(1, owner).clamp(min=0))
    found = torch.where(
        of_image[..., None], visual[row.clamp(min=0, max=len(visual) - 1)].to(text.dtype), text
    )
    found = found.masked_fill((place >= lengths[:, None])[..., None], 0)
    wrong = ((ids < 0) & ~tag & mask).any() | (tag.sum() != images) | (lengths.amin() == 0)
    return found, lengths, wrong


def additive_mask(positions: Tensor, end: int, dtype: torch.dtype) -> Tensor:
    """Return the mask (B, 1, n, end) that lets a token at position p see positions 0 to p: 0 or -inf."""
    seen = torch.arange(end, device=positions.device) <= positions[:, None, :, None]
    return torch.zeros((), dtype=dtype, device=positions.device).masked_fill(~seen, float("-inf"))


def run_decoder(model: Any, embeds: Tensor, positions: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
    """Return the final hidden states (B, n, D) of n new tokens at `positions` (B, n).

    Not by the decoder's own `forward`, in which transformers chooses another mask, and so other attention
    kernels, while a graph is captured.
    """
    if mask is None and attention_of(model.config) != "sdpa":  # SDPA without a mask is causal
        mask = additive_mask(positions, positions.shape[1], embeds.dtype)
    run = model.runtime.decoder_layer or run_decoder_layer
    with repeatable_attention(embeds.device if mask is not None else None):
        return run_decoder_layers(model.get_model(), embeds, positions, cache, mask, run)


@contextmanager
def repeatable_attention(device: torch.device | None) -> Iterator[None]:
    """Leave out cuDNN's attention on CUDA, which with a mask gives other bits every time (torch 2.11, H200).

    Args:
        device: of the tensors; None changes nothing.
    """
    if device is None or device.type != "cuda":
        yield
        return
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


def last_of(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Return the hidden state (B, D) of the last token of every row of (B, S, D)."""
    return hidden.gather(1, (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]


def choose(head: Any, hidden: Tensor) -> Tensor:
    """Return the most likely token (B,) after hidden states (B, D); INVALID where logits are not finite."""
    best, chosen = head(hidden).max(-1)  # the maximum of a row with NaN is NaN
    return chosen.masked_fill(~torch.isfinite(best), INVALID)
