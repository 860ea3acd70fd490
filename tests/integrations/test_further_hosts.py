"""SmolVLM, Idefics3, Mistral3, GLM-4.1V, PaliGemma and Gemma3 equal prompts without the dropped places."""

from __future__ import annotations

import copy
import inspect
import re
from types import SimpleNamespace

import pytest
import torch
import transformers

import llava
from helpers import host_oracle as oracle
from helpers.host_oracle import FURTHER, logits, new_tokens
from helpers.hosts import HOSTS
from llava.integrations.cue import received_per_head
from llava.integrations.table import text_free_methods

OLD = "mm_encoder_outputs" not in inspect.signature(transformers.Gemma3Model.forward).parameters
if OLD:  # these are refused: test_selftest.py
    FURTHER = [name for name in FURTHER if name not in ("paligemma", "gemma3")]
PAIRS = [(name, batch) for name in FURTHER for batch in HOSTS[name].batches() if batch != "single"]
every_batch = pytest.mark.parametrize(("name", "batch"), PAIRS)
every_host = pytest.mark.parametrize("name", FURTHER)
TOLERANCE = {"paligemma": 4e-5, "gemma3": 4e-5}  # whose logits are twice as large, and deeper in noise


def fewer_placeholders(model, inputs, plan):
    """Return the shortened prompt, and the model with features of kept placeholders only, not by `prune`."""
    ids, mask = (oracle.take_rows(inputs[name], plan) for name in ("input_ids", "attention_mask"))
    short = {"input_ids": ids, "attention_mask": mask, "pixel_values": inputs["pixel_values"]}
    short["token_type_ids"] = oracle.take_rows(inputs["token_type_ids"], plan)
    features = model.model.get_image_features(inputs["pixel_values"]).pooler_output.flatten(0, 1)
    where = oracle.visual(inputs["input_ids"])
    stays = oracle.masked(inputs, plan).bool()[where]
    other = copy.deepcopy(model)
    kept = SimpleNamespace(pooler_output=features[stays][None])
    other.model.get_image_features = lambda *args, **kwargs: kept
    return short, other


@every_batch
def test_pruned_is_the_prompt_without_the_dropped_places(name, batch, model):
    inputs = HOSTS[name].batches()[batch]
    expected, answer = logits(model, inputs), new_tokens(model, inputs, max_new_tokens=3)
    with llava.pruned(model, tokens=10_000):
        assert torch.equal(logits(model, inputs), expected)
        assert torch.equal(new_tokens(model, inputs, max_new_tokens=3), answer)
    with llava.pruned(model, keep=0.3) as pruning:
        found, answer = logits(model, inputs), new_tokens(model, inputs, max_new_tokens=4)
        plan = pruning.last
    assert plan.sel.shape[1] < inputs["input_ids"].shape[1]
    other = model
    if name == "gemma3":  # its sliding windows count places, so masking does not remove them
        by_hand, other = fewer_placeholders(model, inputs, plan)
        expected = logits(other, by_hand)[plan.valid]
    else:
        by_hand = oracle.by_hand(model, inputs, plan)
        expected = oracle.at(logits(model, by_hand), plan)
    assert (oracle.kept(found, plan) - expected).abs().max() < TOLERANCE.get(name, oracle.TOLERANCE)
    if name != "gemma3":  # whose `generate` encodes images beside `forward`
        assert torch.equal(answer, new_tokens(model, by_hand, max_new_tokens=4))
        return
    for step in range(4):
        best = logits(other, by_hand)[:, -1].argmax(-1, keepdim=True)
        assert torch.equal(best[:, 0], answer[:, step])
        by_hand = oracle.grown(by_hand, best)


@pytest.mark.parametrize("name", [name for name in FURTHER if name != "gemma3"])
@pytest.mark.skipif(OLD, reason="beams of the unpruned model repeat images instead of rows")
def test_beams_are_those_of_the_prompt_masked_by_hand(name, model):
    # One image per row: for several, transformers repeats images of beams in the wrong order
    inputs = HOSTS[name].inputs(["i"] if name == "paligemma" else ["i", "i"])
    with llava.pruned(model, keep=0.3) as pruning:
        beams = new_tokens(model, inputs, max_new_tokens=3, num_beams=3)
    by_hand = oracle.by_hand(model, inputs, pruning.last)
    assert torch.equal(beams, new_tokens(model, by_hand, max_new_tokens=3, num_beams=3))


@pytest.mark.skipif(OLD, reason="this release of transformers does not take features")
@pytest.mark.parametrize("name", ["paligemma", "gemma3"])
def test_beams_of_a_batch_are_refused_where_features_are_repeated_by_image(name, model):
    inputs = HOSTS[name].batches()["padded"]
    with llava.pruned(model, keep=0.3):
        for options in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
            with pytest.raises(
                ValueError, match="2 answers per row of a batch are not possible after pruning"
            ):
                model.generate(**inputs, max_new_tokens=2, **options)


@every_host
def test_a_batch_answers_like_its_rows(name, model):
    case = HOSTS[name]
    inputs = case.batches()["padded"]
    with llava.pruned(model, keep=0.3) as pruning:
        answer, together = new_tokens(model, inputs, max_new_tokens=3), pruning.last
        one = {key: value[:1] for key, value in inputs.items()}
        real = inputs["attention_mask"][0].bool()
        for key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            if key in one:
                one[key] = one[key][:, real]
        if "image_grid_thw" in one:
            one["pixel_values"] = inputs["pixel_values"][: int(one["image_grid_thw"].prod())]
        assert torch.equal(new_tokens(model, one, max_new_tokens=3)[0], answer[0])
        assert torch.equal(pruning.last.rows[0].kept, together.rows[0].kept)


@every_host
def test_all_text_stays_and_placeholders_are_the_kept_tokens(name, model):
    inputs = HOSTS[name].batches()["padded"]
    with llava.pruned(model, tokens=3) as pruning:
        logits(model, inputs)
    places = oracle.visual(inputs["input_ids"])
    stays = oracle.masked(inputs, pruning.last).bool()
    assert stays[~places & inputs["attention_mask"].bool()].all()
    assert stays[places].sum() == 3 * len(pruning.last.rows) == sum(len(r.kept) for r in pruning.last.rows)


def test_masked_places_receive_and_give_no_attention():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 7, 4, generator=generator) for _ in range(2))
    mask = torch.zeros(7, 7, dtype=torch.bool)
    mask[:3, :3] = mask[3:, 3:] = True
    whole = received_per_head(query, key, 0.5, mask[None, None])
    added = torch.zeros(7, 7).masked_fill(~mask, torch.finfo(torch.float32).min)
    parts = [
        received_per_head(query[:, :, s], key[:, :, s], 0.5) * n / 7
        for s, n in ((slice(3), 3), (slice(3, 7), 4))
    ]
    torch.testing.assert_close(whole, torch.cat(parts, -1))
    torch.testing.assert_close(received_per_head(query, key, 0.5, added[None, None]), whole)


@every_host
def test_every_method_of_the_table_keeps_its_budget(name, model):
    inputs = HOSTS[name].batches()["padded"]
    lacking = {"visionzip", "prumerge", "prumerge+", "tome"}  # which read [CLS]
    for method in text_free_methods():
        if method in lacking:
            with pytest.raises(ValueError, match=f"{re.escape(repr(method))} reads"):
                llava.prune(model, method, tokens=3)
            continue
        with llava.pruned(model, method, tokens=4) as pruning:
            logits(model, inputs)
        places = oracle.visual(inputs["input_ids"])
        assert oracle.masked(inputs, pruning.last).bool()[places].sum() == 4 * len(pruning.last.rows)
