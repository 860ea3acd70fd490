"""Greedy answers over the static cache: prefill, then one captured step per token.

Prompts are padded on the right: under a causal mask real tokens never see what follows them, so prompts of
nearby lengths share a graph. Between prompt and first token nothing waits for the device; what is wrong with
inputs is a flag that is read with the first token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.runtime.arena import Arena
from llava.model.runtime.stages import (
    INVALID,
    additive_mask,
    bucket,
    choose,
    last_of,
    run_decoder,
    splice_on_device,
)

MOST_CAPTURED = 4096  # tokens of a prefill: with more, computing takes longer than launching
_MOST_OF_SUFFIXES = 1024  # tokens of suffixes: their shapes repeat less
_WINDOW = 128  # positions that a step attends to are a multiple of this
_FEW_STEPS = 8  # with fewer steps left, shrinking the batch costs more than it saves


def _normal_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run without gradients, but with tensors of the usual kind in every mode of the caller.

    Compiled code distinguishes tensors that were made under `torch.inference_mode`, and graphs write into
    buffers in any mode.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run


class Doubtful(Exception):
    """Inputs that the careful way has to judge: it raises an error, or computes rare cases."""


@dataclass
class Prompts:
    """A batch after prefill.

    Attributes:
        tokens: (B,) int64 on the device, the first new token of each row, INVALID for logits that are not
            finite.
        lengths: (B,) int64 on the device, tokens of each prompt.
        longest: at least the greatest of them, known to the host.
        doubts: () bool each, on the device: True if the result may be wrong.
    """

    tokens: Tensor
    lengths: Tensor
    longest: int
    doubts: list[Tensor]


@_normal_mode
def prefill(
    model: Any, ids: Tensor, mask: Tensor | None, visual: Sequence[Tensor], longest: int, new: int
) -> tuple[Prompts, Arena]:
    """Compute the first new token of every prompt; keys and values are then in the returned arena.

    Args:
        ids: (B, L) int64 on any device, IMAGE_TOKEN_INDEX for every image.
        mask: (B, L) bool, False at padding; None: there is none.
        visual: (K, D) of every image, in reading order over the batch.
        longest: at least the tokens of the longest prompt, text and visual.
        new: tokens that may follow.
    """
    runtime, (device, dtype) = model.runtime, _place(model)
    rows, length = ids.shape
    padded = -(-length // 16) * 16 - length
    if mask is None:
        mask = torch.ones(rows, length, dtype=torch.bool, device=ids.device)
    ids = torch.nn.functional.pad(ids, (0, padded)).to(device, non_blocking=True)
    mask = torch.nn.functional.pad(mask.bool(), (0, padded)).to(device, non_blocking=True)
    width, images = bucket(longest), len(visual)
    counts = [len(one) for one in visual] or [0]
    sizes = torch.tensor(counts).to(device, non_blocking=True)
    tokens = torch.empty(bucket(max(1, sum(counts))), model.config.hidden_size, dtype=dtype, device=device)
    if visual:
        torch.cat([one.to(tokens) for one in visual], out=tokens[: sum(counts)])
    arena = runtime.arena(model, "batch", padded_rows(rows), capacity(max(width, longest + new)))
    decoder, head = model.get_model(), model.get_output_embeddings()

    def first_tokens(ids: Tensor, mask: Tensor, sizes: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        embeds, lengths, wrong = splice_on_device(
            ids, mask, sizes, tokens, width, images, decoder.embed_tokens
        )
        positions = torch.arange(width, device=device).expand(rows, -1)
        hidden = run_decoder(model, embeds, positions, arena.cache(None, width, slice(rows)), None)
        return choose(head, last_of(hidden, lengths)), lengths, wrong

    inputs = (ids, mask, sizes, tokens)
    if rows * width <= MOST_CAPTURED:
        key = (width, images, arena.version, arena.shape)
        found = runtime.run("prefill", key, first_tokens, *inputs)
    else:
        found = first_tokens(*inputs)
    return Prompts(found[0], found[1], longest, [found[2]]), arena


def _place(model: Any) -> tuple[torch.device, torch.dtype]:
    weight = model.get_input_embeddings().weight
    return weight.device, weight.dtype


def padded_rows(rows: int) -> int:
    """Round the rows of a batch up to 1, 2, 3, 4, 6, 8 ... 16, 20 ... 32, 40 ...: at most a quarter more."""
    if rows <= 4:
        return rows
    step = max(2, (1 << (rows - 1).bit_length() - 1) // 4)
    return -(-rows // step) * step


def capacity(length: int) -> int:
    """Return the positions of the cache for prompts and answers of `length` tokens."""
    return -(-length // _WINDOW) * _WINDOW


@_normal_mode
def answer(
    model: Any, prompts: Prompts, arena: Arena, new: int, stops: set[int], doubts: Sequence[Tensor] = ()
) -> tuple[list[list[int]], list[int]]:
    """Decode up to `new` tokens of every prompt.

    Args:
        doubts: further flags (see `Prompts`), read with the first token.

    Returns:
        Ids of every row, ending with the stop token or INVALID where there is one; and the prompts' lengths.

    Raises:
        Doubtful: a flag is set.
    """
    rows, device = len(prompts.tokens), prompts.tokens.device
    flags = torch.stack([flag.to(device).view(()) for flag in [*prompts.doubts, *doubts]])
    read = torch.cat([prompts.tokens, prompts.lengths, flags.long()]).tolist()  # the first look at the device
    if any(read[2 * rows :]):
        arena.dirty = True
        raise Doubtful
    chosen, lengths = read[:rows], read[rows : 2 * rows]
    said: list[list[int]] = [[] for _ in range(rows)]
    alive, ended = list(range(rows)), set()
    extra = padded_rows(rows) - rows
    tokens = torch.nn.functional.pad(prompts.tokens, (0, extra))
    places = torch.nn.functional.pad(prompts.lengths, (0, extra))
    for number in range(new):
        for line, token in zip(alive, chosen, strict=False):  # rows that fill the batch up come last
            said[line].append(token)
            if token in stops or token == INVALID:
                ended.add(line)
        left = [place for place, line in enumerate(alive) if line not in ended]
        if number + 1 == new or not left:
            break
        if padded_rows(len(left)) * 2 <= len(tokens) and new - number > _FEW_STEPS:
            keep = left + left[:1] * (padded_rows(len(left)) - len(left))
            index = torch.tensor(keep, device=device)
            arena.keep(index)
            tokens, places, alive = tokens[index], places[index], [alive[one] for one in left]
        tokens, places = _step(model, arena, tokens, places, prompts.longest + number + 1)
        chosen = tokens.tolist()
    if any(INVALID in ids for ids in said):
        arena.wipe()
    return [_ended(ids, stops) for ids in said], lengths


def _ended(ids: list[int], stops: set[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in stops or token == INVALID:
            return ids[: place + 1]
    return ids


def _step(model: Any, arena: Arena, tokens: Tensor, places: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Decode one token (B,) of all rows at positions `places` (B,), all below `reach`."""
    head, end = model.get_output_embeddings(), min(window(reach), arena.shape[1])

    def step(tokens: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        return choose(head, step_hidden(model, arena, tokens, places, end)), places + 1

    key = (end, arena.version, arena.shape)
    return model.runtime.run("decoding step", key, step, tokens, places)


def step_hidden(model: Any, arena: Arena, tokens: Tensor, places: Tensor, end: int) -> Tensor:
    """Return hidden states (B, D) after tokens (B,) at positions `places` (B,), all below `end`."""
    embeds, at = model.get_model().embed_tokens(tokens.clamp(min=0))[:, None], places[:, None]
    mask = additive_mask(at, end, embeds.dtype)
    return run_decoder(model, embeds, at, arena.cache(at, end), mask)[:, -1]


def window(reach: int) -> int:
    """Return the positions that steps attend to while no token is past `reach`."""
    step = max(_WINDOW, (1 << reach.bit_length()) // 8)
    return -(-reach // step) * step


@_normal_mode
def answer_rows(model: Any, rows: Sequence[Any], new: int, stops: set[int]) -> list[list[int]]:
    """Answer `decode.Row`s greedily, nothing shared."""
    ids, mask = _right_padded([row.ids for row in rows])
    visual = [image for row in rows for image in row.images]
    with model.runtime.lock:
        prompts, arena = prefill(model, ids, mask, visual, max(row.length for row in rows), new)
        return answer(model, prompts, arena, new, stops)[0]


def _right_padded(lines: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return ids (B, L) and mask (B, L) on the CPU."""
    width = max(map(len, lines))
    ids = torch.tensor([[*line, *[0] * (width - len(line))] for line in lines])
    mask = torch.arange(width) < torch.tensor([len(line) for line in lines])[:, None]
    return ids, mask


@_normal_mode
def answer_shared(
    model: Any, rows: Sequence[Any], groups: Sequence[tuple[int, int]], new: int, stops: set[int]
) -> list[list[int]]:
    """Answer rows of one image each greedily, prefilling each prefix (text and image) once.

    Args:
        rows: in ascending order of their suffixes, none of which is empty.
        groups: (first row, last row + 1) of the suffixes that are computed together.
    """
    with model.runtime.lock:
        return _answer_shared(model, rows, groups, new, stops)


def _answer_shared(
    model: Any, rows: Sequence[Any], groups: Sequence[tuple[int, int]], new: int, stops: set[int]
) -> list[list[int]]:
    runtime, decoder = model.runtime, model.get_model()
    head, device = model.get_output_embeddings(), model.get_input_embeddings().weight.device
    cuts = [row.ids.index(IMAGE_TOKEN_INDEX) + 1 for row in rows]
    number: dict[Any, int] = {}
    place = [
        number.setdefault((row.key, row.ids[:cut]), len(number)) for row, cut in zip(rows, cuts, strict=True)
    ]
    first = [rows[place.index(one)] for one in range(len(number))]
    visual = [row.visual for row in first]
    prefixes = [row.ids[: row.ids.index(IMAGE_TOKEN_INDEX) + 1] for row in first]
    starts = [len(ids) - 1 + len(one) for ids, one in zip(prefixes, visual, strict=True)]
    begins = [starts[one] for one in place]  # where the suffix of a row begins
    suffixes = [row.ids[cut:] for row, cut in zip(rows, cuts, strict=True)]

    width = bucket(max(starts))
    source = runtime.arena(model, "prefixes", len(first), width)
    ids, mask = _right_padded(prefixes)
    _prefixes(
        model, source, ids.to(device, non_blocking=True), mask.to(device, non_blocking=True), visual, width
    )

    lengths = [begin + len(suffix) for begin, suffix in zip(begins, suffixes, strict=True)]
    room = max(max(lengths) + new, max(begins) + bucket(len(suffixes[-1]), 8), width)
    arena = runtime.arena(model, "batch", padded_rows(len(rows)), capacity(room))
    index = torch.tensor(place).to(device, non_blocking=True)
    arena.spread(source, index)
    tokens = torch.empty(len(rows), dtype=torch.long, device=device)
    for start, end in groups:
        part, ids = slice(start, end), _right_padded(suffixes[start:end])[0]
        ids = torch.nn.functional.pad(ids, (0, bucket(ids.shape[1], 8) - ids.shape[1]))
        counts = torch.tensor([len(suffix) for suffix in suffixes[start:end]])
        at = torch.tensor(begins[start:end])
        reach = -(-(max(begins[start:end]) + ids.shape[1]) // 16) * 16
        reach = min(reach, arena.shape[1])
        inputs = [one.to(device, non_blocking=True) for one in (ids, at, counts)]
        captured = ids.numel() <= _MOST_OF_SUFFIXES
        same = begins[start] if not captured and len(set(begins[start:end])) == 1 else None

        def answers(ids: Tensor, at: Tensor, counts: Tensor, part=part, reach=reach, same=same) -> Tensor:
            positions = at[:, None] + torch.arange(ids.shape[1], device=ids.device)
            embeds = decoder.embed_tokens(ids)
            cache = arena.cache(positions if same is None else same, reach, part)
            mask = additive_mask(positions, reach, embeds.dtype)
            hidden = run_decoder(model, embeds, positions, cache, mask)
            return choose(head, last_of(hidden, counts))

        if captured:
            key = (start, end, reach, arena.version, arena.shape)
            tokens[part] = runtime.run("suffixes", key, answers, *inputs)
        else:
            tokens[part] = answers(*inputs)
    prompts = Prompts(tokens, torch.tensor(lengths).to(device, non_blocking=True), max(lengths), [])
    return answer(model, prompts, arena, new, stops, [torch.zeros((), dtype=torch.bool, device=device)])[0]


def _prefixes(
    model: Any, arena: Arena, ids: Tensor, mask: Tensor, visual: Sequence[Tensor], width: int
) -> None:
    """Write keys and values of prefixes (text, then an image) into `arena`."""
    decoder, (device, dtype) = model.get_model(), _place(model)
    counts = [len(one) for one in visual]
    sizes = torch.tensor(counts).to(device, non_blocking=True)
    tokens = torch.empty(bucket(max(1, sum(counts))), model.config.hidden_size, dtype=dtype, device=device)
    torch.cat([one.to(tokens) for one in visual], out=tokens[: sum(counts)])

    def run(ids: Tensor, mask: Tensor, sizes: Tensor, tokens: Tensor) -> Tensor:
        embeds, lengths, _ = splice_on_device(
            ids, mask, sizes, tokens, width, len(visual), decoder.embed_tokens
        )
        positions = torch.arange(width, device=device).expand(len(ids), -1)
        return run_decoder(model, embeds, positions, arena.cache(None, width), None)[:, -1, :1]

    if ids.shape[0] * width <= MOST_CAPTURED:
        key = ("prefixes", width, len(visual), arena.version, arena.shape)
        model.runtime.run("prefill", key, run, ids, mask, sizes, tokens)
    else:
        run(ids, mask, sizes, tokens)
