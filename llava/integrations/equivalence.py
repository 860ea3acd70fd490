"""What a pruned host model has to equal, as the largest differences of logits; `selftest` prints them.

check_host(model, inputs)      # {"keep all": 0.0, "masked": 2e-06, ...}
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

from llava.integrations.core import pruned
from llava.integrations.hosts import find_host, supported_classes
from llava.integrations.inputs import host_inputs, load_processor
from llava.integrations.tiny_hosts import Batch
from llava.model.checkpoint.entries import read_object
from llava.model.checkpoint.find import resolve_config

CHECKS = ("keep all", "masked", "batch", "cached", "unprune")
KEEP = 0.3
NEW_TOKENS = 3
WINDOWED = ("gemma3",)  # sliding windows count places, so masking a place does not remove it
OWN_CLASSES = ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM", "LlavaMptForCausalLM")
_ROW_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def check_host(model: Any, inputs: Batch) -> dict[str, float | None]:
    """Return the largest difference of logits per check; None where a check does not apply.

    Differing tokens of greedy answers count as infinite.

    Args:
        model: An unpruned model in float32.
        inputs: Of one row without padding.
    """
    before = _logits(model, inputs)
    answer = _answer(model, inputs)
    found: dict[str, float | None] = {}
    with pruned(model, keep=1.0):
        found["keep all"] = _difference(_logits(model, inputs), before)
        if not torch.equal(_answer(model, inputs), answer):
            found["keep all"] = float("inf")
    with pruned(model, keep=KEEP) as pruning:
        short, answer = _logits(model, inputs), _answer(model, inputs)
        plan = pruning.last
        together = _logits(model, _with_longer_row(inputs))
        found["batch"] = _difference(together[:1, -short.shape[1] :], short)
        found["cached"] = _cached(model, inputs)
    found["masked"] = None
    if model.config.model_type not in WINDOWED:
        by_hand = _masked(model, inputs, plan.sel)
        found["masked"] = _difference(_logits(model, by_hand)[:, plan.sel[0]], short)
        if not torch.equal(_answer(model, by_hand), answer):
            found["masked"] = float("inf")
    found["unprune"] = _difference(_logits(model, inputs), before)
    return {name: found[name] for name in CHECKS}


def _logits(model: Any, inputs: Batch) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def _answer(model: Any, inputs: Batch) -> Tensor:
    found = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return found[:, inputs["input_ids"].shape[1] :]


def _difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference, relative to the largest value where that is above 4."""
    return float((a - b).abs().max() / (b.abs().max() / 4).clamp(min=1))


def _with_longer_row(inputs: Batch) -> Batch:
    """Return a batch of two rows: the prompt, and a longer one, so that the first is padded on the left.

    The second has three more tokens at its start, copies of its first one.
    """
    batch: Batch = {}
    for name, value in inputs.items():
        if name in _ROW_INPUTS:
            first = value[:, :1].expand(-1, 3)
            batch[name] = torch.cat(
                [torch.cat([torch.zeros_like(first), value], 1), torch.cat([first, value], 1)]
            )
        else:
            batch[name] = torch.cat([value, value])
    return batch


def _cached(model: Any, inputs: Batch) -> float:
    run = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = run.sequences[:, inputs["input_ids"].shape[1] :]
    grown = {**inputs, "input_ids": run.sequences}
    for name in _ROW_INPUTS[1:]:
        if name in inputs:
            # PaliGemma's answers are no part of the prompt, in which attention is in both directions
            is_answer = name == "token_type_ids" and model.config.model_type == "paligemma"
            fill = int(name == "attention_mask" or is_answer)
            grown[name] = torch.cat([inputs[name], inputs[name].new_full(new.shape, fill)], 1)
    whole = _logits(model, grown)
    steps = len(run.logits)
    return max(_difference(whole[:, i - steps - 1], one) for i, one in enumerate(run.logits))


def _masked(model: Any, inputs: Batch, sel: Tensor) -> Batch:
    """Return the full prompt with all but `sel` (1, S') masked, at the positions of a pruned prompt."""
    mask = torch.zeros_like(inputs["attention_mask"]).scatter(1, sel, 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inner, host = find_host(model)
    if host.mrope:
        takes = inspect.signature(host.base(inner).get_rope_index).parameters
        given = {name: value for name, value in inputs.items() if name in takes}
        places, _ = host.base(inner).get_rope_index(**given)
        positions = torch.cat([positions[None], places])
    return {**inputs, "attention_mask": mask, "position_ids": positions}


def read_checkpoint(path: str) -> tuple[Any, Batch]:
    """Load a checkpoint and the inputs of one synthetic image.

    Raises:
        TypeError: its class is not supported.
        OSError, ValueError: it cannot be read; the message names the folder.
    """
    found = read_object(resolve_config(path) / "config.json").get("architectures") or ()
    names = [name for name in found if name in supported_classes()]
    if not names:
        if any(name in OWN_CLASSES for name in found):
            raise TypeError(
                f"{path}: a checkpoint in LLaVA's own format ({found[0]}), not in that of transformers. "
                "llava.load_pretrained_model loads and prunes it; convert it to check it here."
            )
        raise TypeError(
            f"{path}: architectures are {list(found)}, none of which can be pruned. Choose from "
            f"{', '.join(supported_classes())}."
        )
    config = transformers.AutoConfig.from_pretrained(path)
    model = getattr(transformers, names[0]).from_pretrained(path, dtype=torch.float32).eval()
    processor = load_processor(path)
    text = f"USER: {_placeholder(processor, config)}\nWhat is in the image? ASSISTANT:"
    return model, host_inputs(processor, text, [_picture()])


def _placeholder(processor: Any, config: Any) -> str:
    """Return the text that stands for an image, with the tokens around it where the class needs them."""
    tokenizer = processor.tokenizer
    ids = [getattr(config, f"{name}_token_id", None) for name in ("vision_start", "image", "vision_end")]
    image = getattr(processor, "image_token", None) or tokenizer.convert_ids_to_tokens(ids[1])
    if ids[0] is None or ids[2] is None:
        return image
    return tokenizer.convert_ids_to_tokens(ids[0]) + image + tokenizer.convert_ids_to_tokens(ids[2])


def _picture(side: int = 160) -> Image.Image:
    """Make a colored image of blocks, without two equal ones."""
    x = torch.arange(side)
    planes = [(x[:, None] // 16 * a + x // 16 * b) * 5 % 256 for a, b in ((3, 7), (11, 2), (5, 13))]
    return Image.fromarray(torch.stack(planes, -1).to(torch.uint8).numpy())
