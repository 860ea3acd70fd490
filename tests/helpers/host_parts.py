"""Parts of processors for the tiny hosts: tokenizers of single letters, image processors of small sizes."""

from __future__ import annotations

import string

import transformers

from helpers.hosts import HOSTS
from llava.integrations.inputs import HostParts
from llava.integrations.tiny_hosts import FIRST_WORD, IMAGE, VOCABULARY

SMALL = {"shortest_edge": 8 * 8 * 4, "longest_edge": 8 * 8 * 24}
STRINGS = {
    "internvl": ["<IMG_CONTEXT>", "<unused_video>", "<img>", "</img>", "<video>"],
    "qwen": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
    "llava": ["<image>", "<video>"],
}


def slow(name: str):
    """Return an image processor that uses Pillow; older releases have no other name for it."""
    return getattr(transformers, name + "Pil", None) or getattr(transformers, name)


def family(name: str) -> str:
    return "qwen" if name.startswith("qwen") else "internvl" if name == "internvl" else "llava"


def tokenizer_of(name: str):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    letters = string.ascii_letters + string.digits + " .:?!<>\n/"
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {c: FIRST_WORD + i for i, c in enumerate(letters)}
    specials = STRINGS[family(name)]
    vocabulary |= {text: IMAGE + i for i, text in enumerate(specials)}
    used = set(vocabulary.values())
    vocabulary |= {f"<unused{i}>": i for i in range(VOCABULARY) if i not in used}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.add_special_tokens(["<pad>", "<s>", "</s>", *specials])
    named = {}
    if family(name) == "internvl":
        named = {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=named,
    )


def parts_of(name: str) -> HostParts:
    config = HOSTS[name].make_config()
    side = getattr(config.vision_config, "image_size", None)
    square = {"height": side, "width": side}
    clip = {"size": {"shortest_edge": side}, "crop_size": square}
    video: dict = dict(clip)
    if name in ("llava", "llava_siglip"):
        images = slow("CLIPImageProcessor")(**clip)
    elif name.startswith("llava_next"):
        images = slow("LlavaNextImageProcessor")(**clip, image_grid_pinpoints=config.image_grid_pinpoints)
    elif name.startswith("llava_onevision"):
        points = config.image_grid_pinpoints
        images = slow("LlavaOnevisionImageProcessor")(size=square, image_grid_pinpoints=points)
        video = {"size": square, "do_center_crop": False}
    elif name == "video_llava":
        images = transformers.VideoLlavaImageProcessor(**clip)
    elif name == "internvl":
        square = {"height": 24, "width": 24}
        images = slow("GotOcr2ImageProcessor")(
            size=square, min_patches=1, max_patches=4, crop_to_patches=True
        )
        video = {"size": square}
    else:
        video = {"size": dict(SMALL)}
        if name == "qwen3_vl":  # whose limit is for all frames
            video["size"]["longest_edge"] *= 4
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if name == "qwen3_vl" else {}
        sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": SMALL}
        images = slow("Qwen2VLImageProcessor")(**sizes, **half)
    return HostParts(config, tokenizer_of(name), images, video)
