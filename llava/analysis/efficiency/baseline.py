"""The naive baseline: VisPruner and LLaVA step by step, as in Algorithm 1, to compare measurements with.

It answers one question at a time and reuses nothing: the image is decoded, the tower runs all its layers with
eager attention and returns the attention probabilities of every layer, the selection computes a new matrix
product in every round, all patches are projected before most of them are dropped, and transformers'
`generate` answers.

    baseline_answer(model, tokenizer, processor, "cat.jpg", prompt_ids, Decoding(max_new_tokens=16))

It runs on a loaded model of this repository, on any device and in any dtype. It differs in two points from an
independent implementation: a loaded tower has no layers after the select layer, so its last layer runs again
in their place (same shapes, the result is not used); and the crops of an anyres image are merged by
`llava.model.anyres`. Selection runs in the dtype of the features it is given, so its tokens may differ from
those of the float64 selection; cast the features to compare indices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX


@torch.inference_mode()
def baseline_tower(tower: Any, pixels: Tensor, depth: int | None = None) -> tuple[Tensor, Tensor]:
    """Encode crops with eager attention; all matrices (crops, H, N + 1, N + 1) are in memory together.

    Args:
        tower: A loaded vision tower.
        pixels: (crops, 3, S, S).
        depth: Layers of the whole tower (default: from its config).
    Returns:
        Features (crops, N, C) and [CLS] attention (crops, H, N) of the select layer, in the tower's dtype.
    """
    layers = list(tower.layers())
    select = len(layers)  # hidden_states[select] are the features, attentions[select - 1] their layer's
    layers += [layers[-1]] * ((depth or tower.config.num_hidden_layers) - select)
    with _eager(tower) as attentions:
        hidden_states = [tower.embed(pixels.to(device=tower.device, dtype=tower.dtype))]
        for layer in layers:
            hidden_states.append(run_layer(layer, hidden_states[-1]))
    features = hidden_states[select][:, 1:]
    attention = attentions[select - 1][:, :, 0, 1:]
    return features, attention


def run_layer(layer: Any, hidden: Tensor) -> Tensor:
    """Run one layer of a tower without an attention mask; some releases of transformers 5 return a tuple."""
    output = layer(hidden, None)
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _eager(tower: Any) -> Iterator[list[Tensor]]:
    """Use eager attention in the tower; collect the probabilities of its layers in the order they run."""
    attentions: list[Tensor] = []

    def remember(_module: Any, _inputs: Any, output: Any) -> None:
        attentions.append(output[1])

    from llava.model.transformers_compat import attention_of, set_attention

    config = tower.vision_tower.config
    before = attention_of(config)
    hooks = [_attention_module(tower, layer).register_forward_hook(remember) for layer in tower.layers()]
    set_attention(config, "eager")
    try:
        yield attentions
    finally:
        set_attention(config, before)
        for hook in hooks:
            hook.remove()


def _attention_module(tower: Any, layer: Any) -> Any:
    """Find the module of a layer that returns (output, probabilities): it owns the query projection."""
    query = tower.attention_parts(layer)[1]
    return next(module for module in layer.modules() if any(child is query for child in module.children()))


@torch.inference_mode()
def baseline_select(features: Tensor, attention: Tensor, tokens: int, ratio: float) -> Tensor:
    """Select VisPruner's patches, ascending: (B, N, C), (B, H, N) -> (B, min(tokens, N)) int64.

    Computed in the dtype of the features, row by row, with a cosine similarity product per round.
    """
    return torch.stack([_select_row(x, a, tokens, ratio) for x, a in zip(features, attention, strict=True)])


def _select_row(features: Tensor, attention: Tensor, tokens: int, ratio: float) -> Tensor:
    n = len(features)
    if tokens >= n:
        return torch.arange(n, device=features.device)
    order = attention.mean(dim=0).argsort(descending=True, stable=True)
    n_important = int(tokens * ratio)
    n_diverse = tokens - n_important
    important, residual = order[:n_important], order[n_important:]
    while len(residual) > n_diverse > 0:
        even, odd = residual[0::2], residual[1::2]
        drop = min(8, len(residual) - n_diverse, len(even))
        a, b = features[even], features[odd]
        a = a / a.norm(dim=-1, keepdim=True)
        b = b / b.norm(dim=-1, keepdim=True)
        best = (a @ b.transpose(-1, -2)).amax(dim=-1)
        rank = best.argsort(descending=True, stable=True)
        residual = torch.cat([even[rank[drop:]], odd])
    return torch.cat([important, residual[:n_diverse]]).sort().values


@torch.inference_mode()
def baseline_tokens(
    model: Any,
    pixels: Tensor,
    tokens: int | None,
    ratio: float = 0.5,
    image_size: tuple[int, int] | None = None,
) -> Tensor:
    """Compute the visual tokens (K, D) of one image: project all patches, then drop most of them.

    Args:
        pixels: (3, S, S) or (crops, 3, S, S).
        tokens: Visual tokens to keep per crop, None for all.
        image_size: (width, height) of the image, for anyres.
    """
    from llava.model.anyres import NEWLINE, token_layout

    crops = pixels[None] if pixels.ndim == 3 else pixels
    features, attention = baseline_tower(model.get_vision_tower(), crops)
    decoder = model.get_model()
    weight = next(decoder.mm_projector.parameters())
    features = features.to(device=weight.device, dtype=weight.dtype)
    projected = decoder.mm_projector(features)  # (crops, N, D), all of them
    n = features.shape[1]
    indices = baseline_select(features, attention.to(features.device), n if tokens is None else tokens, ratio)
    layout = token_layout(
        indices,
        side=model.get_vision_tower().num_patches_per_side,
        protocol=model.anyres,
        merge_type=getattr(model.config, "mm_patch_merge_type", None) or "flat",
        image_size=image_size,
        grid=model._grid(len(crops), image_size),
        as_crops=True,
    )
    kept = projected.gather(1, indices[..., None].expand(-1, -1, projected.shape[-1])).flatten(0, 1)
    if (layout == NEWLINE).any():
        kept = torch.cat([kept, decoder.image_newline.to(kept)[None]])
        layout = torch.where(layout == NEWLINE, len(kept) - 1, layout)
    return kept[layout.to(kept.device)]


@contextmanager
def eagerly(model: Any) -> Iterator[None]:
    """Run the language model of a model without graphs and compiled layers; captured graphs are kept."""
    runtime = model.runtime
    before = runtime.graphs, runtime.compiled
    runtime.graphs = runtime.compiled = False
    try:
        yield
    finally:
        runtime.graphs, runtime.compiled = before


@torch.inference_mode()
def baseline_answer(
    model: Any,
    tokenizer: Any,
    processor: Any,
    image_path: Any,
    prompt_ids: Sequence[int],
    decoding: Any,
) -> list[int]:
    """Answer one question about an image file, with the model's current pruner.

    Args:
        prompt_ids: The whole prompt, with IMAGE_TOKEN_INDEX exactly once.
        decoding: A `llava.model.decode.Decoding`.
    Returns:
        New token ids, without the end of sequence.
    Raises:
        ValueError: for other methods than vispruner and none.
    """
    from llava.mm_utils import load_image, process_images
    from llava.model.decode import only_asked, stop_ids

    image = load_image(image_path)
    pixels = process_images([image], processor, model.config)[0]
    pruner = model.pruner
    if pruner.name not in ("vispruner", "none"):
        raise ValueError(f"pruner: the baseline implements vispruner and none, not {pruner.name}")
    if list(prompt_ids).count(IMAGE_TOKEN_INDEX) != 1:
        raise ValueError("prompt_ids: the baseline takes exactly one image per prompt")
    visual = baseline_tokens(model, pixels, pruner.tokens, pruner.important_ratio, image.size)
    ids = torch.tensor([list(prompt_ids)], device=model.device)
    mask = torch.ones_like(ids)
    with only_asked(model, tokenizer), eagerly(model):
        new = model.generate(ids, attention_mask=mask, visual=[visual], **decoding.arguments())[0].tolist()
    stops = stop_ids(model, tokenizer)
    end = next((place for place, token in enumerate(new) if token in stops), len(new))
    return new[:end]
