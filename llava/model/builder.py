"""`load_pretrained_model`: every checkpoint format in, one model out.

    tokenizer, model, image_processor, context_len = load_pretrained_model(
        "liuhaotian/llava-v1.5-7b", visual_token_num=64)

Formats: LLaVA-1.5 and 1.6 folders (.bin or .safetensors, sharded or not; vision tower by name, in a folder or
inside), LoRA and projector-only folders over `model_base`, llava-hf folders (LLaVA and LLaVA-NeXT); on
Llama/Vicuna and Mistral. No remote code is ever run. The parts: `configs.py` understands config.json,
`keys.py` the names of weights, `weights.py` reads, `loading.py` assigns.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.model.checkpoint.config import read_config, understand
from llava.model.checkpoint.fill import fill_model
from llava.model.checkpoint.find import resolve_checkpoint
from llava.model.checkpoint.lora import is_lora, merge_lora
from llava.model.checkpoint.placement import connect, main_device, place
from llava.model.checkpoint.quantize import Quantizer
from llava.model.checkpoint.read import CheckpointError, has_weights, read_file, read_folder
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.settings import choose_attention, choose_dtypes, resolve_pruning

DEFAULT_CONTEXT = 2048
_PROJECTOR_FILE = "mm_projector.bin"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# what LLaVA's callers also pass: of no consequence here
_HARMLESS = {"multimodal", "low_cpu_mem_usage", "use_safetensors", "model_max_length"}
_ONLY_UNSET = {
    "trust_remote_code", "customized_config", "overwrite_config", "quantization_config", "offload_folder",
}  # fmt: skip
_HUB = {"revision", "cache_dir", "token", "local_files_only"}
_ALIASES = {
    "torch_dtype": "dtype",
    "use_flash_attn": "attn_implementation",
    "use_flash_attention_2": "attn_implementation",
}


def load_pretrained_model(
    model_path: str,
    model_base: str | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: str | dict | None = "auto",
    device: str | torch.device | None = None,
    attn_implementation: str | None = "sdpa",
    visual_token_num: int | None = None,
    important_ratio: float | None = None,
    method: str | None = None,
    dtype: str | torch.dtype | None = None,
    tower_dtype: str | torch.dtype | None = None,
    anyres: str | None = None,
    **kwargs: Any,
) -> tuple[Any, Any, Any, int]:
    """Load a LLaVA checkpoint. Returns (tokenizer, model, image_processor, context_len).

    model_path: a folder, or owner/name on the Hugging Face hub. model_base: the language model that a LoRA or
    projector-only folder was trained on. model_name: accepted as in LLaVA; the files say what they are.
    load_8bit, load_4bit: quantise the decoder's layers (bitsandbytes).
    device_map: "auto", a device, or a dict of module names to devices; `device` is enough for one device.
    attn_implementation: kernels of tower and language model: sdpa, eager, flash_attention_2.
    method, visual_token_num (tokens kept per crop), important_ratio, anyres ("paper" or "llava"): see
    `set_pruner`; the environment and config.json are asked for what is not given; nothing at all means no
    pruning.
    dtype: of language model and projector; float32 on CPU, else the checkpoint's. tower_dtype: of the vision
    tower, by default the same ("float32" under a half-precision model is the paper's setting).
    kwargs: LLaVA's and transformers' own that have no effect here, and revision, cache_dir, token,
    local_files_only for the hub; anything else is a `TypeError`.
    Raises `ValueError` (`CheckpointError` for files), `FileNotFoundError`, `ImportError`; arguments are
    checked before anything is loaded.
    """
    extra, hub = _check_kwargs(kwargs)
    attn_implementation = extra.get("attn_implementation", attn_implementation)
    dtype = extra.get("dtype", dtype) if dtype is None else dtype
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit exclude each other")
    resolve_pruning(None, method, visual_token_num, important_ratio, anyres)  # refuse before reading anything
    device_main = main_device(device_map, device)
    choose_dtypes(dtype, tower_dtype, None, device_main)

    folder = resolve_checkpoint(model_path, **hub)
    base = resolve_checkpoint(model_base, **hub) if model_base else None
    raw = _config_of(folder, base)
    settings = resolve_pruning(raw, method, visual_token_num, important_ratio, anyres)
    if settings.pruner.name != "none" and settings.pruner.tokens is None:
        warnings.warn(
            f"method {settings.pruner.name!r} without a token budget keeps every visual token; give "
            "visual_token_num=64 (or VISPRUNER_TOKENS=64, or visual_token_num in config.json)",
            stacklevel=2,
        )
    stream = _weights(folder, base)
    model_class, config, tower_source = understand(folder, raw)

    model_dtype, tower_type = choose_dtypes(dtype, tower_dtype, config.dtype, device_main)
    config.dtype = model_dtype
    kernels, tower_kernels = choose_attention(attn_implementation, model_dtype, tower_type)
    quantizer = Quantizer(4 if load_4bit else 8, model_dtype) if load_8bit or load_4bit else None
    config._attn_implementation = kernels
    with torch.device("meta"):
        model = model_class(config)
    model.model.vision_tower = build_vision_tower(
        tower_source,
        select_layer=getattr(config, "mm_vision_select_layer", -2),
        select_feature=getattr(config, "mm_vision_select_feature", None) or "patch",
        attn_implementation=tower_kernels,
    )
    if quantizer is not None:
        quantizer.swap(model)
    placement = place(model, device_map, device, model_dtype)
    fill_model(model, stream, tower_source, placement, model_dtype, tower_type, quantizer, folder)
    model.set_pruner(settings.pruner, anyres=settings.anyres)
    _read_generation_config(model, base if base is not None else folder)

    tokenizer = _load_tokenizer(folder, base)
    _add_image_tokens(tokenizer, model)
    connect(model, placement)
    return tokenizer, model.eval(), model.get_vision_tower().image_processor, context_length(config)


def context_length(config: object) -> int:
    """Tokens of context that LLaVA's scripts may count on."""
    for name in ("max_sequence_length", "tokenizer_model_max_length", "max_position_embeddings"):
        value = getattr(config, name, None)
        if value:
            return int(value)
    return DEFAULT_CONTEXT


def _check_kwargs(kwargs: dict) -> tuple[dict, dict]:
    """Split off hub options, translate other spellings, refuse what would silently do nothing."""
    extra, hub = {}, {}
    for name, value in kwargs.items():
        if name in _HUB:
            hub[name] = value
        elif name in _ALIASES:
            if name.startswith("use_flash"):
                value = "flash_attention_2" if value else None
            if value is not None:
                extra[_ALIASES[name]] = value
        elif name in _ONLY_UNSET:
            if value:
                raise ValueError(f"{name}={value!r} is not supported: no remote code, no foreign config")
        elif name not in _HARMLESS:
            known = [*load_pretrained_model.__annotations__, *_HARMLESS, *_HUB, *_ALIASES]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"load_pretrained_model() got an unknown argument {name!r}{hint}")
    return extra, hub


