"""The self-test passes on tiny models and saved checkpoints, and fails where a result is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

import llava
from helpers.host_parts import parts_of
from helpers.hosts import HOSTS
from llava.integrations import equivalence, selftest


def run(capsys, *arguments: str):
    code = selftest.main(arguments)
    lines = capsys.readouterr().out.strip().splitlines()
    return code, lines[:-1], json.loads(lines[-1])


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "paligemma", "gemma3"])
def test_tiny_hosts_pass(name, capsys):
    code, lines, document = run(capsys, "--host", name)
    if document["skipped"]:
        pytest.skip(lines[1])
    assert code == 0 and document["failed"] == [] and lines[1].endswith("ok")
    assert document["transformers"] == transformers.__version__
    found = document["differences"][name]
    assert list(found) == ["keep all", "masked", "batch", "cached", "unprune"]
    assert found["keep all"] == found["unprune"] == 0
    assert (found["masked"] is None) == (name == "gemma3")
    assert all(0 < found[check] < 1e-5 for check in ("batch", "cached"))


def test_a_wrong_result_fails(capsys, monkeypatch):
    real = equivalence._masked

    def shifted(model, inputs, sel):
        return real(model, inputs, sel.roll(1, 1)[:, 1:])

    monkeypatch.setattr(equivalence, "_masked", shifted)
    code, lines, document = run(capsys, "--host", "llava")
    assert code == 1 and document["failed"] == ["llava"] and lines[1].endswith("FAILED")


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_a_checkpoint_is_checked_on_one_image(name, tmp_path, capsys):
    parts = parts_of(name)
    HOSTS[name].build().save_pretrained(tmp_path)
    parts.tokenizer.save_pretrained(tmp_path)
    parts.image_processor.save_pretrained(tmp_path)
    if name == "llava":
        transformers.LlavaProcessor(
            parts.image_processor,
            parts.tokenizer,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ).save_pretrained(tmp_path)
    if name == "internvl":
        entries = {"processor_class": "InternVLProcessor", "image_seq_length": parts.config.image_seq_length}
        (tmp_path / "processor_config.json").write_text(json.dumps(entries))
    code, lines, document = run(capsys, "--model", str(tmp_path))
    assert code == 0 and list(document["differences"]) == [str(tmp_path)] and lines[1].endswith("ok")


def test_other_models_are_refused(tmp_path, capsys):
    transformers.LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    (tmp_path / "empty").mkdir()
    original = Path(__file__).parents[1] / "data" / "model" / "ckpt_llava15"
    for path, reason in (
        (tmp_path, r"architectures are ['LlamaForCausalLM']"),
        (tmp_path / "empty", f"{tmp_path / 'empty'}"),
        (original, "a checkpoint in LLaVA's own format (LlavaLlamaForCausalLM)"),
    ):
        with pytest.raises(SystemExit) as caught:
            selftest.main(["--model", str(path)])
        assert caught.value.code == 1 and reason in capsys.readouterr().err


@pytest.mark.parametrize("name", ["/none", "none", ""])
def test_a_missing_folder_is_told_before_anything_else(name, capsys):
    with pytest.raises(SystemExit) as caught:
        selftest.main(["--model", name])
    out, error = capsys.readouterr()
    assert caught.value.code == 2 and not out and f"--model {name or repr('')}: no such folder" in error


def test_a_release_that_cannot_take_features_is_told(capsys, monkeypatch):
    def forward(self, input_ids=None, pixel_values=None, inputs_embeds=None):
        raise AssertionError

    case = HOSTS["gemma3"]
    model = case.build()
    monkeypatch.setattr(type(model.model), "forward", forward)
    with pytest.raises(ValueError, match="Gemma3Model of transformers .* does not take features in place of"):
        llava.prune(model, tokens=4)
    monkeypatch.setattr(equivalence, "check_host", lambda model, inputs: llava.prune(model, tokens=4))
    code, lines, document = run(capsys, "--host", "gemma3")
    assert code == 0 and document["skipped"] == ["gemma3"] and "skipped: model: Gemma3Model" in lines[1]


@pytest.mark.parametrize("name", ["qwen", ""])
def test_an_unknown_host_is_refused(name, capsys):
    with pytest.raises(SystemExit) as caught:
        selftest.main(["--host", name])
    error = f"--host {name!r}: unknown (choose from llava, "
    assert caught.value.code == 2 and error in capsys.readouterr().err
