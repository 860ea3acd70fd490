"""The embedded model on embedded questions: whatever is shared, the answers are the plain engine's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava.analysis.efficiency.workload import CollectedAnswers
from llava.eval.benchmarks import get_benchmark
from llava.eval.inference.engine import Engine, PassSetting
from llava.eval.inference.vision_cache import VisionCache
from llava.model.decode import Decoding
from llava.paths import BUNDLED_DATA, BUNDLED_MODEL
from llava.pruning import get_pruner


@pytest.fixture(scope="module")
def loaded():
    from llava.model.builder import load_pretrained_model

    return load_pretrained_model(
        str(BUNDLED_MODEL), device="cpu", dtype="float32", method="none", visual_token_num=0
    )[:3]


def test_sharing_and_batching_change_no_answer(loaded):
    questions = list(get_benchmark("pope").questions(Path(BUNDLED_DATA) / "pope", []))
    pictures = set(list(dict.fromkeys(question.image for question in questions))[:3])
    questions = [question for question in questions if question.image in pictures]
    assert len(questions) == 54
    tokenizer, model, processor = loaded
    cache, pruners = VisionCache(1 << 26), [get_pruner("vispruner", 64), get_pruner("vispruner", 32, 0.0)]

    def ask(**options):
        engine = Engine(model, tokenizer, processor, decoding=Decoding(16), vision_cache=cache, **options)
        settings = [
            PassSetting(str(number), pruner, CollectedAnswers()) for number, pruner in enumerate(pruners)
        ]
        report = engine.run(questions, settings, progress=False)
        assert not report.failures
        return [setting.writer.texts for setting in settings], report

    singles, first = ask(batch_size=1, share_prefix=False)
    assert (first.images, first.reused) == (3, 0)
    assert len(singles[0]) == 54 and {"Yes", "No"} <= set(singles[0].values())
    for size in (64, 20, 7):
        found, report = ask(batch_size=size)
        assert found == singles and (report.images, report.reused) == (0, 3)


def test_out_of_memory_among_captured_stages_changes_no_answer(monkeypatch):
    """Graphs and buffers of the larger batch are dropped, and stages are captured for the smaller one."""
    from helpers.golden_model import DATA
    from llava.model.builder import load_pretrained_model
    from llava.model.runtime.arena import Arena

    questions = list(get_benchmark("pope").questions(Path(BUNDLED_DATA) / "pope", []))[:40]
    tokenizer, model, processor, _ = load_pretrained_model(
        str(DATA / "ckpt_llava15s"), device="cpu", method="none", visual_token_num=0, graphs=True
    )
    fit, most = Arena.fit, 6

    def full(self, rows, length):
        if rows > most:
            raise torch.OutOfMemoryError("the stand-in is full")
        fit(self, rows, length)

    def ask(batch_size):
        engine = Engine(model, tokenizer, processor, decoding=Decoding(8), batch_size=batch_size)
        setting = PassSetting("it", get_pruner("vispruner", 16), CollectedAnswers())
        assert not engine.run(questions, [setting], progress=False).failures
        return setting.writer.texts, engine

    expected, _ = ask(5)
    assert len(model.runtime.captured) > 0 and len(expected) == 40
    monkeypatch.setattr(Arena, "fit", full)
    found, engine = ask(20)
    assert found == expected and engine._rows_at_once <= most
    assert len(model.runtime.captured) > 0 and not model.runtime.captured.refused
