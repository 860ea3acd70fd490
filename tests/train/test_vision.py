"""Encoded images of training: the features of a run without a cache, and never those of another image."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.checkpoints import SOURCE, load
from llava.mm_utils import process_images
from llava.model.features import VisionFeatures
from llava.train.vision import TrainingVision


@pytest.fixture(scope="module")
def loaded():
    torch.set_num_threads(1)
    model = load(SOURCE)
    return model, model.get_vision_tower().image_processor


class Images:
    """Files, how they are loaded, and how often."""

    def __init__(self, folder: Path, loaded, count: int = 3) -> None:
        self.folder, self.model, self.processor = folder, *loaded
        self.paths = [str(folder / f"{n}.png") for n in range(count)]
        self.loads = 0
        for seed, path in enumerate(self.paths):
            self.write(path, seed)

    @staticmethod
    def write(path: str, seed: int) -> None:
        pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        os.utime(path, (1, 1))

    def load(self, path: str) -> dict:
        self.loads += 1
        with Image.open(path) as image:
            pixels = process_images([image.convert("RGB")], self.processor, self.model.config)[0]
            return {"image": pixels, "image_size": image.size}

    def batch(self, vision: TrainingVision, paths: list[str], cues=()) -> list[VisionFeatures]:
        """Encode as a run does: what is cached is not decoded."""
        left_out = {"image": None, "image_size": None}
        items = [left_out if vision.is_cached and vision.is_cached(one) else self.load(one) for one in paths]
        return vision.encode(*([item[name] for item in items] for name in left_out), paths, cues)

    def vision(self, folder=None, **options) -> TrainingVision:
        return TrainingVision(self.model, self.processor, folder, load=self.load, **options)


@pytest.fixture
def images(tmp_path, loaded) -> Images:
    (tmp_path / "images").mkdir()
    return Images(tmp_path / "images", loaded)


def same(one: VisionFeatures, other: VisionFeatures) -> bool:
    assert (one.image_size, list(one.keys), one.as_crops) == (other.image_size, other.keys, other.as_crops)
    pairs = [(one.features, other.features), (one.attention, other.attention)]
    pairs += [(one.cues[cue], other.cues[cue]) for cue in one.cues]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_a_later_epoch_neither_encodes_nor_decodes_and_has_the_same_bits(images, tmp_path) -> None:
    paths = images.paths
    plain = [images.batch(images.vision(), [path])[0] for path in paths]
    first = images.vision(tmp_path / "cache")
    found = images.batch(first, [paths[0], paths[1], paths[0]])
    assert [same(a, b) for a, b in zip([plain[0], plain[1], plain[0]], found, strict=True)] == [True] * 3
    assert (first.encoded, first.read) == (2, 0)
    images.batch(first, paths)
    assert (first.encoded, first.read) == (3, 2)
    loads = images.loads
    second = images.vision(tmp_path / "cache")
    again = images.batch(second, paths[::-1])
    assert all(same(a, b) for a, b in zip(plain[::-1], again, strict=True))
    assert (second.encoded, second.read, images.loads) == (0, 3, loads)
    assert pickle.loads(pickle.dumps(second.is_cached))(paths[0])  # in a worker process


def test_a_replaced_image_is_encoded_again(images, tmp_path) -> None:
    path = images.paths[0]
    before = images.batch(images.vision(tmp_path / "cache"), [path])[0]
    size = os.path.getsize(path)
    for seed in range(10, 99):  # another image of the same size, with the same time
        images.write(path, seed)
        if os.path.getsize(path) == size:
            break
    assert os.path.getsize(path) == size and os.path.getmtime(path) == 1
    vision = images.vision(tmp_path / "cache")
    assert not vision.is_cached(path)
    after = images.batch(vision, [path])[0]
    assert not torch.equal(before.features, after.features) and vision.encoded == 1
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(path).read_bytes())
    assert images.vision(tmp_path / "cache").is_cached(copy)  # by content, wherever it is


def test_an_image_replaced_between_decoding_and_encoding_is_not_kept(images, tmp_path) -> None:
    vision, path = images.vision(tmp_path / "cache"), images.paths[0]
    old = images.load(path)
    images.write(path, 99)
    vision.encode([old["image"]], [old["image_size"]], [path])
    later = images.vision(tmp_path / "cache")
    assert not later.is_cached(path)
    assert same(images.batch(later, [path])[0], images.batch(images.vision(), [path])[0])


def test_what_was_deleted_meanwhile_is_loaded(images, tmp_path) -> None:
    vision, path = images.vision(tmp_path / "cache"), images.paths[0]
    plain = images.batch(vision, [path])[0]
    for file in (tmp_path / "cache").glob("*/*"):
        file.unlink()
    assert same(plain, vision.encode([None], [None], [path])[0])
    os.unlink(path)
    with pytest.raises(FileNotFoundError):
        vision.encode([None], None, [path])
    assert not vision.is_cached(path)
    with pytest.raises(ValueError, match="left out of a batch"):
        vision.encode([None], None, None)


def test_cues_of_all_methods_of_a_run_are_kept(images, tmp_path) -> None:
    path = images.paths[0]
    images.batch(images.vision(tmp_path / "cache"), [path])
    vision = images.vision(tmp_path / "cache", cues=("keys", "projected"))
    assert not vision.is_cached(path)  # without its cue
    images.batch(vision, [path])
    assert vision.is_cached(path)
    again = images.vision(tmp_path / "cache", cues=("keys",))
    found = images.batch(again, [path], ("keys",))[0]
    assert again.encoded == 0 and same(images.batch(images.vision(), [path], ("keys",))[0], found)


def test_autocast_and_wider_projectors_change_no_bit(images, tmp_path) -> None:
    model, path = images.model, images.paths[0]
    tower = model.get_vision_tower()
    tower.to(torch.bfloat16)
    try:
        plain = images.batch(images.vision(), [path])[0]
        with torch.autocast("cpu", torch.bfloat16):
            images.batch(images.vision(tmp_path / "cache"), [path])
        vision = images.vision(tmp_path / "cache")
        assert same(plain, images.batch(vision, [path])[0]) and vision.read == 1
        (file,) = (tmp_path / "cache").glob("*/*")
        numbers = plain.features.numel() * 2 + plain.attention.numel() * 4
        assert plain.features.dtype == torch.float32 and file.stat().st_size < numbers + 1000
    finally:
        tower.to(torch.float32)


def test_a_full_folder_is_told_once_and_the_limit_holds_for_all_processes(images, tmp_path, capsys) -> None:
    images.batch(images.vision(tmp_path / "one"), images.paths[:1])
    (file,) = (tmp_path / "one").glob("*/*")
    limit = 2.5 * file.stat().st_size / 1e9
    visions = [images.vision(tmp_path / "cache", limit_gb=limit, writers=2) for _ in range(2)]
    for _ in range(2):
        for vision, path in zip(visions, images.paths, strict=False):
            images.batch(vision, [path, images.paths[2]])
    assert sum(one.stat().st_size for one in (tmp_path / "cache").glob("*/*")) <= limit * 1e9
    assert any(one.is_cached(path) for one in visions for path in images.paths)
    assert capsys.readouterr().err.count("no room for more encoded images") in (1, 2)
