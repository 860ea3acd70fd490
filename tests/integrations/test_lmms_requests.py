"""Requests as lmms-eval makes them, on our engine, against one call of `model.generate` per request."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from helpers.golden_model import CHECKPOINT, DATA, golden_image
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.integrations import lmms_requests
from llava.integrations.lmms_requests import EngineArguments, Generation, Request, RequestEngine, cut
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.settings import ENVIRONMENT

PATH = str(DATA / CHECKPOINT["15s"])
NAMES = ("land640x480", "tall123x457")
SHORT = {"max_new_tokens": 4, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in ENVIRONMENT.values():
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def loaded():
    """The reference checkpoint with 16 tokens, loaded once."""
    arguments = EngineArguments.parse({"pretrained": PATH, "tokens": 16, "device": "cpu", "batch_size": "3"})
    return RequestEngine(*arguments.resolve())


@pytest.fixture
def engine(loaded):
    loaded.failures.clear()
    loaded.visual_tokens.clear()
    loaded.session.cache._items.clear()
    return loaded


def images(*names: str):
    return lambda: [golden_image(name).copy() for name in names]


def prompt(text: str, answer: str | None = None) -> str:
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], text)
    conversation.append_message(conversation.roles[1], answer)
    return conversation.get_prompt()


def alone(engine: RequestEngine, text: str, names: tuple[str, ...]) -> str:
    """The answer of LLaVA's own call, one prompt at a time."""
    model, tokenizer, processor = engine.session.loaded
    ids = tokenizer_image_token(prompt(text), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    given = {}
    if names:
        pixels = process_images([golden_image(name) for name in names], processor, model.config)
        given = {"images": pixels, "image_sizes": [golden_image(name).size for name in names]}
    new = model.generate(ids, **given, pruner=engine.pruner, do_sample=False, max_new_tokens=4)
    return tokenizer.batch_decode(new, skip_special_tokens=True)[0].strip()


ASKED = [  # text of the request, its images, the prompt of LLaVA's call
    ("What is it?", NAMES[:1], "<image>\nWhat is it?"),
    ("Is there a dog?", NAMES[1:], "<image>\nIs there a dog?"),
    ("Why?", NAMES[:1], "<image>\nWhy?"),
    ("<image>\nWhy not?", NAMES[:1], "<image>\nWhy not?"),
    ("Left <image> or right?", NAMES[1:], "Left <image> or right?"),
    ("Which one?", NAMES, "<image> <image>\nWhich one?"),
    ("One <image> and two <image>", NAMES, "One <image> and two <image>"),
    ("Hello", (), "Hello"),
]


def test_answers_are_those_of_single_calls(engine):
    requests = [Request(text, images(*names), SHORT) for text, names, _ in ASKED]
    expected = [alone(engine, text, names) for _, names, text in ASKED]
    assert engine.answers(requests) == expected and not engine.failures
    assert sorted(engine.visual_tokens) == [0, 16, 16, 16, 16, 16, 32, 32] and engine.seconds > 0


def test_equal_images_are_encoded_once(engine, monkeypatch):
    seen = []
    encode = engine.model.encode_vision
    monkeypatch.setattr(
        engine.model, "encode_vision", lambda *a, **k: seen.append(len(a[0])) or encode(*a, **k)
    )
    requests = [Request(text, images(NAMES[i % 2]), SHORT) for i, text in enumerate("abcdef")]
    whole = engine.answers(requests)
    assert sum(seen) == 2
    monkeypatch.setattr(lmms_requests, "_WINDOW_BYTES", 1)  # a window per image: the cache has the others
    assert engine.answers(requests) == whole and sum(seen) == 2 and not engine._images


def test_requests_are_decoded_as_their_task_says(engine):
    same = ("Why?", images(NAMES[0]))
    first = engine.answers([Request(*same, SHORT)])[0]
    lengths = [{**SHORT, "max_new_tokens": n} for n in (4, 1, 2)]
    ends = [{**SHORT, "until": first[3]}, {**SHORT, "until": ["\n\n", first[1:3]]}]
    found = engine.answers([Request(*same, one) for one in (*lengths, *ends)])
    assert found[0] == first and first.startswith(found[1]) and first.startswith(found[2])
    assert len(found[1]) < len(found[2]) < len(first)
    assert found[3:] == [first[:3].rstrip(), first[:1]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Generation(1024)),
        ({"until": "\n\n"}, Generation(until=("\n\n",))),
        ({"until": ["", "a"], "stop_sequences": ["b"]}, Generation(until=("a", "b"))),
        ({"temperature": 0, "top_p": 0, "top_k": 1, "seed": 3}, Generation()),
        ({"temperature": 0.2, "top_p": 0.7}, Generation(temperature=0.2, top_p=0.7)),
        ({"temperature": 0.2, "top_p": 0.7, "do_sample": False}, Generation()),
        ({"do_sample": True}, Generation(temperature=1.0)),
        (
            {"num_beams": 3, "max_new_tokens": 16, "image_aspect_ratio": "original"},
            Generation(16, num_beams=3),
        ),
        ({"repetition_penalty": 1.0, "min_p": None}, Generation()),
    ],
)
def test_generation_arguments(given, expected):
    assert Generation.parse(given) == expected


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"temperature": 0.5, "top_k": 5}, "top_k=5"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": "warm"}, "temperature='warm'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"num_beams": True}, "num_beams=True"),
        ({"until": 3}, "until=3"),
        ({"until": ["a", 3]}, "until="),
        ({"max_tokens": 16}, "max_tokens=16"),
    ],
)
def test_generation_arguments_that_are_refused(given, named):
    with pytest.raises(ValueError, match=f"generation_kwargs: {named}"):
        Generation.parse(given)


