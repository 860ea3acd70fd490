"""What the command lines of `llava.eval` share: arguments, their checks, defaults, and how a run ends.

Arguments are checked, and everything that decides an answer is known, before a model is loaded or torch is
even imported; a finished run is thus recognised without loading anything. Does not ask or score.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava import paths
from llava.argtypes import at_least, ratio
from llava.eval.benchmarks.base import DataError, Question
from llava.eval.store.answer_file import AnswerFileError
from llava.eval.store.provenance import Configuration, fingerprint_checkpoint, fingerprint_questions

if TYPE_CHECKING:
    from llava.pruning import Pruner

DTYPES = ("float32", "float16", "bfloat16")


class ModelError(RuntimeError):
    """The checkpoint cannot be loaded as asked; the message says why and what to do."""


def guarded(main: Callable[..., int]) -> Callable[..., int]:
    """Turn what users can cause into one clear line and an exit code: 1 errors, 2 arguments, 130 stopped."""

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except KeyboardInterrupt:
            print("\nstopped; run the same command to go on", file=sys.stderr)
            return 130
        except (AnswerFileError, DataError, ModelError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except BrokenPipeError:  # whoever read our output has gone: `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    return wrapper


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--dtype", choices=DTYPES, help="language model; default float32, float16 on CUDA")
    group.add_argument("--tower-dtype", choices=DTYPES, help="vision tower; default as --dtype")
    group.add_argument(
        "--attn-implementation", default="sdpa", choices=("eager", "sdpa", "flash_attention_2")
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1 ...; default cuda if there is one")
    group.add_argument(
        "--anyres",
        choices=("paper", "llava"),
        help="how LLaVA-NeXT pictures are cut; default paper when pruning, llava when not",
    )


def add_asking_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("asking")
    group.add_argument("--conv-mode", default="vicuna_v1", help="conversation template (default %(default)s)")
    group.add_argument("--batch-size", type=at_least(1), help="questions at a time; default 64, 16 on CUDA")
    group.add_argument("--temperature", type=at_least(0, float), default=0.0, help="0 (default) is greedy")
    group.add_argument("--top_p", "--top-p", type=ratio)
    group.add_argument("--num_beams", "--num-beams", type=at_least(1), default=1)
    group.add_argument("--seed", type=int, default=0, help="of random pruning and of sampling")
    group.add_argument(
        "--no-share-prefix",
        action="store_true",
        help="prefill every question by itself instead of once per image",
    )
    group.add_argument(
        "--workers",
        type=at_least(0),
        help="processes that read pictures; 0: threads; default: whatever pays here",
    )


def model_folder(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Path | str:
    """The checkpoint of --model, checked as far as it can be without loading; the embedded one by default."""
    if is_embedded(args.model):
        folder = Path(args.model) if args.model else paths.BUNDLED_MODEL
        if not (folder / "config.json").is_file():
            raise DataError(f"the embedded model is not at {folder}; give --model (CKPT_DIR, CKPT)")
        return folder
    folder = Path(args.model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise DataError(f"{folder}: no config.json there; --model is the folder of a LLaVA checkpoint")
        return folder
    if args.model.count("/") != 1 or args.model[0] in "./~":  # what is left may be a name on the hub
        parser.error(f"--model {args.model}: no such folder")
    return args.model


def is_embedded(model: str | None) -> bool:
    """True if --model is not given, or names one of the embedded checkpoints."""
    return model is None or Path(model).expanduser().resolve() in (
        paths.BUNDLED_MODEL.resolve(),
        paths.BUNDLED_ANYRES_MODEL.resolve(),
    )


def announce_embedded(model: bool, data: bool) -> None:
    """The first line of standard output when the embedded model or data serve."""
    if not model and not data:
        return
    what = "model and data" if model and data else "model" if model else "data"
    options = (["--model (CKPT_DIR, CKPT)"] if model else []) + (["--data (DATA_DIR)"] if data else [])
    other = " and ".join(options)
    print(f"Using the embedded {what} of playground/tiny; give {other} for your own.", flush=True)


def resolve_pruner(
    args: argparse.Namespace,
    method: str | None,
    budget: int | str | None,
    important_ratio: float | None,
    model: Path | str,
) -> Pruner:
    """The pruner of a run: arguments win over the environment, that over keys of the checkpoint's config.

    No budget anywhere means no pruning. Fills in `args.anyres` by the same order. Raises ValueError.
    """
    from llava.model.settings import resolve_pruning
    from llava.pruning import get_pruner

    number = budget if isinstance(budget, int) else None
    found = resolve_pruning(_stored_config(model), method, number, important_ratio, args.anyres)
    args.anyres = found.anyres
    if budget == "none":
        return get_pruner("none")
    settings = found.pruner.config()
    if settings["method"] != "none" and settings["tokens"] is None:
        raise ValueError(f"method {settings['method']} without a budget: give a number of tokens, or none")
    if settings["method"] == "none" and number is not None and method != "none":
        raise ValueError(f"{number} tokens asked for, but the method set elsewhere is none")
    return get_pruner(found.pruner.name, found.pruner.tokens, found.pruner.important_ratio, args.seed)


def resolve_device(args: argparse.Namespace, model: Path | str, local_rank: int | None = None) -> None:
    """Fill in device, dtypes and batch size; raises ValueError for a device that is not there.

    local_rank: the place of this process among several on this machine; each takes a GPU of its own.
    """
    import torch

    from llava.model.settings import choose_dtypes

    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise ValueError(f"--device {args.device}: no such device ({str(error).splitlines()[0]})") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch sees no CUDA device here")
    if args.device == "cuda" and local_rank is not None and torch.cuda.device_count() > 1:
        args.device = f"cuda:{local_rank % torch.cuda.device_count()}"
    stored = _stored_config(model)
    saved_in = stored.get("torch_dtype") or stored.get("dtype")
    chosen = choose_dtypes(args.dtype, args.tower_dtype, saved_in, device)
    args.dtype, args.tower_dtype = (str(dtype).removeprefix("torch.") for dtype in chosen)
    args.batch_size = args.batch_size or (16 if device.type == "cuda" else 64)


def _stored_config(model: Path | str) -> dict[str, Any]:
    from llava.model.checkpoint.config import read_config

    return read_config(model) if isinstance(model, Path) else {}


def configuration(
    args: argparse.Namespace,
    model: Path | str,
    questions: Sequence[Question],
    pruner: Pruner,
    max_new_tokens: int,
) -> Configuration:
    """What these arguments mean for an answer (see `provenance`). Call `resolve_device` first."""
    return Configuration(
        model=model_name(model),
        weights=_weights(args, model),
        questions=fingerprint_questions(questions),
        pruning=tuple(pruner.config().items()),
        conv_mode=args.conv_mode,
        dtype=args.dtype,
        tower_dtype=args.tower_dtype,
        attn_implementation=args.attn_implementation,
        device=args.device.split(":")[0],
        max_new_tokens=max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        num_beams=args.num_beams,
        seed=args.seed,
        anyres=args.anyres,
    )


def _weights(args: argparse.Namespace, model: Path | str) -> str:
    """Fingerprint of the checkpoint, and of the base that a LoRA or projector-only folder stands on."""
    base = getattr(args, "model_base", None)
    if not base:
        return _fingerprint(model)
    folder = Path(base).expanduser()
    return f"{_fingerprint(model)}+{_fingerprint(folder) if folder.is_dir() else base}"


@functools.cache
def _fingerprint(model: Path | str) -> str:
    return fingerprint_checkpoint(model) if isinstance(model, Path) else "hub"


def model_name(model: Path | str) -> str:
    """LLaVA's name of a checkpoint: its folder's, with the parent's before a `checkpoint-N`."""
    parts = [part for part in Path(model).parts if part not in ("/", ".")]
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


