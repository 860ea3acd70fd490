"""Export the trained model as an original LLaVA-1.5 checkpoint, and plot its training curves.

The folder contains the files of `liuhaotian/llava-v1.5-7b` (config.json, generation_config.json, weights with
the same names, sentencepiece tokenizer) and `recipe.json`, the settings of the run. The config names the
vision tower; its weights are not included.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


def export(student, work: Path, output: Path, recipe: dict, tower: str, **entries: object) -> None:
    """Write the checkpoint folder: weights in float16, everything else as JSON.

    Args:
        entries: Of config.json, in place of those of the image model; None leaves an entry out.
    """
    import torch
    from safetensors.torch import save_file

    output.mkdir(parents=True, exist_ok=True)
    config = student.config
    state = {
        name: tensor.detach().to(torch.float16).contiguous()
        for name, tensor in student.state_dict().items()
        if "rotary" not in name
    }
    save_file(state, output / "model.safetensors", metadata={"format": "pt"})
    (output / "model.safetensors").chmod(0o644)  # safetensors creates files that only their owner can read
    described = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "torch_dtype": "float16",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "mm_hidden_size": 384,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": tower,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
    }
    described = {key: value for key, value in (described | entries).items() if value is not None}
    (output / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    (output / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, indent=2) + "\n"
    )
    (output / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        shutil.copyfile(work / name, output / name)


def export_video(student, work: Path, output: Path, recipe: dict) -> None:
    """Write the folder of the Video-LLaVA, which names two towers (`llava.tiny.video_tower`)."""
    from llava.tiny.video_tower import FAMILY, NAMES, WIDTH

    entries = {f"mm_{kind}_tower": f"{FAMILY}/{name}" for kind, name in NAMES.items()}
    entries |= {"mm_vision_tower": None, "mm_hidden_size": WIDTH, "max_position_embeddings": 4096}
    export(student, work, output, recipe, "", **entries, tokenizer_model_max_length=3072)


# grids of LLaVA-NeXT for a tower of 336 pixels
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def export_anyres(base: Path, output: Path) -> None:
    """Write the LLaVA-NeXT variant of an exported checkpoint: the same weights (a link), images cut in crops.

    `image_newline` is the embedding of the newline character; the model was not trained on crops.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    output.mkdir(parents=True, exist_ok=True)
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    with safe_open(base / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        embeddings = weights.get_tensor("model.embed_tokens.weight")
    newline = embeddings[3 + ord("\n")].clone()  # byte pieces follow <unk>, <s>, </s>
    save_file({"model.image_newline": newline}, output / second, metadata={"format": "pt"})
    (output / second).chmod(0o644)
    link = output / first
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(base / "model.safetensors", output))
    size = (base / "model.safetensors").stat().st_size + (output / second).stat().st_size
    index = {
        "metadata": {"total_size": size},
        "weight_map": dict.fromkeys(names, first) | {"model.image_newline": second},
    }
    (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    described = json.loads((base / "config.json").read_text())
    described |= {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": PINPOINTS,
        "mm_patch_merge_type": "spatial_unpad",
        "max_position_embeddings": 4096,
        "tokenizer_model_max_length": 4096,
    }
    (output / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    for name in ("generation_config.json", "recipe.json", *TOKENIZER_FILES):
        shutil.copyfile(base / name, output / name)
    path = output / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"model_max_length": 4096}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def curves(log: list[dict], recipe: dict, folder: Path) -> None:
    """Write `training_log.jsonl` and `training_curves.png` (losses; exact match per question type)."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    trained = [entry for entry in log if "loss" in entry]  # the last entry may describe averaged weights
    steps = [entry["step"] for entry in trained]
    left.plot(steps, [entry["loss"] for entry in trained], label="answers")
    left.plot(steps, [entry["align"] for entry in trained], label="patch names (auxiliary)")
    left.set(xlabel="step", ylabel="cross-entropy (nats)", yscale="log", title="Training loss")
    checked = [entry for entry in trained if "validation" in entry]
    for number, kind in enumerate(checked[-1]["validation"] if checked else ()):
        right.plot(
            [e["step"] for e in checked],
            [100 * e["validation"].get(kind, float("nan")) for e in checked],
            "o-",
            ms=3,
            color=plt.colormaps["tab20"](number * 2 % 20 + number * 2 // 20),
            label=kind,
        )
    first, last = recipe["validation"]
    right.set(
        xlabel="step",
        ylabel="exact match (%)",
        ylim=(0, 101),
        title=f"Validation, {last - first} held-out images, 576 tokens",
    )
    for axis in (left, right):
        for boundary in np.cumsum([phase["steps"] for phase in recipe["phases"]])[:-1]:
            axis.axvline(boundary, color="grey", ls=":", lw=1)
    left.legend(fontsize=8)
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(folder / "training_curves.png", dpi=110)
    plt.close(figure)
