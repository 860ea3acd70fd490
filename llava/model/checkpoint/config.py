"""config.json of every supported checkpoint -> the configuration of our own classes.

    stored_config("liuhaotian/llava-v1.6-mistral-7b")["torch_dtype"]    # a folder or owner/name
    conversation_for(config, name)                                      # "mistral_instruct"

Entries and their meaning only; no weights are read. transformers' `AutoConfig` is not used: it maps `llava`
to another model, which would lose LLaVA's own entries.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from llava.model.checkpoint import CheckpointError, warn
from llava.model.checkpoint.entries import (
    CONFIG,
    LANGUAGE,
    TOWER,
    UNUSED,
    check_entries,
    read_object,
    require_entries,
)
from llava.model.checkpoint.find import find_base, is_hub_name, resolve_config, tower_names
from llava.model.checkpoint.tower import (
    TowerSource,
    check_tower,
    clip_processor,
    find_towers,
    read_processor,
)

_OURS = ("llava", "llava_llama", "llama", "llava_mistral", "mistral")
# Without these, transformers' defaults would be taken; shapes do not reveal a wrong number of heads.
_NEEDED = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads rms_norm_eps vocab_size "
    "mm_vision_select_layer"
)
# Of language models that were trained with ChatML: LLaVA-1.6-34B's (Yi, with padding) and SmolLM2.
_CHATML_VOCABULARIES = (*range(64000, 65000), 49152)


def read_config(folder: Path) -> dict:
    """Read and check config.json. Raises `CheckpointError` naming the file and the key."""
    path = folder / "config.json"
    config = read_object(path)
    check_config(config, str(path))
    return config


def check_config(config: dict, where: str) -> None:
    """Check the entries of a config.json. Raises `CheckpointError` naming `where` and the key."""
    check_entries(config, CONFIG, where)
    if config.get("model_type") == "video_llava":
        raise CheckpointError(
            f"{where}: a Video-LLaVA of transformers (-hf), which is another model than the original: its "
            "video tower has no temporal attention. Load it with transformers "
            "(VideoLlavaForConditionalGeneration), and prune it with llava.prune(model)."
        )
    for name, rules in (("text_config", LANGUAGE), ("vision_config", TOWER)):
        check_entries(config.get(name) or {}, rules, f"{where}: {name}")


def config_folder(folder: Path, base: Path | None) -> Path:
    """Return the folder whose config.json is used: the base's if the checkpoint itself has none."""
    own = base is None or (folder / "config.json").is_file()
    return folder if own else base


def stored_config(model: str | os.PathLike, base: str | os.PathLike | None = None, **hub: object) -> dict:
    """Read the config.json of a checkpoint before loading it; from the Hub, download only that file.

    Args:
        model: a folder, or owner/name on the Hub.
        base: the checkpoint below a LoRA adapter, whose config.json is used if `model` has none.
        hub: revision, cache_dir, token, local_files_only.

    Raises:
        FileNotFoundError: there is no such folder, and the Hub does not provide it.
        CheckpointError: config.json is absent or malformed, or an entry has a wrong type or value.
    """
    try:
        folder = resolve_config(model, **hub)
    except FileNotFoundError:
        if base is None or not is_hub_name(str(model)):
            raise
        folder = None  # a repository without config.json, such as that of a LoRA run
    if folder is None or not (folder / "config.json").is_file():
        base = base if base is not None or folder is None else find_base(folder)
        folder = folder if base is None else resolve_config(base, **hub)
    return read_config(folder)


def conversation_for(config: dict, name: str = "") -> str:
    """Choose the conversation template (a key of `conv_templates`) that a checkpoint was trained with.

    That which llava.train recorded as `conv_mode` in `config`, if any. Else the language model decides where
    it is enough; the checkpoint's `name` distinguishes versions
    that share an architecture. The default is "vicuna_v1", the template of LLaVA-1.5; that of Video-LLaVA is
    "llava_v1".

    Args:
        config: the content of config.json (see `stored_config`); {} if unknown.
        name: the checkpoint's folder or Hub name.
    """
    if config.get("conv_mode"):
        return config["conv_mode"]
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
    if vocabulary in _CHATML_VOCABULARIES or (vocabulary is None and re.search(r"34b|hermes|yi-", name)):
        return "chatml_direct"
    if config.get("mm_video_tower") or config.get("mm_image_tower"):
        return "llava_v1"
    if "llama-2" in name:
        return "llava_llama_2"
    return "llava_v0" if re.search(r"(^|[-_/])v0($|[-_./])", name) else "vicuna_v1"


