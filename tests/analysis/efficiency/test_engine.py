"""The measurement of the engine: rates, extrapolation, and counts of answers that differ."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from helpers.efficiency import run
from helpers.golden_model import DATA
from llava.analysis.efficiency import engine
from llava.analysis.efficiency.dummy_models import DUMMY_MODELS, DummyModel, build_model
from llava.analysis.efficiency.workload import EngineWorkload, WordTokenizer
from llava.paths import BUNDLED_DATA


def test_a_workload_like_gqa_with_a_small_dummy_model(capsys, monkeypatch):
    tiny = DUMMY_MODELS["tiny"]
    tower = {**tiny.tower, "image_size": 112, "num_hidden_layers": 3}
    small = DummyModel({**tiny.language, "num_hidden_layers": 2}, tower)
    monkeypatch.setitem(DUMMY_MODELS, "small", small)
    _, document = run(
        capsys,
        "engine --dummy-model small --tokens 16 --device cpu --vs baseline --questions 40 "
        "--baseline-questions 2 --repeats 1 --warmup 0 --flips --batch-size 20",
    )
    rate = document["questions_per_second"]
    assert document["speedup"] == pytest.approx(rate["engine"] / rate["baseline"], rel=0.01)
    assert (document["questions"], document["images"], document["answers_compared"]) == (40, 2, 2)
    assert document["flips_against_one_at_a_time_with_equal_tokens"] == 0
    counts = document["flip_counts"]
    assert counts["answers"] == 40 and counts["engine_against_singles"] == 0
    assert document["extrapolated"]["seconds"] == pytest.approx(
        398 * document["vision_seconds_per_image"] + 12578 * document["other_seconds_per_question"], abs=0.1
    )


def test_a_checkpoint_with_questions_of_pope(capsys):
    _, document = run(
        capsys,
        f"engine --model {DATA / 'ckpt_llava15s'} --tokens 8 --device cpu --vs baseline --num-images 1 "
        "--baseline-questions 1 --repeats 1 --warmup 0",
    )
    assert (document["questions"], document["images"]) == (18, 1)
    assert document["answers_compared"] == 1 and "extrapolated" not in document
    assert document["flips_against_one_at_a_time_with_equal_tokens"] == 0


@pytest.mark.parametrize("checkpoint", ["ckpt_llava15s", "ckpt_llava16s"])
def test_on_cuda_sizes_follow_from_the_memory(checkpoint, monkeypatch):
    """Rehearsed without one: questions per batch and images encoded together of a loaded model."""
    names = ("dtype", "tower_dtype", "batch_size", "num_images")
    args = SimpleNamespace(
        model=DATA / checkpoint, data=BUNDLED_DATA / "pope", device="cpu", tokens=16, ratio=0.5
    )
    vars(args).update(dict.fromkeys(names))
    load = EngineWorkload.from_checkpoint(args)
    assert load.rows_at_once == 64
    free = {"bytes": 80 * 10**9}
    monkeypatch.setattr(type(load.model), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 80 * 10**9))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    crops = 5 if checkpoint == "ckpt_llava16s" else 1
    for gigabytes, rows, images in ((80, 256, 10 // crops), (0, 1, 1)):
        free["bytes"] = gigabytes * 10**9
        del load.__dict__["rows_at_once"]
        assert load.rows_at_once == rows and load.engine()._encode_at_once == images
    free["bytes"] = round(2.4 * 10**9)
    del load.__dict__["rows_at_once"]
    assert 1 < load.rows_at_once < 256


def test_flips_are_counted_where_answers_differ():
    answers = {(True, 64): "ab", (False, 1): "ax", (False, 64): "xx"}

    class Scripted(EngineWorkload):
        def ask(self, questions=None, vision_cache=None, share_prefix=True, batch_size=64):
            return dict(enumerate(answers[share_prefix, batch_size])), None

    assert Scripted(None, None, None, [], None, None, 64).flips() == {
        "answers": 2,
        "engine_against_singles": 1,
        "unshared_batches_of_64_against_singles": 1,
    }


def test_flips_between_graphs_and_eager_stages_are_counted(tmp_path):
    tiny = DUMMY_MODELS["tiny"]
    tower = {**tiny.tower, "image_size": 112, "num_hidden_layers": 3}
    model = build_model(DummyModel({**tiny.language, "num_hidden_layers": 2}, tower))
    model.set_runtime(graphs=True)  # on a CPU a stand-in
    args = SimpleNamespace(questions=4, tokens=16, ratio=0.5, batch_size=None, seed=0)
    load = EngineWorkload.from_dummy_model(args, tmp_path, model)
    assert load.rows_at_once == 64 and load.flips()["eager_against_engine"] == 0
    assert model.runtime.graphs and not model.runtime.captured.refused


def test_the_word_tokenizer_gives_ids_of_the_vocabulary():
    words = WordTokenizer(50)
    ids = words("is there a cat?").input_ids
    assert len(ids) == 5 and ids[0] == 1 and all(3 <= one < 50 for one in ids[1:])
    assert words("is there", add_special_tokens=False).input_ids == ids[1:3]


def test_invalid_arguments_are_refused_before_a_model_is_loaded(tmp_path):
    args = SimpleNamespace(
        device="cpu",
        dummy_model=None,
        model=tmp_path,
        data=tmp_path,
        questions=None,
        num_images=2,
        compile=False,
    )
    with pytest.raises(ValueError, match=r"no config\.json there"):
        engine.check(args)
    (tmp_path / "config.json").write_text("{}")
    engine.check(args)
    args.data = tmp_path / "gone"
    with pytest.raises(ValueError, match="no such folder"):
        engine.check(args)
    args.questions = 3
    with pytest.raises(ValueError, match="--questions requires --dummy-model"):
        engine.check(args)
    args.dummy_model = "tiny"
    with pytest.raises(ValueError, match="--num-images requires a checkpoint"):
        engine.check(args)
