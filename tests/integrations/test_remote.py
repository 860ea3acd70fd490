"""The adapter for models whose code comes with their checkpoint, on stand-ins of three shapes."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.remote_hosts import IMAGE, ClsTower, Resampler, VisualExpert
from llava.integrations.remote import (
    arguments_of,
    generate,
    keep_places,
    kept_index,
    load_remote,
    select_tokens,
)
from llava.pruning import get_pruner

BUDGETS = {Resampler: 128, ClsTower: 144, VisualExpert: 123}  # those of the paper


@pytest.fixture(scope="module", params=BUDGETS, ids=lambda shape: shape.__name__)
def case(request):
    with torch.inference_mode():
        model = request.param().eval()
        pixels, ids = model.pixels(2), model.prompt(2)
        return model, pixels, ids, model.see(pixels)


@torch.inference_mode()
@pytest.mark.parametrize("method", ["vispruner", "random"])
def test_pruned_equals_masked_by_hand(case, method):
    model, pixels, ids, (_, features, cue) = case
    budget = BUDGETS[type(model)]
    calls = []
    model.decoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    prompt = arguments_of(model.decoder, lambda: model(ids, pixels))
    assert not calls  # the decoder did not run
    kept = keep_places(features, cue, tokens=budget, method=method)
    attention = cue[:, None] if cue.ndim == 2 else cue
    assert torch.equal(kept, get_pruner(method, budget).select(features, attention, crop_ids=[0, 1]))
    visual = ids == IMAGE
    index = kept_index(visual, kept)
    assert index.shape == (2, 6 + budget) and visual.gather(1, index).sum(1).tolist() == [budget, budget]
    short = select_tokens(prompt, index)
    said = generate(lambda new, past: model.decoder(**new, past=past), short, 5, stops={1})

    mask = torch.zeros_like(ids).scatter_(1, index, 1)  # the oracle: all tokens, dropped ones never seen
    masked = {**prompt, "attention_mask": mask}
    whole, _ = model.decoder(**masked)
    pruned, _ = model.decoder(**short)
    assert (whole - pruned).abs().max() < 1e-5
    assert (whole - model.decoder(**prompt)[0]).abs().max() > 1e-3  # dropping matters
    assert said == generate(lambda new, past: model.decoder(**new, past=past), masked, 5, stops={1})
    alone = select_tokens({name: one[1:] for name, one in prompt.items()}, index[1:])
    assert (model.decoder(**alone)[0] - pruned[1:]).abs().max() < 1e-5


@torch.inference_mode()
def test_all_kept_is_the_model_itself(case):
    model, pixels, ids, (_, features, cue) = case
    prompt = arguments_of(model.decoder, lambda: model(ids, pixels))
    short = select_tokens(prompt, kept_index(ids == IMAGE, keep_places(features, cue, keep=1.0)))
    assert short.keys() == prompt.keys() and all(torch.equal(short[name], prompt[name]) for name in prompt)


def test_several_images_per_row_and_shares():
    visual = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 0, 1, 1, 1]], dtype=torch.bool)
    kept = torch.tensor([[0], [2], [1], [1]])
    assert kept_index(visual, kept).tolist() == [[0, 1, 4, 7], [1, 3, 4, 6]]
    none = kept_index(visual, torch.zeros(4, 0, dtype=torch.long))
    assert none.tolist() == [[0, 4], [3, 4]]
    features = torch.randn(1, 30, 4)
    assert keep_places(features, features.norm(dim=-1), keep=0.1).shape == (1, 3)
    assert keep_places(features, features.norm(dim=-1), keep=0.001).shape == (1, 1)


def wrong(message: str):
    return pytest.raises(ValueError, match=message)


def test_what_does_not_fit_is_refused():
    features, cue = torch.randn(1, 9, 4), torch.rand(1, 9)
    with wrong("tokens, keep: got None and None"):
        keep_places(features, cue)
    with wrong("Pass one of them"):
        keep_places(features, cue, 4, 0.5)
    with wrong("share in"):
        keep_places(features, cue, keep=33)
    with wrong(r"cue: shape is \(1, 10\), expected \(1, 9\)"):
        keep_places(features, torch.rand(1, 10), 4)
    with wrong(r"features: shape is \(9, 4\)"):
        keep_places(features[0], cue, 4)
    with wrong("finite"):
        keep_places(features, cue * float("nan"), 4)
    for method in ("fastv", "divprune_x"):
        with pytest.raises(ValueError, match=method):
            keep_places(features, cue, 4, method=method)
    visual = torch.ones(1, 9, dtype=torch.bool)
    with wrong("names visual token 9, but the prompt has 9"):
        kept_index(visual, torch.tensor([[9]]))
    with wrong("9 visual tokens for 2 images"):
        kept_index(visual, torch.tensor([[1], [1]]))
    with wrong("rows have 2, 0 visual tokens"):
        kept_index(torch.tensor([[True, True], [False, False]]), torch.tensor([[0]]))
    index = torch.tensor([[0, 2]])
    with wrong("lengths differ"):
        select_tokens({"inputs_embeds": torch.zeros(1, 3, 2), "position_ids": torch.zeros(1, 4)}, index)
    with wrong(r"mask4d: shape \(1, 1, 3, 3\) contains the prompt's length 3"):
        select_tokens({"inputs_embeds": torch.zeros(1, 3, 2), "mask4d": torch.zeros(1, 1, 3, 3)}, index)


def test_a_call_that_cannot_be_caught_is_refused():
    model = ClsTower()
    with wrong("was not called"):
        arguments_of(model.decoder, lambda: None)
    with wrong("1 positional arguments"):
        arguments_of(model.project, lambda: model.project(torch.zeros(1, 16)))
    assert not model.decoder._forward_pre_hooks


CODE = """
import pathlib
import torch
from transformers import PretrainedConfig, PreTrainedModel
pathlib.Path({mark!r}).write_text("ran")
class TinyConfig(PretrainedConfig):
    model_type = "remote_tiny"
class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(2, 2)
        self.post_init()
    def forward(self, **inputs):
        return self.layer(inputs["inputs_embeds"])
"""


def test_remote_code_runs_only_when_it_is_confirmed(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder, mark = tmp_path / "remote", tmp_path / "mark"
    folder.mkdir()
    (folder / "modeling_tiny.py").write_text(CODE.format(mark=str(mark)))
    entries = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "remote_tiny", "auto_map": entries}))
    torch.save({"layer.weight": torch.eye(2), "layer.bias": torch.zeros(2)}, folder / "pytorch_model.bin")
    for given in (False, None, "yes"):
        with wrong(r"runs code of its own \(modeling_tiny.TinyModel\)"):
            load_remote(str(folder), given)
    assert not mark.exists()
    assert torch.equal(load_remote(str(folder), trust_remote_code=True).layer.weight, torch.eye(2))
    assert mark.exists()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    with wrong("use llava.prune"):
        load_remote(str(folder), trust_remote_code=True)
