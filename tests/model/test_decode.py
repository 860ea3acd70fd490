"""One prefix for many questions gives the ids of `model.generate`, on checkpoints of the original form."""

from __future__ import annotations

import copy
from itertools import combinations
from pathlib import Path

import pytest
import torch

from llava.model import decode
from llava.model.decode import Decoding, Row, can_share, cut_by_length, generate, generate_shared

CHECKPOINTS = Path(__file__).parents[1] / "data" / "model"


@pytest.fixture(scope="module", params=["ckpt_llava15s", "ckpt_llava16s"])
def loaded(request):
    from llava.model.builder import load_pretrained_model

    tokenizer, model, _, _ = load_pretrained_model(str(CHECKPOINTS / request.param), device="cpu")
    return tokenizer, model


def rows(model, images: int = 3, questions: int = 4) -> list[Row]:
    """Prompts of many lengths; images of different token counts, one with another text before it."""
    draw = torch.Generator().manual_seed(0)
    width = model.config.hidden_size
    visual = [torch.randn(5 + 6 * number, width, generator=draw) for number in range(images)]
    found = []
    for number in range(images * questions):
        image = number * 5 % images
        before = [1, 20, 30, 40] if number != 4 else [1, 50]
        after = torch.randint(3, 600, (1 + number % 7,), generator=draw).tolist()
        found.append(Row((*before, -200, *after), visual[image], image))
    return found


@pytest.fixture(params=[0, 48, 10**6], ids=["groups of one length", "some groups", "one group"])
def cost(request, monkeypatch):
    """What a group costs: decides how rests are grouped, and nothing else."""
    monkeypatch.setattr(decode, "_cost_of_a_group", lambda device: request.param)


@pytest.fixture(scope="module")
def plain(loaded):
    """What `generate` says to `rows` in 12 tokens, all at once."""
    return generate(loaded[1], loaded[0], rows(loaded[1]), Decoding(max_new_tokens=12))


def test_shared_prefixes_change_no_id(loaded, plain, cost):
    tokenizer, model = loaded
    decoding, asked = Decoding(max_new_tokens=12), rows(model)
    assert can_share(asked, decoding)
    assert generate_shared(model, tokenizer, asked, decoding) == plain
    assert len({tuple(ids) for ids in plain}) > 6


def test_company_changes_no_id(loaded, plain):
    tokenizer, model = loaded
    decoding = Decoding(max_new_tokens=12)
    assert [generate(model, tokenizer, [row], decoding)[0] for row in rows(model)] == plain


def test_answers_end_at_the_end_of_sequence(loaded, plain):
    tokenizer, model = loaded
    decoding, asked = Decoding(max_new_tokens=12), rows(model)
    before = model.generation_config.eos_token_id
    try:
        # make frequent ids the end, so that rows stop at different steps
        model.generation_config.eos_token_id = [plain[0][3], plain[5][7], 2]
        expected = generate(model, tokenizer, asked, decoding)
        assert generate_shared(model, tokenizer, asked, decoding) == expected
        assert {len(ids) for ids in expected} >= {12} and min(map(len, expected)) <= 3
    finally:
        model.generation_config.eos_token_id = before


def test_long_answers_outgrow_the_copied_cache(loaded):
    tokenizer, model = loaded
    decoding, asked = Decoding(max_new_tokens=40), rows(model)[:6]
    before = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = [639]  # an id that is not said: every answer is long
        expected = generate(model, tokenizer, asked, decoding)
        assert min(map(len, expected)) == 40
        assert generate_shared(model, tokenizer, asked, decoding) == expected
    finally:
        model.generation_config.eos_token_id = before


def test_an_image_at_the_very_end_of_the_prompt(loaded, cost):
    tokenizer, model = loaded
    decoding, asked = Decoding(max_new_tokens=4), rows(model)
    cut = [Row(row.ids[: row.ids.index(-200) + 1], row.visual, row.key) for row in asked]
    for mixed in (cut, [*cut[:3], *asked[3:]]):
        expected = generate(model, tokenizer, mixed, decoding)
        assert generate_shared(model, tokenizer, mixed, decoding) == expected


def test_no_visual_tokens_at_all(loaded):
    tokenizer, model = loaded
    blind = [Row(row.ids, row.visual[:0], row.key) for row in rows(model)]
    decoding = Decoding(max_new_tokens=4)
    assert generate_shared(model, tokenizer, blind, decoding) == generate(model, tokenizer, blind, decoding)


def test_what_cannot_share(loaded):
    _, model = loaded
    asked, greedy = rows(model), Decoding()
    assert not can_share(asked, Decoding(temperature=0.2))
    assert not can_share(asked, Decoding(num_beams=2))
    assert not can_share([*asked, Row((1, 5, 6), None)], greedy)
    assert not can_share([Row((1, -200, -200, 3), asked[0].visual, 0)] * 2, greedy)
    assert not can_share(asked[:1], greedy)


