"""`generate` and `forward` as LLaVA's callers use them: all of transformers' options, losses, caches."""

from __future__ import annotations

import pytest
import torch
from transformers import TextStreamer

from llava.mm_utils import KeywordsStoppingCriteria

IDS = torch.tensor([[1, 292, -200, 554, 13]])
IMAGE = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
GREEDY = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture
def model(golden):
    model = golden("15s").model
    model.set_pruner("vispruner", 12)
    return model


def greedy_by_hand(model, steps):
    """Greedy decoding with `forward` alone: prefill with the image, then single ids on the cache."""
    with torch.no_grad():
        out = model(input_ids=IDS, images=IMAGE, use_cache=True)
        new = [int(out.logits[0, -1].argmax())]
        while len(new) < steps:
            out = model(
                input_ids=torch.tensor([new[-1:]]),
                past_key_values=out.past_key_values,
                use_cache=True,
                images=IMAGE,
            )
            new.append(int(out.logits[0, -1].argmax()))
    return new


def test_decoding_steps_on_a_cache(model):
    new = model.generate(IDS, images=IMAGE, **GREEDY)
    assert new.shape == (1, 6) and greedy_by_hand(model, 6) == new[0].tolist()


def test_second_turn_on_a_cache(model):
    """Text and another image after a cached first turn give the logits of the whole conversation."""
    more = torch.tensor([[7, -200, 9]])
    visual = model.encode_images(torch.cat([IMAGE, IMAGE.flip(-1)]))
    with torch.no_grad():
        whole = model(input_ids=torch.cat([IDS, more], 1), visual=visual).logits[:, -14:]
        past = model(input_ids=IDS, visual=visual[:1], use_cache=True).past_key_values
        seen = past.get_seq_length()
        mask = torch.ones(1, seen + 3, dtype=torch.long)
        part = model(input_ids=more, visual=visual[1:], past_key_values=past, attention_mask=mask).logits
    assert seen == 16
    torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="attention_mask: 5 positions"):
        model(input_ids=more, visual=visual[1:], past_key_values=past, attention_mask=torch.ones(1, 5))


def test_the_callers_spellings(model):
    """`inputs`, temperature 0, options given as None: as LLaVA's scripts write them."""
    want = model.generate(IDS, images=IMAGE, **GREEDY)
    scripts = model.generate(
        IDS, images=IMAGE, image_sizes=[(336, 336)], do_sample=False, temperature=0, top_p=None, num_beams=1,
        max_new_tokens=6, use_cache=True,
    )  # fmt: skip
    assert torch.equal(scripts, want)
    assert torch.equal(model.generate(inputs=IDS, images=IMAGE, temperature=0, max_new_tokens=6), want)
    assert torch.equal(model.generate(IDS, IMAGE, None, position_ids=torch.arange(5)[None], **GREEDY), want)
    assert torch.equal(model.generate(IDS, visual=model.encode_images(IMAGE), **GREEDY), want)


def test_no_warning_for_greedy(model, caplog):
    model.generate(IDS, images=IMAGE, do_sample=False, temperature=0, top_p=0.9, top_k=5, max_new_tokens=2)
    assert not [r for r in caplog.records if "temperature" in r.getMessage() or "top_" in r.getMessage()]


def test_sampling_follows_the_seed(model):
    kwargs = {"images": IMAGE, "do_sample": True, "temperature": 1.5, "top_p": 0.9, "max_new_tokens": 12}
    answers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        answers.append(model.generate(IDS, **kwargs)[0].tolist())
    assert answers[0] == answers[1] != answers[2]


def test_beams(model):
    """Beam search finds a sequence at least as likely as greedy, and several rows may search at once."""
    greedy = model.generate(IDS, images=IMAGE, **GREEDY)
    beams = model.generate(IDS, images=IMAGE, num_beams=4, **GREEDY)
    both = model.generate(IDS.repeat(2, 1), images=IMAGE.repeat(2, 1, 1, 1), num_beams=4, **GREEDY)
    assert torch.equal(both[0], beams[0]) and torch.equal(both[1], beams[0])

    def likelihood(new):
        with torch.no_grad():
            ids = torch.cat([IDS, new], 1)
            scores = model(input_ids=ids, images=IMAGE).logits.log_softmax(-1)[0, -len(new[0]) - 1 : -1]
        return float(scores.gather(1, new[0][:, None]).sum())

    assert likelihood(beams) >= likelihood(greedy) - 1e-5


def test_stopping_on_a_keyword(golden, model):
    tokenizer = golden("15s").tokenizer
    model.set_pruner("vispruner", 12)
    free = model.generate(IDS, images=IMAGE, **GREEDY)[0].tolist()
    word = next(tokenizer.decode([i]) for i in free[1:] if tokenizer.decode([i]).isascii())
    stop = KeywordsStoppingCriteria([word], tokenizer, IDS)
    short = model.generate(IDS, images=IMAGE, stopping_criteria=[stop], **GREEDY)[0].tolist()
    assert short == free[: len(short)] and len(short) < len(free) and word in tokenizer.decode(short)


@pytest.mark.parametrize("skip", [True, False])
def test_streaming(golden, model, capsys, skip):
    tokenizer = golden("15s").tokenizer
    model.set_pruner("vispruner", 12)
    streamer = TextStreamer(tokenizer, skip_prompt=skip, skip_special_tokens=True)
    new = model.generate(IDS, images=IMAGE, streamer=streamer, **GREEDY)
    assert capsys.readouterr().out.strip() == tokenizer.decode(new[0], skip_special_tokens=True).strip()


