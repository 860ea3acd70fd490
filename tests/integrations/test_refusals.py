"""Arguments that would be pruned wrongly are refused in one sentence, before anything runs."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import llava
from helpers.host_oracle import grown, logits, new_tokens
from helpers.hosts import HOSTS
from llava.integrations import supported_classes
from llava.integrations.budget import HostBudget
from llava.model import LlavaLlamaForCausalLM

on_llava = pytest.mark.parametrize("name", ["llava"])
on_both = pytest.mark.parametrize("name", ["llava", "qwen3_vl"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "tokens, keep, clip_tokens: none is given"),
        ({"tokens": 4, "keep": 0.5}, "tokens, keep: both are given"),
        ({"tokens": -1}, "tokens: expected an integer >= 0, got -1"),
        ({"tokens": 4.0}, "tokens: expected an integer >= 0, got 4.0"),
        ({"tokens": True}, "tokens: expected an integer >= 0, got True"),
        ({"tokens": "4"}, "tokens: expected an integer >= 0, got '4'"),
        ({"keep": 0}, r"keep: expected a number in \(0, 1\], got 0"),
        ({"keep": 64}, r"keep: expected a number in \(0, 1\], got 64. It is a share"),
        ({"keep": float("nan")}, "keep: expected a number"),
        ({"keep": "0.5"}, "keep: expected a number"),
        ({"clip_tokens": 9}, "clip_tokens: LlavaForConditionalGeneration has no videos of their own"),
        ({"tokens": 4, "positions": "absolute"}, "positions: 'absolute' is unknown. Choose from contiguous"),
        ({"tokens": 4, "important_ratio": 2}, "important_ratio must be in"),
        ({"tokens": 4, "method": "best"}, "best"),
        ({"tokens": 4, "method": 3}, "method: expected a name"),
        ({"tokens": 4, "method": "cdpruner"}, "method: 'cdpruner' chooses by the question"),
        ({"tokens": 4, "method": "tome"}, "'tome' reads 'merged@4', which the tower does not have"),
    ],
)
@on_llava
def test_settings(name, model, settings, message):
    with pytest.raises(ValueError, match=message):
        llava.prune(model, **settings)
    assert llava.pruning_of(model) is None


def test_unsupported_classes_name_the_supported_ones():
    small = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    text = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=8, **small))
    calls = [lambda: llava.prune(text, tokens=4), lambda: llava.unprune(text), lambda: llava.pruning_of(text)]
    for call in [*calls, llava.pruned(text, tokens=4).__enter__]:
        with pytest.raises(TypeError, match="LlamaForCausalLM cannot be pruned.*Qwen2_5_VLForConditional"):
            call()
    with pytest.raises(TypeError, match="str cannot be pruned"):
        llava.prune("llava-hf/llava-1.5-7b-hf", tokens=4)
    for wrapper, name in ((torch.nn.DataParallel(text), "module"), (torch.compile(text), "_orig_mod")):
        with pytest.raises(TypeError, match=f"is around the model. Pass the one inside, model.{name}"):
            llava.prune(wrapper, tokens=4)
    own = LlavaLlamaForCausalLM.__new__(LlavaLlamaForCausalLM)
    with pytest.raises(TypeError, match="LlavaLlamaForCausalLM is of this package.*model.set_pruner"):
        llava.prune(own, tokens=4)
    assert len(supported_classes()) == len(set(supported_classes())) >= 11


def test_towers_whose_attention_cannot_be_read():
    import transformers

    vision = {"model_type": "pixtral", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config={**vision, "intermediate_size": 16, "image_size": 32, "patch_size": 16},
        text_config={**text, "intermediate_size": 16, "vocab_size": 32},
        vision_feature_layer=-1,
    )
    with pytest.raises(ValueError, match="LlavaConfig.vision_config: the tower is 'pixtral'"):
        llava.prune(transformers.LlavaForConditionalGeneration(config), tokens=4)


@on_llava
def test_pruning_twice_and_unpruning_twice(name, model):
    llava.prune(model, tokens=4)
    first = llava.pruning_of(model)
    with pytest.raises(ValueError, match="is pruned already. Call llava.unprune"):
        llava.prune(model, tokens=8)
    assert llava.pruning_of(model) is first
    llava.unprune(model)
    with pytest.raises(ValueError, match="is not pruned"):
        llava.unprune(model)


@on_both
def test_blocks_are_undone_whatever_happens_inside(name, model):
    inputs = HOSTS[name].batches()["single"]
    block = llava.pruned(model, tokens=4)
    for _ in range(2):  # a block can be used again
        with block as pruning:
            assert logits(model, inputs).shape[1] == pruning.last.sel.shape[1]
            with pytest.raises(ValueError, match="pruned already"), llava.pruned(model, tokens=2):
                pytest.fail("a block inside a block")
            with pytest.raises(ValueError, match="pruned already"), block:
                pytest.fail("the same block inside itself")
            assert llava.pruning_of(model) is pruning
        assert llava.pruning_of(model) is None
    with pytest.raises(KeyboardInterrupt), llava.pruned(model, tokens=4):
        raise KeyboardInterrupt
    assert llava.pruning_of(model) is None
    with llava.pruned(model, tokens=4):
        llava.unprune(model)
        llava.prune(model, tokens=2)  # somebody else's, which stays
    assert llava.pruning_of(model).budget.tokens == 2


@on_both
def test_arguments_of_forward(name, model):
    inputs = HOSTS[name].batches()["single"]
    llava.prune(model, tokens=4)

    def refused(message, **changes):
        given = {key: one for key, one in {**inputs, **changes}.items() if one is not None}
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=message):
                call(**given)

    cache = DynamicCache(config=model.config.get_text_config())
    cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    refused("past_key_values: 3 tokens are cached, and the call has pixels", past_key_values=cache)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    refused("input_ids, inputs_embeds: both are given", inputs_embeds=embeds)
    refused("input_ids: missing|inputs_embeds: rows and columns", input_ids=None)
    refused("attention_mask: expected .batch, length.", attention_mask=torch.ones(1, 1, 4, 4))
    refused("mm_encoder_outputs: features of all tokens", mm_encoder_outputs={"image": object()})
    short = {**inputs, "input_ids": inputs["input_ids"][:, :-1]}
    with pytest.raises(ValueError, match="logits_to_keep: places of the full prompt"):
        model(**inputs, logits_to_keep=torch.tensor([0, 1]))
    if name == "llava":
        refused("vision_feature_layer: got -1, but the model was pruned for -2", vision_feature_layer=-1)
    else:
        refused("inputs_embeds: rows and columns", input_ids=None, inputs_embeds=embeds)
        refused("mm_token_type_ids", mm_token_type_ids=None)
    assert short and llava.pruning_of(model).last is None


@on_llava
def test_arguments_of_generate(name, model):
    inputs = HOSTS[name].batches()["single"]
    llava.prune(model, tokens=4)
    for message, changes in (
        ("prefill_chunk_size: chunks are cut from ids", {"prefill_chunk_size": 8}),
        ("assistant_model: it would get the shortened ids", {"assistant_model": copy.copy(model)}),
        ("cache_implementation: 'paged' takes ids only", {"cache_implementation": "paged"}),
        ("inputs, input_ids: both are given", {"inputs": inputs["input_ids"]}),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, **changes)


@on_llava
def test_flash_attention_with_gaps(name, model, monkeypatch):
    monkeypatch.setattr(model.config.text_config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="positions: 'original' leaves gaps"):
        llava.prune(model, tokens=4, positions="original")
    llava.prune(model, tokens=4)


@pytest.mark.parametrize("total", [7, 36])
@pytest.mark.parametrize("clip", [0, 3, 114, 2048])
@pytest.mark.parametrize("frames", [1, 3, 8])
def test_budgets_of_clips_add_up(total, clip, frames):
    shares = [HostBudget(tokens=5, clip_tokens=clip).of_row(total, (i, frames)) for i in range(frames)]
    assert sum(shares) == clip and max(shares) - min(shares) <= 1
    assert HostBudget(clip_tokens=clip).of_row(total) is None


def test_budgets_of_rows():
    assert HostBudget(tokens=5).of_row(36, (0, 4)) == 5 and HostBudget(tokens=5).of_row(36, crops=4) == 20
    assert HostBudget(keep=0.25).of_row(36) == 9 and HostBudget(keep=0.01).of_row(36) == 1
    assert HostBudget(keep=1).of_row(36) is None and HostBudget().is_empty


@on_both
def test_a_full_prompt_with_the_cache_of_a_pruned_one(name, model):
    inputs = HOSTS[name].batches()["single"]
    more = torch.arange(20, 26)[None]
    with llava.pruned(model, tokens=4):
        first = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        ids, cache = torch.cat([first.sequences, more], 1), first.past_key_values
        mask, options = torch.ones_like(ids), {"max_new_tokens": 3, "do_sample": False}
        for names in ({"input_ids": ids}, {"inputs": ids}):
            for copied in (cache, copy.deepcopy(cache)):
                with pytest.raises(
                    ValueError, match="past_key_values: .* visual tokens of the prompt were pr"
                ):
                    model.generate(**names, attention_mask=mask, past_key_values=copied, **options)
        count = ids.shape[1] - inputs["input_ids"].shape[1]
        expected = new_tokens(model, grown(inputs, ids[:, -count:]), max_new_tokens=3)
        new = ids[:, -1 - more.shape[1] :]  # the last token of an answer is not cached
        mask = torch.ones(1, cache.get_seq_length() + new.shape[1], dtype=torch.int64)
        found = model.generate(input_ids=new, attention_mask=mask, past_key_values=cache, **options)
        assert torch.equal(found[:, new.shape[1] :], expected)
    with llava.pruned(model, keep=1.0):  # all ids are cached
        first = model.generate(**inputs, **options, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, more], 1)
        given = {"attention_mask": torch.ones_like(ids), "past_key_values": first.past_key_values}
        found = model.generate(input_ids=ids, **given, **options)
        assert torch.equal(
            found[:, ids.shape[1] :], new_tokens(model, grown(inputs, ids[:, -count:]), max_new_tokens=3)
        )


@on_both
def test_shapes_that_are_not_those_of_the_prompt(name, model):
    inputs = HOSTS[name].batches()["single"]
    ids = inputs["input_ids"]
    with llava.pruned(model, tokens=4):
        for message, changes in (
            ("attention_mask: its shape is", {"attention_mask": inputs["attention_mask"][:, 1:]}),
            ("labels: its shape is", {"labels": ids[:, 1:]}),
            ("prompt: its shape is", {"input_ids": ids[0], "attention_mask": inputs["attention_mask"]}),
        ):
            with pytest.raises(ValueError, match=message):
                model(**{**inputs, **changes})


@on_llava
def test_a_limit_within_the_prompt(name, model):
    inputs = HOSTS[name].batches()["single"]
    length = inputs["input_ids"].shape[1]
    with llava.pruned(model, tokens=4):
        for limit in (3, length):
            with pytest.raises(ValueError, match=f"max_length: {limit}, but the prompt has {length} tokens"):
                model.generate(**inputs, max_length=limit)
