"""A fingerprint changes with everything that shapes an answer, and with nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from helpers.checkpoints import SOURCE, weights, write
from llava.model.checkpoint import fingerprint
from llava.model.checkpoint.fingerprint import fingerprint_checkpoint


@pytest.fixture
def large(monkeypatch):
    """Treat the small test files as large ones: sample their tensors instead of reading them whole."""
    monkeypatch.setattr(fingerprint, "_WHOLE", 1000)
    monkeypatch.setattr(fingerprint, "_SMALL", 64)
    monkeypatch.setattr(fingerprint, "_BLOCK", 64)


FORMS = ["model.safetensors", ("model.safetensors", 3), "pytorch_model.bin", ("pytorch_model.bin", 2)]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_retrained_tensor_shows(tmp_path, large, form):
    state = weights(SOURCE)
    before = fingerprint_checkpoint(write(tmp_path / "a", state=state, form=form))
    assert before == fingerprint_checkpoint(write(tmp_path / "again", state=state, form=form))
    seen = {before}
    for number, name in enumerate(state):
        changed = {**state, name: state[name] * 1.5 + 0.25}
        seen.add(fingerprint_checkpoint(write(tmp_path / str(number), state=changed, form=form)))
    assert len(seen) == 1 + len(state)


def test_a_single_element_of_a_bias_shows(tmp_path, large):
    state = weights(SOURCE)
    name = "model.mm_projector.0.bias"
    changed = {**state, name: state[name].clone()}
    changed[name][0] += 1
    for form in ("model.safetensors", "pytorch_model.bin"):
        a, b = (write(tmp_path / f"{form}{n}", state=s, form=form) for n, s in enumerate((state, changed)))
        assert fingerprint_checkpoint(a) != fingerprint_checkpoint(b)


def test_zip_archives_without_crc(tmp_path, large):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        found = set()
        for scale in (1, 2):
            folder = tmp_path / str(scale)
            folder.mkdir()
            torch.save({"weight": torch.ones(100_000) * scale}, folder / "pytorch_model.bin")
            found.add(fingerprint_checkpoint(folder))
    finally:
        torch.serialization.set_crc32_options(before)
    assert len(found) == 2


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "preprocessor_config.json", "adapter_config.json"),
        *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("added_tokens.json", "vocab.txt", "chat_template.jinja", "mm_projector.bin"),
        *("non_lora_trainables.bin", "adapter_model.safetensors"),
    ],
)
def test_every_file_that_shapes_answers_shows(tmp_path, name):
    folder = write(tmp_path / "m")
    (folder / name).write_bytes(b'{"a": 1}')
    first = fingerprint_checkpoint(folder)
    (folder / name).write_bytes(b'{"a": 2}')
    assert first != fingerprint_checkpoint(folder)
    (folder / name).unlink()
    assert first != fingerprint_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "README.md",
            "training_args.bin",
            "optimizer.pt",
            "optimizer.bin",
            "scheduler.pt",
            ".gitattributes",
        ),
        *("trainer_state.json", "all_results.json", "train_log.txt", "rng_state_0.pth", "figure.png"),
        *("checkpoint-500/model.safetensors", ".git/config.json"),
    ],
)
def test_traces_of_training_do_not_show(tmp_path, name):
    folder = write(tmp_path / "m")
    before = fingerprint_checkpoint(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"anything")
    assert fingerprint_checkpoint(folder) == before


def test_the_towers_folder_counts_and_the_place_does_not(tmp_path):
    folders = []
    for name in "ab":
        folder = tmp_path / name
        (folder / "tower").mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"mm_vision_tower": "./tower"}))
        (folder / "tower" / "config.json").write_text("{}")
        (folder / "tower" / "preprocessor_config.json").write_text("{}")
        folders.append(folder)
    a, b = folders
    assert fingerprint_checkpoint(a) == fingerprint_checkpoint(b)
    (b / "tower" / "preprocessor_config.json").write_text('{"do_resize": false}')
    assert fingerprint_checkpoint(a) != fingerprint_checkpoint(b)
    assert fingerprint_checkpoint("owner/name") == "hub"


@pytest.mark.parametrize("content", [b"", b"junk" * 1000, b"\xff" * 9 + b"{}" * 1000], ids=["0", "1", "2"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_invalid_weight_files_are_left_to_the_loader(tmp_path, large, name, content):
    (tmp_path / name).write_bytes(content)
    assert len(fingerprint_checkpoint(tmp_path)) == 16


def test_large_checkpoints_are_not_read_whole(tmp_path):
    """4 GB of zeros in a sparse file."""
    header = json.dumps({"w": {"dtype": "F16", "shape": [2 << 30], "data_offsets": [0, 4 << 30]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (4 << 30))
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        file.truncate(4 << 30)
    start = time.perf_counter()
    fingerprint_checkpoint(tmp_path)
    assert time.perf_counter() - start < 2


def test_imports_neither_torch_nor_transformers(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    code = (
        "import sys; from llava.model.checkpoint.fingerprint import fingerprint_checkpoint as f;"
        f"assert len(f({str(tmp_path)!r})) == 16; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_configs_that_cannot_be_read(tmp_path):
    """Loading reports them; a fingerprint exists all the same."""
    for content in (
        '{"a":' * 100_000,
        "[]",
        '{"mm_vision_tower": 5}',
        '{"mm_vision_tower": "' + "x" * 5000 + '"}',
    ):
        (tmp_path / "config.json").write_text(content)
        assert len(fingerprint_checkpoint(tmp_path)) == 16


def test_a_tower_beside_the_base_of_an_adapter(tmp_path):
    folder = tmp_path / "runs" / "lora"
    tower = tmp_path / "models" / "t"
    for one in (folder, tower, tmp_path / "models" / "base"):
        one.mkdir(parents=True)
    (folder / "config.json").write_text('{"mm_vision_tower": ["/of/another/machine/t"]}')
    seen = set()
    for content in ('{"hidden_size": 64}', '{"hidden_size": 128}'):
        (tower / "config.json").write_text(content)
        seen.add(fingerprint_checkpoint(folder, tmp_path / "models" / "base"))
    assert len(seen) == 2
