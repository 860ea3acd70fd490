"""`generate` of a host with a method that prunes inside the language model (`llava.pruning.inside`).

The prompt enters the host's decoder with all visual tokens; `llava.model.inside` runs its layers and shortens
the visual block between them, and decoding is greedy, as of this repository's own class. It takes decoders of
the Llama, Mistral and Qwen2 kind, and one block of visual tokens per prompt: an image with its crops or
tiles, a clip, or several that follow each other without text. The budget of a block is the sum of those of
its rows. Whatever else changes an answer (sampling, beams, processors of logits) is refused before anything
runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llava.integrations.generation import FullPromptStreamer, setting
from llava.integrations.hosts.base import Host
from llava.integrations.plan import KeptRow, Plan, Pruning, Shortened
from llava.integrations.shortening import placeholders, plan_of, refuse_prompt, shortened
from llava.model.decode import ALWAYS, ROOM, answer_inside
from llava.model.inside import EmbeddedPrompt, InsideRun, check_window, prefill_prompts
from llava.model.runtime.stages import INVALID
from llava.model.transformers_compat import attention_of
from llava.pruning import Pruner

DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model")
_KERNELS = ("eager", "sdpa", "flash")  # beginnings of names
_SERVED = {
    "generation_config",
    "max_new_tokens",
    "max_length",
    "eos_token_id",
    "pad_token_id",
    "streamer",
    "return_dict_in_generate",
}
_SEARCH = {"do_sample": (False,), "num_beams": (1,), "num_return_sequences": (1,)}
# Without effect on greedy search
_UNUSED = ("temperature", "top_k", "top_p", "min_p", "length_penalty", "early_stopping", "use_cache")
_RESULTS = dict.fromkeys(
    ("output_scores", "output_logits", "output_attentions", "output_hidden_states"), (False,)
)
_NEW_TOKENS = 20  # without any limit, as in transformers


def check_decoder(base: nn.Module, host: Host, pruner: Pruner) -> None:
    """Raise `ValueError` if a host's decoder cannot be run with reductions."""
    decoder = getattr(base, host.language_model)
    names = [
        cls.__name__ for cls in type(decoder).__mro__ if cls.__module__.startswith("transformers.models.")
    ]
    why = None
    if host.mrope:
        why = "positions have rows and columns"
    elif not set(names) & set(DECODERS):
        why = f"decoder is a {type(decoder).__name__}, not one of {', '.join(DECODERS)}"
    if why is not None:
        raise ValueError(
            f"method: {pruner.name!r} prunes inside the language model, and this model's {why}. Choose a "
            "method that selects before the language model, such as 'vispruner'."
        )
    if any(parameter.is_meta for parameter in decoder.parameters()):
        raise ValueError(
            f"device_map: layers are offloaded, but {pruner.name!r} prunes inside the language model, whose "
            "weights have to be on a device. Load the model without offloading, or choose a method that "
            "selects before the language model."
        )
    if not (kernels := attention_of(decoder.config)).startswith(_KERNELS):
        raise ValueError(
            f"attn_implementation: {kernels!r} is not known to methods that prune inside the language model. "
            "Load the model with attn_implementation='sdpa'."
        )


def refuse_inside(pruning: Pruning, function: str) -> None:
    """Raise `ValueError` if the method acts inside the language model, where only `generate` runs it."""
    if pruning.acts_inside:
        raise ValueError(
            f"{function}: {pruning.method!r} prunes inside the language model, which only generate does. "
            "Call model.generate(..., do_sample=False), or choose a method that selects before the language "
            "model."
        )


def answer_greedily_inside(
    model: nn.Module, given: Mapping[str, Any], rest: Mapping[str, Any], pruning: Pruning
) -> Any:
    """Answer prompts as `generate`, and set the plan.

    Args:
        given: The arguments of `generate` that are not None.
        rest: Those of them that are not about the prompt.

    Returns:
        The caller's ids with new tokens (B, S + t), or an output with them as `.sequences`.

    Raises:
        ValueError: arguments that change the search, prompts with several visual blocks, prompts that are
            longer than a sliding window, or a budget that the method cannot meet.
    """
    host = pruning.host
    base = host.base(model)
    decoder = getattr(base, host.language_model)
    configs = [rest.get("generation_config"), model.generation_config]
    check_decoder(base, host, pruning.pruner(1))
    _refuse_search(rest, configs, pruning.method)
    refuse_prompt(base, host, given)
    visual = torch.stack(list(placeholders(model, base, host, given).values())).any(0)
    mask = given.get("attention_mask")
    real = torch.ones_like(visual) if mask is None else mask.to(visual.device).bool()
    new = _new_tokens(rest, configs, real.shape[1])
    _refuse_blocks(visual & real, pruning.method)
    check_window(decoder.config, int(real.sum(1).max()) + new)
    if rest.get("streamer") is not None and len(real) > 1:
        raise ValueError(f"streamer: the batch has {len(real)} prompts. Pass one prompt, or no streamer.")
    before = pruning.last
    with torch.no_grad():
        short = shortened(model, given, pruning, generating=True)
    pruning.last = before  # until the layers have run
    prompts = [_prompt(short, sample, pruning, len(decoder.layers)) for sample in range(len(real))]
    run = prefill_prompts(decoder, prompts, pruning.pruner(1), min(new, ROOM))
    plan = _plan(run, prompts, short.plan, real.to(short.plan.sel.device), len(decoder.layers))
    eos = setting(rest, configs, "eos_token_id")
    ends = torch.as_tensor([] if eos is None else eos).flatten().tolist()
    full = given.get("input_ids")
    full = torch.zeros(len(real), 0, dtype=torch.int64, device=real.device) if full is None else full
    streamer = None
    if rest.get("streamer") is not None:
        streamer = FullPromptStreamer(rest["streamer"], full)
        streamer.put(full)

    def heard(chosen: Tensor) -> None:
        if INVALID in chosen.tolist():
            raise ValueError(
                "generate: the language model computed NaN or infinite logits. Use another dtype or weights."
            )
        if streamer is not None:
            streamer.put(chosen.cpu())

    said = answer_inside(model, run, new, set(ends), heard)
    pruning.last = plan
    if streamer is not None:
        streamer.end()
    pad = setting(rest, configs, "pad_token_id")
    pad, width = int([*ends, 0][0] if pad is None else pad), max(map(len, said))
    padded = torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in said], dtype=torch.int64)
    sequences = torch.cat([full, padded.to(full)], dim=1)
    if not setting(rest, configs, "return_dict_in_generate"):
        return sequences
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences)


