"""Training on clips: from the bundled image model, resumed exactly, to a folder of the original layout."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from llava.paths import BUNDLED_MODEL
from llava.tiny.training import clip_trainer
from llava.tiny.training.clip_features import ClipFeatures
from llava.tiny.training.clip_trainer import ClipPhase, ClipRecipe, ClipTrainer
from llava.tiny.training.export import export_video

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is missing")
RECIPE = ClipRecipe(
    clips=3,
    validation=1,
    phases=(ClipPhase(1, 2, (16, 16), (1.0, 1.0), 3), ClipPhase(1, 1, (24, 24), (1.0, 0.0), 3)),
)


@pytest.fixture
def store(tmp_path):
    made = ClipFeatures(tmp_path / "features", 3)
    made.data[:] = np.random.RandomState(0).randint(15_000, 16_500, made.data.shape)  # bfloat16 near 0.1
    made.done[:] = 1
    return made


def trainer(store, folder, monkeypatch):
    def train(work, lines, length):  # the image model's pieces
        for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
            (work / name).write_bytes((BUNDLED_MODEL / name).read_bytes())

    monkeypatch.setattr(clip_trainer, "train", train)
    return ClipTrainer(RECIPE, store, folder)


@pytest.mark.slow
def test_a_run_starts_resumes_and_is_exported(store, tmp_path, monkeypatch, capsys):
    from safetensors.torch import load_file

    whole = trainer(store, tmp_path / "whole", monkeypatch)
    image_model = load_file(BUNDLED_MODEL / "model.safetensors")
    for name, tensor in whole.student.state_dict().items():
        wanted = image_model[name].float()
        assert torch.equal(tensor[..., : wanted.shape[-1]], wanted), name
    whole.run(every=1, validate_every=2)
    assert "validation" in json.loads(capsys.readouterr().out.splitlines()[-1])
    cut = trainer(store, tmp_path / "cut", monkeypatch)
    cut.train_step()
    cut.save()
    again = trainer(store, tmp_path / "cut", monkeypatch)
    again.resume()
    again.train_step()
    for name, tensor in again.student.state_dict().items():
        assert torch.equal(tensor, whole.student.state_dict()[name]), name
    export_video(whole.student, tmp_path / "whole", tmp_path / "out", asdict(RECIPE))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mm_video_tower"].endswith("/LanguageBind_Video_merge") and "mm_vision_tower" not in config
    assert config["mm_hidden_size"] == 396 and (tmp_path / "out" / "tokenizer.model").is_file()
