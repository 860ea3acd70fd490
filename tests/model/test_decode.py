"""One prefix for many questions gives the ids of `model.generate`, on checkpoints of the original form."""

from __future__ import annotations

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
    assert can_share(model, asked, decoding)
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
    assert not can_share(model, asked, Decoding(temperature=0.2))
    assert not can_share(model, asked, Decoding(num_beams=2))
    assert not can_share(model, [*asked, Row((1, 5, 6), None)], greedy)
    assert not can_share(model, [Row((1, -200, -200, 3), asked[0].visual, 0)] * 2, greedy)
    assert not can_share(model, asked[:1], greedy)
    longest = max(len(row.ids) - 1 + len(row.visual) for row in asked)
    model.config.tokenizer_model_max_length = longest
    try:
        assert can_share(model, asked, greedy)
        model.config.tokenizer_model_max_length = longest - 1  # the model would cut this prompt
        assert not can_share(model, asked, greedy)
    finally:
        del model.config.tokenizer_model_max_length
    model.generation_config.repetition_penalty = 1.2
    try:
        assert not can_share(model, asked, greedy)
    finally:
        model.generation_config.repetition_penalty = None


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


@pytest.mark.parametrize("decoding", [Decoding(6), Decoding(6, num_beams=2)], ids=["greedy", "beams"])
def test_rows_with_invalid_logits_have_no_answer(loaded, decoding):
    """One image's overflow costs the rows of that image only, in either way of decoding."""
    tokenizer, model = loaded
    asked = rows(model)
    expected = generate(model, tokenizer, asked, decoding)
    bad = [Row(row.ids, row.visual * torch.nan, row.key) if row.key == 1 else row for row in asked]
    wanted = [None if row.key == 1 else ids for row, ids in zip(bad, expected, strict=True)]
    assert generate(model, tokenizer, bad, decoding) == wanted and wanted.count(None) == 4
    if decoding.greedy:
        assert generate_shared(model, tokenizer, bad, decoding) == wanted