def _config_of(folder: Path, base: Path | None) -> dict:
    """config.json of the checkpoint; a LoRA folder may leave it to its base."""
    if base is not None and is_lora(folder) and not (folder / "config.json").is_file():
        return read_config(base)
    return read_config(folder)


def _weights(folder: Path, base: Path | None) -> Iterator[tuple[str, Tensor, Path]]:
    """All (key, tensor, file) that make the model; the kind of folder is checked before any is read."""
    if is_lora(folder) and not has_weights(folder):
        if base is None:
            raise CheckpointError(f"{folder} holds a LoRA adapter: pass the model below it as model_base")
        return merge_lora(read_folder(base), folder)
    if base is None:
        if (folder / _PROJECTOR_FILE).is_file() and not has_weights(folder):
            raise CheckpointError(f"{folder} holds only a projector: pass the language model as model_base")
        return read_folder(folder)
    if (folder / _PROJECTOR_FILE).is_file():
        return _with_projector(base, folder / _PROJECTOR_FILE)
    raise CheckpointError(
        f"model_base was given, but {folder} holds neither a LoRA adapter (adapter_config.json) nor "
        f"{_PROJECTOR_FILE}; for a complete checkpoint leave model_base out"
    )


def _with_projector(base: Path, projector: Path) -> Iterator[tuple[str, Tensor, Path]]:
    yield from read_folder(base)
    for key, tensor in read_file(projector):
        yield key, tensor, projector


def _load_tokenizer(folder: Path, base: Path | None) -> Any:
    from llava.model.tokenizer import load_tokenizer

    for place_ in (base, folder):
        if place_ is not None and any((place_ / f).is_file() for f in _TOKENIZER_FILES):
            return load_tokenizer(place_)
    raise FileNotFoundError(f"{folder}: no tokenizer; expected one of {', '.join(_TOKENIZER_FILES)}")


def _read_generation_config(model: Any, folder: Path) -> None:
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)


def _add_image_tokens(tokenizer: Any, model: Any) -> None:
    """Give the tokenizer the tokens that `mm_use_im_patch_token` / `mm_use_im_start_end` speak of.

    A checkpoint trained with them has their embeddings already; if not, rows are added (their mean, with a
    warning: nothing was learned for them).
    """
    config = model.config
    if getattr(config, "mm_use_im_patch_token", False):
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if getattr(config, "mm_use_im_start_end", False):
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        warnings.warn(
            f"the tokenizer knows {len(tokenizer)} tokens, the checkpoint has embeddings for {rows}: "
            "adding untrained ones",
            stacklevel=3,
        )
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for matrix in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
                matrix[rows:] = matrix[:rows].mean(0, keepdim=True)
