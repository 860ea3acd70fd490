"""Estimates of memory: known sizes, what makes a batch smaller, bounds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from llava.eval.inference import memory
from llava.eval.inference.memory import (
    images_at_once,
    most_crops,
    question_bytes,
    questions_per_batch,
    weight_bytes,
)
from llava.model.flops import LanguageShape, VisionShape
from llava.model.runtime import generation

VICUNA_7B = LanguageShape(layers=32, width=4096, mlp=11008)
MISTRAL_7B = LanguageShape(layers=32, width=4096, mlp=14336, kv_width=1024)
CLIP_L = VisionShape(layers=24, width=1024, mlp=4096, patches=576, patch_size=14)
GB = 10**9


def question(language: LanguageShape = VICUNA_7B, **more: float) -> int:
    return question_bytes(language, 32000, 2, **{"text": 90, "visual": 64, "new": 4, **more})


def batch(gigabytes: float, **more: float) -> int:
    weights = weight_bytes(VICUNA_7B, 32000, CLIP_L, 2, 2)
    return questions_per_batch(int(gigabytes * GB), weights, question(**more))


def test_weights_are_those_of_the_known_checkpoints():
    assert weight_bytes(VICUNA_7B, 32000, CLIP_L, 2, 2) == pytest.approx(14.1 * GB, rel=0.02)
    assert weight_bytes(VICUNA_7B, 32000, CLIP_L, 2, 4) == pytest.approx(14.7 * GB, rel=0.02)
    assert weight_bytes(MISTRAL_7B, 32000, CLIP_L, 2, 2) == pytest.approx(15.1 * GB, rel=0.02)


def test_a_question_takes_at_least_its_cache_and_little_more():
    cache = 2 * 32 * 158 * 4096 * 2
    assert cache * 1.25 < question() < cache * 2.2
    assert question(language=MISTRAL_7B) < 0.5 * question()  # a quarter of the keys and values
    assert question(images=1 / 31) < question(images=1 / 3) and question(images=1 / 31) < question()


def test_caches_have_the_room_that_the_runtime_gives_them():
    assert memory._WINDOW == generation._WINDOW and generation.capacity(129) == 2 * memory._WINDOW
    sizes = [size for size in memory._SIZES if generation.padded_rows(size) != size]
    assert not sizes  # full batches are not filled up


def test_batches_grow_with_the_memory_up_to_a_bound():
    sizes = [batch(gigabytes) for gigabytes in (10, 17, 24, 40, 80, 141, 1000)]
    assert sizes == sorted(sizes) and sizes[0] == 1 and sizes[-3:] == [256, 256, 256]
    assert 1 < sizes[2] < sizes[3] < 256
    assert questions_per_batch(1000 * GB, 0, 1, most=64) == 64


def test_what_a_question_needs_makes_batches_smaller():
    usual = batch(40)
    assert batch(40, visual=576) < usual  # not pruned
    assert batch(40, new=1024) < usual
    assert batch(40, beams=5) < usual
    assert batch(40, held=10**9) < usual


def test_a_little_more_or_less_free_memory_changes_nothing():
    assert {batch(40 + megabytes / 1000) for megabytes in range(-300, 301, 50)} == {batch(40)}


def test_images_encoded_together():
    assert images_at_once(60 * GB, CLIP_L, 1, 2, 32) == 64
    assert images_at_once(60 * GB, CLIP_L, 5, 2, 32) == 12  # 60 crops
    assert images_at_once(60 * GB, CLIP_L, 1, 4, 1) == 10  # float32: no faster beyond
    assert images_at_once(60 * GB, CLIP_L, 5, 4, 1) == 2
    assert 1 <= images_at_once(7 * GB, CLIP_L, 1, 2, 32) < 32
    assert images_at_once(0, CLIP_L, 5, 4, 1) == 1


def test_crops_of_the_largest_image():
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    assert most_crops(SimpleNamespace(image_aspect_ratio="pad"), 336) == 1
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=pinpoints)
    assert most_crops(config, 336) == 5
    config.image_grid_pinpoints = [*pinpoints, [2016, 2016]]
    assert most_crops(config, 336) == 37