@pytest.mark.parametrize(
    ("text", "until", "expected"),
    [
        ("a b", (), "a b"),
        ("a\n\nb", ("\n\n",), "a"),
        ("xaybz", ("b", "a"), "x"),
        ("ab", ("a",), ""),
        ("ab", ("c",), "ab"),
    ],
)
def test_cut(text, until, expected):
    assert cut(text, until) == expected


# --- likelihoods -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [16, None])
def test_losses_are_those_of_the_model(engine, monkeypatch, tokens):
    """Answers of several lengths in one batch, with and without images, against `forward` with labels."""
    model, tokenizer, processor = engine.session.loaded
    monkeypatch.setattr(engine, "pruner", engine.pruner if tokens else _none())
    asked = [("Why?", NAMES[:1], " Yes"), ("Why?", NAMES[:1], "No, it is not."), ("Hello", (), "There")]
    found = engine.losses([Request(text, images(*names), answer=answer) for text, names, answer in asked])
    model.set_pruner(engine.pruner)
    for (text, names, answer), (loss, greedy) in zip(asked, found, strict=True):
        text = f"<image>\n{text}" if names else text
        before, whole = (
            tokenizer_image_token(prompt(text, end), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
            for end in (None, answer.strip())
        )
        labels = whole.clone()
        labels[: len(before)] = -100
        given = {}
        if names:
            given["images"] = process_images([golden_image(names[0])], processor, model.config)
            given["image_sizes"] = [golden_image(names[0]).size]
        with torch.no_grad():
            out = model(whole[None], labels=labels[None], **given)
        assert loss == pytest.approx(float(out.loss), abs=1e-5)
        answer_ids = whole[len(before) :]
        said = out.logits[0, -len(answer_ids) - 1 : -1].argmax(-1)
        assert greedy == torch.equal(said, answer_ids)


def _none():
    from llava.pruning import get_pruner

    return get_pruner("none")


def test_greedy_answers_are_recognized(engine, monkeypatch):
    """A head that prefers given tokens: the answer is greedy if they are all of its tokens, with the end."""
    model, tokenizer, _ = engine.session.loaded
    before, whole = (
        tokenizer_image_token(prompt("<image>\nWhy?", end), tokenizer, IMAGE_TOKEN_INDEX)
        for end in (None, "Yes")
    )
    preferred = torch.tensor(whole[len(before) :])
    request = Request("Why?", images(NAMES[0]), answer=" Yes")

    def head(states):
        assert len(states) == len(preferred)
        return torch.nn.functional.one_hot(preferred, model.config.vocab_size)

    monkeypatch.setattr(model, "get_output_embeddings", lambda: head)
    assert [greedy for _, greedy in engine.losses([request])] == [True]
    preferred[-1] += 1
    assert [greedy for _, greedy in engine.losses([request])] == [False]
    assert engine.losses([Request("Why?", images(NAMES[0]))]) == [(0.0, True)]  # an empty answer


# --- what cannot be answered -----------------------------------------------------------------------------


def broken():
    raise OSError("image file is truncated")


def test_failures_are_counted_and_named(engine, capsys):
    requests = [
        Request("Why?", images(NAMES[0]), SHORT),
        Request("Why?", broken, SHORT, task="pope", document=7),
        Request("<image> <image>", images(NAMES[0]), SHORT, task="pope", document=8),
        Request("Why?", lambda: [Image.new("RGB", (0, 4))], SHORT, task="pope", document=8),
        Request("long " * 3000, images(NAMES[0]), SHORT, task="pope", document=9),
    ]
    answers = engine.answers(requests)
    assert answers[0] and answers[1:] == ["", "", "", ""]
    assert [one.line for one in engine.failures] == [7, 8, 8, 9]
    assert "4 of 5 requests have an empty answer" in capsys.readouterr().out
    with pytest.raises(ValueError, match="none of 1 requests.*\n.*pope.*truncated"):
        engine.answers(requests[1:2])
    with pytest.raises(ValueError, match="pope.*has no likelihood"):
        engine.losses(requests[1:2])


@pytest.mark.parametrize("visual", ["clip.mp4", {"array": [0.0]}])
def test_only_images_are_taken(engine, visual):
    with pytest.raises(TypeError, match="expected a PIL image.*vispruner_hf"):
        engine.answers([Request("Why?", lambda: [visual], SHORT)])


# --- arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"token": 64}, "model_args: 'token' is not an argument of model vispruner.*pretrained.*tokens"),
        ({"tokens": -1}, "tokens='-1'"),
        ({"tokens": 64.0}, "tokens='64.0'"),
        ({"tokens": True}, "tokens='True'"),
        ({"important_ratio": 1.5}, "important_ratio='1.5'"),
        ({"batch_size": 0}, "batch_size='0'"),
        ({"batch_size": "auto:4"}, "batch_size='auto:4'"),
        ({"seed": "x"}, "seed='x'"),
    ],
)
def test_arguments_that_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        EngineArguments.parse({"pretrained": PATH, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "visprunner", "tokens": 4}, "visprunner"),
        ({"method": "vispruner"}, "no budget"),
        ({"tokens": 4, "dtype": "int8"}, "int8"),
        ({"tokens": 4, "preset": "best"}, "best"),
        ({"tokens": 4, "conv_mode": "vicuna"}, "vicuna"),
        ({"tokens": 4, "device": "gpu"}, "gpu"),
        ({"tokens": 4, "pretrained": "/no/such/folder"}, "no such folder"),
    ],
)
def test_settings_that_are_refused_before_loading(given, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        EngineArguments.parse({"pretrained": PATH, "device": "cpu", **given}).resolve()


@pytest.mark.parametrize(
    ("name", "value", "argument"),
    [("VISPRUNER_TOKENS", "64", "tokens"), ("VISPRUNER_RATIO", "0.3", "important_ratio")],
)
def test_the_environment_does_not_change_answers(monkeypatch, name, value, argument):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}: '{value}'.*Add {argument}={value}"):
        EngineArguments.parse({"pretrained": PATH}).resolve()
    given = {"pretrained": PATH, "tokens": 8, "important_ratio": 0.5, "device": "cpu"}
    assert EngineArguments.parse(given).resolve()[1].tokens == 8


def test_unpruned_is_the_default():
    job, pruner = EngineArguments.parse({"pretrained": PATH, "device": "cpu", "batch_size": "auto"}).resolve()
    assert (pruner.name, job.batch_size, job.dtype) == ("none", None, "float32")
    assert EngineArguments.parse({"pretrained": PATH, "tokens": "none"}).resolve()[1].name == "none"
