"""`prune` stays out of the way: callers of `forward` and `generate`, copies, files, adapters and wrappers."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import llava
from helpers import host_oracle as oracle
from helpers.host_oracle import NAMES, every_host, logits, new_tokens
from helpers.hosts import HOSTS

SHAPES = ["llava", "qwen3_vl"]  # positions of one number, and of rows and columns with deepstack
some_hosts = pytest.mark.parametrize("name", SHAPES)
SHORT = {"max_new_tokens": 3, "do_sample": False}


def padded(name):
    return HOSTS[name].batches()["padded"]


@every_host
def test_unprune_leaves_nothing(name, model):
    inputs = padded(name)
    expected = logits(model, inputs)
    modules = [set(vars(module)) for module in model.modules()]
    configs = [id(module.config) for module in model.modules() if hasattr(module, "config")]
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    assert llava.prune(model, tokens=4) is model
    logits(model, inputs)
    assert llava.unprune(model) is model
    assert torch.equal(logits(model, inputs), expected)
    assert [set(vars(module)) for module in model.modules()] == modules
    assert [id(module.config) for module in model.modules() if hasattr(module, "config")] == configs
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert llava.pruning_of(model) is None and "forward" not in vars(model)


@some_hosts
def test_an_error_in_the_tower_leaves_nothing(name, model):
    inputs = padded(name)
    llava.prune(model, tokens=4)
    base = model.model
    before = [set(vars(module)) for module in model.modules()], len(base.language_model._forward_pre_hooks)
    wrong = {key: value[..., :-1] if key == "pixel_values" else value for key, value in inputs.items()}
    with pytest.raises((RuntimeError, ValueError)):
        model(**wrong)
    assert before == (
        [set(vars(module)) for module in model.modules()],
        len(base.language_model._forward_pre_hooks),
    )


@some_hosts
def test_a_pruned_model_is_saved_as_if_it_were_not(name, model, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    with llava.pruned(model, tokens=4):
        logits(model, padded(name))
        model.save_pretrained(tmp_path / "pruned")
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "pruned").iterdir())
    for file in files:
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "pruned" / file).read_bytes(), file
    again = type(model).from_pretrained(tmp_path / "pruned")
    assert torch.equal(logits(again, padded(name)), logits(model, padded(name)))


@some_hosts
def test_a_copy_is_pruned_alone(name, model):
    with llava.pruned(model, tokens=4) as pruning:
        expected = logits(model, padded(name))
        other = copy.deepcopy(model)
        mine = llava.pruning_of(other)
        assert mine is not pruning and mine.config() == pruning.config()
        with torch.no_grad():
            other.lm_head.weight.zero_()
        assert logits(other, padded(name)).abs().max() == 0
        llava.unprune(other)
        assert torch.equal(logits(model, padded(name)), expected)
        assert logits(other, padded(name)).shape[1] == padded(name)["input_ids"].shape[1]


def test_a_model_that_has_not_run_can_be_pickled():
    model = llava.prune(HOSTS["llava"].build(), tokens=4)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again, padded("llava")), logits(model, padded("llava")))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in NAMES), *((name, torch.float16) for name in SHAPES)],
)
def test_half_precision(name, model, dtype):
    half = copy.deepcopy(model).to(dtype)
    inputs = {
        key: value.to(dtype) if value.is_floating_point() and "pixel" in key else value
        for key, value in padded(name).items()
    }
    with llava.pruned(half, keep=0.3) as pruning:
        found = logits(half, inputs)
        plan = pruning.last
        assert new_tokens(half, inputs, max_new_tokens=2).shape == (2, 2)
    expected = oracle.at(logits(half, oracle.by_hand(half, inputs, plan)), plan)
    assert (oracle.kept(found, plan) - expected).abs().max() < (0.05 if dtype == torch.float16 else 0.5)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@some_hosts
def test_any_attention_kernel_selects_the_same(name, model, kernel):
    inputs = padded(name)
    with llava.pruned(model, tokens=4) as pruning:
        logits(model, inputs)
        expected = pruning.last.sel
        other = copy.deepcopy(model)
    other.set_attn_implementation(kernel)
    logits(other, inputs)
    assert torch.equal(llava.pruning_of(other).last.sel, expected)


@some_hosts
def test_static_cache_and_prompt_lookup_give_the_same_tokens(name, model):
    inputs = padded(name)
    one = HOSTS[name].batches()["single"]
    with llava.pruned(model, keep=0.3):
        expected = model.generate(**inputs, **SHORT)
        assert torch.equal(model.generate(**inputs, **SHORT, cache_implementation="static"), expected)
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
        assert torch.equal(model.generate(**inputs, **SHORT, past_key_values=cache), expected)
        assert torch.equal(model.generate(**inputs, **SHORT, use_cache=False), expected)
        expected = model.generate(**one, max_new_tokens=8, do_sample=False)
        looked_up = model.generate(**one, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
        assert torch.equal(looked_up, expected)


class Recorder(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value)

    def end(self):
        self.ended = True


@some_hosts
def test_a_streamer_gets_the_full_prompt_once(name, model):
    inputs, streamer = HOSTS[name].batches()["single"], Recorder()
    with llava.pruned(model, tokens=4):
        answer = model.generate(**inputs, **SHORT, streamer=streamer)
    assert torch.equal(streamer.parts[0], inputs["input_ids"]) and streamer.ended
    assert torch.cat([part.flatten() for part in streamer.parts]).tolist() == answer[0].tolist()


@some_hosts
def test_criteria_and_processors_see_full_sequences(name, model):
    inputs, seen = padded(name), {"criterion": [], "processor": [], "allowed": []}
    ids = inputs["input_ids"]

    def criterion(input_ids, scores, **kwargs):
        seen["criterion"].append(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def processor(input_ids, scores):
        seen["processor"].append(input_ids)
        return scores

    def allowed(batch_id, input_ids):
        seen["allowed"].append((batch_id, input_ids))
        return list(range(10, 90))

    with llava.pruned(model, keep=0.3):
        answer = model.generate(
            **inputs,
            **SHORT,
            num_beams=2,
            stopping_criteria=StoppingCriteriaList([criterion]),
            logits_processor=LogitsProcessorList([processor]),
            prefix_allowed_tokens_fn=allowed,
        )
        assert answer.shape == (2, ids.shape[1] + 3) and torch.equal(answer[:, : ids.shape[1]], ids)
        for one in seen["criterion"] + seen["processor"]:  # of as many candidates as there are
            assert torch.equal(one[:, : ids.shape[1]], ids.repeat_interleave(len(one) // 2, 0))
        for batch_id, one in seen["allowed"]:
            assert torch.equal(one[: ids.shape[1]], ids[batch_id])
        limit = StoppingCriteriaList([MaxLengthCriteria(ids.shape[1] + 2)])
        assert model.generate(**inputs, **SHORT, stopping_criteria=limit).shape[1] == ids.shape[1] + 2


@some_hosts
def test_lengths_count_the_full_prompt(name, model):
    inputs = padded(name)
    length = inputs["input_ids"].shape[1]
    with llava.pruned(model, tokens=4):
        assert model.generate(**inputs, do_sample=False, max_length=length + 4).shape[1] == length + 4
        config = GenerationConfig(max_length=length + 5, do_sample=False, pad_token_id=0)
        assert model.generate(**inputs, generation_config=config).shape[1] == length + 5
        assert config.max_length == length + 5
        default = copy.copy(model.generation_config)
        try:
            model.generation_config.max_length = length + 2
            assert model.generate(**inputs, do_sample=False).shape[1] == length + 2
            assert model.generate(**inputs, do_sample=False, max_new_tokens=1).shape[1] == length + 1
            options = {"do_sample": False, "max_new_tokens": 4}
            single = HOSTS[name].batches()["single"]
            size = single["input_ids"].shape[1]
            first = int(model.generate(**single, do_sample=False, max_new_tokens=1)[0, size])
            options["eos_token_id"] = first
            assert model.generate(**single, **options).shape[1] == size + 1
            assert model.generate(**single, **options, min_length=size + 2).shape[1] >= size + 2
        finally:
            model.generation_config = default


@some_hosts
def test_a_mask_is_derived_from_padding_as_the_host_does(name, model):
    inputs = padded(name)
    without = {key: value for key, value in inputs.items() if key != "attention_mask"}
    with llava.pruned(model, tokens=4):
        assert torch.equal(model.generate(**without, **SHORT), model.generate(**inputs, **SHORT))


@some_hosts
def test_calls_by_position_and_as_tuples(name, model):
    inputs = HOSTS[name].batches()["single"]
    named = list(inspect.signature(model.forward).parameters)
    with llava.pruned(model, tokens=4):
        assert list(inspect.signature(model.forward).parameters) == named
        expected = logits(model, inputs)
        with torch.no_grad():
            args = [inputs.get(key) for key in named[: named.index("pixel_values") + 1]]
            rest = {key: value for key, value in inputs.items() if key not in named[: len(args)]}
            assert torch.equal(model(*args, **rest).logits, expected)
            assert torch.equal(model(**inputs, return_dict=False)[0], expected)
            last = model(**inputs, logits_to_keep=1).logits
            assert torch.allclose(last, expected[:, -1:], atol=1e-5)
        ids = inputs["input_ids"]
        rest = {key: value for key, value in inputs.items() if key != "input_ids"}
        assert torch.equal(model.generate(ids, **rest, **SHORT), model.generate(**inputs, **SHORT))


@pytest.mark.parametrize("name", ["llava"])
def test_embeddings_in_place_of_ids(name, model):
    inputs = HOSTS[name].batches()["single"]
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    with llava.pruned(model, tokens=4):
        assert torch.equal(logits(model, {**rest, "inputs_embeds": embeds}), logits(model, inputs))
        answer = model.generate(**rest, inputs_embeds=embeds, **SHORT)
        assert torch.equal(answer, new_tokens(model, inputs, max_new_tokens=3))
        limit = inputs["input_ids"].shape[1] + 3  # counts the caller's prompt, as without pruning
        assert torch.equal(
            model.generate(**rest, inputs_embeds=embeds, do_sample=False, max_length=limit), answer
        )


@every_host
def test_a_hand_written_loop_with_the_short_mask(name, model):
    inputs = HOSTS[name].batches()["single"]
    with llava.pruned(model, tokens=4) as pruning, torch.no_grad():
        expected = new_tokens(model, inputs, max_new_tokens=3)
        out, found = model(**inputs, use_cache=True), []
        mask = pruning.last.valid.long()
        for _ in range(3):
            found.append(out.logits[:, -1:].argmax(-1))
            mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
            # Positions of rows and columns are derived from the cache, and only without a mask
            options = {} if name.startswith("qwen") else {"attention_mask": mask}
            cache = out.past_key_values
            out = model(input_ids=found[-1], past_key_values=cache, use_cache=True, **options)
    assert torch.equal(torch.cat(found, 1), expected)


@some_hosts
def test_text_passes_through(name, model):
    ids = torch.arange(10, 20)[None]
    expected = logits(model, {"input_ids": ids}), model.generate(input_ids=ids, **SHORT)
    with llava.pruned(model, tokens=4) as pruning:
        assert torch.equal(logits(model, {"input_ids": ids}), expected[0])
        assert torch.equal(model.generate(input_ids=ids, **SHORT), expected[1])
        assert pruning.last is None


@some_hosts
def test_gradient_checkpointing_gives_the_same_gradients(name, model):
    inputs, found = HOSTS[name].batches("right")["padded"], []
    labels = torch.where(oracle.visual(inputs["input_ids"]), -100, inputs["input_ids"])
    for checkpointing in (False, True):
        other = copy.deepcopy(model).train()
        llava.prune(other, keep=0.3)
        if checkpointing:
            other.gradient_checkpointing_enable()
        other(**inputs, labels=labels).loss.backward()
        found.append({key: one.grad for key, one in other.named_parameters() if one.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][key], atol=1e-6), key


@some_hosts
@pytest.mark.parametrize("first", ["prune", "adapter"])
def test_adapters_of_peft_on_either_side(name, model, first):
    peft = pytest.importorskip("peft")
    other, inputs = copy.deepcopy(model), padded(name)
    with llava.pruned(model, keep=0.3):
        expected = logits(model, inputs), model.generate(**inputs, **SHORT)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "qkv"], task_type="CAUSAL_LM")
    if first == "prune":
        llava.prune(other, keep=0.3)
    wrapped = peft.get_peft_model(other, config)
    if first == "adapter":
        assert llava.prune(wrapped, keep=0.3) is wrapped
    assert llava.pruning_of(wrapped) is llava.pruning_of(other) is not None
    assert torch.allclose(logits(wrapped, inputs), expected[0], atol=1e-6)
    assert torch.equal(wrapped.generate(**inputs, **SHORT), expected[1])
    llava.unprune(wrapped)
    assert logits(wrapped, inputs).shape[1] == inputs["input_ids"].shape[1]


@some_hosts
@pytest.mark.parametrize("first", ["prune", "dispatch"])
def test_models_that_accelerate_dispatched(name, model, first, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    inputs, other = padded(name), copy.deepcopy(model)
    with llava.pruned(model, keep=0.3):
        expected = logits(model, inputs), model.generate(**inputs, **SHORT)
    if first == "prune":
        llava.prune(other, keep=0.3)
    parts = {child: "cpu" for child, _ in other.model.named_children()}
    places = {f"model.{child}": place for child, place in parts.items()} | {"lm_head": "cpu"}
    places |= {f"model.{key}": "cpu" for key, _ in other.model.named_parameters(recurse=False)}
    places["model.language_model"] = "disk"
    accelerate.dispatch_model(other, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    if first == "dispatch":
        llava.prune(other, keep=0.3)
    assert torch.equal(logits(other, inputs), expected[0])
    assert torch.equal(other.generate(**inputs, **SHORT), expected[1])
    assert llava.pruning_of(other) is not None
    if first == "dispatch":
        llava.unprune(other)
        assert logits(other, inputs).shape[1] == inputs["input_ids"].shape[1]
    else:
        with pytest.raises(ValueError, match="replaced after llava.prune"):
            llava.unprune(other)
        accelerate.hooks.remove_hook_from_module(other, recurse=True)
        llava.unprune(other)
        assert llava.pruning_of(other) is None


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("VISPRUNER_SLOW") != "1", reason="compiles: set VISPRUNER_SLOW=1")
@some_hosts
def test_a_compiled_tower_gives_the_same_tokens(name, model):
    other, inputs = copy.deepcopy(model), HOSTS[name].batches()["single"]
    with llava.pruned(model, tokens=4) as pruning:
        expected = logits(model, inputs)
    tower = other.model.visual if hasattr(other.model, "visual") else other.model.vision_tower
    tower.compile(backend="eager")
    with llava.pruned(other, tokens=4) as found:
        assert torch.allclose(logits(other, inputs), expected, atol=1e-5)
        assert torch.equal(found.last.sel, pruning.last.sel)


def test_import_of_llava_stays_light():
    code = "import sys, llava; print('torch' in sys.modules, 'transformers' in sys.modules)"
    before = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert before.stdout.split() == ["False", "False"]
    assert {"prune", "unprune", "pruned", "pruning_of"} <= set(dir(llava))
