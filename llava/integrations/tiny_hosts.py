"""Tiny random models of every supported host class, with inputs: for tests, the self-test and examples.

    case = HOSTS["qwen2_5_vl"]
    model = case.build()                      # float32, on the CPU, in evaluation mode
    model.generate(**case.batches()["single"], max_new_tokens=8)

The models are built from configurations, so nothing is downloaded. Inputs are tensors of random pixels and
hand-made ids, so no processor and no tokenizer is needed. Their answers mean nothing: two runs are compared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor

PAD, BOS, EOS = 0, 1, 2
FIRST_WORD, WORDS = 10, 80  # ids of text
IMAGE, VIDEO, VISION_START, VISION_END, ROW_END = 100, 101, 102, 103, 104
VOCABULARY = 112

_ROWS = {
    "single": ["i"],
    "padded": ["i", "iii"],
    "video": ["v", "vv"],
    "mixed": ["iv", "v"],
}  # media of each row
_FRAMES = 4

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class HostCase:
    """A tiny model of one host class.

    Attributes:
        name: Key in `HOSTS`: the model type, with a suffix for variants.
        class_name: The class of transformers.
        make_config: Builds the configuration.
        make_inputs: Called with the configuration and the media of each row, as in "iiv" (two images and a
            video); returns rows of ids and the other inputs.
        video: Whether the class has inputs of videos.
        mixed: Whether a row may have images and videos.
    """

    name: str
    class_name: str
    make_config: Callable[[], Any]
    make_inputs: Callable[[Any, list[str]], tuple[list[list[int]], Batch]]
    video: bool = False
    mixed: bool = False

    def build(self, seed: int = 0) -> Any:
        """Build the model with random weights that depend on `seed` only; float32, in evaluation mode."""
        model = getattr(transformers, self.class_name)(self.make_config())
        spread_weights(model, seed)
        generation = model.generation_config
        generation.pad_token_id, generation.eos_token_id = PAD, None  # answers of a known length
        return model.float().eval()

    def batches(self, padding: str = "left") -> dict[str, Batch]:
        """Make inputs: "single" (one row), "padded" (two rows), "video" and "mixed" where the class has them.

        Args:
            padding: Side of the shorter row that is padded: left or right.
        """
        names = ["single", "padded", *["video"] * self.video, *["mixed"] * self.mixed]
        return {name: self.inputs(_ROWS[name], padding) for name in names}

    def inputs(self, rows: list[str], padding: str = "left") -> Batch:
        """Make inputs of any rows, such as ["i", "iiv"]: i is an image, v a video."""
        config = self.make_config()
        ids, inputs = self.make_inputs(config, rows)
        return {**_padded(ids, padding, _type_ids(config)), **inputs}


def spread_weights(model: Any, seed: int) -> None:
    """Give all parameters random values, matrices of a standard deviation of 1.3 / sqrt(inputs).

    The usual initialization makes attention flat and features of patches nearly equal, so that errors of a
    selection would not change any result. Vectors are 1 + noise, biases are noise.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                noise *= 1.3 / (parameter.numel() / parameter.shape[0]) ** 0.5
            else:
                noise *= 0.1
                if not name.endswith("bias"):
                    noise += 1
            parameter.copy_(noise)
        model.get_output_embeddings().weight[IMAGE : ROW_END + 1] = 0  # answers are words, not placeholders


def _words(count: int, start: int) -> list[int]:
    return [FIRST_WORD + (start * 29 + i * 11) % WORDS for i in range(count)]


def _pixels(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) * 31 + shape[0])
    return torch.randn(shape, generator=generator)


def _padded(rows: list[list[int]], padding: str, type_ids: Callable[[Tensor], Batch]) -> Batch:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if padding == "right" else slice(longest - len(row), longest)
        ids[i, where] = torch.tensor(row)
        mask[i, where] = 1
    return {"input_ids": ids, "attention_mask": mask, **type_ids(ids)}


def _type_ids(config: Any) -> Callable[[Tensor], Batch]:
    """Return a function that makes what the class needs beside ids, from ids."""
    kind = config.model_type
    if kind in ("gemma3", "paligemma"):  # PaliGemma needs them in training only: all of the prompt is prefix
        return lambda ids: {"token_type_ids": (ids == IMAGE).long() * (kind == "gemma3")}
    if kind == "glm4v":  # placeholders of both modalities have the same id, within tokens that open a video
        return lambda ids: {"mm_token_type_ids": _types_within_videos(ids)}
    if kind.startswith("qwen"):
        return lambda ids: {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}
    return lambda ids: {}


