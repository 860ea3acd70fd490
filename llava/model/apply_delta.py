"""Add a delta, as the first releases of LLaVA were published, to the language model below it.

    python -m llava.model.apply_delta --base-model-path llama-13b --target-model-path LLaVA-13b-v0 \\
        --delta-path LLaVA-13b-delta-v0

Weights are read and written shard by shard. `make_delta` is the inverse.
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
from llava.model.checkpoint.keys import TOWER, translate
from llava.model.checkpoint.read import listing, read_folder
from llava.model.checkpoint.write import check_target, exit_code, write_checkpoint

_GROWS = ("model.embed_tokens.weight", "lm_head.weight")  # rows that training added are the delta's own
_NEW = ("model.mm_projector.", "model.image_newline", TOWER)  # parts that the language model does not have


def apply_delta(base_model_path: str | Path, target_model_path: str | Path, delta_path: str | Path) -> None:
    """Write target = base + delta. Arguments are LLaVA's.

    Raises:
        CheckpointError: the two do not fit each other, or the target already contains weights.
        FileNotFoundError: there is no such folder.
    """
    _write(base_model_path, delta_path, target_model_path, 1)


def make_delta(base_model_path: str | Path, target_model_path: str | Path, delta_path: str | Path) -> None:
    """Write delta = target - base; see `apply_delta`."""
    _write(base_model_path, target_model_path, delta_path, -1)


def _write(base: str | Path, other: str | Path, result: str | Path, sign: int) -> None:
    base, other, result = resolve_checkpoint(base), resolve_checkpoint(other), Path(result).expanduser()
    check_target(result, base, other)
    files = write_checkpoint(result, _combine(base, other, sign), settings=other)
    print(f"{result}: {len(files)} weight files written")


def _combine(base: Path, other: Path, sign: int) -> Iterator[tuple[str, Tensor]]:
    """Yield other + sign * base. Files are memory-mapped, so a tensor is read when its turn comes."""
    below = {name: tensor for key, tensor, _ in read_folder(base) if (name := translate(key)) is not None}
    above = [
        (key, name, tensor) for key, tensor, _ in read_folder(other) if (name := translate(key)) is not None
    ]
    problems = [
        f"{key}: {tuple(tensor.shape)} {tensor.dtype} over {_describe(below.get(name))}"
        for key, name, tensor in above
        if not _fits(name, tensor, below.get(name))
    ]
    problems += [f"{name}: missing" for name in sorted(below.keys() - {name for _, name, _ in above})]
    if problems:
        raise CheckpointError(
            f"{other}: {len(problems)} weights do not fit those of {base}. Pass the language model that the "
            f"checkpoint was trained on.\n{listing(problems)}"
        )
    for key, name, tensor in above:
        result = tensor.clone()
        if name in below:
            part = result[: len(below[name])]
            part += sign * below[name].to(result.dtype)
            if not torch.isfinite(result).all():
                raise CheckpointError(
                    f"{other}: {key}: NaN or infinite values. Pass the language model that the checkpoint "
                    "was trained on, or download both again."
                )
        yield key, result


def _fits(name: str, tensor: Tensor, below: Tensor | None) -> bool:
    if not tensor.is_floating_point():
        return False
    if below is None:
        return name.startswith(_NEW)
    more = name in _GROWS and tensor.ndim == below.ndim == 2 and len(tensor) > len(below)
    same = tensor.shape[1:] == below.shape[1:] if more else tensor.shape == below.shape
    return same and below.is_floating_point()


def _describe(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"


def build_parser(description: str | None = __doc__) -> argparse.ArgumentParser:
    """Return the parser of both commands."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    parser.add_argument("--base-model-path", required=True, help="the language model: a folder or owner/name")
    parser.add_argument("--target-model-path", required=True, help="the LLaVA checkpoint")
    parser.add_argument("--delta-path", required=True, help="their difference")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return exit_code(apply_delta, args.base_model_path, args.target_model_path, args.delta_path)


if __name__ == "__main__":
    sys.exit(main())
