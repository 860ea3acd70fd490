"""config.json of every supported checkpoint -> the configuration of our own classes.

    stored_config("liuhaotian/llava-v1.6-mistral-7b")["torch_dtype"]    # a folder or owner/name
    conversation_for(config, name)                                      # "mistral_instruct"

Entries and their meaning only; no weights are read. transformers' `AutoConfig` is not used: it maps `llava`
to another model, which would lose LLaVA's own entries.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.find import resolve_config
from llava.model.checkpoint.tower import TowerSource, clip_processor, find_tower

_OURS = ("llava", "llava_llama", "llama", "llava_mistral", "mistral")
_YI_VOCABULARY = range(64000, 65000)  # of LLaVA-1.6-34B's language model, with padding


def read_config(folder: Path) -> dict:
    """Read config.json as a dict. Raises `CheckpointError` naming the file if it is absent or malformed."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file. Pass the folder of a checkpoint.") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}). Download it again.") from error
    if not isinstance(config, dict):
        kind = type(config).__name__
        raise CheckpointError(f"{path}: expected a JSON object, got a {kind}. Download it again.")
    return config


def stored_config(model: str | os.PathLike, base: str | os.PathLike | None = None, **hub: object) -> dict:
    """Read the config.json of a checkpoint before loading it; from the Hub, download only that file.

    Args:
        model: a folder, or owner/name on the Hub.
        base: the checkpoint below a LoRA adapter, whose config.json is used if `model` has none.
        hub: revision, cache_dir, token, local_files_only.

    Raises:
        FileNotFoundError: there is no such folder, and the Hub does not provide it.
        CheckpointError: config.json is absent or malformed.
    """
    folder = resolve_config(model, **hub)
    if base is not None and not (folder / "config.json").is_file():
        folder = resolve_config(base, **hub)
    return read_config(folder)


def conversation_for(config: dict, name: str = "") -> str:
    """Choose the conversation template (a key of `conv_templates`) that a checkpoint was trained with.

    The language model in `config` decides where it is enough; the checkpoint's `name` distinguishes versions
    that share an architecture. The default is "vicuna_v1", the template of LLaVA-1.5.

    Args:
        config: the content of config.json (see `stored_config`); {} if unknown.
        name: the checkpoint's folder or Hub name.
    """
    text = config.get("text_config") or {}
    kinds = [config.get("model_type"), text.get("model_type"), *(config.get("architectures") or [])]
    model = " ".join(str(kind) for kind in kinds if kind).lower()
    name = name.lower()
    known = model or name  # the name tells the language model only if config.json does not
    if "mistral" in known or "mixtral" in known:
        return "mistral_instruct"
    if "mpt" in known:
        return "mpt"
    if "qwen" in known:
        return "qwen_1_5"
    vocabulary = text.get("vocab_size") or config.get("vocab_size")
    if vocabulary in _YI_VOCABULARY or (vocabulary is None and re.search(r"34b|hermes|yi-", name)):
        return "chatml_direct"
    if "llama-2" in name:
        return "llava_llama_2"
    return "llava_v0" if re.search(r"(^|[-_/])v0($|[-_./])", name) else "vicuna_v1"


def understand(folder: Path, config: dict) -> tuple[type, object, TowerSource]:
    """Return (model class, its config object, the source of its tower) for a folder's config.json.

    Raises:
        CheckpointError: another kind of model, or entries of a wrong type.
        FileNotFoundError: the vision tower was not found.
    """
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM

    where = folder / "config.json"
    if "text_config" in config:
        config, source = _from_transformers(folder, config)
    else:
        if not config.get("mm_vision_tower"):
            raise CheckpointError(
                f"{where}: no mm_vision_tower, so this is not a LLaVA checkpoint (model_type "
                f"{config.get('model_type')!r}). Pass a bare language model as model_base, and the folder of "
                "the projector or LoRA adapter as model_path."
            )
        source = find_tower(config["mm_vision_tower"], folder)
    kind = str(config.get("model_type"))
    names = [kind, *(config.get("architectures") or [])]
    if kind not in _OURS:
        raise CheckpointError(
            f"{where}: model_type {kind!r} is not supported. Choose LLaVA on Llama/Vicuna or on Mistral, in "
            "LLaVA's own format or as llava-hf (llava, llava_next)."
        )
    mistral = any("mistral" in n.lower() for n in names)
    config_class = LlavaMistralConfig if mistral else LlavaConfig
    dropped = ("model_type", "transformers_version", "quantization_config", "auto_map")
    fields = {k: v for k, v in config.items() if k not in dropped}
    try:
        built = config_class.from_dict(fields)
    except Exception as error:  # transformers raises its own classes for entries of a wrong type
        raise CheckpointError(f"{where}: {error}") from error
    _check_tower_width(where, built, source)
    return (LlavaMistralForCausalLM if mistral else LlavaLlamaForCausalLM), built, source


