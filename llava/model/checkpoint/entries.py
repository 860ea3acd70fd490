"""Read the JSON files of a checkpoint and check the type and range of every entry that is used.

    config = read_entries(folder / "config.json", CONFIG)    # CheckpointError names the file and the key

The one place where these files are validated: config.json of checkpoints and towers, generation_config.json,
preprocessor_config.json, adapter_config.json, the tokenizer's files and weight indices. An entry that is null
counts as not given. Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.conversation import conv_templates
from llava.model.checkpoint import CheckpointError

_MAX_NUMBER = 1e15  # far above what any entry may be, and below what overflows inside torch
_MAX_DEPTH = 64  # nesting of a JSON file; files of checkpoints have less than 10


@dataclass(frozen=True)
class Entry:
    """What an entry must be, in words, and the test for it."""

    expected: str
    is_valid: Callable[[Any], bool]


Entries = Mapping[str, Entry]


# --- reading ---------------------------------------------------------------------------------------------
def read_entries(path: Path, rules: Entries) -> dict[str, Any]:
    """Read a JSON object and check its entries.

    Raises:
        CheckpointError: the file is absent or not a JSON object, or an entry has a wrong type or value.
    """
    entries = read_object(path)
    check_entries(entries, rules, str(path))
    return entries


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `CheckpointError` naming the file if it is absent or malformed."""
    deep = CheckpointError(f"{path}: nested more than {_MAX_DEPTH} levels deep. Download it again.")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file. Pass the folder of a checkpoint.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check the file.") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}). Download it again.") from error
    except RecursionError:
        raise deep from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise CheckpointError(f"{path}: expected a JSON object, got a {kind}. Download it again.")
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise deep
        inside = (value for one in level for value in (one.values() if isinstance(one, dict) else one))
        level = [value for value in inside if isinstance(value, dict | list)]
    return content


def check_entries(entries: Mapping[str, Any], rules: Entries, where: str) -> None:
    """Check the entries that `rules` lists. Raises `CheckpointError` naming `where` and the key."""
    for key, rule in rules.items():
        value = entries.get(key)
        if value is not None and not rule.is_valid(value):
            raise CheckpointError(
                f"{where}: {key} is {reprlib.repr(value)}, expected {rule.expected}. Correct the entry, or "
                "use the file of the original checkpoint."
            )


def require_entries(entries: Mapping[str, Any], keys: str, where: str) -> None:
    """Raise `CheckpointError` unless all `keys` (separated by blanks) are given."""
    missing = [key for key in keys.split() if entries.get(key) is None]
    if missing:
        raise CheckpointError(
            f"{where}: missing {', '.join(missing)}. A default could silently give wrong answers. Use the "
            "file of the original checkpoint."
        )


# --- kinds of values -------------------------------------------------------------------------------------
def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _whole(low: int = 0, high: int = 1 << 40) -> Entry:
    ends = f"from {low} to {high}" if high < 1 << 40 else f">= {low}"
    return Entry(f"an integer {ends}", lambda value: _is_whole(value, low, high))


