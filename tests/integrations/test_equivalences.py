"""A pruned host equals the same host with the dropped places masked by hand, for every class and batch."""

from __future__ import annotations

import pytest
import torch

import llava
from helpers import host_oracle as oracle
from helpers.host_oracle import NAMES, every_host, logits, new_tokens
from helpers.hosts import HOSTS

PAIRS = [(name, batch) for name in NAMES for batch in HOSTS[name].batches()]
every_batch = pytest.mark.parametrize(("name", "batch"), PAIRS)
# Batches of one row are in the others, and kinds of positions do not depend on the batch
SEVERAL = [(name, batch) for name, batch in PAIRS if batch != "single"]
BY_HAND = [(name, batch, "contiguous") for name, batch in SEVERAL] + [
    (name, "padded", "original") for name in NAMES if "qwen" not in name
]
KINDS = {"contiguous": {"keep": 0.3}, "original": {"tokens": 3}}


def inputs_of(name, batch):
    return HOSTS[name].batches()[batch]


@every_batch
def test_nothing_dropped_is_the_unpruned_model(name, batch, model):
    inputs = inputs_of(name, batch)
    expected, answer = logits(model, inputs), model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with llava.pruned(model, tokens=10_000) as pruning:
        found = logits(model, inputs)
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), answer)
    assert torch.equal(found, expected)
    assert torch.equal(pruning.last.sel[0], torch.arange(inputs["input_ids"].shape[1]))
    assert torch.equal(pruning.last.valid, inputs["attention_mask"].bool())


@pytest.mark.parametrize(("name", "batch", "kind"), BY_HAND)
def test_pruned_is_masked_by_hand(name, batch, kind, model):
    inputs = inputs_of(name, batch)
    with llava.pruned(model, **KINDS[kind], positions=kind) as pruning:
        found, answer = logits(model, inputs), new_tokens(model, inputs, max_new_tokens=4)
        plan = pruning.last
    by_hand = oracle.by_hand(model, inputs, plan, kind)
    assert plan.sel.shape[1] < inputs["input_ids"].shape[1]
    expected = oracle.at(logits(model, by_hand), plan)
    assert (oracle.kept(found, plan) - expected).abs().max() < oracle.TOLERANCE
    assert torch.equal(answer, new_tokens(model, by_hand, max_new_tokens=4))


@every_host
def test_beams_are_those_of_a_prompt_masked_by_hand(name, model):
    inputs = inputs_of(name, "mixed" if HOSTS[name].mixed else "padded")
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2}
    with llava.pruned(model, keep=0.3) as pruning:
        answer = model.generate(**inputs, do_sample=False, **options)
    expected = new_tokens(model, oracle.by_hand(model, inputs, pruning.last), **options)
    prompt = inputs["input_ids"].repeat_interleave(2, 0)
    assert torch.equal(answer, torch.cat([prompt, expected], 1))


@pytest.mark.parametrize(("name", "batch"), SEVERAL)
def test_a_batch_answers_like_its_rows(name, batch, model):
    inputs = inputs_of(name, batch)
    with llava.pruned(model, keep=0.3) as pruning:
        found, answer, together = logits(model, inputs), new_tokens(model, inputs, max_new_tokens=3), []
        plan = pruning.last
        for row, one in enumerate(oracle.rows_of(inputs, oracle.MEDIA[batch])):
            expected = logits(model, one)[0]
            assert (found[row, plan.valid[row]] - expected).abs().max() < oracle.TOLERANCE
            assert torch.equal(new_tokens(model, one, max_new_tokens=3)[0], answer[row])
            together += [kept.kept.tolist() for kept in pruning.last.rows]
    assert sorted(together) == sorted(row.kept.tolist() for row in plan.rows)


@every_host
def test_cached_generation_is_a_forward_of_the_grown_prompt(name, model):
    inputs = inputs_of(name, "padded")
    with llava.pruned(model, keep=0.3):
        run = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        new = run.sequences[:, inputs["input_ids"].shape[1] :]
        whole = logits(model, oracle.grown(inputs, new))
    assert torch.equal(run.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    for step, expected in enumerate(run.logits):
        assert (whole[:, step - 4] - expected).abs().max() < oracle.TOLERANCE


@every_host
def test_right_padding_stays_on_the_right(name, model):
    left, right = HOSTS[name].batches()["padded"], HOSTS[name].batches("right")["padded"]
    with llava.pruned(model, keep=0.3) as pruning:
        expected = oracle.kept(logits(model, left), pruning.last)
        found = oracle.kept(logits(model, right), pruning.last)
        assert pruning.last.valid[:, 0].all()
    assert (found - expected).abs().max() < oracle.TOLERANCE


@every_host
def test_one_pass_of_tower_and_language_model(name, model):
    inputs, passes = inputs_of(name, "single"), []
    base = model.model
    tower = getattr(base, "vision_tower", None) or getattr(base, "visual", None) or base.image_tower
    handles = [
        tower.register_forward_hook(lambda *_: passes.append("tower")),
        base.language_model.layers[0].register_forward_hook(lambda *_: passes.append("layer")),
    ]
    with llava.pruned(model, tokens=4):
        logits(model, inputs)
        assert passes == ["tower", "layer"]
        passes.clear()
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert passes == ["tower", *["layer"] * 3]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_no_tokens_at_all_is_the_prompt_without_them(name, model):
    inputs = inputs_of(name, "single")
    text = {
        name: inputs[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids") if name in inputs
    }
    stay = ~oracle.visual(inputs["input_ids"][0])
    text = {name: value[:, stay] for name, value in text.items()}
    with llava.pruned(model, tokens=0):
        found = logits(model, inputs)
    if name == "llava":
        assert torch.equal(found, logits(model, text))
    assert found.shape[1] == int(stay.sum())


@every_host
def test_training_gradients_are_those_of_the_masked_run(name, model):
    inputs = HOSTS[name].batches("right")["padded"]
    labels = inputs["input_ids"].clone()
    labels[oracle.visual(labels) | (inputs["attention_mask"] == 0)] = -100
    # The token after an image follows another token than in the full prompt, so its loss differs
    labels[oracle.visual(inputs["input_ids"]).roll(1, 1)] = -100
    with llava.pruned(model, keep=0.3) as pruning:
        loss = model(**inputs, labels=labels).loss
    by_hand = oracle.by_hand(model, inputs, pruning.last)
    gradients = _gradients(model, loss)
    expected_loss = model(**by_hand, labels=labels).loss
    expected = _gradients(model, expected_loss)
    assert abs(loss.item() - expected_loss.item()) < 1e-5
    assert any("vision" in key or "visual" in key or "tower" in key for key in expected)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for key, gradient in expected.items():  # those of key biases are zero but for rounding
        scale = gradient.abs().max().clamp(min=1e-3 * largest)
        assert (gradients[key] - gradient).abs().max() / scale < 1e-4, key


def _gradients(model, loss):
    model.zero_grad()
    loss.backward()
    found = {key: one.grad.clone() for key, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return found
