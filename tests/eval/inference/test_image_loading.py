"""Pictures come in order, as the same bits, few at a time, whoever reads them and whatever dies."""

from __future__ import annotations

import os
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from helpers import deadly_reader
from llava.eval.inference import image_loading as pictures
from llava.eval.inference.image_loading import Prepare, read_ahead
from llava.mm_utils import load_image, process_images
from llava.model.checkpoint.tower import clip_processor
from llava.model.image_processor import load_image_processor

CONFIG = {"image_aspect_ratio": "pad"}
PROCESSOR = load_image_processor(clip_processor(56))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        Image.effect_noise((30 + 7 * number, 64), 80).convert("RGB").save(folder / f"{number}.png")
    Image.new("RGB", (20, 30), (9, 8, 7)).save(folder / "deadly.png")
    (folder / "3.png").write_bytes(b"no picture")
    return folder


def same(found, expected) -> bool:
    if expected[0] is None:
        return found == expected
    return found[1] is None and found[0][1] == expected[0][1] and torch.equal(found[0][0], expected[0][0])


def test_the_same_bits_in_order_even_if_a_process_dies(folder):
    prepare = Prepare(deadly_reader.load, PROCESSOR, CONFIG)
    images = [folder / f"{name}.png" for name in (*range(12), "gone", "deadly", 0, 1)]
    expected = [prepare(image) for image in images]
    assert [pair[1] is None for pair in expected] == [number not in (3, 12) for number in range(16)]
    assert str(images[3]) in expected[3][1] and str(images[12]) in expected[12][1]
    pixels = process_images([load_image(images[5])], PROCESSOR, SimpleNamespace(**CONFIG))[0]
    assert torch.equal(expected[5][0][0], pixels)
    for workers in (0, 1):
        told: list[str] = []
        with read_ahead(images, prepare, workers, warn=told.append) as found:
            got = list(found)
        assert len(got) == 16 and all(map(same, got, expected))
        assert len(told) == workers and all("died" in message for message in told)


def test_what_cannot_be_sent_to_a_process_is_read_by_threads(folder):
    told: list[str] = []
    prepare = Prepare(lambda path: load_image(path), PROCESSOR, CONFIG)
    with read_ahead([folder / "0.png"], prepare, 2, warn=told.append) as found:
        assert same(next(found), prepare(folder / "0.png"))
    assert len(told) == 1 and "cannot be sent" in told[0]


def test_few_are_made_ahead():
    made, lock = [], threading.Lock()

    def prepare(image):
        with lock:
            made.append(image)
        return image, None

    with read_ahead(range(100), prepare, 0) as found:
        for number in range(50):
            assert next(found) == (number, None)
            with lock:
                assert len(made) <= number + 1 + 8 + 1
    assert len(made) < 70  # what was not asked for was not read


def test_what_is_known_is_handed_out_in_its_place():
    seen = []

    def known(image):
        seen.append(image)
        return f"features {image}" if image % 2 else None

    with read_ahead(range(9), lambda image: (image, None), 0, known) as found:
        assert [pair[0] for pair in found] == [
            f"features {number}" if number % 2 else number for number in range(9)
        ]
    assert seen == list(range(9))


def test_our_own_errors_are_raised(folder):
    class Broken:
        image_mean, crop_size = (0.5,) * 3, {"height": 4}

        def preprocess(self, *_, **__):
            raise TypeError("a bug")

    with read_ahead([folder / "0.png"], Prepare(load_image, Broken(), CONFIG), 0) as found:
        with pytest.raises(TypeError, match="a bug"):
            next(found)


def test_processes_only_where_they_pay(monkeypatch):
    monkeypatch.setattr(pictures, "usable_cores", lambda: 16)
    ours = SimpleNamespace(__spec__=SimpleNamespace(name="llava.eval.run"))
    monkeypatch.setitem(sys.modules, "__main__", ours)
    assert pictures.sensible_workers(5000) == 8
    assert pictures.sensible_workers(100) == 0
    monkeypatch.setattr(pictures, "usable_cores", lambda: 4)
    assert pictures.sensible_workers(5000) == 0
    monkeypatch.setattr(pictures, "usable_cores", lambda: 16)
    ours.__spec__ = None  # somebody's script: starting a process would run it again
    assert pictures.sensible_workers(5000) == 0


def test_ranks_on_one_machine_share_its_cores(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = pictures.usable_cores()
    assert 1 <= alone <= os.cpu_count()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert pictures.usable_cores() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "many")
    assert pictures.usable_cores() == alone
