"""transformers' `generate` over captured stages: sampling, streamers, stopping criteria, penalties.

The search stays with transformers, so all of its arguments work. It is given a `CapturedCache`, for which
`forward` replays the captured prefill and decoding step. Beams, batches of several prompts, assistants and
whatever else needs more than the logits of the last token are eager.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.model.runtime.generation import MOST_CAPTURED, batch_arena, step_hidden, window
from llava.model.runtime.stages import bucket, last_of, run_decoder

# what needs more than the logits of one token after the other, and inputs that do not
_OTHER_WAYS = ("past_key_values", "custom_generate", "assistant_model", "position_ids")
_INPUTS = {
    *("inputs_embeds", "attention_mask", "position_ids", "cache_position"),
    *("past_key_values", "use_cache", "logits_to_keep"),
}
_OTHER_SETTINGS = ("output_attentions", "output_hidden_states", "cache_implementation", "prefill_chunk_size")


class CapturedCache(DynamicCache):
    """Keys and values of one prompt and its answer in the runtime's arena, for one call of `generate`."""

    is_compileable = False  # the stages are captured here

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model
        self._arena: Any = None
        self._length = 0
        self._place, self._finite = torch.zeros(1), torch.ones(())

    def get_seq_length(self, *_: Any) -> int:
        """Return the tokens in the cache, without a look at the device."""
        return self._length

    def take(self, room: int) -> None:
        """Take the arena for a prompt and an answer of `room` tokens; it grows if they are more."""
        arena = batch_arena(self._model, 1, room)
        arena.dirty = True  # until `finish`: what fails in between may leave NaN
        self._arena = arena

    def finish(self) -> None:
        """Give the arena back."""
        if self._arena is not None:
            self._arena.dirty = not bool(self._finite)

    def copy(self) -> DynamicCache:
        """Return a cache that no later search writes into."""
        copy = DynamicCache()
        for number, (keys, values) in enumerate(self._held()):
            copy.update(keys, values, number)
        return copy

    def _held(self) -> list[tuple[Tensor, ...]]:
        layers = self._arena.views(*self._arena.shape)
        return [tuple(one[:, :, : self._length] for one in layer) for layer in layers]

    def logits(self, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        """Return logits (1, 1, V) of the token after a prompt (1, S, D), or after one more token (1, 1)."""
        if (self._length == 0) != (ids is None) or (ids is not None and ids.shape != (1, 1)):
            raise ValueError("past_key_values: a CapturedCache takes one prompt, then one token at a time.")
        with torch.inference_mode(False), torch.no_grad():  # graphs write into buffers in any mode
            found = self._prefill(embeds) if ids is None else self._step(ids)
        return found[:, None]

    def _prefill(self, embeds: Tensor) -> Tensor:
        model, arena, length = self._model, self._arena, embeds.shape[1]
        head, device, width = model.get_output_embeddings(), embeds.device, bucket(length)

        def prefill(embeds: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            positions = torch.arange(width, device=device)[None]
            hidden = run_decoder(model, embeds, positions, arena.cache(None, width), None)
            logits = head(last_of(hidden, lengths))
            return logits, torch.isfinite(logits.max())

        embeds = torch.nn.functional.pad(embeds, (0, 0, 0, width - length))
        self._place, self._length = torch.tensor([length]).to(device, non_blocking=True), length
        if width <= MOST_CAPTURED:
            key = ("logits", width, arena.version, arena.shape)
            logits, self._finite = model.runtime.run("prefill", key, prefill, embeds, self._place)
        else:
            logits, self._finite = prefill(embeds, self._place)
        return logits

    def _step(self, ids: Tensor) -> Tensor:
        model, arena = self._model, self._arena
        if self._length == arena.shape[1]:
            self._grow()
        head, end = model.get_output_embeddings(), min(window(self._length + 1), arena.shape[1])

        def step(tokens: Tensor, place: Tensor, finite: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = head(step_hidden(model, arena, tokens, place, end))
            return logits, place + 1, finite & torch.isfinite(logits.max())

        key = ("logits", end, arena.version, arena.shape)
        tokens = ids[0].to(self._place)
        logits, self._place, self._finite = model.runtime.run(
            "decoding step", key, step, tokens, self._place, self._finite
        )
        self._length += 1
        return logits

    def _grow(self) -> None:
        before = [tuple(one.clone() for one in layer) for layer in self._held()]
        self.take(2 * self._length)
        for old, new in zip(before, self._held(), strict=True):
            for source, target in zip(old, new, strict=True):
                target.copy_(source)


class CapturedGeneration:
    """Mixed into a causal model with a `runtime`, before the class of transformers."""

    def generate(self, **kwargs: Any) -> Any:
        """Call transformers' `generate`, over captured stages for one prompt in `inputs_embeds`."""
        embeds, runtime = kwargs.get("inputs_embeds"), self.runtime
        alone = embeds is not None and embeds.ndim == 3 and len(embeds) == 1 and embeds.shape[1] > 0
        beams = kwargs.get("num_beams", self.generation_config.num_beams)
        if not alone or beams not in (None, 1) or any(name in kwargs for name in _OTHER_WAYS):
            return super().generate(**kwargs)
        if not runtime.decodes(self):
            return super().generate(**kwargs)
        with runtime.checked(self):
            if not runtime.decodes(self):
                return super().generate(**kwargs)
            cache = CapturedCache(self)
            runtime.lent = threading.get_ident()
            try:
                found = super().generate(past_key_values=cache, **kwargs)
            finally:
                runtime.lent = None
            cache.finish()
            if getattr(found, "past_key_values", None) is cache:
                found.past_key_values = cache.copy()
            return found

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Decide which cache `generate` uses, when transformers has put all settings together."""
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, CapturedCache):
            if _needs_logits_only(generation_config, model_kwargs, generation_mode):
                prompt, most = model_kwargs["inputs_embeds"].shape[1], self.config.max_position_embeddings
                room = max(bucket(prompt), min(max_cache_length + 1, most))
                try:
                    return cache.take(room)
                except torch.OutOfMemoryError:
                    pass  # transformers' cache grows with the answer, which may be short
            del model_kwargs["past_key_values"]
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def forward(self, input_ids=None, past_key_values=None, inputs_embeds=None, **kwargs: Any) -> Any:
        """Run captured stages for a `CapturedCache`, else the decoder of transformers."""
        if isinstance(past_key_values, CapturedCache):
            logits = past_key_values.logits(input_ids, inputs_embeds)
            return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        return super().forward(
            input_ids=input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )


def _needs_logits_only(settings: Any, inputs: dict[str, Any], mode: Any) -> bool:
    """Return whether a search with these settings reads nothing but the logits of one row."""
    mask = inputs.get("attention_mask")
    return (
        mode in ("greedy_search", "sample")
        and settings.num_return_sequences in (None, 1)
        and settings.use_cache is not False
        and not any(getattr(settings, name, None) for name in _OTHER_SETTINGS)
        and {name for name, value in inputs.items() if value is not None} <= _INPUTS
        and (mask is None or (mask.ndim == 2 and bool(mask.all())))
    )
