"""Small Video-LLaVA checkpoints in the original layout, written on the fly, and a plain video tower.

The language model is that of tests/data/video; towers are random, with 2 x 2 patches and four layers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from llava.model.builder import load_pretrained_model
from llava.model.checkpoint.read import read_folder

DATA = Path(__file__).resolve().parents[1] / "data" / "video"
SOURCE = DATA / "Video-LLaVA-7B-split"
VIDEO, IMAGE = "LanguageBind_Video_merge", "LanguageBind_Image"
WIDTH, SIDE, FRAMES, PATCHES, LAYERS, HEADS = 64, 28, 8, 4, 4, 4
IDS = torch.tensor([[1, 292, *[-200] * FRAMES, 554, 13]])


def tower_config(kind: str, **changes: object) -> dict:
    is_video = kind == VIDEO
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "image_size": SIDE, "patch_size": 14, "hidden_act": "gelu",
        "layer_norm_eps": 1e-5, "add_time_attn": is_video, "num_frames": FRAMES if is_video else 1,
        "force_patch_dropout": 0.5, "lora_r": 2 if is_video else 0, "model_type": "clip_vision_model",
        **changes,
    }  # fmt: skip
    vision = {key: value for key, value in vision.items() if value is not ...}
    kind = "LanguageBindVideo" if is_video else "LanguageBindImage"
    return {"model_type": kind, "vision_config": vision, "text_config": {"hidden_size": 8}}


def tower_state(kind: str, seed: int = 0) -> dict[str, Tensor]:
    """Return random weights, and the unused rest of a CLIP, as in the published folders."""
    generator = torch.Generator().manual_seed(seed + (kind == VIDEO))
    state: dict[str, Tensor] = {}

    def add(name: str, *shape: int, scale: float = 0.3) -> None:
        state[f"vision_model.{name}"] = torch.randn(*shape, generator=generator) * scale

    def add_norm(name: str) -> None:
        add(f"{name}.weight", WIDTH, scale=1.0)
        add(f"{name}.bias", WIDTH)

    def add_linear(name: str, width_in: int, width: int) -> None:
        add(f"{name}.weight", width, width_in)
        add(f"{name}.bias", width)

    add("embeddings.class_embedding", WIDTH)
    add("embeddings.patch_embedding.weight", WIDTH, 3, 14, 14, scale=0.1)
    add("embeddings.position_embedding.weight", PATCHES + 1, WIDTH)
    for name in ("pre_layrnorm", "post_layernorm"):
        add_norm(name)
    for layer in range(LAYERS):
        at = f"encoder.layers.{layer}"
        for name in ("layer_norm1", "layer_norm2"):
            add_norm(f"{at}.{name}")
        blocks = ["self_attn"]
        if kind == VIDEO:
            add(f"{at}.temporal_embedding", 1, FRAMES, WIDTH)
            add_norm(f"{at}.temporal_layer_norm1")
            blocks.append("temporal_attn")
        for block in blocks:
            for part in ("q", "k", "v", "out"):
                add_linear(f"{at}.{block}.{part}_proj", WIDTH, WIDTH)
        add_linear(f"{at}.mlp.fc1", WIDTH, 32)
        add_linear(f"{at}.mlp.fc2", 32, WIDTH)
    state["vision_model.embeddings.position_ids"] = torch.arange(PATCHES + 1)[None]
    state["text_model.embeddings.token_embedding.weight"] = torch.zeros(5, 8)
    state["visual_projection.weight"] = state["text_projection.weight"] = torch.zeros(4, WIDTH)
    state["logit_scale"] = torch.ones(())
    return {name: tensor.clone() for name, tensor in state.items()}


def write_tower(
    root: Path,
    kind: str,
    state: dict[str, Tensor] | None = None,
    config: dict | None = None,
    weights: str | None = "pytorch_model.bin",
) -> Path:
    """Write the folder LanguageBind/KIND; `weights` None leaves them out."""
    folder = root / "LanguageBind" / kind
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tower_config(kind) if config is None else config))
    if weights is not None:
        state = tower_state(kind) if state is None else state
        (save_file if weights.endswith(".safetensors") else torch.save)(state, folder / weights)
    return folder


def inside(kind: str, state: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the keys that the main checkpoint has for a tower."""
    name = "video_tower" if kind == VIDEO else "image_tower"
    own = {key: value for key, value in state.items() if key.startswith("vision_model.")}
    return {
        f"model.{name}.{name}.{key.removeprefix('vision_model.')}": value.to(dtype)
        if dtype and value.is_floating_point()
        else value
        for key, value in own.items()
    }


