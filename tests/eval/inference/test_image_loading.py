"""Pictures come in order, as the same bits, few at a time, whoever reads them and whatever dies."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from helpers import deadly_reader
from llava.eval.inference import image_loading
from llava.eval.inference.image_loading import ImageLoader, read_ahead
from llava.mm_utils import load_image, process_images
from llava.model.checkpoint.tower import clip_processor
from llava.model.image_processor import load_image_processor

ROOT = Path(__file__).parents[3]
CONFIG = {"image_aspect_ratio": "pad"}
PROCESSOR = load_image_processor(clip_processor(56))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        Image.effect_noise((30 + 7 * number, 64), 80).convert("RGB").save(folder / f"{number}.png")
    Image.new("RGB", (20, 30), (9, 8, 7)).save(folder / "deadly.png")
    (folder / "3.png").write_bytes(b"not an image")
    return folder


def same(found, expected) -> bool:
    if expected[0] is None:
        return found == expected
    return found[1] is None and found[0][1] == expected[0][1] and torch.equal(found[0][0], expected[0][0])


def test_the_same_bits_in_order_even_if_a_process_dies(folder):
    loader = ImageLoader(deadly_reader.load, PROCESSOR, CONFIG)
    images = [folder / f"{name}.png" for name in (*range(12), "gone", "deadly", 0, 1)]
    expected = [loader(image) for image in images]
    assert [pair[1] is None for pair in expected] == [number not in (3, 12) for number in range(16)]
    assert str(images[3]) in expected[3][1] and str(images[12]) in expected[12][1]
    pixels = process_images([load_image(images[5])], PROCESSOR, SimpleNamespace(**CONFIG))[0]
    assert torch.equal(expected[5][0][0], pixels)
    for workers in (0, 1):
        told: list[str] = []
        with read_ahead(images, loader, workers, warn=told.append) as found:
            got = list(found)
        assert len(got) == 16 and all(map(same, got, expected))
        assert len(told) == workers and all("died" in message for message in told)


def test_what_cannot_be_sent_to_a_process_is_read_by_threads(folder):
    told: list[str] = []
    loader = ImageLoader(lambda path: load_image(path), PROCESSOR, CONFIG)
    with read_ahead([folder / "0.png"], loader, 2, warn=told.append) as found:
        assert same(next(found), loader(folder / "0.png"))
    assert len(told) == 1 and "cannot be sent" in told[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_pixels_are_pinned_once_and_only_where_it_is_asked(folder, workers, monkeypatch):
    """By threads and by processes, and for the images of a process that died; failures stay what they are."""
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.data_ptr()) or self)
    loader = ImageLoader(deadly_reader.load, PROCESSOR, CONFIG)
    images = [folder / f"{name}.png" for name in (0, 1, "deadly", 2, 3, "gone")]
    expected = [loader(image) for image in images]
    for pin, count in ((False, 0), (True, 4)):
        with read_ahead(images, loader, workers, warn=lambda _: None, pin=pin) as found:
            got = list(found)
        assert all(map(same, got, expected)) and len(pinned) == count


def test_few_are_made_ahead():
    made, lock = [], threading.Lock()

    def loader(image):
        with lock:
            made.append(image)
        return image, None

    with read_ahead(range(100), loader, 0) as found:
        for number in range(50):
            assert next(found) == (number, None)
            with lock:
                assert len(made) <= number + 1 + 8 + 1
    assert len(made) < 70  # what was not asked for was not read


def test_as_many_are_made_ahead_as_asked():
    made: list[int] = []
    with read_ahead(range(100), lambda image: made.append(image) or (image, None), 0, ahead=30) as found:
        assert next(found) == (0, None)
        deadline = time.monotonic() + 10
        while len(made) < 31 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert 30 <= len(made) <= 31


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

    with read_ahead([folder / "0.png"], ImageLoader(load_image, Broken(), CONFIG), 0) as found:
        with pytest.raises(TypeError, match="a bug"):
            next(found)


def test_processes_only_where_they_pay(monkeypatch):
    monkeypatch.setattr(image_loading, "usable_cores", lambda: 16)
    ours = SimpleNamespace(__spec__=SimpleNamespace(name="llava.eval.run"))
    monkeypatch.setitem(sys.modules, "__main__", ours)
    assert image_loading.sensible_workers(5000) == 8
    assert image_loading.sensible_workers(100) == 0
    monkeypatch.setattr(image_loading, "usable_cores", lambda: 4)
    assert image_loading.sensible_workers(5000) == 0
    monkeypatch.setattr(image_loading, "usable_cores", lambda: 16)
    ours.__spec__ = None  # somebody's script: starting a process would run it again
    assert image_loading.sensible_workers(5000) == 0


def test_ranks_on_one_machine_share_its_cores(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = image_loading.usable_cores()
    assert 1 <= alone <= os.cpu_count()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert image_loading.usable_cores() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "many")
    assert image_loading.usable_cores() == alone


def test_processes_end_when_the_one_that_started_them_is_killed(tmp_path):
    """A killed process cannot shut its workers down: they must notice by themselves."""
    code = (
        "import time\n"
        "from llava.eval.inference import image_loading\n"
        "if __name__ == '__main__':\n"
        "    from helpers import deadly_reader\n"
        "    source = image_loading._Source(deadly_reader.blank, 2, print)\n"
        "    futures = [source.submit(number) for number in range(8)]\n"
        "    [future.result() for future in futures]\n"
        "    print(*source.pool._processes, flush=True)\n"
        "    time.sleep(600)\n"
    )
    script = tmp_path / "program.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    parent = subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        workers = [int(word) for word in parent.stdout.readline().split()]
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    assert len(workers) == 2
    patience = time.monotonic() + 60
    while any(alive(pid) for pid in workers) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)


def alive(pid: int) -> bool:
    """True if the process runs; a zombie that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
