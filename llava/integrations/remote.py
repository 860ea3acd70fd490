"""Prune models that transformers does not define, whose code comes with their checkpoint.

    model = load_remote("Qwen/Qwen-VL-Chat", trust_remote_code=True)
    prompt = arguments_of(decoder, lambda: model(**inputs))  # what the decoder would get
    kept = keep_places(features, cue, tokens=128)  # (images, N, C), (images, N) -> (images, K)
    index = kept_index(visual, kept)  # (B, S) -> (B, S')
    prompt = select_tokens(prompt, index)
    answers = generate(step, prompt, max_new_tokens=32, stops={2})

The adapter knows no model: the caller reads features and cue from the vision tower, says which places of the
prompt are visual tokens, and runs the decoder on what is left. docs/other_vlms.md has the parts for Qwen-VL,
InternVL-Chat and CogVLM. Models of transformers' own need none of this: `llava.prune`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from llava.pruning import get_pruner

PER_TOKEN = ("inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "input_ids", "labels")


def load_remote(path: str, trust_remote_code: bool = False, **kwargs: Any) -> Any:
    """Load a model whose code is in its checkpoint. The code runs on this machine.

    Args:
        path: Folder or name on the Hugging Face Hub.
        trust_remote_code: True confirms that the code may run.
        kwargs: For transformers' `AutoModelForCausalLM.from_pretrained`, such as dtype or device_map.

    Raises:
        ValueError: The code was not confirmed, or the checkpoint contains none.
    """
    from transformers import AutoModelForCausalLM, PretrainedConfig

    found = PretrainedConfig.get_config_dict(path)[0]
    files = found.get("auto_map") or {}
    entry = files.get("AutoModelForCausalLM")
    if entry is None:
        raise ValueError(
            f"{path}: config.json has no auto_map with AutoModelForCausalLM, so the checkpoint has no code "
            f"of its own (model_type {found.get('model_type')!r}). Load it with transformers and use "
            "llava.prune."
        )
    if trust_remote_code is not True:
        raise ValueError(
            f"trust_remote_code: is {trust_remote_code!r}, and {path} runs code of its own ({entry}). Read "
            "that code, then pass trust_remote_code=True to run it on this machine."
        )
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **kwargs).eval()


class _Caught(BaseException):
    """Ends a call once its arguments are known. Not an Exception, so that no handler on the way stops it."""


def arguments_of(module: nn.Module, call: Callable[[], Any]) -> dict[str, Any]:
    """Run `call` up to the first call of `module`, which does not run, and return the arguments it would get.

    Args:
        module: A module that is called with keyword arguments only.

    Raises:
        ValueError: The module was not called, or with positional arguments.
    """
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, dict(kwargs)))
        raise _Caught

    hook = module.register_forward_pre_hook(catch, with_kwargs=True, prepend=True)
    try:
        with torch.no_grad():
            call()
    except _Caught:
        pass
    finally:
        hook.remove()
    if not found:
        raise ValueError(
            f"module: {type(module).__name__} was not called. Pass the decoder that the call runs."
        )
    if found[0][0]:
        raise ValueError(
            f"module: {type(module).__name__} was called with {len(found[0][0])} positional arguments, whose "
            "names are unknown. Pass a module that is called with keyword arguments."
        )
    return found[0][1]


def keep_places(
    features: Tensor,
    cue: Tensor,
    tokens: int | None = None,
    keep: float | None = None,
    method: str = "vispruner",
    important_ratio: float = 0.5,
    seed: int = 0,
) -> Tensor:
    """Return the kept visual tokens of every image: (images, K) int64, ascending.

    Args:
        features: (images, N, C), one row per visual token, before or after the projector; similarity is
            computed on them.
        cue: (images, N) or (images, H, N), importance per visual token: [CLS] attention where the tower has
            [CLS], else attention received. Heads are averaged.
        tokens: Visual tokens to keep per image.
        keep: Share of them to keep instead, in (0, 1].
        method: A method of `llava.pruning` that reads features and attention only.
        important_ratio: Share of the kept tokens that is selected by the cue, for methods that have one.
        seed: Of random methods.

    Raises:
        ValueError: Shapes that do not fit, values that are not finite, no budget or two, or a method that
            reads more than this.
    """
    if (tokens is None) == (keep is None):
        raise ValueError(f"tokens, keep: got {tokens!r} and {keep!r}. Pass one of them.")
    if keep is not None and not 0 < keep <= 1:
        raise ValueError(
            f"keep: expected a share in (0, 1], got {keep!r}. Pass a number of tokens as tokens=."
        )
    if features.ndim != 3:
        raise ValueError(f"features: shape is {tuple(features.shape)}, expected (images, N, C).")
    attention = cue[:, None] if cue.ndim == 2 else cue
    images, count = features.shape[:2]
    if attention.ndim != 3 or (attention.shape[0], attention.shape[2]) != (images, count):
        raise ValueError(
            f"cue: shape is {tuple(cue.shape)}, expected ({images}, {count}) or ({images}, heads, {count}): "
            "one value per visual token. Drop the columns of [CLS] and of others that are not in features."
        )
    budget = tokens if keep is None else max(1, round(keep * count))
    pruner = get_pruner(method, budget, important_ratio, seed)
    more = [name for name in pruner.cues if name != "attention"]
    if pruner.acts_in != "image" or pruner.needs_question or more or pruner.is_adaptive:
        why = f"reads {', '.join(more)}" if more else "needs more than features and a cue"
        raise ValueError(
            f"method: {method!r} {why}. Choose vispruner, fastervlm, random or another of that kind."
        )
    return pruner.keep(features, attention, crop_ids=list(range(images))).indices


def kept_index(visual: Tensor, kept: Tensor) -> Tensor:
    """Return which places of a prompt are kept: all text, and the kept visual tokens.

    Args:
        visual: (B, S) bool, True at visual tokens that may be dropped, N for every image, images one after
            the other in reading order.
        kept: (images, K), of `keep_places`.

    Returns:
        (B, S') int64, ascending. Rows have equally many images, so that all have the same length.

    Raises:
        ValueError: Visual tokens and images do not fit, or rows differ in their number of images.
    """
    counts = visual.sum(1)
    total, images = int(counts.sum()), len(kept)
    if images == 0 or total % images:
        raise ValueError(f"visual: {total} visual tokens for {images} images. Mark those of every image.")
    each = total // images
    if kept.numel() and int(kept.max()) >= each:
        raise ValueError(
            f"kept: names visual token {int(kept.max())}, but the prompt has {each} per image. Pass features "
            "of the tokens that enter the prompt."
        )
    if (counts != counts[0]).any():
        listed = ", ".join(str(int(one)) for one in counts)
        raise ValueError(f"visual: rows have {listed} visual tokens. Prune prompts of one length at a time.")
    chosen = torch.zeros(images, each, dtype=torch.bool, device=visual.device)
    chosen.scatter_(1, kept.to(visual.device), True)
    stays = ~visual.bool()
    stays[visual.bool()] = chosen.flatten()
    return stays.nonzero()[:, 1].view(len(visual), -1)


def select_tokens(
    prompt: dict[str, Any], index: Tensor, per_token: Collection[str] = PER_TOKEN
) -> dict[str, Any]:
    """Return a prompt with the tokens of `index` only; positions stay those of the unpruned prompt.

    Args:
        prompt: Arguments of a decoder; tensors named in `per_token` are (B, S) or (B, S, ...).
        index: (B, S') int64, of `kept_index`.

    Raises:
        ValueError: A tensor whose second dimension has the length of the prompt is not named, or a named one
            has another length.
    """
    rows = torch.arange(len(index), device=index.device)[:, None]
    lengths = {name: one.shape[1] for name, one in prompt.items() if name in per_token and one is not None}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"prompt: lengths differ ({lengths}). Pass arguments of one call, without a cache.")
    length = next(iter(lengths.values()))
    found = {}
    for name, one in prompt.items():
        if isinstance(one, Tensor) and name not in per_token and length in one.shape[1:]:
            raise ValueError(
                f"{name}: shape {tuple(one.shape)} contains the prompt's length {length}. Name it in "
                "per_token if its second dimension counts tokens, or leave it out if the decoder makes it."
            )
        found[name] = one[rows.to(one.device), index.to(one.device)] if lengths.get(name) else one
    return found


@torch.inference_mode()
def generate(
    step: Callable[[dict[str, Any], Any], tuple[Tensor, Any]],
    prompt: dict[str, Any],
    max_new_tokens: int,
    stops: Collection[int],
) -> list[list[int]]:
    """Decode greedily after a pruned prompt, by a model's own decoder.

    Args:
        step: Runs the decoder: (arguments, cache) -> (logits (B, V) of the last token, cache). It is called
            with `prompt` and None, then with input_ids (B, 1), attention_mask (B, S' + t) and position_ids
            (B, 1) of one new token; the position is one more than the last.
        prompt: Of `select_tokens`, with position_ids; rows end with a real token.
        stops: Ids that end an answer.

    Returns:
        New ids of every row, without the stop token.
    """
    position = prompt["position_ids"][:, -1:]
    mask = prompt.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(prompt["position_ids"])
    logits, cache = step(prompt, None)
    said: list[list[int]] = [[] for _ in logits]
    ended = [False] * len(said)
    for count in range(max_new_tokens):
        chosen = logits.argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            ended[row] |= token in stops
            if not ended[row]:
                said[row].append(token)
        if all(ended) or count + 1 == max_new_tokens:
            break
        mask, position = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), position + 1
        new = {"input_ids": chosen[:, None], "attention_mask": mask, "position_ids": position}
        logits, cache = step(new, cache)
    return said
