"""Checkpoint folders of tiny random models of transformers, to rehearse commands that read folders.

    write_tiny_host("qwen2_5_vl", Path("tiny-qwen"))
    # python -m llava.eval.run --benchmark pope --model tiny-qwen --tokens 8

Weights are random and the tokenizer knows single characters, so the answers mean nothing.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from llava.integrations.tiny_hosts import BOS, EOS, FIRST_WORD, HOSTS, IMAGE, PAD, VOCABULARY

_QWEN = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
_STRINGS = {
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "internvl": ("<IMG_CONTEXT>", "<unused_video>", "<img>", "</img>", "<video>"),
}
_IMAGES = {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>\n",
}
TINY = tuple(_STRINGS)


def write_tiny_host(name: str, folder: Path, seed: int = 0) -> Path:
    """Write weights, tokenizer with a chat template, and image processor of a tiny random model.

    Args:
        name: One of `TINY`.

    Raises:
        ValueError: Another name.
    """
    if name not in TINY:
        raise ValueError(
            f"{name}: there is no tiny checkpoint of this family. Choose from {', '.join(TINY)}."
        )
    model = HOSTS[name].build(seed)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    tokenizer = _tokenizer(name)
    tokenizer.save_pretrained(folder)
    _image_processor(name).save_pretrained(folder)
    return folder


def _tokenizer(name: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = string.ascii_letters + string.digits + " .:?!,'\n/()-"
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {c: FIRST_WORD + i for i, c in enumerate(letters)}
    specials = _STRINGS[name]
    vocabulary |= {text: IMAGE + i for i, text in enumerate(specials)}
    used = set(vocabulary.values())
    vocabulary |= {f"<unused{i}>": i for i in range(VOCABULARY) if i not in used}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unused9>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(["<pad>", "<s>", "</s>", *specials])
    extra = {}
    if name == "internvl":
        extra = {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
        extra["context_image_token"] = "<IMG_CONTEXT>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=extra,
    )
    tokenizer.chat_template = (
        "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}"
        + _IMAGES[name]
        + "{% else %}"
        "User: {{ part['text'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\\nAnswer: ' }}"
        "{% endif %}"
    )
    return tokenizer


def _image_processor(name: str) -> Any:
    import transformers

    def slow(kind: str) -> Any:  # that uses Pillow; older releases have no other name for it
        return getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)

    if name == "internvl":
        side = HOSTS[name].make_config().vision_config.image_size
        height, width = side if isinstance(side, list | tuple) else (side, side)
        options = {"size": {"height": height, "width": width}, "crop_to_patches": True}
        return slow("GotOcr2ImageProcessor")(min_patches=1, max_patches=4, **options)
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if name == "qwen3_vl" else {}
    size = {"shortest_edge": 8 * 8 * 16, "longest_edge": 8 * 8 * 160}
    return slow("Qwen2VLImageProcessor")(patch_size=4, merge_size=2, temporal_patch_size=2, size=size, **half)
