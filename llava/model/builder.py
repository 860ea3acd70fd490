"""`load_pretrained_model`: every checkpoint format in, one model out.

    tokenizer, model, image_processor, context_len = load_pretrained_model(
        "liuhaotian/llava-v1.5-7b", visual_token_num=64)

Formats: LLaVA-1.5 and 1.6 folders (.bin or .safetensors, sharded or not; vision tower by name, in a folder or
inside), LoRA and projector-only folders over `model_base`, llava-hf folders (LLaVA and LLaVA-NeXT), original
Video-LLaVA folders; on Llama/Vicuna and Mistral. No remote code is ever run. What concerns files is in
`llava.model.checkpoint`.
"""

from __future__ import annotations

import difflib
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from llava.environment import check_environment
from llava.model.checkpoint import CheckpointError, collect_warnings, warn
from llava.model.checkpoint.config import check_config, understand
from llava.model.checkpoint.entries import GENERATION, read_entries
from llava.model.checkpoint.fill import fill_model
from llava.model.checkpoint.find import resolve_checkpoint
from llava.model.checkpoint.folder import CheckpointFolder, has_tokenizer
from llava.model.checkpoint.placement import connect, main_device, place
from llava.model.checkpoint.quantize import Quantizer
from llava.model.checkpoint.tower import tower_weights
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.settings import (
    ENVIRONMENT,
    choose_attention,
    choose_dtypes,
    choose_runtime,
    resolve_preset,
    resolve_pruning,
)
from llava.model.tokenizer import add_image_tokens, load_tokenizer
from llava.model.transformers_compat import set_attention