# --- what can be asked ------------------------------------------------------------------------------------
def _refuse_search(rest: Mapping[str, Any], configs: list[Any], method: str) -> None:
    """Raise `ValueError` for settings of `generate` that greedy search with reductions does not follow."""
    neutral = {**ALWAYS, **_SEARCH, **_RESULTS}
    found = {name: setting(rest, configs, name) for name in neutral}
    wrong = [name for name, value in found.items() if value is not None and value not in neutral[name]]
    wrong += [name for name in rest if name not in {*_SERVED, *_UNUSED, *neutral}]
    if wrong:
        raise ValueError(
            f"generate: {method!r} prunes inside the language model, where only greedy search is supported, "
            f"got {', '.join(sorted(wrong))}. Pass do_sample=False and max_new_tokens=N, and nothing else "
            "that changes the search, or choose a method that selects before the language model."
        )


def _new_tokens(rest: Mapping[str, Any], configs: list[Any], length: int) -> int:
    """Return how many tokens may follow prompts of a length, which counts in `max_length`."""
    new = setting(rest, configs, "max_new_tokens")
    if new is None:
        from transformers import GenerationConfig

        most = setting(rest, configs, "max_length")
        new = _NEW_TOKENS if most == GenerationConfig().max_length else most - length
    if new < 1:
        raise ValueError(
            f"max_new_tokens, max_length: no token can follow a prompt of {length}. Pass max_new_tokens=N, "
            "at least 1."
        )
    return new


def _refuse_blocks(visual: Tensor, method: str) -> None:
    """Raise `ValueError` if a prompt has text between its visual tokens (B, S) bool."""
    before = torch.nn.functional.pad(visual, (1, 0))[:, :-1]
    blocks = (visual & ~before).sum(1)
    if int(blocks.max()) > 1:
        raise ValueError(
            f"input_ids: row {int(blocks.argmax())} has {int(blocks.max())} blocks of visual tokens with "
            f"text between them, but {method!r} prunes inside the language model and takes one. Choose a "
            "method that selects before the language model."
        )


# --- the prompt, before and after ---------------------------------------------------------------------------
def _prompt(short: Shortened, sample: int, pruning: Pruning, depth: int) -> EmbeddedPrompt:
    """Return a row of the batch without padding, with the reductions of its visual block."""
    valid = short.plan.valid[sample].to(short.embeds.device)
    embeds = short.embeds[sample, valid]
    visual = torch.stack(list(short.visual.values())).any(0)[sample].to(valid.device)[valid]
    count = int(visual.sum())
    start = int(visual.long().argmax()) if count else len(embeds)
    rows = [row for row in short.plan.rows if row.sample == sample]
    stages = []
    if any(row.budget is not None for row in rows):
        budget = sum(row.total if row.budget is None else row.budget for row in rows)
        stages = pruning.pruner(budget).stages(depth, count)
    return EmbeddedPrompt(embeds, torch.arange(len(embeds), device=embeds.device), start, count, stages)


def _plan(run: InsideRun, prompts: list[EmbeddedPrompt], entered: Plan, real: Tensor, depth: int) -> Plan:
    """Return what the last layer sees of the caller's prompt, and the visual tokens that every layer sees."""
    retained, layers = torch.zeros_like(real), []
    last: list[Tensor | None] = []
    for sample, prompt in enumerate(prompts):
        places = entered.sel[sample, entered.valid[sample]]
        block = places[prompt.start : prompt.start + prompt.count]
        retained[sample, places] = True
        seen = [block.cpu()] * depth
        for reduction in run.reductions[sample]:
            left = block[reduction.ids[reduction.ids < prompt.count].to(block.device)].cpu()
            seen[reduction.stage.layer :] = [left] * (depth - reduction.stage.layer)
        retained[sample, block] = False
        retained[sample, seen[-1].to(block.device)] = True
        layers.append(seen)
        last.append(seen[-1] if run.reductions[sample] else None)
    rows = [_left(row, last[row.sample]) for row in entered.rows]
    plan = plan_of(real, retained, rows)
    plan.layers = layers
    return plan


def _left(row: KeptRow, places: Tensor | None) -> KeptRow:
    """Return what is left of a row at places of the caller's prompt; None leaves it as it is."""
    if places is None:
        return row
    kept = torch.isin(row.places, places).nonzero()[:, 0]
    return replace(row, kept=kept, important=torch.zeros(len(kept), dtype=torch.bool))
