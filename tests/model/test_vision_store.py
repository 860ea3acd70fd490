"""Encoded images on disk: the same bits in another process, bounded, and safe against damage and writers."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from helpers.checkpoints import SOURCE, load
from llava.eval.inference.vision_cache import VisionCache
from llava.model import vision_store
from llava.model.features import VisionFeatures
from llava.model.vision_store import VisionStore, tower_identity


@pytest.fixture(scope="module")
def loaded():
    model = load(SOURCE)
    return model, model.get_vision_tower().image_processor


def features(seed: int, cues: tuple[str, ...] = ()) -> VisionFeatures:
    torch.manual_seed(seed)
    tensors = torch.randn(2, 9, 4).half(), torch.rand(2, 3, 9)
    found = {cue: torch.randn(2, 9) for cue in cues}
    return VisionFeatures(*tensors, (640, 480), ["a", "b"], False, found)


def assert_same(one: VisionFeatures, other: VisionFeatures) -> None:
    for name in ("features", "attention"):
        assert torch.equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype
    assert (one.image_size, list(one.keys), one.as_crops) == (other.image_size, other.keys, other.as_crops)
    assert set(one.cues) >= set(other.cues)
    assert all(torch.equal(one.cues[cue], tensor) for cue, tensor in other.cues.items())


def test_another_process_finds_the_same_bits_and_only_with_its_cues(tmp_path, loaded):
    first, image = VisionStore(tmp_path, 1 << 30, *loaded), features(1, ("keys", "received@9/24"))
    assert first.get("a") is None
    first.put("a", image)
    again = VisionStore(tmp_path, 1 << 30, *loaded)
    assert_same(image, again.get("a", ("keys",)))
    assert again.get("a").cues == {} and again.get("a", ("cls",)) is None and again.get("b") is None
    more = features(1, ("cls",))
    again.put("a", more)
    assert_same(more, first.get("a", ("cls",)))


def test_other_weights_have_another_folder(tmp_path, loaded):
    model, processor = loaded
    before = tower_identity(model, processor)
    weight = next(model.get_vision_tower().parameters())
    with torch.no_grad():
        value = weight.flatten()[0].clone()
        weight.view(-1)[0] += 1
        assert tower_identity(model, processor) != before
        weight.view(-1)[0] = value
    assert tower_identity(model, processor) == before


def test_the_limit_holds_and_files_in_use_stay(tmp_path, loaded):
    old = VisionStore(tmp_path, 1 << 30, *loaded)
    for number in range(4):
        old.put(number, features(number))
    size = sum(path.stat().st_size for path in tmp_path.glob("*/*")) // 4
    new = VisionStore(tmp_path, 3 * size + 8, *loaded)
    assert new.get(0) is not None  # used: it stays, though it is the oldest
    new.put("x", features(9))
    assert len(list(tmp_path.glob("*/*"))) == 3
    assert new.get(0) is not None and new.get("x") is not None and new.get(1) is None
    for number in range(10, 14):  # more than fits: what was kept in this run stays
        new.put(number, features(number))
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= 3 * size + 8
    assert new.get("x") is not None and new.get(13) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100])
def test_damaged_files_are_encoded_again(tmp_path, loaded, content):
    store = VisionStore(tmp_path, 1 << 30, *loaded)
    store.put("a", features(1))
    (path,) = tmp_path.glob("*/*")
    path.write_bytes(content)
    assert store.get("a") is None and not path.exists()
    store.put("a", features(1))
    assert_same(features(1), store.get("a"))


def test_a_folder_that_cannot_be_written_costs_nothing_but_one_line(tmp_path, loaded, capsys):
    (tmp_path / "vision").write_text("a file")
    store = VisionStore(tmp_path / "vision", 1 << 30, *loaded)
    store.put("a", features(1))
    store.put("b", features(2))
    assert capsys.readouterr().err.count("encoded images are not kept") == 1


def test_two_writers_and_the_cache_in_memory(tmp_path, loaded):
    stores = [VisionStore(tmp_path, 1 << 30, *loaded) for _ in range(2)]
    images = [features(seed, ("cls",)) for seed in range(8)]

    def write(store: VisionStore) -> None:
        for seed, image in enumerate(images):
            store.put(seed, image)

    threads = [threading.Thread(target=write, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(tmp_path.glob("*/*"))) == 16 and not list(tmp_path.glob("*/*.tmp"))
    cache = VisionCache(1 << 20, "cpu", VisionStore(tmp_path, 1 << 30, *loaded))
    assert_same(images[3], cache.get(3, ("cls",)))
    assert (cache.hits, cache.misses, len(cache)) == (1, 0, 1)
    assert cache.get(3, ("keys",)) is None and cache.misses == 1


def test_a_later_command_encodes_nothing(tmp_path, monkeypatch, capsys):
    from helpers.synthetic_pope import make_pope
    from llava.eval import run

    monkeypatch.setenv("VISPRUNER_VISION_CACHE", "1")
    monkeypatch.setenv("VISPRUNER_CACHE", str(tmp_path / "cache"))
    data = make_pope(tmp_path / "pope", pictures=3, per_category=4)
    found = []
    for number, method in enumerate(("vispruner", "vispruner", "hiprune")):
        out = tmp_path / f"out{number}"
        argv = ["--benchmark", "pope", "--model", str(SOURCE), "--data", str(data), "--output", str(out)]
        argv += ["--method", method, "--tokens", "8", "--max-new-tokens", "2", "--device", "cpu"]
        assert run.main([*argv, "--dtype", "float32"]) == 0
        capsys.readouterr()
        card = json.loads((out / "score.json").read_text())
        answers = [json.loads(line)["text"] for line in (out / "answers.jsonl").read_text().splitlines()]
        found.append((card["speed"]["vision_seconds"], card["speed"]["questions_per_second"], answers))
    (first, second, third) = found
    assert first[0] > 0 and first[1] is not None
    assert second[0] > 0 and second[1] is not None and second[2] == first[2]
    assert third[0] > 0  # its cue was not stored


def test_other_kernels_have_another_folder(loaded, monkeypatch):
    model, processor = loaded
    before, tower = tower_identity(model, processor), model.get_vision_tower()
    monkeypatch.setattr(tower, "run_layer", lambda layer, hidden: hidden)
    assert tower_identity(model, processor) != before
    names = {"cuda:0": "One GPU", "cuda:1": "Another GPU"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[str(device)])
    found = [vision_store.device_name(torch.device(one)) for one in ("cpu", "cuda:0", "cuda:1")]
    assert found == ["cpu", "One GPU", "Another GPU"]
