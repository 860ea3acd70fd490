"""Copy a complete checkpoint as float16 safetensors, shard by shard.

python -m llava.model.consolidate --src llava-v1.5-7b-task --dst llava-v1.5-7b-task-fp16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.find import resolve_checkpoint
from llava.model.checkpoint.folder import CheckpointFolder
from llava.model.checkpoint.keys import translate
from llava.model.checkpoint.read import refuse_quantized
from llava.model.checkpoint.write import check_target, exit_code, write_checkpoint


def consolidate_ckpt(src_path: str | Path, dst_path: str | Path) -> None:
    """Write the checkpoint `src_path` to the new folder `dst_path` in float16. Names are LLaVA's.

    Raises:
        CheckpointError: not a complete checkpoint, or a quantized one, or a value beyond float16.
        FileNotFoundError: there is no such folder.
    """
    source, target = resolve_checkpoint(src_path), Path(dst_path).expanduser()
    check_target(target, source)
    files = write_checkpoint(target, _halves(source), settings=source)
    print(f"{target}: {len(files)} weight files written")


def _halves(source: Path) -> Iterator[tuple[str, Tensor]]:
    checkpoint = CheckpointFolder(source)
    quantization = checkpoint.config().get("quantization_config")
    for key, tensor, path in checkpoint.weights():
        if translate(key) is None:  # a constant that old releases saved
            continue
        refuse_quantized(key, tensor, path, quantization)
        if not tensor.is_floating_point():
            yield key, tensor.clone()
            continue
        half = tensor.to(torch.float16, copy=True)
        if not torch.isfinite(half).all():
            raise CheckpointError(
                f"{path}: {key}: NaN, infinite or beyond float16, whose largest value is 65504. Use the "
                "checkpoint as it is, with dtype='bfloat16' or 'float32'."
            )
        yield key, half


def main(argv: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--src", required=True, help="checkpoint: a folder or owner/name")
    parser.add_argument("--dst", required=True, help="new folder")
    args = parser.parse_args(argv)
    return exit_code(consolidate_ckpt, args.src, args.dst)


if __name__ == "__main__":
    sys.exit(main())
