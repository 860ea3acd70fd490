"""Write what is shipped of a LoRA run: adapter and projector in float16, without what the base has.

    python -m llava.tiny.adapter --checkpoint outputs/smol/stage2 --output playground/tiny/smol

The folder names its base (`llava.tiny.base`) and its tower (`llava.tiny.tower`), which are found in the
cache. Optimizer, tokenizer and state of the run are left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.config import read_config
from llava.model.checkpoint.entries import ADAPTER, read_entries
from llava.model.checkpoint.find import ADAPTER_CONFIG, TRAINABLES, find_base
from llava.model.checkpoint.read import read_file

from .base import BASE_NAME
from .tower import TOWER_NAME

LARGEST = 12 * 2**20  # bytes of the folder
WEIGHTS = "adapter_model.safetensors"
_OPTIONAL = ("trainer_state.json",)


def ship(checkpoint: Path, output: Path, largest: int = LARGEST) -> int:
    """Write the folder that is shipped; return its size in bytes.

    Raises:
        CheckpointError: A file is missing, has another base or tower, or a value that float16 does not have;
            or the folder would be larger than `largest`.
    """
    from safetensors.torch import save_file

    entries = read_entries(checkpoint / ADAPTER_CONFIG, ADAPTER)
    config = read_config(checkpoint)
    base = find_base(checkpoint)
    if base is None or base.name != BASE_NAME:
        raise CheckpointError(
            f"{checkpoint / ADAPTER_CONFIG}: base_model_name_or_path is "
            f"{entries.get('base_model_name_or_path')!r}, expected {BASE_NAME}, converted. Run "
            "`python -m llava.tiny.base` once, and use a run that started from it."
        )
    if Path(str(config.get("mm_vision_tower"))).name != TOWER_NAME:
        raise CheckpointError(
            f"{checkpoint / 'config.json'}: mm_vision_tower is {config.get('mm_vision_tower')!r}, expected "
            f"{TOWER_NAME}. Use a run with this tower."
        )
    parts = {name: {} for name in (WEIGHTS, TRAINABLES)}
    for name, found in parts.items():
        for key, tensor in read_file(checkpoint / name):
            found[key] = tensor.to(torch.float16).contiguous()
            if not torch.isfinite(found[key]).all():
                raise CheckpointError(
                    f"{checkpoint / name}: {key} has values beyond float16. Use another checkpoint."
                )
    output.mkdir(parents=True, exist_ok=True)
    save_file(parts[WEIGHTS], output / WEIGHTS)
    torch.save(parts[TRAINABLES], output / TRAINABLES)
    for name, content, changed in (
        (ADAPTER_CONFIG, entries, {"base_model_name_or_path": BASE_NAME}),
        ("config.json", config, {"mm_vision_tower": TOWER_NAME, "_name_or_path": BASE_NAME}),
    ):
        kept = {key: value for key, value in {**content, **changed}.items() if value is not None}
        (output / name).write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name in _OPTIONAL:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, output / name)
    size = sum(path.stat().st_size for path in output.iterdir() if path.is_file())
    if size > largest:
        raise CheckpointError(
            f"{output}: {size / 2**20:.1f} MiB, expected at most {largest / 2**20:.0f}. Train with a smaller "
            "--lora_r."
        )
    return size


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llava.tiny.adapter", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder that LoRA training wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    try:
        size = ship(args.checkpoint, args.output)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"output": str(args.output), "bytes": size}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