DEFAULT_CONTEXT = 2048
# Arguments that LLaVA's callers also pass and that have no effect here.
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
    attn_implementation: str | bool | None = "sdpa",
    visual_token_num: int | None = None,
    important_ratio: float | None = None,
    method: str | None = None,
    dtype: str | torch.dtype | None = None,
    tower_dtype: str | torch.dtype | None = None,
    anyres: str | None = None,
    config: dict | None = None,
    model_class: type | None = None,
    preset: str | None = None,
    allow_outside: bool = False,
    graphs: bool | None = None,
    compile: bool = False,
    decoder: bool = True,
    **kwargs: Any,
) -> tuple[Any, Any, Any, int]:
    """Load a LLaVA checkpoint; return (tokenizer, model, image_processor, context_len).

    Arguments are checked before anything is loaded. Pruning settings that are not given are taken from the
    environment, then from config.json (see `llava.model.settings`); the default is no pruning. Where a model
    is not what the files of its checkpoint claim, there is a `CheckpointWarning`; `model.loading_notes` has
    the texts.

    Args:
        model_path: a folder, or owner/name on the Hugging Face Hub.
        model_base: the language model that a LoRA or projector-only folder was trained on (default: the one
            that its files name, if it is beside the folder or in the cache).
        model_name: accepted as in LLaVA and not used; the files tell what they are.
        load_8bit, load_4bit: quantize the decoder's layers (bitsandbytes).
        device_map: "auto", a device, or a dict of module names to devices.
        device: the device, if there is only one; wins over device_map="auto".
        attn_implementation: kernels of tower and language model: sdpa, eager, flash_attention_2. True
            and False, LLaVA's `use_flash_attn` in this place, mean flash_attention_2 and sdpa.
        visual_token_num: visual tokens to keep per crop.
        important_ratio, method, anyres: see `VisualTokenMixin.set_pruner`.
        dtype: of language model and projector (default: float32 on CPU, else the checkpoint's).
        tower_dtype: of the vision tower (default: `dtype`); "float32" under a half-precision model is the
            paper's setting.
        config: entries that replace config.json.
        model_class: the class of the model; the tokenizer is then not loaded (see `from_pretrained`).
        preset: "published" sets dtype (not on a CPU), tower_dtype and anyres as for the published numbers,
            and rounds pixels to float16 before the tower; "exact" (default) sets nothing.
        allow_outside: a weight index may name files outside of its folder (also VISPRUNER_ALLOW_OUTSIDE=1).
        graphs: capture the stages of a generation as CUDA graphs (default: on CUDA, unless
            VISPRUNER_GRAPHS=0).
        compile: compile layers, on CUDA only; last bits of the results differ.
        decoder: False leaves out the decoder's layers, where a server runs the language model; a forward pass
            then raises ValueError. A LoRA checkpoint is always loaded as a whole.
        kwargs: revision, cache_dir, token and local_files_only for the Hub, and arguments of LLaVA and
            transformers that have no effect here.

    Raises:
        ValueError: an argument or environment variable is invalid, or contradicts the preset, or layers
            are to be compiled on a device without CUDA, or the model does not have what the method reads;
            `CheckpointError` for files.
        FileNotFoundError: the checkpoint, its tower or its tokenizer was not found.
        ImportError: an optional package is missing.
        TypeError: unknown argument.
    """
    given = {
        "method": method,
        "tokens": visual_token_num,
        "ratio": important_ratio,
        "anyres": anyres,
        "tower_dtype": tower_dtype,
        "preset": preset,
        "graphs": graphs,
    }
    check_environment(ENVIRONMENT[name] for name, value in given.items() if value is not None)
    extra, hub = _check_kwargs(kwargs)
    attn_implementation = extra.get("attn_implementation", attn_implementation)
    if isinstance(attn_implementation, bool):
        attn_implementation = "flash_attention_2" if attn_implementation else "sdpa"
    dtype = extra.get("dtype", dtype) if dtype is None else dtype
    if load_8bit and load_4bit:
        raise ValueError("load_8bit and load_4bit are both set. Choose one.")
    pruning = (method, visual_token_num, important_ratio, anyres, preset)
    resolve_pruning(None, *pruning)  # refuse before reading anything
    device_main = main_device(device_map, device)
    choose_dtypes(dtype, tower_dtype, None, device_main, preset)
    choose_runtime(graphs, compile, device_main)

    folder = resolve_checkpoint(model_path, **hub)
    base = resolve_checkpoint(model_base, **hub) if model_base else None
    allow_outside = allow_outside or os.environ.get("VISPRUNER_ALLOW_OUTSIDE") == "1"
    checkpoint = CheckpointFolder(folder, base, allow_outside)
    with collect_warnings() as notes:
        raw = checkpoint.check()
        if config is not None:
            check_config(config, "config")
            raw = config
        settings = resolve_pruning(raw, *pruning)
        if settings.pruner.name != "none" and settings.pruner.tokens is None:
            warnings.warn(
                f"method {settings.pruner.name!r} without a token budget keeps every visual token. Pass "
                "visual_token_num=64 (or set VISPRUNER_TOKENS=64, or visual_token_num in config.json).",
                stacklevel=2,
            )
        tokenizer = _load_tokenizer(checkpoint) if model_class is None else None
        generation = read_generation_config(checkpoint.generation_config())
        stored_class, config, sources = understand(checkpoint.config_folder, raw, checkpoint.base)
        if not issubclass(model_class or stored_class, stored_class):
            raise CheckpointError(
                f"{checkpoint.config_folder / 'config.json'}: the checkpoint is a {stored_class.__name__}, "
                f"not a {model_class.__name__}. Use {stored_class.__name__}.from_pretrained."
            )
        model_dtype, tower_type = choose_dtypes(dtype, tower_dtype, config.dtype, device_main, preset)
        config.dtype = model_dtype
        kernels, tower_kernels = choose_attention(attn_implementation, model_dtype, tower_type)
        quantizer = Quantizer(4 if load_4bit else 8, model_dtype) if load_8bit or load_4bit else None
        set_attention(config, kernels)
        model = _build(model_class or stored_class, config)
        for holder, source in sources.items():
            tower = build_vision_tower(
                source,
                select_layer=getattr(config, "mm_vision_select_layer", -2),
                select_feature=getattr(config, "mm_vision_select_feature", None) or "patch",
                attn_implementation=tower_kernels,
            )
            tower.read_weights = partial(tower_weights, source, checkpoint.weights)
            setattr(model.model, holder, tower)
        if not decoder and checkpoint.adapter() is None:
            model.model.layers = AbsentLayers()
        if quantizer is not None:
            quantizer.swap(model)
        placement = place(model, device_map, device, model_dtype)
        fill_model(
            model,
            checkpoint.weights(),
            sources,
            placement,
            model_dtype,
            tower_type,
            quantizer,
            checkpoint.config_folder,
            checkpoint.adapter(),
            raw.get("quantization_config") or (raw.get("text_config") or {}).get("quantization_config"),
        )
        model.preset = resolve_preset(preset)
        model.set_pruner(settings.pruner, anyres=settings.anyres)
        if generation is not None:
            model.generation_config = generation
        if tokenizer is not None:
            add_image_tokens(tokenizer, model)
        _check_ids(model, checkpoint)
    model.loading_notes = tuple(notes)
    connect(model, placement)
    model.set_runtime(graphs=graphs, compiled=compile)
    model.check_pruner(model.pruner)
    return tokenizer, model.eval(), model.get_vision_tower().image_processor, context_length(config)