SETTINGS = {
    "top_p": 0.01,
    "top_k": 1,
    "min_p": 0.99,
    "top_h": 0.01,
    "typical_p": 0.01,
    "epsilon_cutoff": 0.9,
    "eta_cutoff": 0.9,
    "repetition_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "length_penalty": -9.0,
    "early_stopping": True,
    "min_new_tokens": 6,
    "suppress_tokens": [*range(300)],
    "begin_suppress_tokens": [*range(300)],
    "bad_words_ids": [[token] for token in range(3, 300)],
    "sequence_bias": [[[token], -100.0] for token in range(3, 300)],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "exponential_decay_length_penalty": [0, 9.0],
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "output_scores": True,
    "max_length": 3,
    "renormalize_logits": True,
    "guidance_scale": 9.0,
    "watermarking_config": {"bias": 9.0, "hashing_key": 3, "greenlist_ratio": 0.1},
    "penalty_alpha": 0.9,
    "prompt_lookup_num_tokens": 3,
    "dola_layers": "low",
    "stop_strings": ["a"],
    "cache_implementation": "static",
    "num_beams": 3,
    "do_sample": True,
    "temperature": 0.01,
}


@pytest.mark.parametrize(
    "decoding",
    [Decoding(6), Decoding(6, temperature=1.0), Decoding(6, num_beams=2), Decoding(6, 1.0, num_beams=2)],
    ids=["greedy", "sampled", "beams", "sampled beams"],
)
def test_the_checkpoints_generation_settings_change_no_answer(loaded, decoding):
    """Only what `Decoding` names is at work, whatever generation_config.json turns on."""
    tokenizer, model = loaded
    asked, stored = rows(model)[:4], model.generation_config

    def answers():
        torch.manual_seed(0)
        return generate(model, tokenizer, asked, decoding)

    expected = answers()
    try:
        for name, value in SETTINGS.items():
            model.generation_config = copy.deepcopy(stored)
            setattr(model.generation_config, name, value)
            assert answers() == expected, name
            assert getattr(model.generation_config, name) == value, "it is the client's after the call"
    finally:
        model.generation_config = stored


def test_settings_that_would_have_changed_answers_are_named():
    stored = {"top_p": 0.6, "temperature": 0.9, "repetition_penalty": 1.2, "length_penalty": 2.0, "top_k": 50}
    assert Decoding().unused(stored) == {"repetition_penalty": 1.2}
    assert Decoding(temperature=1.0).unused(stored) == {"top_p": 0.6, "repetition_penalty": 1.2}
    assert Decoding(temperature=1.0, top_p=0.9).unused(stored) == {"repetition_penalty": 1.2}
    assert Decoding(num_beams=2).unused(stored) == {"repetition_penalty": 1.2, "length_penalty": 2.0}
    neutral = {"top_p": 1.0, "min_p": None, "epsilon_cutoff": 0.0, "repetition_penalty": 1, "typical_p": 1.0}
    assert Decoding(temperature=1.0).unused(neutral) == {}


def test_rows_whose_answer_has_ended_leave_the_batch(loaded, plain, monkeypatch):
    tokenizer, model = loaded
    decoding, asked = Decoding(max_new_tokens=12), rows(model)
    sizes, forward = [], decode._forward

    def counted(decoder, embeds, *rest):
        sizes.append(embeds.shape[:2])
        return forward(decoder, embeds, *rest)

    monkeypatch.setattr(decode, "_forward", counted)
    before = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = [2, *(ids[2] for ids in plain[:8])]
        found = generate_shared(model, tokenizer, asked, decoding)
        monkeypatch.undo()
        assert found == generate(model, tokenizer, asked, decoding)
    finally:
        model.generation_config.eos_token_id = before
    steps = [batch for batch, length in sizes if length == 1]
    assert steps[0] == len(asked) and 0 < min(steps) <= len(asked) // 2
    assert sum(steps) >= sum(max(0, len(ids) - 1) for ids in found)


@pytest.mark.parametrize("lengths", [[3], [1, 1, 9], [2, 3, 5, 8, 8, 13], [0, 0, 7, 7, 7, 30]])
@pytest.mark.parametrize("cost", [0, 5, 20, 1000])
def test_cuts_are_the_cheapest_there_are(lengths, cost):
    def expense(slices):
        return sum((end - start) * lengths[end - 1] + cost for start, end in slices)

    every = []
    for count in range(len(lengths)):
        for inner in combinations(range(1, len(lengths)), count):
            edges = [0, *inner, len(lengths)]
            every.append(list(zip(edges, edges[1:], strict=False)))
    found = cut_by_length(lengths, cost)
    assert found in every and expense(found) == min(map(expense, every))


DECODINGS = {
    "greedy": Decoding(6),
    "beams": Decoding(6, num_beams=2),
    "sampled": Decoding(6, temperature=0.7),
    "nucleus": Decoding(6, temperature=0.7, top_p=0.9),
    "sampled beams": Decoding(6, temperature=0.7, num_beams=2),
}


@pytest.mark.parametrize("decoding", DECODINGS.values(), ids=[*DECODINGS])
def test_rows_with_invalid_logits_have_no_answer(loaded, decoding):
    """One image's overflow costs the rows of that image only, in every way of decoding."""
    tokenizer, model = loaded
    asked = rows(model)
    torch.manual_seed(0)
    expected = generate(model, tokenizer, asked, decoding)
    torch.manual_seed(0)
    bad = [Row(row.ids, row.visual * torch.nan, row.key) if row.key == 1 else row for row in asked]
    wanted = [None if row.key == 1 else ids for row, ids in zip(bad, expected, strict=True)]
    assert generate(model, tokenizer, bad, decoding) == wanted and wanted.count(None) == 4
    if decoding.greedy:
        assert generate_shared(model, tokenizer, bad, decoding) == wanted
