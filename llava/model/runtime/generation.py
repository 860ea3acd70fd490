"""Greedy answers over the static cache: prefill, then one captured step per token.

Prompts are padded on the right: under a causal mask real tokens never see what follows them, so prompts of
nearby lengths share a graph. Between prompt and first token nothing waits for the device; what is wrong with
inputs is a flag that is read with the first token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.runtime.arena import Arena
from llava.model.runtime.stages import (
    INVALID,
    PADDING,
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
        state: (2, B) int64 on the device: the first new token of each row, INVALID for logits that are not
            finite; and the tokens of each prompt.
        longest: at least the greatest of them, known to the host.
        doubts: () bool each, on the device: True if the result may be wrong.
    """

    state: Tensor
    longest: int
    doubts: list[Tensor]


@_normal_mode
def prefill(
    model: Any, ids: Tensor, mask: Tensor | None, visual: Sequence[Tensor], longest: int, new: int
) -> tuple[Prompts, Arena]:
    """Compute the first new token of every prompt; keys and values are then in the returned arena.

    Args:
        ids: (B, L) int64 on any device, IMAGE_TOKEN_INDEX for every image, PADDING anywhere.
        mask: (B, L), False at padding; None: there is none besides PADDING.
        visual: (K, D) of every image, in reading order over the batch.
        longest: at least the tokens of the longest prompt, text and visual.
        new: tokens that may follow.
    """
    runtime, rows, width = model.runtime, len(ids), bucket(longest)
    arena = batch_arena(model, rows, max(width, longest + new))
    inputs, splice = _inputs(model, ids, mask, visual, width)
    head = model.get_output_embeddings()

    def first_tokens(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        embeds, lengths, wrong = splice(*inputs)
        positions = torch.arange(width, device=embeds.device).expand(rows, -1)
        hidden = run_decoder(model, embeds, positions, arena.cache(None, width, slice(rows)), None)
        return torch.stack([choose(head, last_of(hidden, lengths)), lengths]), wrong

    if rows * width <= MOST_CAPTURED:
        key = (width, *splice.keywords.values(), arena.version, arena.shape)
        found = runtime.run("prefill", key, first_tokens, *inputs, copies=False)
    else:
        found = first_tokens(*inputs)
    return Prompts(found[0], longest, [found[1]]), arena


def _inputs(
    model: Any, ids: Tensor, mask: Tensor | None, visual: Sequence[Tensor], width: int
) -> tuple[tuple[Tensor, ...], partial]:
    """Put prompts on the device; return them, and what makes embeddings of them (see `splice_on_device`)."""
    weight = model.get_input_embeddings().weight
    if mask is not None:
        ids = ids.masked_fill(~mask.bool(), PADDING)
    ids = torch.nn.functional.pad(ids, (0, -ids.shape[1] % 16), value=PADDING)
    counts = [len(one) for one in visual] or [0]
    total = sum(counts)
    if len(visual) == 1 and total == bucket(total) and visual[0].dtype == weight.dtype:
        tokens = visual[0]
    else:
        tokens = weight.new_empty(bucket(max(1, total)), weight.shape[1])
        if visual:
            torch.cat([one.to(tokens) for one in visual], out=tokens[:total])
    inputs = [ids.to(weight.device, non_blocking=True), tokens]
    if len(set(counts)) > 1:
        inputs.append(torch.tensor(counts).to(weight.device, non_blocking=True))
    equal = counts[0] if len(set(counts)) == 1 else None
    splice = partial(
        _splice, width=width, images=len(visual), each=equal, embed=model.get_model().embed_tokens
    )
    return tuple(inputs), splice


def _splice(
    ids: Tensor,
    tokens: Tensor,
    sizes: Tensor | None = None,
    *,
    width: int,
    images: int,
    each: int | None,
    embed: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    if sizes is None:
        sizes = torch.full((max(images, 1),), each, device=ids.device)
    return splice_on_device(ids, ids != PADDING, sizes, tokens, width, images, embed)


def batch_arena(model: Any, rows: int, room: int) -> Arena:
    """Return the arena for a batch of prompts and answers of `room` tokens."""
    arena = model.runtime.arena(model, "batch", padded_rows(rows), capacity(room))
    if rows == 1:
        arena.fit(1, arena.capacity)  # so that one row has the same places for all lengths
    return arena


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
    model: Any, prompts: Prompts, arena: Arena, new: int, stops: set[int]
) -> tuple[list[list[int]], list[int]]:
    """Decode up to `new` tokens of every prompt.

    Returns:
        Ids of every row, ending with the stop token or INVALID where there is one; and the prompts' lengths.

    Raises:
        Doubtful: a flag is set.
    """
    state, rows = prompts.state, prompts.state.shape[1]
    flags = [flag.to(state).view(1) for flag in prompts.doubts]
    read = torch.cat([state.flatten(), *flags]).tolist()  # the first look at the device
    if any(read[2 * rows :]):
        arena.dirty = True
        raise Doubtful
    chosen, lengths = read[:rows], read[rows : 2 * rows]
    said: list[list[int]] = [[] for _ in range(rows)]
    alive, ended = list(range(rows)), set()
    state = torch.nn.functional.pad(state, (0, padded_rows(rows) - rows))
    for number in range(new):
        for line, token in zip(alive, chosen, strict=False):  # rows that fill the batch up come last
            said[line].append(token)
            if token in stops or token == INVALID:
                ended.add(line)
        left = [place for place, line in enumerate(alive) if line not in ended]
        if number + 1 == new or not left:
            break
        if padded_rows(len(left)) * 2 <= state.shape[1] and new - number > _FEW_STEPS:
            keep = left + left[:1] * (padded_rows(len(left)) - len(left))
            index = torch.tensor(keep, device=state.device)
            arena.keep(index)
            state, alive = state[:, index], [alive[one] for one in left]
        state = _step(model, arena, state, prompts.longest + number + 1)
        chosen = state[0].tolist()
    if any(INVALID in ids for ids in said):
        arena.dirty = True
    return [_ended(ids, stops) for ids in said], lengths


def _ended(ids: list[int], stops: set[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in stops or token == INVALID:
            return ids[: place + 1]
    return ids


def _step(model: Any, arena: Arena, state: Tensor, reach: int) -> Tensor:
    """Decode one token of all rows.

    Args:
        state: (2, B) int64, the last token and its position, all positions below `reach`.

    Returns:
        The next tokens and positions (2, B), which the next step overwrites.
    """
    head, end = model.get_output_embeddings(), min(window(reach), arena.shape[1])

    def step(state: Tensor) -> Tensor:
        hidden = step_hidden(model, arena, state[0], state[1], end)
        return torch.stack([choose(head, hidden), state[1] + 1])

    key = (end, arena.version, arena.shape)
    return model.runtime.run("decoding step", key, step, state, copies=False)


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
    ids = _right_padded([row.ids for row in rows])
    visual = [image for row in rows for image in row.images]
    with model.runtime.lock:
        prompts, arena = prefill(model, ids, None, visual, max(row.length for row in rows), new)
        return answer(model, prompts, arena, new, stops)[0]


def _right_padded(lines: Sequence[Sequence[int]], value: int = PADDING) -> Tensor:
    """Return ids (B, L) on the CPU."""
    width = max(map(len, lines))
    return torch.tensor([[*line, *[value] * (width - len(line))] for line in lines])


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
    _prefixes(model, source, _right_padded(prefixes), visual, width)

    lengths = [begin + len(suffix) for begin, suffix in zip(begins, suffixes, strict=True)]
    room = max(max(lengths) + new, max(begins) + bucket(len(suffixes[-1]), 8), width)
    arena = batch_arena(model, len(rows), room)
    arena.spread(source, torch.tensor(place).to(device, non_blocking=True))
    state = torch.tensor([lengths, lengths]).to(device, non_blocking=True)
    for start, end in groups:
        part, ids = slice(start, end), _right_padded(suffixes[start:end], 0)
        captured = ids.numel() <= _MOST_OF_SUFFIXES
        if captured:
            ids = torch.nn.functional.pad(ids, (0, bucket(ids.shape[1], 8) - ids.shape[1]))
        counts = torch.tensor([len(suffix) for suffix in suffixes[start:end]])
        at = torch.tensor(begins[start:end])
        reach = min(arena.shape[1], -(-(max(begins[start:end]) + ids.shape[1]) // 16) * 16)
        inputs = [one.to(device, non_blocking=True) for one in (ids, at, counts)]
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
            state[0, part] = runtime.run("suffixes", key, answers, *inputs, copies=False)
        else:
            state[0, part] = answers(*inputs)
    return answer(model, Prompts(state, max(lengths), []), arena, new, stops)[0]


def _prefixes(model: Any, arena: Arena, ids: Tensor, visual: Sequence[Tensor], width: int) -> None:
    """Write keys and values of prefixes (text, then an image) into `arena`."""
    inputs, splice = _inputs(model, ids, None, visual, width)

    def run(*inputs: Tensor) -> Tensor:
        embeds = splice(*inputs)[0]
        positions = torch.arange(width, device=embeds.device).expand(len(ids), -1)
        return run_decoder(model, embeds, positions, arena.cache(None, width), None)[:, -1, :1]

    if len(ids) * width <= MOST_CAPTURED:
        key = ("prefixes", width, *splice.keywords.values(), arena.version, arena.shape)
        model.runtime.run("prefill", key, run, *inputs, copies=False)
    else:
        run(*inputs)
