"""`llava.prune` with methods that prune inside the language model: greedy `generate` of Llama-like hosts."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

import llava
from helpers import host_oracle as oracle
from helpers.hosts import HOSTS
from llava.integrations.tiny_hosts import spread_weights
from llava.pruning.base import scaled_layer

DEPTH = 6
METHODS = {"fastv": 5, "sparsevlm": 9, "pyramiddrop": 12, "vtw": 12, "dart": 10}
# Hosts with a decoder of every kind, and prompts of one visual block each, of different lengths
ROWS = {
    "llava": ["i", ""],  # Llama
    "llava_mistral": ["", "i"],
    "internvl": ["", "i"],  # Qwen2
    "llava_next": ["i", "i"],
    "video_llava": ["i", "v"],
    "llava_next_video": ["v", "i"],
    "llava_onevision": ["v", "i"],
}
ASKED = {"do_sample": False, "max_new_tokens": 5}
on_hosts = pytest.mark.parametrize("name", ROWS)


@functools.cache
def deep(name, **entries):
    """Return a tiny host with more layers, sharp enough that its answers depend on what it sees."""
    case = HOSTS[name.removesuffix("_mistral")]
    config = case.make_config()
    text = {**config.text_config.to_dict(), "num_hidden_layers": DEPTH, "layer_types": None, **entries}
    if name.endswith("_mistral"):
        names = set(transformers.MistralConfig().to_dict()) - {"model_type", "architectures"}
        text = {"sliding_window": None, **{key: one for key, one in text.items() if key in names}, **entries}
        config.text_config = transformers.MistralConfig(**text)
    else:
        config.text_config = type(config.text_config)(**text)
    model = getattr(transformers, case.class_name)(config)
    spread_weights(model, 0)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model.eval()


def batch_of(name, rows=None, padding="left"):
    return HOSTS[name.removesuffix("_mistral")].inputs(ROWS[name] if rows is None else rows, padding)


def new_tokens(model, inputs, **options):
    found = model.generate(**inputs, **{**ASKED, **options})
    length = inputs["input_ids"].shape[1]
    assert torch.equal(found[:, :length], inputs["input_ids"])
    return found[:, length:]


@on_hosts
def test_batches_equal_singles(name):
    model, inputs = deep(name), batch_of(name)
    singles, answers = oracle.rows_of(inputs, ROWS[name]), set()
    assert not inputs["attention_mask"].all()
    for method, tokens in METHODS.items():
        with llava.pruned(
            model, method, **({"keep": 0.4} if method in ("pyramiddrop", "vtw") else {"tokens": tokens})
        ) as pruning:
            together = new_tokens(model, inputs)
            plan = pruning.last
            right = new_tokens(model, batch_of(name, padding="right"))
            for sample, single in enumerate(singles):
                if "pixel_values" not in single and "pixel_values_videos" not in single:
                    alone = new_tokens(model, single)  # passes through
                else:
                    alone = new_tokens(model, single)
                    shift = int((inputs["attention_mask"][sample] == 0).sum())
                    kept = [(places + shift).tolist() for places in pruning.last.layers[0]]
                    assert kept == [places.tolist() for places in plan.layers[sample]], method
                assert torch.equal(together[sample], alone[0]), (method, sample)
            assert torch.equal(right, together), method
        answers.add(tuple(together.flatten().tolist()))
    assert len(answers) > 2


@on_hosts
def test_budgets_that_cover_all_tokens_equal_the_unpruned_model(name):
    model, inputs = deep(name), batch_of(name)
    expected = new_tokens(model, inputs)
    for method in ("fastv", "sparsevlm"):
        with llava.pruned(model, method, keep=1.0) as pruning:
            assert torch.equal(new_tokens(model, inputs), expected)
            plan = pruning.last
            assert torch.equal(plan.valid, inputs["attention_mask"].bool())
            assert [len(one) for one in plan.layers] == [DEPTH] * 2
            assert all(len(one.kept) == one.total for one in plan.rows)


@pytest.mark.parametrize("name", ["llava_mistral", "internvl", "llava_next_video"])
def test_fastv_keeps_what_eager_attention_of_the_host_says(name):
    """The attention weights that the host's own eager code returns, at the last place, mean over heads."""
    model = deep(name)
    layer = scaled_layer(2, 32, DEPTH)
    for inputs in (batch_of(name), batch_of(name, padding="right")):
        model.set_attn_implementation({"text_config": "eager"})
        try:
            with torch.no_grad():
                weights = model(**inputs, output_attentions=True).attentions[layer - 1].mean(1)
        finally:
            model.set_attn_implementation({"text_config": "sdpa"})
        visual = oracle.visual(inputs["input_ids"])
        with llava.pruned(model, "fastv", tokens=5) as pruning:
            model.generate(**inputs, **ASKED)
            plan = pruning.last
        for sample, mask in enumerate(inputs["attention_mask"].bool()):
            columns = visual[sample].nonzero()[:, 0]
            budget = sum(5 for row in plan.rows if row.sample == sample)
            last = mask.nonzero()[-1, 0]
            best = weights[sample, last, columns].topk(min(budget, len(columns))).indices
            expected = columns[best].sort().values
            layers = plan.layers[sample]
            assert all(torch.equal(one, columns) for one in layers[:layer])
            assert all(torch.equal(one, expected) for one in layers[layer:])
            stays = mask & ~visual[sample]
            stays[expected] = True
            assert torch.equal(plan.sel[sample, plan.valid[sample]], stays.nonzero()[:, 0])


