"""The engine's measurement runs from the command line at small shapes, and counts what it says it counts."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from llava.analysis.efficiency import engine, shapes
from llava.analysis.efficiency.__main__ import main


def test_a_gqa_like_load_at_small_shapes(capsys, monkeypatch):
    tower = {**shapes.SHAPES["tiny"].tower, "image_size": 112, "num_hidden_layers": 3}
    language = {**shapes.SHAPES["tiny"].language, "num_hidden_layers": 2}
    monkeypatch.setitem(shapes.SHAPES, "mini", shapes.Shape(language, tower))
    arguments = [
        "engine",
        "--shapes",
        "mini",
        "--tokens",
        "16",
        "--device",
        "cpu",
        "--vs",
        "plain",
        "--questions",
        "40",
        "--plain-questions",
        "2",
        "--repeats",
        "1",
        "--warmup",
        "0",
        "--flips",
        "--batch-size",
        "20",
    ]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    speed = document["questions_per_second"]
    assert document["ratio"] == pytest.approx(speed["engine"] / speed["plain"], rel=0.01)
    assert (document["questions"], document["images"], document["answers_compared"]) == (40, 2, 2)
    assert document["flips_against_one_at_a_time_with_equal_tokens"] == 0
    counts = document["flip_counts"]
    assert counts["answers"] == 40 and counts["engine_against_singles"] == 0
    whole = document["extrapolated"]
    assert whole["seconds"] == pytest.approx(
        398 * document["vision_seconds_per_image"] + 12578 * document["other_seconds_per_question"], abs=0.1
    )


def test_flips_are_counted_where_answers_differ():
    said = {(True, 64): "ab", (False, 1): "ax", (False, 64): "xx"}

    class Load(engine.Workload):
        def ask(self, questions=None, vision_cache=None, share_prefix=True, batch_size=64):
            return dict(enumerate(said[share_prefix, batch_size])), None

    load = Load(None, None, None, [], None, None, 64)
    assert engine._flips(load) == {
        "answers": 2,
        "engine_against_singles": 1,
        "plain_engine_batches_of_64_against_singles": 1,
    }


def test_the_word_tokenizer_gives_ids_of_the_vocabulary():
    words = engine.Words(50)
    ids = words("is there a cat?").input_ids
    assert len(ids) == 5 and ids[0] == 1 and all(3 <= one < 50 for one in ids[1:])
    assert words("is there", add_special_tokens=False).input_ids == ids[1:3]


def test_wrong_arguments_are_refused_before_a_model_is_loaded(tmp_path):
    given = SimpleNamespace(
        device="cpu", shapes=None, model=tmp_path, data=tmp_path, questions=None, pictures=2
    )
    with pytest.raises(ValueError, match=r"no config\.json there"):
        engine.check(given)
    (tmp_path / "config.json").write_text("{}")
    engine.check(given)
    given.data = tmp_path / "gone"
    with pytest.raises(ValueError, match="no such folder"):
        engine.check(given)
    given.questions = 3
    with pytest.raises(ValueError, match="--questions goes with --shapes"):
        engine.check(given)
    given.shapes = "huge"
    with pytest.raises(ValueError, match="--pictures goes with a checkpoint"):
        engine.check(given)
    given.pictures = None
    with pytest.raises(ValueError, match=r"no shape 'huge'"):
        engine.check(given)