def _is_number(value: object, low: float, high: float, above: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > _MAX_NUMBER:
        return False  # also Infinity; NaN fails the comparisons
    return (low < value if above else low <= value) and value <= high


def _number(low: float = -math.inf, high: float = math.inf, above: bool = False) -> Entry:
    ends = f" {'>' if above else '>='} {low:g}" if low > -math.inf else ""
    ends += f" and <= {high:g}" if high < math.inf else ""
    return Entry(f"a number{ends}", lambda value: _is_number(value, low, high, above))


def _words(text: str) -> Entry:
    words = text.split()
    return Entry(f"one of {', '.join(words)}", lambda value: isinstance(value, str) and value in words)


def _list_of(rule: Entry, length: int | None = None) -> Entry:
    count = "a list" if length is None else f"a list of {length}"
    return Entry(
        f"{count}, each {rule.expected}",
        lambda value: (
            isinstance(value, list)
            and (length is None or len(value) == length)
            and all(map(rule.is_valid, value))
        ),
    )


def _either(*rules: Entry) -> Entry:
    return Entry(
        " or ".join(rule.expected for rule in rules),
        lambda value: any(rule.is_valid(value) for rule in rules),
    )


def _object_of(rule: Entry, keys: Entry | None = None) -> Entry:
    return Entry(
        f"an object with values that are {rule.expected}",
        lambda value: (
            isinstance(value, dict)
            and all(rule.is_valid(one) for one in value.values() if one is not None)
            and (keys is None or all(map(keys.is_valid, value)))
        ),
    )


_FLAG = Entry("true or false", lambda value: isinstance(value, bool))
_TEXT = Entry("a text", lambda value: isinstance(value, str) and "\0" not in value)
OBJECT = Entry("an object", lambda value: isinstance(value, dict))
_DTYPE = _words(
    "float32 float16 bfloat16 float64 float half double auto torch.float32 torch.float16 torch.bfloat16 "
    "torch.float64"
)
_POSITIVE = _number(0, above=True)
_SHARE = _number(0, 1)
_SIDE = _whole(1, 1 << 14)
_ID = _whole(-1, 1 << 24)  # -1: none, in the first conversions of LLaMA
_IDS = _either(_ID, _list_of(_ID))
_ACTIVATION = _words(
    "silu swish gelu gelu_new gelu_fast gelu_python gelu_pytorch_tanh gelu_accurate gelu_10 quick_gelu relu "
    "relu2 relu6 tanh sigmoid mish linear leaky_relu laplace"
)


# --- config.json -----------------------------------------------------------------------------------------
_ROPE_NEEDS = {
    "default": "",
    "linear": "factor",
    "dynamic": "factor",
    "yarn": "factor",
    "longrope": "short_factor long_factor",
    "llama3": "factor low_freq_factor high_freq_factor original_max_position_embeddings",
}


def _is_rope(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    kind = value.get("rope_type", value.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_NEEDS:
        return False
    if any(value.get(key) is None for key in _ROPE_NEEDS[kind].split()):
        return False
    number = _either(_POSITIVE, _list_of(_POSITIVE), _FLAG)
    return all(
        number.is_valid(one)
        for key, one in value.items()
        if key not in ("rope_type", "type") and one is not None
    )


_ROPE = Entry(
    "an object with rope_type (" + ", ".join(_ROPE_NEEDS) + ") and the positive numbers of that type",
    _is_rope,
)
ANYRES_MAX = re.compile(r"anyres_max_([1-9][0-9]{0,3})")
_ASPECT = Entry(
    "one of pad, anyres, anyres_max_N (N = 1, 2, ...), square or null (center crop)",
    lambda value: (
        isinstance(value, str)
        and (value in ("pad", "anyres", "square", "none") or ANYRES_MAX.fullmatch(value) is not None)
    ),
)
_PINPOINTS = _either(
    _list_of(_list_of(_SIDE, 2)),
    Entry("the same as a text, or a range such as (1x1),...,(6x6)", lambda value: isinstance(value, str)),
)


def _feature(word: str) -> Entry:
    reason = "patches are ranked by [CLS], which is not itself a visual token"
    return Entry(f"{word!r} ({reason})", lambda value: value == word)


_PATH = Entry(
    "the name of a file or folder",
    lambda value: (
        isinstance(value, str)
        and "\0" not in value
        and len(value) < 1024
        and all(len(part.encode("utf-8", "replace")) < 256 for part in re.split(r"[\\/]", value))
    ),
)
GENERATION: Entries = {
    "bos_token_id": _IDS, "eos_token_id": _IDS, "pad_token_id": _ID, "decoder_start_token_id": _IDS,
    "forced_bos_token_id": _ID, "forced_eos_token_id": _IDS,
    "suppress_tokens": _list_of(_ID), "begin_suppress_tokens": _list_of(_ID),
    "bad_words_ids": _list_of(_list_of(_ID)), "sequence_bias": OBJECT,
    "do_sample": _FLAG, "temperature": _number(0), "top_p": _SHARE, "top_k": _whole(0), "top_h": _SHARE,
    "min_p": _SHARE, "typical_p": _SHARE, "epsilon_cutoff": _SHARE, "eta_cutoff": _SHARE,
    "repetition_penalty": _POSITIVE, "encoder_repetition_penalty": _POSITIVE, "length_penalty": _number(),
    "diversity_penalty": _number(),
    "no_repeat_ngram_size": _whole(), "encoder_no_repeat_ngram_size": _whole(),
    "num_beams": _whole(1, 1 << 12), "num_beam_groups": _whole(1, 1 << 12), "penalty_alpha": _number(0),
    "num_return_sequences": _whole(1, 1 << 12), "max_length": _whole(), "min_length": _whole(),
    "max_new_tokens": _whole(), "min_new_tokens": _whole(), "max_time": _number(0),
    "early_stopping": _either(_FLAG, _words("never")), "guidance_scale": _number(),
    "exponential_decay_length_penalty": _list_of(_number(), 2),
    "stop_strings": _either(_TEXT, _list_of(_TEXT)),
    "use_cache": _FLAG, "renormalize_logits": _FLAG, "remove_invalid_values": _FLAG,
    "token_healing": _FLAG, "low_memory": _FLAG, "output_attentions": _FLAG, "output_hidden_states": _FLAG,
    "output_scores": _FLAG, "output_logits": _FLAG, "return_dict_in_generate": _FLAG,
    "cache_implementation": _TEXT, "cache_config": OBJECT, "watermarking_config": OBJECT,
    "prompt_lookup_num_tokens": _whole(1), "max_matching_ngram_size": _whole(1),
    "transformers_version": _TEXT,
}  # fmt: skip
LANGUAGE: Entries = {
    "model_type": _TEXT, "architectures": _list_of(_TEXT), "transformers_version": _TEXT,
    "hidden_size": _whole(1, 1 << 17), "intermediate_size": _whole(1, 1 << 20),
    "num_hidden_layers": _whole(1, 1000), "num_attention_heads": _whole(1, 1 << 12),
    "num_key_value_heads": _whole(1, 1 << 12), "head_dim": _whole(1, 1 << 14),
    "vocab_size": _whole(1, 1 << 24), "max_position_embeddings": _whole(1),
    "hidden_act": _ACTIVATION, "rms_norm_eps": _number(0, 1), "initializer_range": _number(0),
    "attention_dropout": _SHARE, "rope_theta": _POSITIVE, "rope_scaling": _ROPE, "rope_parameters": _ROPE,
    "attention_bias": _FLAG, "mlp_bias": _FLAG, "tie_word_embeddings": _FLAG,
    "sliding_window": _whole(1), "pretraining_tp": _whole(1), "torch_dtype": _DTYPE, "dtype": _DTYPE,
    "layer_types": _list_of(_TEXT), "max_sequence_length": _whole(1), "quantization_config": OBJECT,
    **GENERATION,
}  # fmt: skip
TOWER: Entries = {
    "model_type": _TEXT, "architectures": _list_of(_TEXT), "transformers_version": _TEXT,
    "hidden_size": _whole(1, 1 << 17), "intermediate_size": _whole(1, 1 << 20),
    "num_hidden_layers": _whole(1, 1000), "num_attention_heads": _whole(1, 1 << 12),
    "image_size": _SIDE, "patch_size": _SIDE, "num_channels": _whole(3, 3),
    "projection_dim": _whole(0, 1 << 17),
    "hidden_act": _ACTIVATION, "layer_norm_eps": _number(0, 1), "attention_dropout": _SHARE,
    "initializer_range": _number(0), "initializer_factor": _number(0), "torch_dtype": _DTYPE, "dtype": _DTYPE,
    "mlp_ratio": _number(0, 100, above=True), "hidden_dropout_prob": _SHARE, "drop_path_rate": _SHARE,
    "attention_probs_dropout_prob": _SHARE, "qkv_bias": _FLAG, "layerscale_value": _number(),
    "use_swiglu_ffn": _FLAG, "use_mask_token": _FLAG,
    "apply_layernorm": _FLAG, "reshape_hidden_states": _FLAG,
    "vision_config": OBJECT, "quantization_config": OBJECT,
    "add_time_attn": _FLAG, "num_frames": _whole(1, 1 << 12),
}  # fmt: skip
CONFIG: Entries = {
    **LANGUAGE,
    "mm_vision_tower": _either(_PATH, _list_of(_PATH)), "mm_image_tower": _PATH, "mm_video_tower": _PATH,
    "mm_hidden_size": _whole(1, 1 << 17),
    "mm_projector_type": Entry(
        "linear, mlpNx_gelu (N = 1, 2, ...) or identity",
        lambda value: isinstance(value, str) and len(value) < 100,
    ),
    "mm_vision_select_layer": _whole(-1000, 1000),
    "mm_vision_select_feature": _feature("patch"),
    "mm_patch_merge_type": _words("flat spatial spatial_unpad"),
    "mm_use_im_start_end": _FLAG, "mm_use_im_patch_token": _FLAG,
    "image_aspect_ratio": _ASPECT, "image_grid_pinpoints": _PINPOINTS,
    "conv_mode": Entry(
        "a conversation template of llava.conversation",
        lambda value: isinstance(value, str) and value in conv_templates,
    ),
    "tokenizer_model_max_length": _whole(1), "tokenizer_padding_side": _words("left right"),
    # of transformers' own LLaVA
    "text_config": OBJECT, "vision_config": OBJECT, "projector_hidden_act": _TEXT,
    "multimodal_projector_bias": _FLAG,
    "vision_feature_layer": _either(_whole(-1000, 1000), _list_of(_whole(-1000, 1000))),
    "vision_feature_select_strategy": _feature("default"),
}  # fmt: skip
# Entries of every transformers config that have no effect on a LLaVA model, or would change what it returns.
UNUSED = frozenset(
    "model_type transformers_version quantization_config auto_map id2label label2id num_labels problem_type "
    "return_dict output_attentions output_hidden_states torchscript pruned_heads task_specific_params "
    "is_decoder is_encoder_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder "
    "chunk_size_feed_forward gradient_checkpointing finetuning_task tokenizer_class prefix use_bfloat16 "
    "tf_legacy_loss base_model_tp_plan base_model_pp_plan _attn_implementation _attn_implementation_internal "
    "_attn_implementation_autoset attn_implementation _commit_hash".split()
)


# --- other files -----------------------------------------------------------------------------------------
_SIZE = _either(_SIDE, _object_of(_SIDE))
PROCESSOR: Entries = {
    "image_processor_type": _TEXT, "feature_extractor_type": _TEXT,
    "do_resize": _FLAG, "do_center_crop": _FLAG, "do_rescale": _FLAG, "do_normalize": _FLAG,
    "do_convert_rgb": _FLAG, "size": _SIZE, "crop_size": _SIZE, "resample": _whole(0, 5),
    "rescale_factor": _POSITIVE, "image_mean": _list_of(_number(), 3), "image_std": _list_of(_POSITIVE, 3),
}  # fmt: skip


def check_processor(entries: Mapping[str, Any], where: str) -> None:
    """Check an image processor's entries: a resize, a square crop and normalized pixels.

    Raises:
        CheckpointError: naming `where` and the key.
    """
    check_entries(entries, PROCESSOR, where)

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{where}: {what}. Use the file of the original checkpoint.")

    for key in ("image_mean", "image_std") if entries.get("do_rescale") is not False else ():
        if any(not 0 <= value <= 1 for value in entries.get(key) or ()):
            raise refuse(f"{key} is {entries[key]!r}, expected numbers from 0 to 1")
    size, crop = entries.get("size"), entries.get("crop_size")
    if isinstance(size, dict) and "shortest_edge" not in size and not {"height", "width"} <= size.keys():
        raise refuse(f"size is {size!r}, expected shortest_edge, or height and width")
    if isinstance(crop, dict):
        if crop.get("height") is None or crop.get("height") != crop.get("width"):
            raise refuse(f"crop_size is {crop!r}, expected equal height and width: towers take squares")
        crop = crop["height"]
    edge = size.get("shortest_edge") if isinstance(size, dict) else size
    if None not in (edge, crop) and edge < crop:
        raise refuse(f"size {edge} is smaller than crop_size {crop}, so images would get a black border")


ADAPTER: Entries = {
    "base_model_name_or_path": _PATH,
    "peft_type": _words("LORA"), "r": _whole(1, 1 << 16), "lora_alpha": _POSITIVE,
    "use_rslora": _FLAG, "use_dora": _FLAG, "fan_in_fan_out": _FLAG,
    "target_modules": _either(_TEXT, _list_of(_TEXT)), "exclude_modules": _either(_TEXT, _list_of(_TEXT)),
    "init_lora_weights": _either(_FLAG, _TEXT),
    "layers_to_transform": _either(_whole(0, 1000), _list_of(_whole(0, 1000))),
    "rank_pattern": OBJECT, "alpha_pattern": OBJECT, "modules_to_save": _list_of(_TEXT),
}  # fmt: skip
INDEX: Entries = {"weight_map": _object_of(_PATH)}


_TOKEN_FLAGS = "lstrip rstrip single_word normalized special".split()


def _is_token(value: object) -> bool:
    if not isinstance(value, dict):
        return isinstance(value, str)
    flags = all(isinstance(value.get(flag), bool | None) for flag in _TOKEN_FLAGS)
    return flags and isinstance(value.get("content"), str)


_ADDED_TOKEN = Entry("a text, or an object with a text as content and true or false elsewhere", _is_token)
SPECIAL_TOKENS: Entries = {
    **dict.fromkeys(
        "bos_token eos_token unk_token pad_token sep_token cls_token mask_token".split(), _ADDED_TOKEN
    ),
    "additional_special_tokens": _list_of(_ADDED_TOKEN),
    "extra_special_tokens": _either(_list_of(_ADDED_TOKEN), _object_of(_ADDED_TOKEN)),
}
# "no limit" is written as 1e30
_LENGTH = Entry(
    "a number >= 1",
    lambda value: not isinstance(value, bool) and isinstance(value, int | float) and 1 <= value < 1e40,
)
_NUMBER_TEXT = Entry("a number", lambda value: value.isascii() and value.isdecimal() and len(value) < 9)
TOKENIZER: Entries = {
    **SPECIAL_TOKENS,
    "model_max_length": _LENGTH, "padding_side": _words("left right"), "tokenizer_class": _TEXT,
    "chat_template": _either(_TEXT, _list_of(OBJECT)),
    "add_bos_token": _FLAG, "add_eos_token": _FLAG, "legacy": _FLAG,
    "added_tokens_decoder": _object_of(
        Entry("objects with a text as content", lambda value: isinstance(value, dict) and _is_token(value)),
        _NUMBER_TEXT,
    ),
}  # fmt: skip
TOKENIZER_JSON: Entries = {
    "added_tokens": _list_of(
        Entry(
            "an object with content and id",
            lambda value: (
                isinstance(value, dict) and _is_token(value) and _is_whole(value.get("id"), 0, 1 << 24)
            ),
        )
    )
}
