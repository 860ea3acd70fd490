"""config.json before loading: read from a folder or the Hub, and the conversation template it implies."""

from __future__ import annotations

import subprocess
import sys

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from helpers.checkpoints import SOURCE
from llava.conversation import conv_templates
from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.config import conversation_for, stored_config


def test_a_folders_config():
    assert stored_config(SOURCE) == stored_config(str(SOURCE))
    assert stored_config(SOURCE)["mm_vision_tower"]


def test_only_config_json_of_a_hub_checkpoint_is_downloaded(tmp_path, monkeypatch):
    asked = []

    def download(name, file, **options):
        asked.append((name, file, options))
        (tmp_path / file).write_text('{"torch_dtype": "bfloat16"}')
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert stored_config("owner/name", revision="v2", token=None) == {"torch_dtype": "bfloat16"}
    assert asked == [("owner/name", "config.json", {"revision": "v2"})]


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(FileNotFoundError, match=r"owner/name.*Hub \(no network\).*pass that folder"):
        stored_config("owner/name")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        stored_config("./nowhere/at/all")


def test_a_lora_repository_without_config_uses_its_base(monkeypatch):
    def absent(*_, **__):
        raise LocalEntryNotFoundError("no config.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", absent)
    assert stored_config("owner/lora", SOURCE) == stored_config(SOURCE)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        stored_config("./nowhere", SOURCE)


def test_a_lora_folder_without_config_uses_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        stored_config(tmp_path)
    assert stored_config(tmp_path, SOURCE) == stored_config(SOURCE)


@pytest.mark.parametrize("content", ["{oops", "[]"])
def test_invalid_config(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json: .*Download it again"):
        stored_config(tmp_path)


LLAMA, MISTRAL = {"model_type": "llava_llama"}, {"model_type": "llava_mistral"}
HF = {"model_type": "llava_next"}


@pytest.mark.parametrize(
    ("config", "name", "template"),
    [
        (MISTRAL, "llava-v1.6-mistral-7b", "mistral_instruct"),
        (MISTRAL, "my-run-v1", "mistral_instruct"),
        ({"model_type": "llava", "architectures": ["LlavaMistralForCausalLM"]}, "x", "mistral_instruct"),
        ({**HF, "text_config": {"model_type": "mistral"}}, "llava-v1.6-mistral-7b-hf", "mistral_instruct"),
        (LLAMA, "distilled-from-mistral", "vicuna_v1"),  # the name does not overrule config.json
        ({}, "llava-v1.6-mistral-7b", "mistral_instruct"),
        ({**LLAMA, "vocab_size": 64000}, "llava-v1.6-34b", "chatml_direct"),
        ({**HF, "text_config": {"model_type": "llama", "vocab_size": 64064}}, "a", "chatml_direct"),
        ({}, "llava-v1.6-34b", "chatml_direct"),
        ({**LLAMA, "vocab_size": 32000}, "llava-v1.5-7b", "vicuna_v1"),
        ({**LLAMA, "vocab_size": 32000}, "llava-v1.6-vicuna-13b", "vicuna_v1"),
        (LLAMA, "llava-llama-2-13b-chat-lightning-preview", "llava_llama_2"),
        (LLAMA, "LLaVA-13b-delta-v0", "llava_v0"),
        (LLAMA, "LLaVA-7B-v0-science-qa", "llava_v0"),
        ({"model_type": "llava_mpt"}, "LLaVA-Lightning-MPT-7B-preview", "mpt"),
        ({"model_type": "llava_qwen"}, "llava-qwen", "qwen_1_5"),
        (LLAMA, "llava-tiny", "vicuna_v1"),
        ({}, "", "vicuna_v1"),
    ],
)
def test_conversation_template_of_a_checkpoint(config, name, template):
    assert conversation_for(config, name) == template
    assert template in conv_templates


def test_imports_nothing_heavy():
    code = (
        "import sys; from llava.model.checkpoint.config import stored_config as f;"
        f"f({str(SOURCE)!r}); assert not {{'torch', 'transformers'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
