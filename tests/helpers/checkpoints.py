"""Variants of the reference checkpoints, written on the fly, and one fixed question to ask them."""

from __future__ import annotations

import json
import shutil

import torch
from safetensors.torch import save_file

from helpers.golden_model import DATA
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.read import Assigner, read_folder
from llava.model.checkpoint.tower import fill_tower, find_tower
from llava.model.multimodal_encoder.builder import build_vision_tower

SOURCE = DATA / "ckpt_llava15s"
NEXT = DATA / "ckpt_llava16s"
IMAGE = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[1, 292, -200, 554, 13]])


def weights(folder):
    return {k: v for k, v, _ in read_folder(folder)}


def write(folder, source=SOURCE, state=None, config=None, form="model.safetensors", tower=True):
    """Write a variant of a reference checkpoint. `form`: file name, or (file name, number of shards)."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".model") and "index" not in file.name:
            shutil.copyfile(file, folder / file.name)
    settings = json.loads((source / "config.json").read_text())
    if tower:
        settings["mm_vision_tower"] = str(DATA / settings["mm_vision_tower"])
    settings.update(config or {})
    settings = {k: v for k, v in settings.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(settings))
    state = weights(source) if state is None else state
    name, shards = (form, 1) if isinstance(form, str) else form
    save = save_file if name.endswith(".safetensors") else torch.save
    if shards == 1:
        save(state, folder / name)
        return folder
    stem, suffix = name.split(".")
    mapping = {}
    for n in range(shards):
        part = {k: v for i, (k, v) in enumerate(state.items()) if i % shards == n}
        shard = f"{stem}-{n + 1:05d}-of-{shards:05d}.{suffix}"
        save(part, folder / shard)
        mapping.update(dict.fromkeys(part, shard))
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    return folder


def load(folder, *args, **kwargs):
    return load_pretrained_model(str(folder), *args, device="cpu", **kwargs)[1]


@torch.no_grad()
def logits(model, **kwargs):
    return model(input_ids=IDS, images=IMAGE, image_sizes=[(336, 336)], **kwargs).logits


def load_vision_tower(name, select_layer=-2, attn_implementation="sdpa", dtype=torch.float32):
    """Load a tower without a language model, as `fill_model` does."""
    source = find_tower(str(name), None)
    tower = build_vision_tower(source, select_layer, attn_implementation=attn_implementation)
    assigner = Assigner(tower.vision_tower, lambda _: (dtype, torch.device("cpu")))
    fill_tower(tower, source, assigner.assign)
    for problem, names in (("missing", assigner.missing()), ("unexpected", assigner.unexpected)):
        if names:
            raise CheckpointError(f"{problem} keys in the vision tower: {names}")
    tower.restore_buffers()
    return tower.eval()
