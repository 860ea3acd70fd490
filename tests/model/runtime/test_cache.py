"""transformers' `generate` gives the same over captured stages as over eager ones, with all arguments."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from helpers.eagerly import eagerly, load_case
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.decode import Decoding, Row
from llava.model.decode import generate as answer_rows
from llava.model.runtime.cache import CapturedCache


@pytest.fixture(
    scope="module",
    params=[
        ("cpu", "ckpt_llava15s", "sdpa"),
        ("cpu", "ckpt_llava16s", "eager"),
        pytest.param(("cuda", "ckpt_llava15s", "sdpa"), marks=pytest.mark.gpu),
        pytest.param(("cuda", "ckpt_llava16s", "eager"), marks=pytest.mark.gpu),
    ],
    ids="-".join,
)
def loaded(request):
    tokenizer, model = load_case(*request.param)
    model.set_pruner(None, tokens=4)
    return tokenizer, model


class Used:
    """How often `CapturedCache` was asked for logits."""

    count = 0


@pytest.fixture
def used(monkeypatch):
    logits, used = CapturedCache.logits, Used()

    def counted(self, ids, embeds):
        used.count += 1
        return logits(self, ids, embeds)

    monkeypatch.setattr(CapturedCache, "logits", counted)
    return used


@pytest.fixture
def captured(loaded):
    loaded[1].set_runtime(graphs=True)
    yield loaded[1]
    assert not loaded[1].runtime.captured.refused and loaded[1].runtime.lent is None
    loaded[1].set_runtime()


def prompt(length: int = 9) -> torch.Tensor:
    ids = torch.randint(3, 600, (1, length), generator=torch.Generator().manual_seed(length))
    ids[:, 4] = IMAGE_TOKEN_INDEX
    return ids


def pixels(model, images: int = 1) -> torch.Tensor:
    side = model.get_vision_tower().image_size
    return torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(3))


def draw(model, ids=None, **kwargs):
    torch.manual_seed(5)
    given = {"do_sample": True, "max_new_tokens": 12, "images": pixels(model), **kwargs}
    given = {name: value() if callable(value) else value for name, value in given.items()}
    return model.generate(prompt() if ids is None else ids, **given)


class StopAt(StoppingCriteria):
    """LLaVA's scripts stop at keywords in this way."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids, scores, **_):
        return input_ids.shape[1] >= self.length


class Raised(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores + 2 * (torch.arange(scores.shape[1], device=scores.device) % 7 == 0)


SEARCHES = [
    {"temperature": 0.2},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "top_p": None, "top_k": 3},
    {"temperature": 2.0, "min_p": 0.01},
    {"temperature": 1.0, "repetition_penalty": 1.8},
    {"temperature": 1.0, "no_repeat_ngram_size": 1},
    {"temperature": 1.0, "min_new_tokens": 6, "eos_token_id": list(range(3, 400))},
    {"temperature": 1.0, "eos_token_id": list(range(3, 200))},
    {"temperature": 1.0, "bad_words_ids": [[n] for n in range(3, 300)]},
    {"temperature": 1.0, "max_new_tokens": 1},
    {"temperature": 1.0, "max_new_tokens": 130},
    {"temperature": 1.0, "max_new_tokens": None, "max_length": 50},
    {"temperature": 1.0, "max_new_tokens": None},
    {"temperature": 1.0, "stopping_criteria": lambda: StoppingCriteriaList([StopAt(4)])},
    {"temperature": 1.0, "logits_processor": lambda: [Raised()]},
    {
        "generation_config": lambda: GenerationConfig(
            do_sample=True, temperature=1.5, top_k=9, max_new_tokens=7
        )
    },
    {"temperature": 1.0, "num_beams": 1, "num_return_sequences": 1, "use_cache": True},
    # as lmms-eval and LLaVA's scripts call it
    {
        **{"temperature": 0.2, "top_p": None, "num_beams": 1, "use_cache": True, "pad_token_id": 0},
        "attention_mask": lambda: torch.ones(1, 9, dtype=torch.long),
    },
    {"do_sample": False, "repetition_penalty": 1.3},
    {"do_sample": False, "min_new_tokens": 12, "eos_token_id": list(range(3, 600))},
    {"do_sample": False, "stopping_criteria": lambda: [StopAt(5)]},
    {"do_sample": False, "bad_words_ids": [[n] for n in range(3, 300)]},
]


