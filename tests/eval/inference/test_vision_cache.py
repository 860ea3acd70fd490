"""Pictures that several benchmarks share are encoded once, within a bounded memory, with the same answers."""

from __future__ import annotations

import dataclasses
import os
import threading

import pytest
import torch

from helpers.fake_llava import FakeLlava, FakeProcessor, FakeTokenizer
from helpers.synthetic_pope import make_pope
from llava.analysis.efficiency.workload import CollectedAnswers
from llava.eval.benchmarks import get_benchmark
from llava.eval.inference.engine import Engine, PassSetting
from llava.eval.inference.vision_cache import VisionCache, image_key
from llava.model.features import CropKeys, VisionFeatures
from llava.pruning import get_pruner


def features(number: int, crops: int = 1) -> VisionFeatures:
    draw = torch.Generator().manual_seed(number)
    return VisionFeatures(
        torch.randn(crops, 10, 5, generator=draw),
        torch.rand(crops, 2, 10, generator=draw),
        (3, 4),
        [str(number)] * crops,
    )


BYTES = 4 * (10 * 5 + 2 * 10)  # of one crop


def test_what_comes_out_is_what_went_in():
    for device in (None, "cpu"):
        cache = VisionCache(10 * BYTES, device)
        batch = torch.randn(4, 10, 5)
        one = dataclasses.replace(features(1), features=batch[1:2])
        cache.put("one", one)
        found = cache.get("one")
        assert torch.equal(found.features, one.features) and torch.equal(found.attention, one.attention)
        assert (found.image_size, found.keys) == ((3, 4), ["1"])
        # a slice of a batch must not keep the batch alive
        assert found.features.untyped_storage().nbytes() == found.features.nbytes
        assert cache.get("two") is None and (cache.hits, cache.misses) == (1, 1)


def test_pixels_are_not_kept_with_the_features():
    crops = torch.randn(2, 3, 8, 8)
    keys, cache = CropKeys(crops), VisionCache(10 * BYTES)
    cache.put("one", dataclasses.replace(features(1), keys=keys))
    assert keys._crops is None and list(cache.get("one").keys) == list(CropKeys(crops))


def test_memory_is_bounded_and_the_least_recently_used_goes_first():
    cache = VisionCache(3 * BYTES)
    for number in range(3):
        cache.put(number, features(number))
    assert cache.get(0) is not None
    cache.put(3, features(3))
    assert [cache.get(number) is not None for number in range(4)] == [True, False, True, True]
    assert cache.bytes == 3 * BYTES and len(cache) == 3
    cache.put(3, features(3))
    assert cache.bytes == 3 * BYTES
    cache.put("big", features(9, crops=4))  # more than there is: nothing is dropped for it
    assert len(cache) == 3 and cache.get("big") is None
    cache.put("two", features(9, crops=2))
    assert cache.bytes == 3 * BYTES and len(cache) == 2
    with pytest.raises(ValueError, match="limit_bytes"):
        VisionCache(-1)


def test_threads_may_share_it():
    cache, wrong = VisionCache(5 * BYTES), []

    def work(seed: int) -> None:
        for number in range(300):
            key = (number * seed) % 11
            found = cache.get(key)
            if found is not None and found.keys != [str(key)]:
                wrong.append(key)
            cache.put(key, features(key))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 3, 5, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and cache.bytes == len(cache) * BYTES == 5 * BYTES


def test_one_cache_serves_one_model():
    cache, model = VisionCache(BYTES), FakeLlava()
    cache.bind(model)
    cache.put(1, features(1))
    cache.bind(model)
    assert len(cache) == 1
    other = FakeLlava()
    with pytest.raises(ValueError, match="another model"):
        cache.bind(other)
    del model
    cache.bind(other)
    assert len(cache) == 0 and cache.bytes == 0


def test_a_path_stands_for_its_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"1")
    os.symlink(tmp_path / "a.png", tmp_path / "b.png")
    pope, vqa = get_benchmark("pope"), get_benchmark("vqav2")
    one = image_key(tmp_path / "a.png", pope.load_image, None)
    assert image_key(str(tmp_path / "b.png"), vqa.load_image, None) == one
    assert image_key(tmp_path / "a.png", pope.load_image, "paper") != one
    assert image_key(tmp_path / "a.png", get_benchmark("mmbench").load_image, None) != one
    (tmp_path / "a.png").write_bytes(b"12")
    assert image_key(tmp_path / "a.png", pope.load_image, None) != one
    gone = tmp_path / "gone.png"
    assert image_key(gone, pope.load_image, None) == image_key(gone, pope.load_image, None)


@pytest.mark.parametrize("fits", [5, 2])
def test_a_second_run_encodes_only_what_is_not_kept(tmp_path, fits):
    class Model(FakeLlava):
        def encode_vision(self, images, image_sizes):
            return [Seen(one.features, one.key) for one in super().encode_vision(images, image_sizes)]

    @dataclasses.dataclass
    class Seen:
        features: torch.Tensor
        key: float

    data = make_pope(tmp_path / "pope", pictures=5, per_category=20)
    questions = list(get_benchmark("pope").questions(data, []))
    model, cache = Model(), VisionCache(fits * 16 * 3 * 4)
    found, reports = [], []
    for order in (questions, questions[::-1]):
        engine = Engine(
            model,
            FakeTokenizer(),
            FakeProcessor(),
            batch_size=8,
            share_prefix=False,
            vision_cache=cache,
            load_image=get_benchmark("pope").load_image,
        )
        setting = PassSetting("one", get_pruner("vispruner", 8), CollectedAnswers())
        reports.append(engine.run(order, [setting], progress=False))
        found.append(setting.writer.texts)
    assert found[0] == found[1]
    assert (reports[0].images, reports[0].reused) == (5, 0)
    assert reports[1].images + reports[1].reused == 5 and reports[1].reused >= fits
    assert sum(model.encoded.values()) == 10 - reports[1].reused