def _types_within_videos(ids: Tensor) -> Tensor:
    opened = (ids == VIDEO).long().cumsum(1) - (ids == ROW_END).long().cumsum(1)
    return torch.where(ids == IMAGE, 1 + opened, 0)


def _prompts(rows: list[str], place: Callable[[str], list[int]]) -> list[list[int]]:
    """Make ids of rows: text around each image or video; `place` returns the ids of the next one."""
    prompts = []
    for number, row in enumerate(rows):
        ids = [BOS, *_words(2 + number, number)]
        for kind in row:
            ids += [*place(kind), *_words(2, number + 3)]
        prompts.append([*ids, *_words(3, number + 7)])
    return prompts


def _count(rows: list[str], kind: str) -> int:
    return "".join(rows).count(kind)


# ---- text and vision parts shared by classes ----


def _text(model_type: str, **entries: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **entries,
    }


def _vision(model_type: str, **entries: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 24,
        "patch_size": 4,
        **entries,
    }


_CLIP = _vision("clip_vision_model")
_SIGLIP = _vision("siglip_vision_model", vision_use_head=False)


# ---- classes with a tower of fixed image size ----


def _llava_inputs(config: Any, rows: list[str]) -> tuple[list[list[int]], Batch]:
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    pixels = _pixels(_count(rows, "i"), 3, vision.image_size, vision.image_size)
    return _prompts(rows, lambda kind: [IMAGE] * tokens), {"pixel_values": pixels}


_SIZES = [(40, 20), (20, 44), (44, 44), (30, 24)]  # height and width of images before they are cut into crops