def understand(
    folder: Path, config: dict, base: Path | None = None
) -> tuple[type, object, dict[str, TowerSource]]:
    """Return (model class, its config object, sources of its towers by holder) for a folder's config.json.

    Args:
        folder: of the config.json.
        config: its content, checked by `read_config`.
        base: another folder in and beside which the tower may be.

    Raises:
        CheckpointError: another kind of model, or entries that are missing or do not fit each other.
        FileNotFoundError: the vision tower was not found.
    """
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
    from llava.model.transformers_compat import build_config

    where = folder / "config.json"
    if config.get("text_config") is not None:
        config, source = _from_transformers(folder, config)
        sources = {"vision_tower": source}
    else:
        if not tower_names(config):
            if folder == base:
                raise CheckpointError(
                    f"{where}: no mm_vision_tower: model_base is a bare language model, and the folder of "
                    "the trained part has no config.json. Copy that of the training run into it."
                )
            raise CheckpointError(
                f"{where}: no mm_vision_tower, so this is not a LLaVA checkpoint (model_type "
                f"{config.get('model_type')!r}). Pass a bare language model as model_base, and the folder of "
                "the projector or LoRA adapter as model_path."
            )
        require_entries(config, _NEEDED, str(where))
        sources = find_towers(config, folder, base)
    kind = str(config.get("model_type"))
    names = [kind, *(config.get("architectures") or [])]
    if kind not in _OURS:
        raise CheckpointError(
            f"{where}: model_type {kind!r} is not supported. Choose LLaVA on Llama/Vicuna or on Mistral, in "
            "LLaVA's own format or as llava-hf (llava, llava_next)."
        )
    mistral = any("mistral" in n.lower() for n in names)
    config_class = LlavaMistralConfig if mistral else LlavaConfig
    fields = {k: v for k, v in config.items() if k not in UNUSED}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if fields.get(name) == -1:  # none, in the first conversions of LLaMA
            fields[name] = None
    fields["dtype"] = _dtype(where, fields.pop("dtype", None), fields.pop("torch_dtype", None))
    built = build_config(config_class, fields, str(where))
    _check_shapes(where, built)
    for source in sources.values():
        _check_tower_width(where, built, source)
        _check_layer(where, built, source)
        _check_crops(where, built, source)
    return (LlavaMistralForCausalLM if mistral else LlavaLlamaForCausalLM), built, sources


def _dtype(where: Path, dtype: str | None, torch_dtype: str | None) -> str | None:
    """Return torch's name of the dtype in config.json; "auto" counts as not given."""
    names = [str(one).removeprefix("torch.") for one in (dtype, torch_dtype) if one not in (None, "auto")]
    if len(set(names)) > 1:
        warn(
            f"{where}: dtype is {dtype!r}, torch_dtype is {torch_dtype!r}. dtype is used where the command "
            "sets none. Remove the other one."
        )
    return names[0] if names else None


def _check_shapes(where: Path, config: object) -> None:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        raise CheckpointError(
            f"{where}: hidden_size {config.hidden_size} is not a multiple of num_attention_heads {heads}. "
            "Use the file of the original checkpoint."
        )
    if heads % groups:
        raise CheckpointError(
            f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}. Use "
            "the file of the original checkpoint."
        )
    kind = getattr(config, "mm_projector_type", None) or "linear"
    if kind not in ("linear", "identity") and re.fullmatch("mlp[1-9][0-9]?x_gelu", kind) is None:
        raise CheckpointError(
            f"{where}: mm_projector_type: {kind!r} is unknown. Choose linear, mlpNx_gelu (N = 1, 2, ...) or "
            "identity."
        )


