"""Exported checkpoints load like any LLaVA checkpoint."""

import json
from dataclasses import asdict

import torch

from llava.tiny.tower import TOWER_NAME
from llava.tiny.training import export
from llava.tiny.training.trainer import Trainer


def test_export_is_a_llava_checkpoint(folder, store, tmp_path, recipe):
    """The folder loads like any checkpoint, with weights equal to the float16 rounding."""
    from llava.model.builder import load_pretrained_model

    trainer = Trainer(recipe, store, folder)
    export.export(trainer.student, folder, tmp_path / "llava-new", asdict(recipe), TOWER_NAME)
    _, model, _, context = load_pretrained_model(str(tmp_path / "llava-new"), None, "llava-new", device="cpu")
    assert context == 2048 and model.pruner.name == "none"
    loaded = dict(model.named_parameters())
    for name, tensor in trainer.student.named_parameters():
        assert torch.equal(loaded[name], tensor.detach().half().float()), name


def test_anyres_variant_has_the_same_weights(folder, store, tmp_path, recipe):
    from llava.model.builder import load_pretrained_model

    trainer = Trainer(recipe, store, folder)
    base, output = tmp_path / "llava-new", tmp_path / "llava-new-anyres"
    export.export(trainer.student, folder, base, asdict(recipe), TOWER_NAME)
    export.export_anyres(base, output)
    assert (output / "model-00001-of-00002.safetensors").resolve() == (base / "model.safetensors").resolve()
    tokenizer, model, _, context = load_pretrained_model(str(output), None, output.name, device="cpu")
    assert context == 4096 and model.config.image_aspect_ratio == "anyres"
    newline = tokenizer.convert_tokens_to_ids("<0x0A>")
    assert torch.equal(model.model.image_newline, model.model.embed_tokens.weight[newline])


def test_curves_are_drawn(tmp_path, recipe):
    log = [{"step": k, "loss": 1 / k, "align": 2 / k, "validation": {"exist": 0.5}} for k in (50, 100)]
    log.append({"step": 100, "averaged": 2, "validation": {"exist": 0.6}})
    export.curves(log, asdict(recipe), tmp_path)
    assert (tmp_path / "training_curves.png").read_bytes()[:4] == b"\x89PNG"
    assert [
        json.loads(line)["step"] for line in (tmp_path / "training_log.jsonl").read_text().splitlines()
    ] == [50, 100, 100]