def test_a_clip_has_one_budget_and_loses_no_frame_before_the_language_model():
    model = deep("llava_next_video")
    inputs = batch_of("llava_next_video", ["v", "i"])
    with llava.pruned(model, "fastv", clip_tokens=3) as pruning:
        new_tokens(model, inputs)
        plan = pruning.last
    clip, image = (oracle.visual(row).nonzero()[:, 0] for row in inputs["input_ids"])
    assert torch.equal(plan.layers[0][0], clip) and len(plan.layers[0][-1]) == 3
    assert all(torch.equal(one, image) for one in plan.layers[1])  # whole without a budget of its own
    assert sum(len(row.kept) for row in plan.rows if row.modality == "video") == 3
    with llava.pruned(model, "fastv", tokens=0) as pruning:
        blind = new_tokens(model, inputs)
        assert len(pruning.last.layers[0][0]) == 0
    with llava.pruned(model, "uniform", tokens=0):
        assert torch.equal(new_tokens(model, inputs), blind)


class Recorder(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value)

    def end(self):
        self.ended = True


def test_what_generate_is_told():
    """Ends, limits, forms of the result, streamers and embeddings, as transformers does it."""
    model, inputs = deep("llava"), batch_of("llava")
    single = batch_of("llava", ["i"])
    length = inputs["input_ids"].shape[1]
    with llava.pruned(model, "fastv", tokens=5) as pruning:
        plain = new_tokens(model, inputs, max_new_tokens=6)
        eos = int(plain[0, 2])
        first = [row.tolist().index(eos) if eos in row.tolist() else 5 for row in plain]
        ended = new_tokens(model, inputs, max_new_tokens=6, eos_token_id=[eos, 7], pad_token_id=9)
        width = max(first) + 1
        expected = plain[:, :width].clone()
        for row, end in zip(expected, first, strict=True):
            row[end + 1 :] = 9
        assert torch.equal(ended, expected)
        config = GenerationConfig(max_new_tokens=6, eos_token_id=torch.tensor(eos), do_sample=False)
        config.eos_token_id = eos
        told = model.generate(**inputs, generation_config=config)
        assert told.shape[1] == length + width
        limited = new_tokens(model, inputs, max_new_tokens=None, max_length=length + 4)
        assert torch.equal(limited, plain[:, :4])
        assert new_tokens(model, inputs, max_new_tokens=None).shape[1] == 20
        neutral = {
            "temperature": 0.7,
            "top_p": 0.9,
            "num_beams": 1,
            "repetition_penalty": 1.0,
            "use_cache": True,
        }
        assert torch.equal(new_tokens(model, inputs, max_new_tokens=6, **neutral), plain)
        result = model.generate(**inputs, **ASKED, return_dict_in_generate=True)
        assert torch.equal(result.sequences[:, length:], plain[:, :5])
        given = {**single, "inputs": single["input_ids"], "input_ids": None, "attention_mask": None}
        answer, streamer = model.generate(**given, **ASKED), Recorder()
        assert torch.equal(model.generate(**single, **ASKED, streamer=streamer), answer)
        assert torch.equal(streamer.parts[0], single["input_ids"]) and streamer.ended
        assert torch.cat([part.flatten() for part in streamer.parts]).tolist() == answer[0].tolist()
        embeds = model.get_input_embeddings()(single["input_ids"]).detach()
        found = model.generate(**{**single, "input_ids": None, "inputs_embeds": embeds}, **ASKED)
        assert torch.equal(found, answer[:, single["input_ids"].shape[1] :])
        assert pruning.positions == "original" and pruning.config()["method"] == "fastv"
        text = {name: inputs[name][1:, -6:] for name in ("input_ids", "attention_mask")}
        assert torch.equal(model(**text).logits, model(**text).logits)  # passes through


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"do_sample": True}, "do_sample"),
        ({"num_beams": 3}, "num_beams"),
        ({"num_beams": 2, "repetition_penalty": 1.3}, "num_beams, repetition_penalty"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"stopping_criteria": [lambda ids, scores: False]}, "stopping_criteria"),
        ({"logits_processor": [lambda ids, scores: scores]}, "logits_processor"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [1]}, "prefix_allowed_tokens_fn"),
        ({"output_scores": True}, "output_scores"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"min_new_tokens": 2}, "min_new_tokens"),
        ({"generation_config": GenerationConfig(do_sample=True, top_p=0.9)}, "do_sample"),
    ],
)
def test_other_searches_are_refused(changes, names, monkeypatch):
    model, inputs = deep("llava"), batch_of("llava")
    asked = {"max_new_tokens": 3, **changes}
    with llava.pruned(model, "fastv", tokens=5) as pruning:
        monkeypatch.setattr(model.model.vision_tower, "forward", None)  # nothing is computed
        with pytest.raises(
            ValueError, match=f"'fastv' prunes inside .* greedy search .* got {names}. Pass do_"
        ):
            model.generate(**inputs, **asked)
        assert pruning.last is None


