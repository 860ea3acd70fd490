"""Run a decoder with a method that prunes inside it: prefill with reductions, then cached decoding.

    run = prefill(model, rows, pruner, room=16)
    run.last                          # (B, D) hidden states that give the first token
    run.advance(embeds)               # (B, D) after one more token

The layers run as always, with SDPA or flash attention. At a stage, the few attention rows that the method
asks for are computed in addition, from the inputs of that one layer. Layers after a stage see fewer tokens,
so KV caches differ in length between spans of layers. Rows are padded on the left, and a method decides for
every row alone, so that batches give the answers of single prompts. Methods are in `llava.pruning.inside`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.prefix_cache import RoomyLayer
from llava.model.runtime.stages import repeatable_attention
from llava.model.transformers_compat import attention_of, run_decoder_layer
from llava.pruning import Pruner
from llava.pruning.inside import DecoderPruner, DecoderState, Stage


def acts_inside(pruner: Pruner | None) -> bool:
    """Return whether a pruner acts inside the language model."""
    return pruner is not None and pruner.acts_in == "decoder"


@dataclass
class EmbeddedPrompt:
    """A prompt as the first layer gets it: text, at most one block of visual tokens, text.

    Attributes:
        embeds: (S, D).
        positions: (S,) int64.
        start: Place of the first visual token.
        count: Visual tokens.
        stages: Reductions of the block, by ascending layer; none leaves it whole.
        marked: (count,) bool, tokens that the method chose before the language model; None if unknown.
    """

    embeds: Tensor
    positions: Tensor
    start: int
    count: int
    stages: Sequence[Stage]
    marked: Tensor | None = None


@dataclass
class Sequences:
    """Tokens of a batch between two layers, padded on the left."""

    hidden: Tensor  # (B, S, D)
    mask: Tensor  # (B, S) int64, 0 at padding
    positions: Tensor  # (B, S) int64

    @classmethod
    def of(cls, rows: Sequence[Tensor], positions: Sequence[Tensor]) -> Sequences:
        """Pad rows (S_i, D) with their positions (S_i,)."""
        width = max(len(row) for row in rows)
        hidden = rows[0].new_zeros(len(rows), width, rows[0].shape[-1])
        mask = torch.zeros(len(rows), width, dtype=torch.int64, device=hidden.device)
        places = torch.zeros_like(mask)
        for number, (row, place) in enumerate(zip(rows, positions, strict=True)):
            if len(row):
                hidden[number, -len(row) :], places[number, -len(row) :] = row, place
                mask[number, -len(row) :] = 1
        return cls(hidden, mask, places)

    def row(self, number: int) -> tuple[Tensor, Tensor]:
        """Return hidden states (S_i, D) and positions (S_i,) of a row without padding."""
        real = self.mask[number].bool()
        return self.hidden[number, real], self.positions[number, real]


@dataclass
class Span:
    """Consecutive layers that see the same tokens, and their part of the KV cache."""

    layers: range
    held: list[RoomyLayer]  # of every layer
    mask: Tensor  # (B, L) int64 of the cached tokens, 0 at padding
    is_full: bool  # no padding
    next: Tensor  # (B, 1) int64, position of the next token


@dataclass
class Reduction:
    """What a stage did to one row."""

    stage: Stage
    ids: (
        Tensor  # visual tokens that are left: 0 to N - 1 entered the decoder, N and above were made, in order
    )
    new: Tensor | None  # (C, D) states of the tokens made here


@dataclass
class _Block:
    """The visual block of one row: `count` tokens from place `start` on, then `after` text tokens."""

    start: int
    count: int
    after: int
    stages: dict[int, Stage]  # by layer
    prepared: Tensor | None
    ids: Tensor  # (count,)
    made: int  # number of the next new token
    marked: Tensor | None  # (N,) bool of the tokens that entered the decoder

    def columns(self) -> slice:
        return slice(self.start, self.start + self.count)


class InsideRun:
    """One batch after its prefill.

    Attributes:
        last: (B, D) final hidden states of the prompts' last tokens.
        spans: the layers, by what they see.
        reductions: what every stage did, per row; none for rows without image.
    """

    def __init__(
        self, decoder: Any, spans: list[Span], last: Tensor, reductions: list[list[Reduction]]
    ) -> None:
        self.decoder, self.spans, self.last, self.reductions = decoder, spans, last, reductions

    def advance(self, embeds: Tensor) -> Tensor:
        """Append one token (B, 1, D) to every row; return its final hidden states (B, D)."""
        hidden = embeds
        for span in self.spans:
            span.mask = torch.cat([span.mask, span.mask.new_ones(len(span.mask), 1)], dim=1)
            hidden, _ = _run(self.decoder, span, hidden, span.next)
            span.next = span.next + 1
        return self.decoder.norm(hidden)[:, -1]

    def select(self, keep: Tensor) -> None:
        """Keep rows `keep` (int64) only."""
        for span in self.spans:
            span.mask, span.next = span.mask[keep], span.next[keep]
            for layer in span.held:
                layer.batch_select_indices(keep.to(layer.keys.device))


@torch.inference_mode()
def prefill(
    model: Any, rows: Sequence[Any], pruner: Pruner | None, room: int = 0, share: bool = False
) -> InsideRun:
    """Run prompts through the decoder, reducing their visual blocks on the way.

    Args:
        rows: `decode.Row`, with at most one image each; with `places`, their positions have gaps.
        pruner: a method that acts here; others reduce nothing.
        room: tokens that can follow before the KV cache is copied.
        share: run text before the image and the image once for all rows of equal key and text, in the layers
            before the first reduction. Later layers see what the row's own question kept.

    Raises:
        ValueError: a prompt with several images, a sliding window that is shorter than a prompt, or a
            budget that the method cannot meet.
    """
    decoder = model.get_model()
    prompts = [_prompt(decoder, row, pruner) for row in rows]
    keys = [(row.key, row.ids[: one.start]) for row, one in zip(rows, prompts, strict=True)]
    return prefill_prompts(decoder, prompts, pruner, room, keys if share else None)


@torch.inference_mode()
def prefill_prompts(
    decoder: Any,
    prompts: Sequence[EmbeddedPrompt],
    pruner: Pruner | None,
    room: int = 0,
    keys: Sequence[Any] | None = None,
) -> InsideRun:
    """Run prompts through a decoder of the Llama kind (Mistral, Qwen2), as `prefill`.

    Args:
        decoder: Embeddings, `layers`, `norm` and `rotary_emb`, without a head.
        pruner: What made the stages of the prompts.
        room: tokens that can follow before the KV cache is copied.
        keys: of prompts up to their text after the image; equal ones are run once. None shares nothing.

    Raises:
        ValueError: a sliding window that is shorter than a prompt.
    """
    depth = len(decoder.layers)
    blocks = [_block(one, pruner) for one in prompts]
    check_window(decoder.config, max(len(one.embeds) for one in prompts) + room)
    cuts = sorted({layer for block in blocks if block is not None for layer in block.stages})
    bounds = [0, *cuts, depth]
    tokens = Sequences.of([one.embeds for one in prompts], [one.positions for one in prompts])
    total = tokens.positions[:, -1:] + 1  # (B, 1)
    contiguous = isinstance(pruner, DecoderPruner) and pruner.positions == "contiguous"
    spans: list[Span] = []
    reductions: list[list[Reduction]] = [[] for _ in prompts]
    entering = tokens.hidden
    with repeatable_attention(tokens.hidden.device):
        for begin, end in zip(bounds, bounds[1:], strict=False):
            if begin:
                tokens = _reduce(decoder, pruner, spans[-1], tokens, entering, blocks, reductions)
            following = tokens.mask.sum(1, keepdim=True) if contiguous else total
            shared = _shared(keys, blocks) if keys is not None and not begin and cuts else None
            if shared is None:
                span = _span(decoder, range(begin, end), tokens.mask, following, tokens.mask.shape[1] + room)
                hidden, entering = _run(decoder, span, tokens.hidden, tokens.positions)
            else:
                prefixes = [block.start + block.count for block in blocks if block is not None]
                span, hidden, entering = _run_shared(
                    decoder, range(end), tokens, shared, prefixes, following, room
                )
            tokens = Sequences(hidden, tokens.mask, tokens.positions)
            spans.append(span)
    return InsideRun(decoder, spans, decoder.norm(tokens.hidden[:, -1]), reductions)


def _prompt(decoder: Any, row: Any, pruner: Pruner | None) -> EmbeddedPrompt:
    """Embed a row, and find the stages of its visual block."""
    weight, depth = decoder.embed_tokens.weight, len(decoder.layers)
    if len(row.images) > 1:
        raise ValueError(
            f"a prompt has {len(row.images)} images, but methods inside the language model and original "
            "positions take one. Use a method that prunes before the language model."
        )
    start = row.ids.index(IMAGE_TOKEN_INDEX) if row.images else len(row.ids)
    ids = torch.tensor([one for one in row.ids if one >= 0], dtype=torch.int64, device=weight.device)
    before, after = decoder.embed_tokens(ids).split([start, len(ids) - start])
    visual = row.images[0].to(before) if row.images else before[:0]
    embeds = torch.cat([before, visual, after])
    stages = pruner.stages(depth, len(visual), row.crops) if isinstance(pruner, DecoderPruner) else []
    return EmbeddedPrompt(embeds, _positions(embeds, row), start, len(visual), stages, row.marked)


def _block(prompt: EmbeddedPrompt, pruner: Pruner | None) -> _Block | None:
    """Return the visual block that a method reduces, None if there is nothing to reduce."""
    if not prompt.stages or not isinstance(pruner, DecoderPruner):
        return None
    _, visual, after = prompt.embeds.split(
        [prompt.start, prompt.count, len(prompt.embeds) - prompt.start - prompt.count]
    )
    return _Block(
        prompt.start,
        prompt.count,
        len(after),
        {stage.layer: stage for stage in prompt.stages},
        pruner.prepare(visual, after) if len(after) else None,
        torch.arange(prompt.count, device=visual.device),
        prompt.count,
        prompt.marked,
    )


def _positions(embeds: Tensor, row: Any) -> Tensor:
    """Return the positions (S,) of a prompt's tokens."""
    every = torch.arange(len(embeds), device=embeds.device)
    if row.places is None or not row.images:
        return every
    start, count = row.ids.index(IMAGE_TOKEN_INDEX), len(row.images[0])
    every[start + count :] += row.span - count
    every[start : start + count] = start + row.places.to(every)
    return every