def _check_crops(where: Path, config: object, source: TowerSource) -> None:
    """Write the resolutions of an anyres checkpoint as [width, height] pairs, whole crops each."""
    from llava.mm_utils import read_pinpoints

    if not str(getattr(config, "image_aspect_ratio", None)).startswith("anyres"):
        return
    if source.folder_first:
        raise CheckpointError(
            f"{where}: image_aspect_ratio is {config.image_aspect_ratio!r}, but Video-LLaVA takes whole "
            "images. Set it to pad."
        )
    side = source.side
    try:
        pairs = read_pinpoints(getattr(config, "image_grid_pinpoints", None), side)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    odd = [pair for pair in pairs if pair[0] % side or pair[1] % side]
    if odd:
        raise CheckpointError(
            f"{where}: image_grid_pinpoints: {list(odd[0])} is not a multiple of the tower's crops of {side} "
            "pixels. Use the tower that the checkpoint was trained with, or correct the entry."
        )
    config.image_grid_pinpoints = [list(pair) for pair in pairs]


def _check_layer(where: Path, config: object, source: TowerSource) -> None:
    from llava.model.multimodal_encoder.base import layers_to_run

    depth = (source.config.get("vision_config") or source.config).get("num_hidden_layers")
    if depth is not None:
        try:
            layers_to_run(getattr(config, "mm_vision_select_layer", -2), depth)
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from error


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
            f"{where}: mm_hidden_size is {config.mm_hidden_size}, but the tower {_name(config, source)!r} "
            f"has hidden_size {width}. Use the tower that the checkpoint was trained with."
        )


def _name(config: object, source: TowerSource) -> object:
    return getattr(config, "mm_vision_tower", None) if source.folder is None else str(source.folder)


def _from_transformers(folder: Path, config: dict) -> tuple[dict, TowerSource]:
    """Translate a llava-hf folder's config. Images are prepared as in LLaVA (pad / anyres)."""
    where, kind = folder / "config.json", config.get("model_type")
    text, vision = dict(config["text_config"]), dict(config.get("vision_config") or {})
    if kind not in ("llava", "llava_next") or text.get("model_type", "llama") not in ("llama", "mistral"):
        raise CheckpointError(
            f"{where}: model_type {kind!r} over {text.get('model_type')!r} is not supported. Choose llava or "
            "llava_next over llama or mistral."
        )
    if (
        config.get("projector_hidden_act") not in (None, "gelu")
        or config.get("multimodal_projector_bias") is False
    ):
        raise CheckpointError(
            f"{where}: the projector is not supported. Only two layers with GELU and bias are."
        )
    layer = config.get("vision_feature_layer")
    layer = -2 if layer is None else layer
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
        "dtype": None,
        "mm_vision_tower": vision.get("_name_or_path") or str(folder),
        "mm_hidden_size": vision.get("hidden_size"),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "anyres" if next_ else "pad",
        "mm_patch_merge_type": "spatial_unpad" if next_ else "flat",
    }
    if next_:
        # transformers writes (height, width), LLaVA (width, height)
        pinpoints = config.get("image_grid_pinpoints")
        if not isinstance(pinpoints, list):
            raise CheckpointError(
                f"{where}: image_grid_pinpoints is {pinpoints!r}, expected a list of [height, width] pairs. "
                "Use the file of the original checkpoint."
            )
        ours["image_grid_pinpoints"] = [[w, h] for h, w in pinpoints]
    for name in ("pruning_method", "visual_token_num", "important_ratio", "anyres_protocol"):
        if name in config:
            ours[name] = config[name]
    vision.setdefault("model_type", "clip_vision_model")
    check_tower(vision, f"{where}: vision_config")
    processor = _processor(folder, vision)
    return ours, TowerSource(vision, None, processor, "llava-hf folders contain their own tower")


def _processor(folder: Path, vision: dict) -> dict:
    """Return CLIP's preprocessing with the folder's own values; LLaVA-NeXT's processor adds only tiling."""
    processor = clip_processor(vision.get("image_size") or 336)
    saved = read_processor(folder) or {}
    processor.update({k: v for k, v in saved.items() if k in processor and k != "image_processor_type"})
    return processor