def _build(model_class: type, config: Any) -> Any:
    """Build a model on the meta device with an output layer of its own, whatever config.json claims."""
    padding, tied = config.pad_token_id, config.tie_word_embeddings
    config.tie_word_embeddings = False
    if padding is not None and not 0 <= padding < config.vocab_size:  # held against the weights later
        config.pad_token_id = None
    with torch.device("meta"):
        model = model_class(config)
    config.pad_token_id, config.tie_word_embeddings = padding, tied
    return model


class AbsentLayers(nn.ModuleList):
    """The layers of a decoder that was not loaded: whoever runs it gets an error, not its input."""

    def __iter__(self) -> Any:
        raise ValueError("decoder: its layers were not loaded. Load the model with decoder=True to run it.")

    def __getitem__(self, index: Any) -> Any:
        return iter(self)


def _load_tokenizer(checkpoint: CheckpointFolder) -> Any:
    """Load the tokenizer; warn if that of the base is used and the trained part has another one."""
    place = checkpoint.tokenizer()
    tokenizer = load_tokenizer(place)
    if place != checkpoint.folder and has_tokenizer(checkpoint.folder):
        own = load_tokenizer(checkpoint.folder)
        if len(own) != len(tokenizer) or own.get_added_vocab() != tokenizer.get_added_vocab():
            only = sorted(own.get_added_vocab().items() - tokenizer.get_added_vocab().items())
            first = f", and has {only[0][0]!r}" if only else ""
            warn(
                f"{checkpoint.folder}: its tokenizer is not that of model_base{first}. The tokenizer of "
                f"model_base ({len(tokenizer)} tokens) is used, as in LLaVA. If the other's tokens were "
                "trained, copy its files into the folder of model_base."
            )
    return tokenizer


def read_generation_config(path: Path | None) -> GenerationConfig | None:
    """Read generation_config.json; None if there is no such file. Raises `CheckpointError`."""
    if path is None:
        return None
    entries = read_entries(path, GENERATION)
    try:
        return GenerationConfig.from_dict(entries)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # of transformers, for nested entries
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: {reason}. Use the file of the original checkpoint.") from error


def _check_ids(model: Any, checkpoint: CheckpointFolder) -> None:
    """Raise `CheckpointError` for ids of special tokens that the model has no embedding for."""
    rows = len(model.get_input_embeddings().weight)
    path = checkpoint.generation_config()
    places = [(checkpoint.config_folder / "config.json", model.config)]
    places += [] if path is None else [(path, model.generation_config)]
    for where, holder in places:
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(holder, key, None)
            outside = [one for one in (value if isinstance(value, list) else [value]) if one and one >= rows]
            if outside:
                raise CheckpointError(
                    f"{where}: {key} is {value}, but the model has {rows} tokens. Set it to an id below "
                    f"{rows}, or to null."
                )


def context_length(config: object) -> int:
    """Return the tokens of context that LLaVA's scripts may use."""
    for name in ("max_sequence_length", "tokenizer_model_max_length", "max_position_embeddings"):
        value = getattr(config, name, None)
        if value:
            return int(value)
    return DEFAULT_CONTEXT


def _check_kwargs(kwargs: dict) -> tuple[dict, dict]:
    """Split off Hub options, translate other spellings, refuse what would silently do nothing."""
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
                raise ValueError(f"{name}={value!r} is not supported: no remote code is run. Leave it out.")
        elif name not in _HARMLESS:
            known = [*load_pretrained_model.__annotations__, *_HARMLESS, *_HUB, *_ALIASES]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" The nearest known one is {near[0]}." if near else ""
            raise TypeError(f"load_pretrained_model() got an unknown argument {name!r}.{hint}")
    return extra, hub
