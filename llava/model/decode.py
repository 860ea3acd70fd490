"""Decoding: prompts and visual tokens in, new token ids out.

`generate` calls the model's own `generate` and handles everything (sampling, beams, text-only rows).
`generate_shared` is greedy only: it prefills the prompt up to and including the image once per image, copies
the KV cache to each of the image's questions, and computes only their short suffixes. Both give the same ids
in float32. With a method that prunes inside the language model, both are greedy, and what is shared is less
(see `inside`). `Decoding` alone decides: of the checkpoint's generation_config.json, only the ids that end an
answer are used. Independent of files and benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.inside import InsideRun, acts_inside, prefill
from llava.model.runtime.generation import Doubtful, answer_rows, answer_shared
from llava.model.runtime.stages import INVALID, repeatable_attention
from llava.pruning import Pruner

ROOM = 16  # tokens of an answer that the copied cache has room for from the start
TOP_K = 50  # of sampling: transformers' default, which LLaVA's scripts leave as it is
# Settings of generation_config.json that change answers, with the values that change nothing besides None.
_SAMPLING = {
    "top_k": (TOP_K,),
    "top_p": (1,),
    "min_p": (0,),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
_BEAMS = {
    "length_penalty": (1,),
    "early_stopping": (False,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "constraints": (),
    "force_words_ids": (),
}
ALWAYS = {
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "sequence_bias": (),
    "exponential_decay_length_penalty": (),
    "stop_strings": (),
    "max_time": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "token_healing": (False,),
}
# Arguments of `generate` for which None means off, not the checkpoint's value.
SWITCHES = frozenset({*_SAMPLING, "repetition_penalty", "no_repeat_ngram_size"})


@dataclass(frozen=True)
class Decoding:
    """Decoding settings; temperature 0 is greedy (or beam) search. What is not listed here is off."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 and self.num_beams == 1

    def arguments(self) -> dict[str, Any]:
        """Return keyword arguments for `model.generate`."""
        sample = self.temperature > 0
        return {
            "do_sample": sample,
            "temperature": self.temperature if sample else None,
            "top_p": self.top_p if sample else None,
            "top_k": self.top_k,
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
            "use_cache": True,
        }

    @property
    def top_k(self) -> int | None:
        """Most likely tokens that sampling draws from."""
        return TOP_K if self.temperature > 0 else None

    def unused(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries of generation_config.json that would change these answers if they were used."""
        known = ALWAYS | (_SAMPLING if self.temperature > 0 else {}) | (_BEAMS if self.num_beams > 1 else {})
        if self.top_p is not None:  # given, so the stored one is overridden
            known.pop("top_p", None)
        return {
            name: stored[name]
            for name, neutral in known.items()
            if stored.get(name) is not None and stored[name] not in neutral
        }


@dataclass(frozen=True)
class Row:
    """One prompt: ids with IMAGE_TOKEN_INDEX in place of the image, and that image's visual tokens."""

    ids: tuple[int, ...]
    # (K, D) projected tokens; one for each of several images (only `generate`); None for a text-only prompt
    visual: Tensor | tuple[Tensor, ...] | None
    key: Any = None  # rows of equal key have the same `visual`
    crops: int = 1  # of the image, by which the budget of a method inside the language model is multiplied
    marked: Tensor | None = None  # (K,) bool, tokens that such a method chose before the language model
    # (K,) int64, places of the visual tokens among `span` that the unpruned image has; None: contiguous
    places: Tensor | None = None
    span: int = 0

    @property
    def length(self) -> int:
        """Tokens of the prompt, text and visual."""
        return len(self.ids) - self.ids.count(IMAGE_TOKEN_INDEX) + sum(map(len, self.images))

    @property
    def images(self) -> tuple[Tensor, ...]:
        """Visual tokens of every image."""
        if self.visual is None:
            return ()
        return self.visual if isinstance(self.visual, tuple) else (self.visual,)


def can_share(rows: Sequence[Row], decoding: Decoding) -> bool:
    """Return True if `generate_shared` is exact for these rows and at least two share a prefix."""
    one_image = all(row.ids.count(IMAGE_TOKEN_INDEX) == 1 and row.visual is not None for row in rows)
    if not decoding.greedy or not one_image:
        return False
    return len({row.key for row in rows}) < len(rows)


def stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """Return the ids that end an answer, by the generation config, else the tokenizer."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    return id_set(found)


def id_set(ids: Any) -> set[int]:
    """Return the ids of an entry that is one id, several or None."""
    return set(ids if isinstance(ids, list | tuple) else [ids]) - {None}


@contextmanager
def only_asked(model: Any, tokenizer: Any) -> Iterator[None]:
    """Set aside the checkpoint's generation settings, except for the ids that begin and end an answer.

    `generate` of transformers fills in whatever it is not given from `model.generation_config`.
    """
    from transformers import GenerationConfig

    stored = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=getattr(stored, "bos_token_id", None),
        eos_token_id=sorted(stop_ids(model, tokenizer)) or None,
    )
    try:
        yield
    finally:
        model.generation_config = stored


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, rows: Sequence[Row], decoding: Decoding, pruner: Pruner | None = None
) -> list[list[int] | None]:
    """Decode all rows, by captured stages or by one call of `model.generate`, left-padded.

    Args:
        pruner: of the setting; matters only if it acts inside the language model.

    Returns:
        New token ids per row, without the stop token; None for a row with NaN or infinite logits.

    Raises:
        ValueError: sampling or beams with a method that acts inside the language model.
    """
    from transformers import LogitsProcessorList

    stops = stop_ids(model, tokenizer)
    if runs_inside(rows, pruner):
        check_greedy(pruner, decoding)
        return _texts(stops, generate_inside(model, rows, pruner, decoding.max_new_tokens, stops))
    if decoding.greedy and _is_captured(model):
        with suppress(Doubtful):
            return _texts(stops, answer_rows(model, rows, decoding.max_new_tokens, stops))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)  # (B, L)
    mask = torch.zeros_like(ids)
    for line, row in enumerate(rows):
        ids[line, width - len(row.ids) :] = torch.tensor(row.ids)
        mask[line, width - len(row.ids) :] = 1
    visual = [image for row in rows for image in row.images]
    with only_asked(model, tokenizer):
        new = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            visual=visual or None,
            **({"pruner": None} if acts_inside(getattr(model, "pruner", None)) else {}),
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([check := FiniteCheck()]),
            **decoding.arguments(),
        )
    finite = check.rows(len(rows))
    return [
        until_stop(line, stops) if valid else None for line, valid in zip(new.tolist(), finite, strict=True)
    ]


class FiniteCheck:
    """A logits processor that remembers, on the device, which rows had NaN or infinite logits.

    Such rows get equal logits, because drawing from NaN raises an error on a CPU and ends the CUDA context on
    a GPU, with all other rows of the batch. Other rows are unchanged.
    """

    finite: Tensor | None = None

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        now = torch.isfinite(scores.max(-1).values)  # the maximum of a row with NaN is NaN
        self.finite = now if self.finite is None else self.finite & now
        return scores.masked_fill(~now[:, None], 0.0)

    def rows(self, count: int) -> list[bool]:
        """Return one value per row; a row may have several beams."""
        if self.finite is None:
            return [True] * count
        return self.finite.view(count, -1).all(1).tolist()


@torch.inference_mode()
def generate_shared(
    model: Any, tokenizer: Any, rows: Sequence[Row], decoding: Decoding, pruner: Pruner | None = None
) -> list[list[int] | None]:
    """Decode all rows greedily, prefilling each shared prefix (text and image) once.

    Prefixes and suffixes are left-padded; positions count real tokens only, so padding changes nothing.
    Suffixes are computed in groups of similar length where that saves more than it costs, and finished
    sequences leave the batch.

    Args:
        rows: Prompts with exactly one image each (see `can_share`).
        pruner: of the setting. If it acts inside the language model, only the layers before its first
            reduction are shared.

    Returns:
        New token ids per row, without the stop token; None for a row with NaN or infinite logits.
    """
    from transformers import DynamicCache

    from llava.model.prefix_cache import is_plain, join, spread

    decoder, head = model.get_model(), model.get_output_embeddings()
    embed, device, stops = decoder.embed_tokens, model.device, stop_ids(model, tokenizer)
    if runs_inside(rows, pruner):
        return _texts(stops, generate_inside(model, rows, pruner, decoding.max_new_tokens, stops, share=True))
    at = [row.ids.index(IMAGE_TOKEN_INDEX) for row in rows]
    order = sorted(range(len(rows)), key=lambda line: len(rows[line].ids) - at[line])  # short suffixes first
    rows, at = [rows[line] for line in order], [at[line] for line in order]
    lengths = [len(row.ids) - cut - 1 for row, cut in zip(rows, at, strict=True)]  # of suffixes
    if lengths[0] and _is_captured(model):
        groups = cut_by_length(lengths, _cost_of_a_group(device))
        found = _texts(stops, answer_shared(model, rows, groups, decoding.max_new_tokens, stops))
        return [found[order.index(line)] for line in range(len(rows))]
    prefix_of: dict[tuple[Any, tuple[int, ...]], int] = {}
    place = [
        prefix_of.setdefault((row.key, row.ids[:cut]), len(prefix_of))
        for row, cut in zip(rows, at, strict=True)
    ]
    first = [place.index(number) for number in range(len(prefix_of))]  # a row of each prefix

    before = [embed(_ids(rows[line].ids[: at[line]], device)) for line in first]
    pieces = [torch.cat([text, rows[line].visual.to(text)]) for text, line in zip(before, first, strict=True)]
    embeds, mask = _left_pad(pieces)  # (P, Lp, D), (P, Lp)
    cache = DynamicCache(config=model.config)
    hidden = _forward(decoder, embeds, mask, mask.cumsum(1) - 1, cache)[:, -1]

    index = torch.tensor(place, device=device)
    suffixes = [_ids(row.ids[cut + 1 :], device) for row, cut in zip(rows, at, strict=True)]
    longest, room = lengths[-1], lengths[-1] + min(decoding.max_new_tokens, ROOM)
    plain, prefix_width = is_plain(cache), mask.shape[1]
    cuts = cut_by_length(lengths, _cost_of_a_group(device)) if plain else [(0, len(rows))]
    groups = [(start, end, longest - lengths[end - 1]) for start, end in cuts]
    caches = spread(cache, index, room, groups) if plain else spread(cache, index, room) or [cache]
    mask = torch.cat([mask[index], mask.new_zeros(len(rows), longest)], dim=1)
    seen = mask.sum(1, keepdim=True)  # (B, 1) real tokens so far
    last = hidden[index]
    for (start, end, shift), part in zip(groups, caches, strict=True):
        embeds, suffix_mask = _left_pad(
            [embed(suffix) for suffix in suffixes[start:end]]
        )  # (b, Lc, D), (b, Lc)
        whole = mask.new_zeros(end - start, prefix_width + longest)
        whole[:, shift : shift + prefix_width] = mask[start:end, :prefix_width]
        whole[:, shift + prefix_width :] = suffix_mask
        mask[start:end] = whole
        if not embeds.shape[1]:
            continue
        positions = seen[start:end] + suffix_mask.cumsum(1) - 1
        found = _forward(decoder, embeds, whole[:, shift:], positions, part)[:, -1]
        # (a row without suffix continues where its prefix ended)
        last[start:end] = torch.where(suffix_mask.any(1, keepdim=True), found, last[start:end])
        seen[start:end] += suffix_mask.sum(1, keepdim=True)
    if plain:
        join(cache, prefix_width + longest)
    del caches

    def advance(chosen: Tensor) -> Tensor:
        nonlocal mask, seen
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        hidden = _forward(decoder, embed(chosen)[:, None], mask, seen, cache)[:, -1]
        seen = seen + 1
        return hidden

    def select(keep: Tensor) -> None:
        nonlocal mask, seen
        for layer in cache.layers:
            layer.batch_select_indices(keep)
        mask, seen = mask[keep], seen[keep]

    said = _greedily(head, last, advance, select, decoding.max_new_tokens, stops)
    found = _texts(stops, said)
    return [found[order.index(line)] for line in range(len(rows))]


@torch.inference_mode()
def generate_inside(
    model: Any,
    rows: Sequence[Row],
    pruner: Pruner | None,
    max_new_tokens: int,
    stops: set[int],
    share: bool = False,
) -> list[list[int]]:
    """Decode all rows greedily with a method that prunes inside the language model, or at given places.

    Args:
        share: Run each shared prefix once in the layers before the first reduction.

    Returns:
        New token ids per row, with the stop token; INVALID for a token whose logits are not finite.
    """
    run = prefill(model, rows, pruner, min(max_new_tokens, ROOM), share)
    return answer_inside(model, run, max_new_tokens, stops)


@torch.inference_mode()
def answer_inside(
    model: Any,
    run: InsideRun,
    max_new_tokens: int,
    stops: set[int],
    heard: Callable[[Tensor], None] | None = None,
) -> list[list[int]]:
    """Decode greedily after a prefill of `inside`; returns what `generate_inside` does.

    Args:
        model: Has the embeddings of new tokens and the head.
        heard: Is called with the tokens (B,) of every step.
    """
    embed = model.get_input_embeddings()

    def advance(chosen: Tensor) -> Tensor:
        return run.advance(embed(chosen)[:, None])

    head = model.get_output_embeddings()
    return _greedily(head, run.last, advance, run.select, max_new_tokens, stops, heard)


def runs_inside(rows: Sequence[Row], pruner: Pruner | None) -> bool:
    """Return whether rows need `generate_inside`, for the method or for their positions."""
    return acts_inside(pruner) or any(row.places is not None for row in rows)


def check_greedy(pruner: Pruner | None, decoding: Decoding) -> None:
    """Raise `ValueError` unless decoding is greedy, which `generate_inside` needs."""
    if not decoding.greedy:
        why = "positions: 'original'"
        if acts_inside(pruner):
            why = f"{pruner.name}: prunes inside the language model"
        raise ValueError(
            f"{why}, where only greedy decoding is supported, got temperature {decoding.temperature:g} and "
            f"{decoding.num_beams} beams. Set temperature 0 and 1 beam."
        )


def _greedily(
    head: Any,
    last: Tensor,
    advance: Callable[[Tensor], Tensor],
    select: Callable[[Tensor], None],
    max_new_tokens: int,
    stops: set[int],
    heard: Callable[[Tensor], None] | None = None,
) -> list[list[int]]:
    """Return the most likely tokens of every row, with the stop token.

    Args:
        last: (B, D) final hidden states of the prompts.
        advance: Appends tokens (B,) to the rows; returns their final hidden states (B, D).
        select: Drops all rows except those of given indices (int64).
        heard: Is called with the tokens of every step, of the rows that are left.
    """
    said: list[list[int]] = [[] for _ in last]
    alive = list(range(len(said)))  # rows in the batch, ended ones too until they are many
    ended: set[int] = set()
    for step in range(max_new_tokens):
        best, chosen = head(last).max(-1)  # (B,) each; the maximum of a row with NaN is NaN
        chosen = torch.where(torch.isfinite(best), chosen, INVALID)
        if heard is not None:
            heard(chosen)
        for line, token in zip(alive, chosen.tolist(), strict=True):
            said[line].append(token)
            if token in stops or token == INVALID:
                ended.add(line)
        left = [place for place, line in enumerate(alive) if line not in ended]
        if step + 1 == max_new_tokens or not left:
            break
        if 2 * len(left) <= len(alive):  # halves: what is copied for it stays little
            keep = torch.tensor(left, device=last.device)
            select(keep)
            chosen, alive = chosen[keep], [alive[one] for one in left]
        last = advance(chosen.clamp(min=0))
    return said


def _is_captured(model: Any) -> bool:
    runtime = getattr(model, "runtime", None)  # models of other origin have none
    return runtime is not None and runtime.decodes(model)


def _texts(stops: set[int], said: Sequence[list[int]]) -> list[list[int] | None]:
    """Return ids without the stop token; None for a row with a token that is not one."""
    return [None if INVALID in ids else until_stop(ids, stops) for ids in said]


def _cost_of_a_group(device: torch.device) -> int:
    """Return the padded tokens that one more pass must save to pay for reading all weights once more."""
    return 48 if device.type == "cpu" else 320


def cut_by_length(lengths: Sequence[int], cost: int) -> list[tuple[int, int]]:
    """Cut ascending lengths into slices (start, end), each padded to its longest, at the least cost.

    The expense of a slice is its padded tokens plus `cost`, what one more pass costs in tokens.
    """
    best: list[tuple[int, int]] = [(0, 0)]  # of the first n lengths: (expense, start of the last slice)
    for end in range(1, len(lengths) + 1):
        best.append(
            min((best[start][0] + (end - start) * lengths[end - 1] + cost, start) for start in range(end))
        )
    slices, end = [], len(lengths)
    while end:
        start = best[end][1]
        slices.append((start, end))
        end = start
    return slices[::-1]


def _forward(decoder: Any, embeds: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """Return the final hidden states (B, L, D) of the new tokens; the cache grows by L."""
    with repeatable_attention(embeds.device):
        return decoder(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions.clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state


def _ids(ids: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(ids, dtype=torch.long, device=device)  # (L,), L = 0 included


def _left_pad(pieces: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad [(L_i, D)] with zeros on the left to (B, L, D); return it with its mask (B, L) of 0 and 1."""
    width = max(len(piece) for piece in pieces)
    out = pieces[0].new_zeros(len(pieces), width, pieces[0].shape[-1])
    mask = torch.zeros(len(pieces), width, dtype=torch.long, device=out.device)
    for line, piece in enumerate(pieces):
        out[line, width - len(piece) :] = piece
        mask[line, width - len(piece) :] = 1
    return out, mask


def until_stop(ids: list[int], stops: set[int]) -> list[int]:
    """Return the ids before the first one that ends an answer."""
    for place, token in enumerate(ids):
        if token in stops:
            return ids[:place]
    return ids