@pytest.mark.parametrize("kwargs", SEARCHES, ids="-".join)
def test_every_search_of_one_prompt_is_captured_and_the_same(loaded, captured, used, kwargs):
    model = captured
    expected = eagerly(model, lambda: draw(model, **kwargs))
    assert used.count == 0
    for _ in range(2):  # captures, then replays
        found = draw(model, **kwargs)
        assert torch.equal(found, expected) and found.dtype == expected.dtype
    assert used.count == 2 * found.shape[1]
    assert len(set(expected[0].tolist())) > 1 or expected.shape[1] == 1


@pytest.mark.parametrize("sample", [True, False])
def test_scores_logits_and_cache_are_returned(loaded, captured, used, sample):
    model = captured
    kwargs = {
        **{"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
        **{"do_sample": sample, "max_new_tokens": 8},
    }
    expected = eagerly(model, lambda: draw(model, **kwargs))
    found = draw(model, **kwargs)
    assert used.count == 8 and type(found) is type(expected)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        for a, b in zip(getattr(found, name), getattr(expected, name), strict=True):
            assert a.dtype == b.dtype and torch.allclose(a, b, atol=1e-4)
    assert type(found.past_key_values) is type(expected.past_key_values) is DynamicCache
    draw(model, prompt(30))  # writes into the same memory
    assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
    for a, b in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert torch.allclose(a.keys, b.keys, atol=1e-4) and torch.allclose(a.values, b.values, atol=1e-4)


def test_text_is_streamed(loaded, captured, used, capsys):
    tokenizer, model = loaded
    expected = eagerly(model, lambda: draw(model))
    capsys.readouterr()
    found = draw(model, streamer=TextStreamer(tokenizer))
    text = tokenizer.decode(expected[0])
    assert torch.equal(found, expected) and capsys.readouterr().out.strip() == text.strip()
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    thread = threading.Thread(target=draw, args=(model,), kwargs={"streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces).strip() == text.strip() and used.count == 24


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 2},
        {"num_beams": 2, "do_sample": False},
        {"generation_config": lambda: GenerationConfig(num_beams=3, max_new_tokens=4)},
        {"num_return_sequences": 2},
        {"generation_config": lambda: GenerationConfig(do_sample=True, num_return_sequences=3)},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"output_attentions": True, "return_dict_in_generate": True},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2, "do_sample": False},
        {"past_key_values": DynamicCache},
        {"ids": torch.cat([prompt(), prompt()]), "images": None},
    ],
    ids="-".join,
)
def test_other_searches_are_eager(loaded, captured, used, kwargs):
    model = captured
    if kwargs.get("ids") is not None:
        kwargs = {"ids": kwargs["ids"], "images": pixels(model, 2)}
    if "output_attentions" in kwargs and model.config._attn_implementation == "sdpa":
        pytest.skip("SDPA returns no attention")
    try:
        expected = eagerly(model, lambda: draw(model, **kwargs))
    except IndexError:
        pytest.skip("this release of transformers does not look up embeddings")
    found = draw(model, **kwargs)
    of = (lambda x: x) if isinstance(found, torch.Tensor) else (lambda x: x.sequences)
    assert torch.equal(of(found), of(expected)) and used.count == 0
    draw(model)  # hooks that transformers left in the model do not keep it eager
    assert used.count == 12


def test_prompts_of_many_lengths_share_stages(loaded, captured, used):
    model = captured
    for length in (*range(8, 30), 5, 200, 9):
        expected = eagerly(model, lambda length=length: draw(model, prompt(length), max_new_tokens=4))
        assert torch.equal(draw(model, prompt(length), max_new_tokens=4), expected)
    assert len(model.runtime.captured) < 12 and used.count


