"""config.json of every supported checkpoint -> the configuration of our own classes.

Knows entries and their meaning, reads no weights. transformers' `AutoConfig` is not asked: there `llava` is
another model, and LLaVA's own entries would be lost.
"""

from __future__ import annotations

import json
from pathlib import Path

from llava.model.checkpoint.read import CheckpointError
from llava.model.multimodal_encoder.builder import TowerSource, clip_processor, find_tower

_OURS = ("llava", "llava_llama", "llama", "llava_mistral", "mistral")


def read_config(folder: Path) -> dict:
    """config.json as a dict. Raises `CheckpointError` naming the file if absent or malformed."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; {folder} is not a checkpoint folder") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return config


def understand(folder: Path, config: dict) -> tuple[type, object, TowerSource]:
    """(model class, its config object, where the tower comes from) for a checkpoint folder's config.json.

    Raises `CheckpointError` for another kind of model, `FileNotFoundError` if the tower is nowhere.
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
                f"{config.get('model_type')!r}); a bare language model belongs in model_base, with the "
                "folder of the projector or LoRA as model_path"
            )
        source = find_tower(config["mm_vision_tower"], folder)
    kind = str(config.get("model_type"))
    names = [kind, *(config.get("architectures") or [])]
    if kind not in _OURS:
        raise CheckpointError(
            f"{where}: model_type {kind!r} is not supported; supported: LLaVA on Llama/Vicuna and on "
            "Mistral, in LLaVA's own format or as llava-hf (llava, llava_next)"
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
            raise CheckpointError(f"{where}: mm_hidden_size is missing, and the tower names no hidden_size")
        config.mm_hidden_size = width
    elif width is not None and width != config.mm_hidden_size:
        raise CheckpointError(
            f"{where}: mm_hidden_size is {config.mm_hidden_size}, but the tower {config.mm_vision_tower!r} "
            f"has hidden_size {width}; this is not the tower the checkpoint was trained with"
        )


def _from_transformers(folder: Path, config: dict) -> tuple[dict, TowerSource]:
    """The config of a llava-hf folder in LLaVA's terms. Images are prepared as LLaVA does (pad / anyres)."""
    where, kind = folder / "config.json", config.get("model_type")
    text, vision = dict(config["text_config"]), dict(config.get("vision_config") or {})
    if kind not in ("llava", "llava_next") or text.get("model_type", "llama") not in ("llama", "mistral"):
        raise CheckpointError(
            f"{where}: model_type {kind!r} over {text.get('model_type')!r} is not supported; supported: "
            "llava and llava_next over llama and mistral"
        )
    gelu = config.get("projector_hidden_act", "gelu") == "gelu"
    if not gelu or not config.get("multimodal_projector_bias", True):
        raise CheckpointError(f"{where}: only the two-layer GELU projector with bias is supported")
    layer = config.get("vision_feature_layer", -2)
    strategy = config.get("vision_feature_select_strategy", "default")
    if not isinstance(layer, int):
        raise CheckpointError(f"{where}: vision_feature_layer {layer!r} is not supported, only one layer")
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
    return ours, TowerSource(vision, None, processor, "llava-hf folders hold their own tower")


def _processor(folder: Path, vision: dict) -> dict:
    """CLIP's preprocessing with the folder's own numbers (LLaVA-NeXT's processor is CLIP's, plus cutting)."""
    processor = clip_processor(vision.get("image_size", 336))
    path = folder / "preprocessor_config.json"
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        processor.update({k: v for k, v in saved.items() if k in processor and k != "image_processor_type"})
    return processor