def check_window(config: Any, length: int) -> None:
    """Raise `ValueError` if a sliding window is shorter than a prompt with its answer."""
    window = getattr(config, "sliding_window", None)
    if window is not None and length > window:
        raise ValueError(
            f"config.json: sliding_window is {window}, and prompt and answer have {length} tokens. Methods "
            "inside the language model need all of them in every layer. Shorten the prompt, or use a method "
            "that prunes before the language model."
        )


def _span(decoder: Any, layers: range, mask: Tensor, following: Tensor, length: int) -> Span:
    """Return a span with an empty cache that has room for `length` tokens."""
    held = []
    for number in layers:
        attention = decoder.layers[number].self_attn
        heads = attention.k_proj.out_features // attention.head_dim
        shape = (len(mask), heads, length, attention.head_dim)
        weight = decoder.embed_tokens.weight  # has the dtype of the states
        buffers = [weight.new_empty(shape, device=attention.k_proj.weight.device) for _ in range(2)]
        held.append(RoomyLayer(*buffers, 0, 0))
    return Span(layers, held, mask, bool(mask.all()), following)


def _run(decoder: Any, span: Span, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Run new tokens (B, n, D) through a span; return its output and what entered its last layer."""
    rotary = decoder.rotary_emb(hidden, position_ids=positions)
    mask = _mask(decoder.config, span, hidden)
    entering = hidden
    for number, held in zip(span.layers, span.held, strict=True):
        entering = hidden
        # No positions: flash attention would take gaps in them for several sequences in one row.
        hidden = run_decoder_layer(decoder.layers[number], hidden, mask, rotary, None, held)
    return hidden, entering


def _mask(config: Any, span: Span, hidden: Tensor) -> Tensor | None:
    """Return the mask that a layer takes: each of the n tokens of `hidden`, the last cached ones, is causal.

    (B, 1, n, L) to add to scores, (B, L) of padding for flash attention; None where a kernel needs none.
    """
    (new, length), kernels = (hidden.shape[1], span.mask.shape[1]), attention_of(config)
    if kernels.startswith("flash"):  # without a mask it takes gaps in positions for several packed prompts
        return None if span.is_full and new == 1 else span.mask
    if kernels == "sdpa" and span.is_full and new in (1, length):
        return None
    place = torch.arange(length, device=hidden.device)
    seen = (place[None, :] <= place[length - new :, None]) & span.mask.bool()[:, None, None, :]
    least = torch.finfo(hidden.dtype).min
    return torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~seen, least)


def _shared(keys: Sequence[Any], blocks: Sequence[_Block | None]) -> list[int] | None:
    """Return the first prompt that has the same key, of every prompt; None if nothing is shared."""
    if any(block is None or not block.after for block in blocks):
        return None
    seen: dict[Any, int] = {}
    found = [seen.setdefault(key, number) for number, key in enumerate(keys)]
    return None if len(seen) == len(keys) else found


def _run_shared(
    decoder: Any,
    layers: range,
    tokens: Sequences,
    prefix_of: Sequence[int],
    cuts: Sequence[int],
    following: Tensor,
    room: int,
) -> tuple[Span, Tensor, Tensor]:
    """Run the first span with every prefix computed once.

    Args:
        prefix_of: a row that has the same prefix, of every row.
        cuts: tokens of every row's prefix.

    Returns:
        The span of all rows, its output (B, S, D), and what entered its last layer after the prefixes.
    """
    whole = [tokens.row(number) for number in range(len(prefix_of))]
    firsts = list(dict.fromkeys(prefix_of))
    prefixes = Sequences.of(
        *zip(*([part[: cuts[one]] for part in whole[one]] for one in firsts), strict=True)
    )
    width = prefixes.mask.shape[1]
    span = _span(decoder, layers, prefixes.mask, following, width)
    before, _ = _run(decoder, span, prefixes.hidden, prefixes.positions)
    index = torch.tensor([firsts.index(one) for one in prefix_of], device=before.device)
    suffixes = Sequences.of(
        *zip(*([part[cut:] for part in row] for row, cut in zip(whole, cuts, strict=True)), strict=True)
    )
    mask = torch.cat([prefixes.mask[index], suffixes.mask], dim=1)
    held = []
    for layer in span.held:
        buffers = []
        for old in (layer.keys, layer.values):
            buffer = old.new_empty(len(index), old.shape[1], mask.shape[1] + room, old.shape[3])
            buffer[:, :, :width] = old[index.to(old.device)]
            buffers.append(buffer)
        held.append(RoomyLayer(*buffers, 0, width))
    span = Span(layers, held, mask, bool(mask.all()), following)
    after, entering = _run(decoder, span, suffixes.hidden, suffixes.positions)
    rows = [
        torch.cat([before[one][prefixes.mask[one].bool()], after[number][suffixes.mask[number].bool()]])
        for number, one in enumerate(index.tolist())
    ]
    return span, Sequences.of(rows, [positions for _, positions in whole]).hidden, entering


def _reduce(
    decoder: Any,
    pruner: DecoderPruner,
    span: Span,
    tokens: Sequences,
    entering: Tensor,
    blocks: Sequence[_Block | None],
    reductions: list[list[Reduction]],
) -> Sequences:
    """Shorten the visual blocks that have a stage after `span`; update blocks and reductions."""
    layer = span.layers.stop
    rows, positions = [], []
    for number, block in enumerate(blocks):
        hidden, places = tokens.row(number)
        if block is not None and (stage := block.stages.get(layer)) is not None:
            state = _State(decoder, span, number, block, hidden, places, entering[number])
            reduced = pruner.reduce(stage, state)
            new = hidden[:0] if reduced.new is None else reduced.new
            if (len(reduced.kept), len(new)) != (stage.keep, stage.new):
                raise RuntimeError(
                    f"pruner {pruner.name!r} returned {len(reduced.kept)} kept and {len(new)} new tokens, "
                    f"expected {stage.keep} and {stage.new}"
                )
            start, rest = block.start, block.start + block.count
            kept = torch.cat([torch.arange(start, device=hidden.device), reduced.kept + start])
            hidden = torch.cat([hidden[kept], new, hidden[rest:]])
            if pruner.positions == "contiguous":
                places = torch.arange(len(hidden), device=hidden.device)
            else:
                places = torch.cat([places[kept], places[rest:]])
            made = torch.arange(block.made, block.made + len(new), device=hidden.device)
            block.ids = torch.cat([block.ids[reduced.kept], made])
            block.count, block.made = len(block.ids), block.made + len(new)
            reductions[number].append(Reduction(stage, block.ids, reduced.new))
        rows.append(hidden)
        positions.append(places)
    return Sequences.of(rows, positions)


class _State(DecoderState):
    """What a method reads about row `number` of a batch after a span."""

    def __init__(
        self,
        decoder: Any,
        span: Span,
        number: int,
        block: _Block,
        hidden: Tensor,
        positions: Tensor,
        entering: Tensor,
    ) -> None:
        """`hidden` (S, D) with `positions` (S,) is the row; the last tokens of `entering` are its text."""
        self._decoder, self._span, self._number, self._block = decoder, span, number, block
        self._hidden, self._positions, self._entering = hidden, positions, entering
        self.prepared, self.start, self.marked = block.prepared, block.start, block.marked
        self.visual = hidden[block.columns()]
        self.text = hidden[block.start + block.count :]

    def attention(self, rows: Tensor | None = None, ahead: bool = False, level: bool = False) -> Tensor:
        """Return attention (R, n) of the rows to the visual block (see `DecoderState`)."""
        length, device = len(self._hidden), self._hidden.device
        if rows is None:
            from_end = torch.ones(1, dtype=torch.int64, device=device)
        else:
            from_end = self._block.after - rows
        layer = self._decoder.layers[self._span.layers.stop - (not ahead)]
        source = self._hidden if ahead else self._entering
        positions = self._positions[length - from_end]
        queries = self._rotated(layer, "q_proj", source[len(source) - from_end], positions)  # (H, R, d)
        if ahead:
            keys = self._rotated(layer, "k_proj", self._hidden, self._positions)
        else:
            keys = self._cached_keys()
        if level:
            keys, block = keys.clone(), self._block.columns()
            keys[:, block] = self._turned(keys[:, block], positions - self._positions[block])
            keys[:, block] /= self._decoder.rotary_emb.attention_scaling  # which they had already
        group = queries.shape[0] // keys.shape[0]  # query heads that share a key head
        shape = (keys.shape[0], group, *queries.shape[1:])
        scores = queries.float().view(shape) @ keys.float().transpose(1, 2)[:, None]  # (Hkv, group, R, S)
        scores = scores.flatten(0, 1) * layer.self_attn.scaling
        later = torch.arange(length, device=device)[None, :] > (length - from_end)[:, None]
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        return weights[:, :, self._block.columns()].mean(0)

    def keys(self) -> Tensor:
        """Return the rotated keys (n + T, W) of the last layer."""
        return self._cached_keys()[:, self._block.start :].transpose(0, 1).flatten(1)

    def normed(self) -> Tensor:
        """Return the states (n + T, D) after the final norm."""
        return self._decoder.norm(self._hidden[self._block.start :])

    def _cached_keys(self) -> Tensor:
        """Return the rotated keys (Hkv, S, d) of the last layer that ran."""
        keys = self._span.held[-1].keys[self._number].to(self._hidden.device)
        return keys[:, self._span.mask[self._number].bool()]

    def _rotated(self, layer: Any, projection: str, hidden: Tensor, positions: Tensor) -> Tensor:
        """Return queries or keys (H, R, d) of states (R, D) that enter a layer."""
        attention = layer.self_attn
        found = getattr(attention, projection)(layer.input_layernorm(hidden))
        found = found.view(len(hidden), -1, attention.head_dim).transpose(0, 1).to(hidden.device)
        return self._turned(found, positions)

    def _turned(self, states: Tensor, positions: Tensor) -> Tensor:
        """Rotate queries or keys (H, R, d) by positions (R,)."""
        cos, sin = self._decoder.rotary_emb(states, position_ids=positions[None])
        first, second = states.chunk(2, dim=-1)
        return states * cos + torch.cat([-second, first], dim=-1) * sin