def test_a_prompt_may_be_too_long_to_capture(loaded, captured, used, monkeypatch):
    from llava.model.runtime import cache

    monkeypatch.setattr(cache, "MOST_CAPTURED", 8)
    expected = eagerly(captured, lambda: draw(captured))
    assert torch.equal(draw(captured), expected) and used.count == 12


def test_answers_past_the_last_position_make_the_arena_grow(loaded, captured, used, monkeypatch):
    model = captured
    kwargs = {"max_new_tokens": 300, "min_new_tokens": 300}
    monkeypatch.setattr(model.config, "max_position_embeddings", 100)
    with pytest.warns(UserWarning, match="max_position_embeddings"):
        expected = eagerly(model, lambda: draw(model, **kwargs))
        model.runtime.clear()
        monkeypatch.setattr("llava.model.runtime.arena._ROUND", 128)
        assert torch.equal(draw(model, **kwargs), expected)
    assert used.count == 300 and model.runtime.arenas["batch"].version > 1


def test_angles_that_follow_the_length_are_not_padded(loaded, captured, used):
    model, decoder = captured, captured.get_model()
    config = copy.deepcopy(model.config)
    config.max_position_embeddings = 14  # prompts are padded past it
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    before = decoder.rotary_emb

    def ask(length, kwargs):
        decoder.rotary_emb = type(before)(config=config)
        return draw(model, prompt(length), **kwargs)

    try:
        for kwargs in ({"do_sample": True}, {"do_sample": False}):
            for length in (8, 9, 14):
                expected = eagerly(model, lambda length=length, kwargs=kwargs: ask(length, kwargs))
                assert torch.equal(ask(length, kwargs), expected)
    finally:
        decoder.rotary_emb = before
    assert used.count == 0


def test_without_memory_the_search_is_eager(loaded, captured, used, monkeypatch):
    model = captured

    def full(*_):
        raise torch.OutOfMemoryError("out of memory")

    expected = eagerly(model, lambda: draw(model))
    monkeypatch.setattr(CapturedCache, "take", full)
    assert torch.equal(draw(model), expected) and used.count == 0


def test_a_streamer_may_ask_the_model(loaded, captured, used):
    """Its answers must not overwrite those of the outer search."""
    model, inner = captured, []

    class Asking(StopAt):
        def __call__(self, input_ids, scores, **_):
            inner.append(draw(model, prompt(12), do_sample=False, max_new_tokens=3))
            inner.append(draw(model, prompt(12), do_sample=False, repetition_penalty=1.5, max_new_tokens=3))
            return super().__call__(input_ids, scores)

    kwargs = {"do_sample": False, "max_new_tokens": 6, "repetition_penalty": 1.2}
    expected = eagerly(model, lambda: draw(model, stopping_criteria=[Asking(99)], **kwargs))
    alone = list(inner)
    inner.clear()
    assert torch.equal(draw(model, stopping_criteria=[Asking(99)], **kwargs), expected)
    assert len(inner) == len(alone) == 12 and all(map(torch.equal, inner, alone)) and used.count == 6


def test_threads_wait_for_each_other(loaded, captured):
    model, found = captured, {}
    ids = {length: prompt(length) for length in (9, 14, 20, 26)}
    same = {"do_sample": False, "repetition_penalty": 1.3, "images": pixels(model), "max_new_tokens": 20}
    expected = eagerly(model, lambda: {n: model.generate(one, **same) for n, one in ids.items()})

    def ask(length):
        for _ in range(3):
            found[length] = model.generate(ids[length], **same)

    threads = [threading.Thread(target=ask, args=(length,)) for length in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[n], expected[n]) for n in ids)