def _crop_inputs(config: Any, rows: list[str], frame_tokens: int, after_video: int) -> tuple[Any, Batch]:
    """Make inputs of classes that cut images into crops and pack their features."""
    module = inspect.getmodule(getattr(transformers, type(config).__name__.replace("Config", "Model")))
    several = config.model_type == "llava_onevision"  # whose rows of several images have one crop per image
    size = config.vision_config.image_size
    patches = (size // config.vision_config.patch_size) ** 2
    place: list[int] = []
    sizes, crops, numbers = [], [], []
    for row in rows:
        images = row.count("i")
        if images:
            numbers.append(images)
        for _ in range(images):
            sizes.append(torch.tensor(_SIZES[len(sizes) % len(_SIZES)]))
            cut = not several or images == 1
            crops.append(
                module.image_size_to_num_patches(sizes[-1], config.image_grid_pinpoints, size) if cut else 1
            )
    inputs: Batch = {}
    if sizes:
        pixels = _pixels(len(sizes), max(crops), 3, size, size)
        for i, n in enumerate(crops):
            pixels[i, n:] = 0
        inputs |= {"pixel_values": pixels, "image_sizes": torch.stack(sizes)}
        base = getattr(transformers, type(config).__name__.replace("Config", "Model"))
        options = {"vision_aspect_ratio": config.vision_aspect_ratio} if several else {}
        if not several:
            options["vision_feature_select_strategy"] = config.vision_feature_select_strategy
        place = base.pack_image_features(
            SimpleNamespace(config=config),
            [torch.zeros(n, patches, 1) for n in crops],
            torch.stack(sizes),
            image_newline=torch.zeros(1),
            **options,
        )[1].tolist()
        if several:
            inputs["batch_num_images"] = torch.tensor(numbers)
    if _count(rows, "v"):
        inputs["pixel_values_videos"] = _pixels(_count(rows, "v"), _FRAMES, 3, size, size)
    lengths = iter(place)

    def ids(kind: str) -> list[int]:
        return [IMAGE] * next(lengths) if kind == "i" else [VIDEO] * (_FRAMES * frame_tokens + after_video)

    return _prompts(rows, ids), inputs


def _video_llava_inputs(config: Any, rows: list[str]) -> tuple[list[list[int]], Batch]:
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    takes = inspect.signature(transformers.VideoLlavaForConditionalGeneration.forward).parameters
    inputs = {}
    if _count(rows, "i"):
        name = "pixel_values" if "pixel_values" in takes else "pixel_values_images"
        inputs[name] = _pixels(_count(rows, "i"), 3, vision.image_size, vision.image_size)
    if _count(rows, "v"):
        inputs["pixel_values_videos"] = _pixels(
            _count(rows, "v"), _FRAMES, 3, vision.image_size, vision.image_size
        )
    places = {"i": [IMAGE] * patches, "v": [VIDEO] * (_FRAMES * (patches + 1))}
    return _prompts(rows, places.__getitem__), inputs


def _internvl_inputs(config: Any, rows: list[str]) -> tuple[list[list[int]], Batch]:
    """Make tiles: two per image, and one per frame of a video, which have placeholders of images, too."""
    vision = config.vision_config
    height, width = (a // b for a, b in zip(vision.image_size, vision.patch_size, strict=True))
    tile = [IMAGE] * int(height * width * config.downsample_ratio**2)
    frame = [*_words(2, 5), VISION_START, *tile, VISION_END]
    places = {"i": [VISION_START, *tile, *tile, VISION_END], "v": frame * _FRAMES}
    tiles = 2 * _count(rows, "i") + _FRAMES * _count(rows, "v")
    return _prompts(rows, places.__getitem__), {"pixel_values": _pixels(tiles, 3, *vision.image_size)}


def _idefics_inputs(config: Any, rows: list[str]) -> tuple[list[list[int]], Batch]:
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 // config.scale_factor**2
    pixels = _pixels(len(rows), max(map(len, rows)), 3, vision.image_size, vision.image_size)
    for i, row in enumerate(rows):
        pixels[i, len(row) :] = 0  # images that are all zero are padding
    place = [VISION_START, *[IMAGE] * tokens, VISION_END]
    return _prompts(rows, lambda kind: place), {"pixel_values": pixels}


def _gemma_inputs(config: Any, rows: list[str]) -> tuple[list[list[int]], Batch]:
    vision = config.vision_config
    tokens = getattr(config, "mm_tokens_per_image", (vision.image_size // vision.patch_size) ** 2)
    pixels = _pixels(_count(rows, "i"), 3, vision.image_size, vision.image_size)
    return _prompts(rows, lambda kind: [VISION_START, *[IMAGE] * tokens, VISION_END]), {
        "pixel_values": pixels
    }


# ---- classes that take images of any size ----

_GRIDS = [(1, 8, 8), (1, 4, 8), (1, 8, 12), (1, 4, 4)]  # frames, rows and columns of patches
_VIDEO_GRIDS = [(2, 4, 8), (2, 8, 4), (3, 4, 4)]


def _mistral_inputs(config: Any, rows: list[str]) -> tuple[list[list[int]], Batch]:
    patch, merge = config.vision_config.patch_size, config.spatial_merge_size
    grids = [_GRIDS[i % len(_GRIDS)][1:] for i in range(_count(rows, "i"))]
    sizes = torch.tensor(grids) * patch
    pixels = _pixels(len(grids), 3, *sizes.amax(0).tolist())
    for i, (height, width) in enumerate(sizes.tolist()):
        pixels[i, :, height:] = 0
        pixels[i, :, :, width:] = 0
    following = iter(grids)

    def ids(kind: str) -> list[int]:
        height, width = next(following)
        return [
            *([IMAGE] * (width // merge) + [ROW_END]) * (height // merge - 1),
            *[IMAGE] * (width // merge),
            VISION_END,
        ]

    return _prompts(rows, ids), {"pixel_values": pixels, "image_sizes": sizes}


def _grid_inputs(config: Any, rows: list[str]) -> tuple[list[list[int]], Batch]:
    """Make inputs of the Qwen-VL and GLM-V families: flat patches and a grid per image or video."""
    vision = config.vision_config
    channels = 3 * vision.temporal_patch_size * vision.patch_size**2
    merged = vision.spatial_merge_size**2
    images = [_GRIDS[i % len(_GRIDS)] for i in range(_count(rows, "i"))]
    videos = [_VIDEO_GRIDS[i % len(_VIDEO_GRIDS)] for i in range(_count(rows, "v"))]
    inputs: Batch = {}
    for grids, pixels, grid in (
        (images, "pixel_values", "image_grid_thw"),
        (videos, "pixel_values_videos", "video_grid_thw"),
    ):
        if grids:
            inputs[grid] = torch.tensor(grids)
            inputs[pixels] = _pixels(int(inputs[grid].prod(1).sum()), channels)
    if videos and config.model_type == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([1.0 + 0.5 * i for i in range(len(videos))])
    following = {"i": iter(images), "v": iter(videos)}

    def ids(kind: str) -> list[int]:
        frames, height, width = next(following[kind])
        frame = height * width // merged
        if kind == "i":
            return [VISION_START, *[IMAGE] * frame, VISION_END]
        if config.model_type == "qwen3_vl":  # each frame has its time and its own delimiters
            return [
                i for t in range(frames) for i in (*_words(2, t), VISION_START, *[VIDEO] * frame, VISION_END)
            ]
        if config.model_type == "glm4v":  # placeholders of images, between tokens that open and close a video
            placed = [
                i for t in range(frames) for i in (VISION_START, *[IMAGE] * frame, VISION_END, *_words(1, t))
            ]
            return [VIDEO, *placed, ROW_END]
        return [VISION_START, *[VIDEO] * (frames * frame), VISION_END]

    return _prompts(rows, ids), inputs


# ---- configurations ----


def _with_tower(
    class_name: str, text: dict[str, Any], vision: dict[str, Any], **entries: Any
) -> Callable[[], Any]:
    """Return a function that builds a configuration from copies of these entries."""

    def make() -> Any:
        config = getattr(transformers, class_name)
        return config(
            text_config=dict(text), vision_config=dict(vision), tie_word_embeddings=False, **entries
        )

    return make


_PLACES = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_INDICES = {"image_token_index": IMAGE, "video_token_index": VIDEO}
_DELIMITERS = {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
_PINPOINTS = [[24, 48], [48, 24], [48, 48], [24, 72], [72, 24]]
_WHOLE_PINPOINTS = [[28, 28], [28, 56], [56, 28], [56, 56]]
_MROPE = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0}


def _qwen_vision(model_type: str, **entries: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **entries,
    }


def _cases() -> list[HostCase]:
    generation = "ForConditionalGeneration"
    llama, qwen = _text("llama"), _text("qwen2")
    whole = {**_SIGLIP, "image_size": 28}  # 7 x 7 patches: pooled frames have 4 x 4
    onevision = {**_INDICES, "image_grid_pinpoints": _WHOLE_PINPOINTS}
    idefics_vision = {**_SIGLIP, "image_size": 32}

    def crops(frame_tokens: int = 0, after_video: int = 0) -> Callable[[Any, list[str]], tuple[Any, Batch]]:
        return lambda config, rows: _crop_inputs(config, rows, frame_tokens, after_video)

    def idefics(name: str, kind: str) -> HostCase:
        vision = {k: v for k, v in idefics_vision.items() if k != "vision_use_head"}
        make = _with_tower(
            f"{kind}Config",
            llama,
            {**vision, "model_type": f"{name}_vision"},
            image_token_id=IMAGE,
            scale_factor=2,
        )
        return HostCase(name, kind + generation, make, _idefics_inputs)

    return [
        HostCase(
            "llava",
            "Llava" + generation,
            _with_tower("LlavaConfig", llama, _CLIP, image_token_index=IMAGE, image_seq_length=36),
            _llava_inputs,
        ),
        HostCase(
            "llava_siglip",
            "Llava" + generation,
            _with_tower(
                "LlavaConfig",
                qwen,
                _SIGLIP,
                image_token_index=IMAGE,
                image_seq_length=36,
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
            ),
            _llava_inputs,
        ),
        HostCase(
            "llava_next",
            "LlavaNext" + generation,
            _with_tower(
                "LlavaNextConfig",
                _text("mistral"),
                _CLIP,
                image_token_index=IMAGE,
                image_grid_pinpoints=_PINPOINTS,
            ),
            crops(),
        ),
        HostCase(
            "llava_next_video",
            "LlavaNextVideo" + generation,
            _with_tower("LlavaNextVideoConfig", llama, _CLIP, **_INDICES, image_grid_pinpoints=_PINPOINTS),
            crops(9),
            video=True,
            mixed=True,
        ),
        HostCase(
            "llava_onevision",
            "LlavaOnevision" + generation,
            _with_tower("LlavaOnevisionConfig", qwen, whole, **onevision),
            crops(16, 1),
            video=True,
            mixed=True,
        ),
        HostCase(
            "llava_onevision_interpolated",  # a grid above the limit is resized
            "LlavaOnevision" + generation,
            _with_tower("LlavaOnevisionConfig", qwen, whole, **onevision, vision_aspect_ratio="anyres_max_1"),
            crops(16, 1),
            video=True,
            mixed=True,
        ),
        HostCase(
            "video_llava",
            "VideoLlava" + generation,
            _with_tower(
                "VideoLlavaConfig",
                llama,
                {**_CLIP, "image_size": 16},
                **_INDICES,
                image_seq_length=16,
                video_seq_length=17 * _FRAMES,
            ),
            _video_llava_inputs,
            video=True,
            mixed=True,
        ),
        HostCase(
            "internvl",
            "InternVL" + generation,
            _with_tower(
                "InternVLConfig",
                qwen,
                _vision(
                    "internvl_vision",
                    image_size=[24, 24],
                    patch_size=[3, 3],
                    use_qk_norm=True,
                    attention_bias=True,
                ),
                image_token_id=IMAGE,
                image_seq_length=16,
            ),
            _internvl_inputs,
            video=True,
            mixed=True,
        ),
        HostCase(
            "qwen2_vl",
            "Qwen2VL" + generation,
            _with_tower(
                "Qwen2VLConfig",
                _text("qwen2_vl_text", rope_parameters=_MROPE),
                _qwen_vision("qwen2_vl_vision", embed_dim=32, hidden_size=64, mlp_ratio=2),
                **_PLACES,
                **_DELIMITERS,
            ),
            _grid_inputs,
            video=True,
            mixed=True,
        ),
        HostCase(
            "qwen2_5_vl",
            "Qwen2_5_VL" + generation,
            _with_tower(
                "Qwen2_5_VLConfig",
                _text("qwen2_5_vl_text", rope_parameters=_MROPE),
                _qwen_vision(
                    "qwen2_5_vl_vision",
                    intermediate_size=48,
                    out_hidden_size=64,
                    window_size=16,  # 2 x 2 tokens
                    fullatt_block_indexes=[0, 1],
                ),
                **_PLACES,
                **_DELIMITERS,
            ),
            _grid_inputs,
            video=True,
            mixed=True,
        ),
        HostCase(
            "qwen3_vl",
            "Qwen3VL" + generation,
            _with_tower(
                "Qwen3VLConfig",
                _text("qwen3_vl_text", head_dim=16, rope_parameters={**_MROPE, "mrope_interleaved": True}),
                _qwen_vision(
                    "qwen3_vl_vision",
                    intermediate_size=48,
                    out_hidden_size=64,
                    num_position_embeddings=64,
                    deepstack_visual_indexes=[0, 1],
                ),
                **_PLACES,
                **_DELIMITERS,
            ),
            _grid_inputs,
            video=True,
            mixed=True,
        ),
        idefics("smolvlm", "SmolVLM"),
        idefics("idefics3", "Idefics3"),
        HostCase(
            "mistral3",
            "Mistral3" + generation,
            _with_tower(
                "Mistral3Config",
                _text("mistral"),
                _vision("pixtral", image_size=48),
                image_token_index=IMAGE,
                spatial_merge_size=2,
            ),
            _mistral_inputs,
        ),
        HostCase(
            "glm4v",
            "Glm4v" + generation,
            _with_tower(
                "Glm4vConfig",
                _text(
                    "glm4v_text",
                    rope_parameters={**_MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
                ),
                _qwen_vision("glm4v_vision", image_size=32, intermediate_size=48, out_hidden_size=64),
                **_PLACES,
                image_start_token_id=VISION_START,
                image_end_token_id=VISION_END,
                video_start_token_id=VIDEO,
                video_end_token_id=ROW_END,
            ),
            _grid_inputs,
            video=True,
        ),
        HostCase(
            "paligemma",
            "PaliGemma" + generation,
            _with_tower(
                "PaliGemmaConfig",
                _text("gemma", head_dim=16),
                {**_SIGLIP, "projection_dim": 64},
                image_token_index=IMAGE,
                projection_dim=64,
                hidden_size=64,
                vocab_size=VOCABULARY,
            ),
            _gemma_inputs,
        ),
        HostCase(
            "gemma3",
            "Gemma3" + generation,
            _with_tower(
                "Gemma3Config",
                _text(
                    "gemma3_text",
                    head_dim=16,
                    query_pre_attn_scalar=16,
                    sliding_window=16,
                    layer_types=["sliding_attention", "full_attention"],
                ),
                _SIGLIP,
                image_token_index=IMAGE,
                boi_token_index=VISION_START,
                eoi_token_index=VISION_END,
                mm_tokens_per_image=9,
            ),
            _gemma_inputs,
        ),
    ]


HOSTS = {case.name: case for case in _cases()}
