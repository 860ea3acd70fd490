"""The engine on a fake model: each picture once, right company, right order, failures of single questions."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from helpers.fake_llava import FakeLlava, FakeProcessor, FakeTokenizer
from helpers.synthetic_pope import make_pope
from llava.eval.benchmarks import get_benchmark
from llava.eval.benchmarks.base import Question
from llava.eval.inference.engine import Engine, PassSetting, plan
from llava.mm_utils import tokenizer_image_token
from llava.model.decode import Decoding
from llava.pruning import get_pruner


class Memory:
    """A writer that remembers; `known` are answered before."""

    def __init__(self, known: set[int] = frozenset()) -> None:
        self.texts: dict[int, str] = {}
        self.visual: dict[int, int] = {}
        self.writes: list[int] = []
        self.known = set(known)

    def wants(self, index: int) -> bool:
        return index not in self.known and index not in self.texts

    def write(self, answers) -> None:
        fresh = [answer for answer in answers if self.wants(answer.index)]
        self.writes.append(len(fresh))
        self.texts |= {answer.index: answer.text for answer in fresh}
        self.visual |= {answer.index: answer.visual_tokens for answer in fresh}


@pytest.fixture
def questions(tmp_path) -> list[Question]:
    data = make_pope(tmp_path / "pope", pictures=5, per_category=20)
    return list(get_benchmark("pope").questions(data, []))


def ask(questions, pruners, batch_size=8, model=None, writers=None, **options):
    model = model or FakeLlava()
    engine = Engine(
        model, FakeTokenizer(), FakeProcessor(), batch_size=batch_size, share_prefix=False, **options
    )
    writers = writers or [Memory() for _ in pruners]
    settings = [
        PassSetting(f"{number}", *pair) for number, pair in enumerate(zip(pruners, writers, strict=True))
    ]
    return engine.run(questions, settings, progress=False), settings, model


def texts(setting: PassSetting) -> list[str]:
    return [setting.writer.texts[index] for index in sorted(setting.writer.texts)]


GRID = [get_pruner("none"), get_pruner("vispruner", 8), get_pruner("vispruner", 4, 0.0)]


def test_each_picture_is_decoded_encoded_and_pruned_once(questions):
    decoded: Counter = Counter()

    def load(path):
        from llava.mm_utils import load_image

        decoded[path] += 1
        return load_image(str(path))

    report, settings, model = ask(questions, GRID, load_image=load)
    assert len(decoded) == len(model.encoded) == report.images == 5
    assert set(decoded.values()) == set(model.encoded.values()) == set(model.pruned.values()) == {1}
    assert len(model.pruned) == 15
    assert report.generated == 180 and [setting.generated for setting in settings] == [60] * 3
    assert [set(setting.writer.visual.values()) for setting in settings] == [{16}, {8}, {4}]


def test_answers_do_not_depend_on_batches_order_or_company(questions):
    singles = texts(ask(questions, GRID[1:2], batch_size=1)[1][0])
    assert len(set(singles)) > 15
    for size in (2, 7, 64):
        assert texts(ask(questions, GRID, batch_size=size)[1][1]) == singles
    backwards = list(reversed(questions))
    assert texts(ask(backwards, GRID[1:2], batch_size=7)[1][0]) == singles


def test_text_only_questions_go_beside_the_others(questions):
    mixed = list(questions)
    mixed[3:5] = [dataclasses.replace(question, image=None) for question in mixed[3:5]]
    report, (setting,), _ = ask(mixed, GRID[1:2])
    assert not report.failures and setting.generated == 60
    assert [setting.writer.visual[index] for index in range(6)] == [8, 8, 8, 0, 0, 8]


def test_plan_covers_every_question_once_and_keeps_images_together():
    images = [f"{number * 7 % 11}.png" for number in range(100)] + ["big.png"] * 30 + [None] * 3
    questions = [Question(index, index, image, "?") for index, image in enumerate(images)]
    waves = plan(questions, 12)
    asked = [place for wave in waves for batch in wave.batches for place in batch]
    assert sorted(asked) == list(range(133))
    together = [str(image) for wave in waves for image in wave.images]
    assert sorted(together) == sorted(map(str, set(images)))
    assert all(0 < len(batch) <= 12 for wave in waves for batch in wave.batches)
    big = next(wave for wave in waves if wave.images == ("big.png",))
    assert [len(batch) for batch in big.batches] == [10, 10, 10]
    assert plan(questions, 12) == waves and plan([], 12) == []


def test_going_on_asks_only_what_is_missing_in_the_same_company(questions):
    complete = ask(questions, GRID[:1])[1][0]
    known = set(range(0, 60, 3)) | {q.index for q in questions if q.image == questions[0].image}
    model = FakeLlava()
    report, (setting,), _ = ask(questions, GRID[:1], writers=[Memory(known)], model=model)
    assert report.generated == setting.generated == 60 - len(known)
    rest = {index: text for index, text in complete.writer.texts.items() if index not in known}
    assert setting.writer.texts == rest
    full = FakeLlava()
    ask(questions, GRID[:1], model=full)
    assert not Counter(model.batches) - Counter(full.batches)
    nothing = FakeLlava()
    ask(questions, GRID[:1], writers=[Memory(set(range(60)))], model=nothing)
    assert not nothing.encoded and not nothing.batches


def test_an_unreadable_picture_stops_only_its_questions(questions):
    broken, gone = questions[0].image, questions[1].image
    broken.write_bytes(b"not an image")
    gone.unlink()
    report, settings, _ = ask(questions, GRID)
    lost = [question for question in questions if question.image in (broken, gone)]
    assert sorted(problem.line for problem in report.failures if problem.file == lost[0].file) == sorted(
        question.line for question in lost
    )
    assert {problem.file for problem in report.failures} == {questions[0].file}
    assert all(str(broken) in str(problem) or str(gone) in str(problem) for problem in report.failures)
    for setting in settings:
        assert len(setting.writer.texts) == 60 - len(lost)


def test_a_text_with_an_image_tag_stops_only_itself(questions):
    strange = dataclasses.replace(questions[3], text="What is <image>?")
    report, (setting,), _ = ask([*questions[:3], strange, *questions[4:]], GRID[:1])
    assert [(problem.file, problem.line) for problem in report.failures] == [(strange.file, strange.line)]
    assert "<image>" in report.failures[0].message
    assert sorted(setting.writer.texts) == [index for index in range(60) if index != strange.index]


def test_out_of_memory_halves_the_batch_and_goes_on(questions, capsys):
    expected = texts(ask(questions, GRID[:1], batch_size=30)[1][0])
    model = FakeLlava(out_of_memory_above=4)
    _, (setting,), _ = ask(questions, GRID[:1], batch_size=30, model=model)
    assert texts(setting) == expected
    assert max(model.batches) > 4 and all(size <= 4 for size in model.batches[4:])
    assert "out of memory: continuing with batches of" in capsys.readouterr().err
    with pytest.raises(torch.OutOfMemoryError):
        ask(questions, GRID[:1], model=FakeLlava(out_of_memory_above=0))


def test_out_of_memory_in_a_library_or_a_capture_halves_as_well(questions, capsys):
    class Full(FakeLlava):
        def generate(self, input_ids, **more):
            if len(input_ids) > 4:
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")
            return super().generate(input_ids, **more)

    expected = texts(ask(questions, GRID[:1], batch_size=30)[1][0])
    assert texts(ask(questions, GRID[:1], batch_size=30, model=Full())[1][0]) == expected
    assert "out of memory: continuing with batches of" in capsys.readouterr().err

    class Broken(FakeLlava):
        def generate(self, input_ids, **more):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        ask(questions, GRID[:1], batch_size=30, model=Broken())


def test_out_of_memory_in_the_tower_halves_the_images_and_loses_none(questions, capsys):
    class Full(FakeLlava):
        calls: list[int] = []

        def encode_vision(self, images, image_sizes):
            assert len(images) == len(image_sizes)
            self.calls.append(len(images))
            if len(images) > 1:
                raise torch.OutOfMemoryError("the fake device is full")
            return super().encode_vision(images, image_sizes)

    expected = texts(ask(questions, GRID[:1], batch_size=64)[1][0])
    model, writer = Full(), Memory()
    engine = Engine(model, FakeTokenizer(), FakeProcessor(), batch_size=64, share_prefix=False)
    engine._encode_at_once = engine._images_per_call = 4
    setting = PassSetting("one", GRID[0], writer)
    engine.run(questions, [setting], progress=False)
    assert texts(setting) == expected and setting.images == 5
    assert Full.calls == [4, 2, 1, 1, 1, 1, 1]
    assert "out of memory: encoding 1 images at once" in capsys.readouterr().err
    Full.encode_vision = lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))
    with pytest.raises(torch.OutOfMemoryError):
        ask(questions, GRID[:1], model=Full())


def test_every_text_is_tokenized_once_for_all_settings(questions):
    class Counting(FakeTokenizer):
        texts: list[str] = []

        def __call__(self, text, **more):
            self.texts.append(text)
            return super().__call__(text, **more)

    engine = Engine(FakeLlava(), Counting(), FakeProcessor(), batch_size=8, share_prefix=False)
    ids = [engine.prompt_ids(question) for question in questions]
    plain = tokenizer_image_token("a <image> b", FakeTokenizer())
    assert tokenizer_image_token("a <image> b", engine._tokenize) == plain
    settings = [PassSetting(f"{number}", pruner, Memory()) for number, pruner in enumerate(GRID)]
    engine.run(questions, settings, progress=False)
    assert max(Counter(Counting.texts).values()) == 1
    assert [engine.prompt_ids(question) for question in questions] == ids


def test_one_write_per_batch(questions):
    _, (setting,), _ = ask(questions, GRID[:1], batch_size=16)
    assert sum(setting.writer.writes) == 60 and len(setting.writer.writes) == 5


def test_our_own_errors_are_not_blamed_on_pictures(questions):
    class Broken(FakeProcessor):
        def preprocess(self, image, **_):
            raise TypeError("a bug")

    engine = Engine(FakeLlava(), FakeTokenizer(), Broken(), share_prefix=False)
    with pytest.raises(TypeError, match="a bug"):
        engine.run(questions, [PassSetting("one", GRID[0], Memory())], progress=False)


def test_a_failing_writer_ends_the_run(questions):
    class Full(Memory):
        def write(self, answers):
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        ask(questions, GRID[:1], writers=[Full()])


def test_wrong_settings_are_refused(questions):
    with pytest.raises(ValueError, match="conv_mode .v9.: unknown"):
        ask(questions, GRID, conv_mode="v9")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        ask(questions, GRID, batch_size=0)
    model = FakeLlava()
    model.config.image_aspect_ratio = "anyres"
    with pytest.raises(ValueError, match="anyres='paper' or anyres='llava'"):
        ask(questions, GRID, model=model)


def test_progress_is_on_standard_error_with_a_rate(questions, capsys):
    engine = Engine(FakeLlava(), FakeTokenizer(), FakeProcessor(), batch_size=8, share_prefix=False)
    engine.run(questions, [PassSetting("one", GRID[0], Memory())])
    captured = capsys.readouterr()
    assert captured.out == "" and "60/60" in captured.err and "q/s" in captured.err


def test_sampling_is_seeded_by_batch(questions):
    seen = []

    class Sampling(FakeLlava):
        def generate(self, input_ids, **settings):
            assert settings["do_sample"] and settings["temperature"] == 0.7
            seen.append(torch.rand(1).item())
            return super().generate(input_ids, **settings)

    decoding = Decoding(temperature=0.7)
    ask(questions, GRID[:1], model=Sampling(), decoding=decoding)
    first, seen = seen, []
    known = {question.index for question in questions if question.image == questions[0].image}
    ask(questions, GRID[:1], model=Sampling(), writers=[Memory(known)], decoding=decoding)
    assert 0 < len(seen) < len(first) and seen == first[-len(seen) :]
    seen = []
    ask(questions, GRID[:1], model=Sampling(), decoding=decoding, seed=1)
    assert not set(seen) & set(first)


def test_image_is_named_by_path_not_by_object(questions):
    copies = [dataclasses.replace(question, image=Path(str(question.image))) for question in questions]
    _, _, model = ask(copies, GRID[:1])
    assert set(model.encoded.values()) == {1}


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_a_prompt_that_does_not_fit_fails_alone_and_only_where_it_does_not_fit(questions, batch_size):
    """Unpruned prompts are too long, pruned ones fit: neither is cut, and each setting counts its own."""
    free = ask(questions, GRID, batch_size=batch_size)[1]
    model = FakeLlava()
    engine = Engine(model, FakeTokenizer(), FakeProcessor())
    longest = max(len(engine.prompt_ids(question)) - 1 for question in questions)
    shortest = min(len(engine.prompt_ids(question)) - 1 for question in questions)
    assert longest > shortest
    model.config.tokenizer_model_max_length = longest + 8
    report, settings, _ = ask(questions, GRID, batch_size=batch_size, model=model)
    fits = [q.index for q in questions if len(engine.prompt_ids(q)) - 1 + 16 <= longest + 8]
    assert sorted(settings[0].writer.texts) == fits and len(fits) < 60
    assert [len(setting.failures) for setting in settings] == [60 - len(fits), 0, 0]
    assert report.failures == settings[0].failures
    issue = report.failures[0]
    assert issue.file == questions[0].file and issue.line > 0
    assert (
        "16 visual" in issue.message
        and f"tokenizer_model_max_length in config.json is {longest + 8}" in str(issue)
    )
    for setting, without_limit in zip(settings, free, strict=True):
        kept = setting.writer.texts
        assert kept == {index: without_limit.writer.texts[index] for index in kept}
    assert [len(setting.writer.texts) for setting in settings[1:]] == [60, 60]


def test_an_answer_that_runs_past_the_last_position_is_a_failure(questions):
    model = FakeLlava()
    engine = Engine(model, FakeTokenizer(), FakeProcessor())
    (free,) = ask(questions, GRID[1:2])[1]
    needed = {
        question.index: len(engine.prompt_ids(question)) - 1 + 8 + len(free.writer.texts[question.index])
        for question in questions
    }
    limit = sorted(needed.values())[30]
    model.config.max_position_embeddings = limit
    report, (setting,), _ = ask(questions, GRID[1:2], model=model)
    assert sorted(setting.writer.texts) == [index for index, count in needed.items() if count <= limit]
    assert len(report.failures) == 60 - len(setting.writer.texts) > 0
    assert all("max_position_embeddings in config.json" in str(one) for one in report.failures)


def test_text_only_prompts_have_limits_too(questions):
    model = FakeLlava()
    model.config.max_position_embeddings = 40
    alone = [dataclasses.replace(question, image=None) for question in questions]
    report, (setting,), _ = ask(alone, GRID[1:2], model=model)
    assert len(report.failures) == 60 and not setting.writer.texts and "(0 visual)" in str(report.failures[0])