def load(args: argparse.Namespace, model: Path | str) -> tuple[Any, Any, Any]:
    """(tokenizer, model, image_processor) as `resolve_device` decided; unpruned, the engine prunes.

    Every pruning setting is given, so that none of the environment or of config.json is asked for again.
    Raises ModelError and OSError.
    """
    from llava.model.builder import load_pretrained_model

    base = getattr(args, "model_base", None)
    if args.device.startswith("cuda:"):  # kernels of our own are launched on the current device
        import torch

        torch.cuda.set_device(args.device)
    try:
        tokenizer, loaded, image_processor, _ = load_pretrained_model(
            str(model),
            base,
            model_name(model),
            device=args.device,
            dtype=args.dtype,
            tower_dtype=args.tower_dtype,
            attn_implementation=args.attn_implementation,
            method="none",
            visual_token_num=0,
            important_ratio=0.5,
            anyres=args.anyres,
        )
    except (ValueError, ImportError) as error:
        raise ModelError(str(error)) from error
    return tokenizer, loaded, image_processor


def build_engine(
    args: argparse.Namespace, loaded: tuple[Any, Any, Any], max_new_tokens: int, load_image: Any = None
) -> Any:
    """An engine around what `load` gave."""
    tokenizer, model, image_processor = loaded
    from llava.eval.inference.decode import Decoding
    from llava.eval.inference.engine import Engine

    decoding = Decoding(max_new_tokens, args.temperature, args.top_p, args.num_beams)
    return Engine(
        model,
        tokenizer,
        image_processor,
        args.conv_mode,
        decoding,
        args.batch_size,
        args.seed,
        not args.no_share_prefix,
        load_image,
        args.anyres,
        workers=getattr(args, "workers", None),
    )


def chunk(questions: Sequence[Question], count: int, index: int) -> list[Question]:
    """LLaVA's chunk `index` of `count`: contiguous slices of ceil(n / count) questions."""
    size = -(-len(questions) // count)
    return list(questions[index * size : (index + 1) * size])


def check_conv_mode(name: str) -> None:
    """Raises ValueError for a conversation template there is not."""
    from llava.conversation import conv_templates

    if name not in conv_templates:
        raise ValueError(f"--conv-mode {name}: no such template; there are {', '.join(conv_templates)}")


def report_problems(problems: Sequence[Any]) -> None:
    """Failures of single questions, at the end, on standard error."""
    if not problems:
        return
    print(f"{len(problems)} questions were not answered:", file=sys.stderr)
    for problem in problems[:50]:
        print(f"  {problem}", file=sys.stderr)
    if len(problems) > 50:
        print(f"  ... and {len(problems) - 50} more", file=sys.stderr)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned for reading: the first to the left, the others to the right."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [header, *rows]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def cell(value: Any, form: str) -> str:
    """A number for a table, a dash where there is none."""
    return "-" if value is None else format(value, form)