def write_model(root: Path, more: dict[str, Tensor] | None = None, **config: object) -> Path:
    """Write the main folder, without towers; entries of `config` that are ... are left out."""
    folder = root / "Video-LLaVA-7B"
    folder.mkdir(parents=True, exist_ok=True)
    for path in SOURCE.iterdir():
        if path.suffix in (".json", ".model"):
            shutil.copyfile(path, folder / path.name)
    entries = {**json.loads((SOURCE / "config.json").read_text()), **config}
    entries = {key: value for key, value in entries.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(entries))
    state = {key: tensor for key, tensor, _ in read_folder(SOURCE)}
    save_file({**state, **(more or {})}, folder / "model.safetensors")
    return folder


def write_all(root: Path, more: dict[str, Tensor] | None = None, **config: object) -> Path:
    """Write the main folder and both towers; return the main folder."""
    for kind in (VIDEO, IMAGE):
        write_tower(root, kind)
    return write_model(root, more, **config)


def load(folder: Path, *args: object, **kwargs: object):
    """Return the loaded model on the CPU."""
    return load_pretrained_model(str(folder), *args, device="cpu", **kwargs)[1]


def clip(seed: int = 0, frames: int = FRAMES) -> Tensor:
    return torch.randn(3, frames, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def picture(seed: int = 0) -> Tensor:
    return torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(100 + seed))


def plain_tower(state: dict[str, Tensor], pixels: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """Run LanguageBind's video tower line by line in float64, place by place and frame by frame.

    Args:
        pixels: (3, F, S, S).
        layers: that run.

    Returns:
        (F, T, C) hidden states with [CLS] first; (F, heads, T - 1) attention of [CLS] in the last layer.
    """
    w = {key.removeprefix("vision_model."): value.double() for key, value in state.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def attention(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attend over the rows of (n, C); also return the probabilities (heads, n, n)."""
        q, k, v = (linear(f"{name}.{part}_proj", x).view(len(x), HEADS, -1).transpose(0, 1) for part in "qkv")
        probabilities = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
        return linear(f"{name}.out_proj", (probabilities @ v).transpose(0, 1).flatten(1)), probabilities

    frames = []
    for frame in pixels.double().transpose(0, 1):
        patches = functional.conv2d(frame[None], w["embeddings.patch_embedding.weight"], stride=14)
        tokens = torch.cat([w["embeddings.class_embedding"][None], patches[0].flatten(1).T])
        frames.append(norm("pre_layrnorm", tokens + w["embeddings.position_embedding.weight"]))
    hidden = torch.stack(frames)  # (F, T, C)
    rows = []
    for layer in range(layers):
        at = f"encoder.layers.{layer}"
        if f"{at}.temporal_embedding" in w:
            hidden = hidden + w[f"{at}.temporal_embedding"][0][:, None]
            for place in range(hidden.shape[1]):
                column = hidden[:, place].clone()
                normed = norm(f"{at}.temporal_layer_norm1", column)
                hidden[:, place] = column + attention(f"{at}.temporal_attn", normed)[0]
        rows = []
        for frame in range(len(hidden)):
            found, probabilities = attention(f"{at}.self_attn", norm(f"{at}.layer_norm1", hidden[frame]))
            hidden[frame] = hidden[frame] + found
            rows.append(probabilities[:, 0, 1:])
        inner = functional.gelu(linear(f"{at}.mlp.fc1", norm(f"{at}.layer_norm2", hidden)))
        hidden = hidden + linear(f"{at}.mlp.fc2", inner)
    return hidden, torch.stack(rows)