def test_generate_from_embeddings(model):
    """Ready embeddings go straight to the language model."""
    batch = model._splice(IDS, None, None, model.encode_images(IMAGE), "left")
    new = model.generate(inputs_embeds=batch.embeds, attention_mask=batch.mask.long(), **GREEDY)
    assert torch.equal(new, model.generate(IDS, images=IMAGE, **GREEDY))


def test_loss_and_gradient(model):
    """Labels are aligned with input_ids; projector and language model learn, the tower does not."""
    labels = torch.tensor([[-100, -100, -100, 554, 13]])
    model.zero_grad()
    out = model(input_ids=IDS, images=IMAGE, labels=labels)
    with torch.no_grad():
        scores = out.logits[0].log_softmax(-1)  # 2 + 12 + 2 positions
        want = -(scores[13, 554] + scores[14, 13]) / 2
    assert out.logits.shape[1] == 16
    torch.testing.assert_close(out.loss.detach(), want, atol=1e-5, rtol=1e-5)
    out.loss.backward()
    for name in ("model.mm_projector.0.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"):
        assert model.get_parameter(name).grad.abs().sum() > 0
    assert all(p.grad is None for p in model.get_vision_tower().parameters())
    model.zero_grad()


def test_loss_of_a_batch(model):
    """Right-padded training batch: the loss of each row is its own."""
    ids = torch.tensor([[1, -200, 554, 13, 7], [1, 9, 20, 0, 0]])
    mask = ids.ne(0)
    labels = ids.masked_fill(~mask | (ids == -200), -100)
    with torch.no_grad():
        both = model(input_ids=ids, attention_mask=mask, images=IMAGE, labels=labels)
        first = model(input_ids=ids[:1], images=IMAGE, labels=labels[:1])
        second = model(input_ids=ids[1:, :3], labels=labels[1:, :3])
    # 2 + 0: position after the image predicts a label too: 3 in the first row, 2 in the second
    torch.testing.assert_close(both.loss, (first.loss * 3 + second.loss * 2) / 5, atol=1e-5, rtol=1e-5)


def test_left_padding_in_forward(model):
    ids = torch.tensor([[1, -200, 554, 13, 7], [0, 0, 1, 9, 20]])
    with torch.no_grad():
        both = model(input_ids=ids, attention_mask=ids.ne(0), images=IMAGE).logits[:, -1]
        first = model(input_ids=ids[:1], images=IMAGE).logits[:, -1]
        second = model(input_ids=ids[1:, 2:]).logits[:, -1]
    torch.testing.assert_close(both, torch.cat([first, second]), atol=1e-5, rtol=1e-5)


def prepare(model, **kwargs):
    given = {
        "position_ids": None,
        "attention_mask": None,
        "past_key_values": None,
        "labels": None,
        "images": IMAGE,
    }
    return model.prepare_inputs_labels_for_multimodal(IDS, **{**given, **kwargs})


def test_six_values(model):
    """LLaVA's six values; what came in as None goes out as None."""
    ids, position_ids, mask, past, embeds, labels = prepare(model)
    assert ids is position_ids is mask is past is labels is None and embeds.shape == (1, 16, 64)
    cache = object()
    ids, position_ids, mask, past, embeds, labels = prepare(
        model,
        position_ids=torch.arange(5)[None],
        attention_mask=torch.ones(1, 5, dtype=torch.long),
        past_key_values=cache,
        labels=IDS,
        image_sizes=[(336, 336)],
    )
    assert ids is None and past is cache and position_ids.tolist() == [list(range(16))]
    assert mask.dtype == torch.long and mask.tolist() == [[1] * 16]
    assert labels.tolist() == [[1, 292] + [-100] * 12 + [554, 13]]


def test_six_values_padding_side(model):
    ids = torch.tensor([[1, -200, 5], [1, 9, 0]])
    mask = ids.ne(0)
    args = (ids, None, mask, None, None, IMAGE)
    assert model.prepare_inputs_labels_for_multimodal(*args)[2][1].tolist() == [True] * 2 + [False] * 12
    model.config.tokenizer_padding_side = "left"
    try:
        assert model.prepare_inputs_labels_for_multimodal(*args)[2][1].tolist() == [False] * 12 + [True] * 2
    finally:
        del model.config.tokenizer_padding_side


def test_six_values_without_images(model):
    text = torch.tensor([[1, 5, 6]])
    mask = torch.ones(1, 3)
    got = model.prepare_inputs_labels_for_multimodal(text, None, mask, None, text, None)
    assert got[0] is text and got[2] is mask and got[4] is None and got[5] is text
    step = model.prepare_inputs_labels_for_multimodal(text[:, :1], None, None, "cache", None, IMAGE)
    assert step[0].tolist() == [[1]] and step[3] == "cache" and step[4] is None
    with pytest.raises(ValueError, match="0 image"):
        prepare(model, images=None)


def test_truncation(model):
    model.config.tokenizer_model_max_length = 10
    try:
        with pytest.warns(UserWarning, match="16 tokens is longer than tokenizer_model_max_length=10"):
            assert prepare(model)[4].shape[1] == 10
    finally:
        del model.config.tokenizer_model_max_length