def _check_tower_width(where: Path, config: object, source: TowerSource) -> None:
    width = (source.config.get("vision_config") or source.config).get("hidden_size")
    if getattr(config, "mm_hidden_size", None) is None:
        if width is None:
            raise CheckpointError(
                f"{where}: mm_hidden_size is missing, and so is the hidden_size of the tower. Set it."
            )
        config.mm_hidden_size = width
    elif width is not None and width != config.mm_hidden_size:
        raise CheckpointError(
            f"{where}: mm_hidden_size is {config.mm_hidden_size}, but the tower {config.mm_vision_tower!r} "
            f"has hidden_size {width}. Use the tower that the checkpoint was trained with."
        )


def _from_transformers(folder: Path, config: dict) -> tuple[dict, TowerSource]:
    """Translate a llava-hf folder's config. Images are prepared as in LLaVA (pad / anyres)."""
    where, kind = folder / "config.json", config.get("model_type")
    text, vision = dict(config["text_config"]), dict(config.get("vision_config") or {})
    if kind not in ("llava", "llava_next") or text.get("model_type", "llama") not in ("llama", "mistral"):
        raise CheckpointError(
            f"{where}: model_type {kind!r} over {text.get('model_type')!r} is not supported. Choose llava or "
            "llava_next over llama or mistral."
        )
    gelu = config.get("projector_hidden_act", "gelu") == "gelu"
    if not gelu or not config.get("multimodal_projector_bias", True):
        raise CheckpointError(
            f"{where}: the projector is not supported. Only two layers with GELU and bias are."
        )
    layer = config.get("vision_feature_layer", -2)
    strategy = config.get("vision_feature_select_strategy", "default")
    if not isinstance(layer, int):
        raise CheckpointError(f"{where}: vision_feature_layer is {layer!r}, but only one layer is supported.")
    next_ = kind == "llava_next"
    dtypes = (c.get(n) for c in (config, text) for n in ("dtype", "torch_dtype"))
    ours = {
        **text,
        "model_type": f"llava_{text.get('model_type', 'llama')}",
        "architectures": None,
        "tie_word_embeddings": bool(text.get("tie_word_embeddings") or config.get("tie_word_embeddings")),
        "torch_dtype": next((d for d in dtypes if d), None),
        "mm_vision_tower": vision.get("_name_or_path") or str(folder),
        "mm_hidden_size": vision.get("hidden_size"),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": layer,
        "mm_vision_select_feature": {"default": "patch", "full": "cls_patch"}.get(strategy, strategy),
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "anyres" if next_ else "pad",
        "mm_patch_merge_type": "spatial_unpad" if next_ else "flat",
    }
    if next_:
        # transformers writes (height, width), LLaVA (width, height)
        ours["image_grid_pinpoints"] = [[w, h] for h, w in config["image_grid_pinpoints"]]
    for name in ("pruning_method", "visual_token_num", "important_ratio", "anyres_protocol"):
        if name in config:
            ours[name] = config[name]
    vision.setdefault("model_type", "clip_vision_model")
    processor = _processor(folder, vision)
    return ours, TowerSource(vision, None, processor, "llava-hf folders contain their own tower")


def _processor(folder: Path, vision: dict) -> dict:
    """Return CLIP's preprocessing with the folder's own values; LLaVA-NeXT's processor adds only tiling."""
    processor = clip_processor(vision.get("image_size", 336))
    path = folder / "preprocessor_config.json"
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        processor.update({k: v for k, v in saved.items() if k in processor and k != "image_processor_type"})
    return processor
