"""How many questions and images fit into the memory of a GPU, by the sizes of the model.

    language, vision = LanguageShape.from_config(config), VisionShape.from_config(tower_config)
    weights = weight_bytes(language, config.vocab_size, vision, 2, 2)
    row = question_bytes(language, config.vocab_size, 2, text=80, visual=576, new=128)
    questions_per_batch(free, weights, row)

Estimates, on the high side; where they are too low all the same, the engine halves what it computes at once.
Pure arithmetic: no device is looked at. Bytes of an element are 2 in half precision and 4 in float32.
"""

from __future__ import annotations

from typing import Any

from llava.model.flops import LanguageShape, VisionShape, kv_cache_bytes

MOST_QUESTIONS = 256  # more answer hardly faster, and lose more when they are stopped
# Few sizes, so that a little more or less free memory does not change the size, and with it the batches.
_SIZES = (MOST_QUESTIONS, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
_USED = 0.9  # share of the free memory; the rest is for fragmentation
_RESERVE = 2 << 30  # bytes for libraries, captured graphs and the next images
_WINDOW = 128  # caches have room for a multiple of this, as in llava.model.runtime.generation
# Crops encoded together: enough for whole passes of the tower. In float32 an image has its own passes.
_HALF_CROPS, _FULL_CROPS = 64, 10
_IMAGES_SHARE = 0.1  # of the free memory, for what is encoded together


def weight_bytes(
    language: LanguageShape, vocabulary: int, vision: VisionShape, element: float, tower_element: int
) -> float:
    """Return bytes of the weights of language model, projector (of two layers) and tower."""
    d, m = language.width, language.mlp
    kv = d if language.kv_width is None else language.kv_width
    decoder = language.layers * (2 * d * d + 2 * d * kv + 3 * d * m) + 2 * vocabulary * d
    projector = vision.width * d + d * d
    mlp = (3 if vision.gated else 2) * vision.width * vision.mlp
    tower = vision.layers * (4 * vision.width**2 + mlp) + vision.patches * vision.width
    return (decoder + projector) * element + tower * tower_element


def question_bytes(
    language: LanguageShape,
    vocabulary: int,
    element: int,
    text: int,
    visual: int,
    new: int,
    images: float = 1.0,
    beams: int = 1,
    held: int = 0,
) -> int:
    """Return bytes that one more question of a batch takes.

    Args:
        text: Tokens of the prompt without the image.
        visual: Tokens of the image, after pruning.
        new: Tokens of the answer.
        images: Images per question, at most 1: questions about one image share its prefill.
        beams: Of beam search; each has its own cache.
        held: Bytes that wait for the question besides, such as the visual tokens of its image.
    """
    prompt = text + visual
    length = -(-(prompt + new) // _WINDOW) * _WINDOW
    cache = kv_cache_bytes(length, language, element) * beams
    prefix = images * kv_cache_bytes(prompt, language, element) if images < 1 else 0
    # Of one layer at a time: hidden states, their norm, queries, keys, values and the attention's output;
    # gate, up and their product.
    computed = images * prompt + text
    activations = computed * (6 * language.width + 3 * language.mlp) * element
    logits = vocabulary * (element + 4) * beams
    return int(cache + prefix + activations + logits + held)


def questions_per_batch(free: int, weights: int, question: int, most: int = MOST_QUESTIONS) -> int:
    """Return how many questions fit at once: at least 1, at most `most`.

    Args:
        free: Bytes of the GPU that this process may use, before the weights are on it.
        weights: Bytes of the weights.
        question: Bytes of a question, see `question_bytes`.
    """
    fitting = (_USED * free - _RESERVE - weights) / max(1, question)
    return next((size for size in _SIZES if size <= min(fitting, most)), 1)


def images_at_once(free: int, vision: VisionShape, crops: int, element: int, pass_size: int) -> int:
    """Return how many images are encoded together: at least 1.

    Args:
        free: Bytes of the GPU that are not in use.
        crops: Of an image.
        element: Bytes of an element of the tower.
        pass_size: Crops that the tower computes together.
    """
    side = vision.patch_size * vision.patches**0.5
    # Pixels of the image and of the batch of all images; features, in two dtypes.
    held = 2 * 3 * side * side * 4 + vision.patches * vision.width * (element + 4)
    computed = max(pass_size, crops) * (vision.patches + 1) * (8 * vision.width + 2 * vision.mlp) * element
    fitting = (_IMAGES_SHARE * free - computed) / held
    return max(1, int(min(_HALF_CROPS if element == 2 else _FULL_CROPS, fitting)) // crops)


def most_crops(config: Any, side: int) -> int:
    """Return the crops of the largest image that the checkpoint's image processor makes.

    Args:
        side: Pixels along a crop.
    """
    from llava.mm_utils import is_anyres

    if not is_anyres(getattr(config, "image_aspect_ratio", None)):
        return 1
    return 1 + max((width * height // side**2 for width, height in config.image_grid_pinpoints), default=0)