def test_stored_settings_count(monkeypatch):
    model, inputs = deep("llava"), batch_of("llava")
    with llava.pruned(model, "sparsevlm", tokens=9):
        monkeypatch.setattr(model.generation_config, "do_sample", True)
        with pytest.raises(ValueError, match="got do_sample"):
            model.generate(**inputs, max_new_tokens=3)
        assert new_tokens(model, inputs).shape == (2, 5)  # asked for greedy search


def test_what_cannot_be_done_is_refused(monkeypatch):
    model, inputs = deep("llava"), batch_of("llava")
    with llava.pruned(model, "fastv", tokens=5) as pruning:
        for call in (
            lambda: model(**inputs),
            lambda: llava.integrations.shorten(model, **inputs),
        ):
            with pytest.raises(
                ValueError, match="(forward|shorten): 'fastv' prunes inside .* only generate does"
            ):
                call()
        with pytest.raises(ValueError, match="streamer: the batch has 2 prompts"):
            model.generate(**inputs, **ASKED, streamer=Recorder())
        for limit in ({"max_length": inputs["input_ids"].shape[1]}, {"max_new_tokens": 0}):
            with pytest.raises(ValueError, match="no token can follow a prompt of"):
                model.generate(**inputs, do_sample=False, **limit)
        several = batch_of("llava", ["", "iii"])
        with pytest.raises(ValueError, match="row 1 has 3 blocks of visual tokens with text between them"):
            model.generate(**several, **ASKED)
        monkeypatch.setattr(model.lm_head.weight, "data", model.lm_head.weight.data * float("nan"))
        with pytest.raises(ValueError, match="NaN or infinite logits"):
            model.generate(**inputs, **ASKED)
        assert pruning.last is None
    with llava.pruned(model, "vtw", tokens=3), pytest.raises(ValueError, match="Set at least 6 of 36 tokens"):
        model.generate(**inputs, **ASKED)


def test_decoders_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="method: 'dart' prunes inside .* positions have rows and columns"):
        llava.prune(HOSTS["qwen2_vl"].build(), "dart", tokens=4)
    config = HOSTS["llava"].make_config()
    config.text_config = transformers.GemmaConfig(
        vocab_size=112, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4
    )
    model = transformers.LlavaForConditionalGeneration(config)
    with pytest.raises(ValueError, match="decoder is a GemmaModel, not one of LlamaModel, MistralModel"):
        llava.prune(model, "fastv", tokens=4)
    llava.unprune(llava.prune(model, tokens=4))
    offloaded = copy.deepcopy(deep("llava"))
    offloaded.model.language_model.layers[1].to("meta")
    with pytest.raises(ValueError, match="device_map: layers are offloaded, but 'fastv' prunes inside"):
        llava.prune(offloaded, "fastv", tokens=4)
    with pytest.raises(ValueError, match="positions: 'sparsevlm' counts the tokens that a layer sees"):
        llava.prune(deep("llava"), "sparsevlm", tokens=4, positions="original")


def test_a_sliding_window_has_to_hold_prompt_and_answer():
    model, inputs = deep("llava_mistral", sliding_window=48), batch_of("llava_mistral")
    longest = int(inputs["attention_mask"].sum(1).max())
    with llava.pruned(model, "fastv", tokens=5):
        assert new_tokens(model, inputs, max_new_tokens=48 - longest).shape[1] == 48 - longest
        with pytest.raises(ValueError, match="sliding_window is 48, and prompt and answer have 49 tokens"):
            model.generate(**inputs, do_sample=False, max_new_tokens=49 - longest)


def test_kernels_that_are_not_known(monkeypatch):
    model = deep("llava")
    monkeypatch.setattr(model.config.text_config, "_attn_implementation_internal", "flex_attention")
    with pytest.raises(ValueError, match="attn_implementation: 'flex_attention' is not known"):
        llava.prune(model, "fastv", tokens=4)