def test_images_of_several_threads_do_not_mix(loaded, captured):
    """Every graph has one place for its input; `encode_images` is also called outside of `generate`."""
    model, found = captured, {}
    images = {number: pixels(model) * (1 + number) for number in range(4)}
    expected = eagerly(model, lambda: {number: model.encode_images(one)[0] for number, one in images.items()})
    start = threading.Barrier(len(images))

    @torch.no_grad()
    def encode(number):
        start.wait()
        found[number] = [model.encode_images(images[number])[0] for _ in range(6)]

    threads = [threading.Thread(target=encode, args=(number,)) for number in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(one, expected[n], atol=1e-4) for n in images for one in found[n])


def test_prompts_that_are_not_finite_harm_no_later_one(loaded, captured, used):
    tokenizer, model = loaded
    width = model.config.hidden_size
    broken = Row((*range(10, 60), IMAGE_TOKEN_INDEX, 9), torch.full((5, width), float("nan")))
    sound = Row((1, 5, IMAGE_TOKEN_INDEX, 9), torch.randn(5, width))
    sampled = Decoding(max_new_tokens=6, temperature=1.0, top_p=0.9)

    def ask(row):
        torch.manual_seed(0)
        return answer_rows(model, tokenizer, [row], sampled)

    expected = ask(sound)
    assert expected == eagerly(model, lambda: ask(sound)) and used.count == 6
    assert ask(broken) == [None]
    assert ask(sound) == expected
    visual = [broken.visual]
    ids = torch.tensor([broken.ids])
    for kwargs in (
        {"do_sample": True},
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.1},
    ):
        try:
            model.generate(ids, visual=visual, max_new_tokens=3, **kwargs)
        except RuntimeError as error:  # transformers cannot draw from NaN
            assert "probability" in str(error)
        assert ask(sound) == expected


def test_images_that_are_not_finite_harm_no_later_one(loaded, captured):
    tokenizer, model = loaded
    greedy = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(prompt(), images=pixels(model), **greedy)
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.generate(prompt(90), images=pixels(model) * float("nan"), **greedy)
    with torch.inference_mode():
        visual = model.encode_images(pixels(model))[0]
    row = Row(tuple(prompt()[0].tolist()), visual)
    assert answer_rows(model, tokenizer, [row], Decoding(max_new_tokens=4)) == expected.tolist()
    with pytest.raises(ValueError, match="NaN or infinite"):
        draw(model, prompt(90), images=pixels(model) * float("nan"))
    assert torch.equal(model.generate(prompt(), images=pixels(model), **greedy), expected)


def test_searches_that_fail_leave_the_runtime_free(loaded, captured, used):
    model = captured

    class Failing(StopAt):
        def __call__(self, *_args, **_kwargs):
            raise KeyError("stop")

    expected = draw(model)
    with pytest.raises(KeyError):
        draw(model, stopping_criteria=[Failing(1)])
    assert model.runtime.lent is None and torch.equal(draw(model), expected)


def test_prompts_without_images_and_embeddings_of_the_caller(loaded, captured, used):
    model = captured
    ids = torch.tensor([[1, 9, 30, 42, 77]], device=model.device)
    embeds = model.get_input_embeddings()(ids).detach()
    for given in ({"input_ids": ids}, {"inputs_embeds": embeds}):
        for kwargs in ({"do_sample": True, "max_new_tokens": 5}, {"do_sample": False, "max_new_tokens": 5}):

            def ask(given=given, kwargs=kwargs):
                torch.manual_seed(1)
                return model.generate(**given, **kwargs)

            expected = eagerly(model, ask)
            assert torch.equal(ask(), expected)
    assert used.count == 15  # plain greedy ids have a loop of their own
    mask = torch.tensor([[0, 0, 1, 1, 1]], device=model.device)
    masked = {"inputs_embeds": embeds, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**masked), eagerly(model, lambda: model.generate(**masked)))
    assert used.count == 15


def test_inference_mode_and_gradients_of_the_caller(loaded, captured, used):
    model = captured
    expected = draw(model)
    with torch.inference_mode():
        assert torch.equal(draw(model), expected)
    with torch.enable_grad():
        assert torch.equal(draw(model), expected)
    assert used.count == 36
