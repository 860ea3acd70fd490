"""Measure a training step at several numbers of visual tokens: seconds and peak memory.

    python -m llava.analysis.efficiency training --dummy-model smol --tokens 576,128,64
    python -m llava.analysis.efficiency training --model CHECKPOINT --batch-size 8 --bf16

A step is what `llava.train` does: encode images, select tokens, project, run the language model, compute the
loss, go backward, and update by AdamW; `full` trains all of the language model and the projector, `lora` an
adapter on the decoder and the projector. Every pass is a process of its own, which takes the steps of
--warmup before it measures --steps of them and its peak memory, so that no setting hides another one's. The
passes of all settings are interleaved, in reversed order in every second round. Medians over all measured
steps are reported. Images and texts are random; a fifth of the text has labels. Without gradient
checkpointing.

Time in the tower is shown separately: --vision_cache of `llava/train/train.py` spends it once per image.
Memory is the most that the process had (CPU: resident memory, weights and libraries included; GPU: allocated
memory).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from llava.analysis.efficiency import options
from llava.argtypes import at_least, comma_separated

TRAINED = ("full", "lora")
GOAL = 3.0  # speedup at 64 tokens
_RANK, _ALPHA = 16, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model").add_mutually_exclusive_group()
    options.add_dummy_model(model, default="smol")
    model.add_argument("--model", type=Path, metavar="FOLDER", help="LLaVA checkpoint to measure instead")
    group = parser.add_argument_group("step")
    group.add_argument(
        "--tokens",
        type=options.numbers,
        default=[576, 128, 64],
        help="visual tokens per image, comma-separated (default: 576,128,64)",
    )
    options.add_ratio(group)
    group.add_argument(
        "--train",
        type=comma_separated(),
        default=list(TRAINED),
        help=f"what is trained, comma-separated (default: {','.join(TRAINED)})",
    )
    group.add_argument(
        "--batch-size", type=at_least(1), default=2, help="samples per step (default: %(default)s)"
    )
    group.add_argument(
        "--text-tokens",
        type=at_least(8),
        default=128,
        help="text tokens per sample (default: %(default)s)",
    )
    group.add_argument("--bf16", action="store_true", help="as --bf16 of train.py (default: float32)")
    group = parser.add_argument_group("measuring")
    group.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if available, else cpu)")
    group.add_argument(
        "--rounds", type=at_least(1), default=2, help="passes per setting (default: %(default)s)"
    )
    group.add_argument(
        "--warmup", type=at_least(0), default=1, help="steps before these, per pass (default: %(default)s)"
    )
    group.add_argument(
        "--steps", type=at_least(1), default=2, help="measured steps per pass (default: %(default)s)"
    )
    group.add_argument(
        "--seed", type=int, default=0, help="seed of weights, images and texts (default: %(default)s)"
    )


def check(args: argparse.Namespace) -> None:
    from importlib.util import find_spec

    options.check_device(args)
    unknown = [name for name in args.train if name not in TRAINED]
    if unknown or not args.train:
        raise ValueError(f"--train: {''.join(unknown[:1])!r} is unknown. Choose from {', '.join(TRAINED)}.")
    if "lora" in args.train and not find_spec("peft"):
        raise ValueError("--train: lora needs peft. Run: pip install 'vispruner[train]'")
    if args.model is not None and not (args.model / "config.json").is_file():
        raise ValueError(f"--model {args.model}: no config.json. Pass the folder of a checkpoint.")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from llava.analysis.efficiency.timing import machine

    settings = [(trained, tokens) for trained in args.train for tokens in args.tokens]
    taken: dict[tuple[str, int], list[dict[str, Any]]] = {setting: [] for setting in settings}
    for turn in range(args.rounds):
        for trained, tokens in settings if turn % 2 == 0 else settings[::-1]:
            print(f"round {turn + 1}/{args.rounds}: {trained}, {tokens} tokens", file=sys.stderr)
            taken[trained, tokens].append(_in_process(args, trained, tokens))
    rows = [{"train": trained, **_row(tokens, taken[trained, tokens])} for trained, tokens in settings]
    for row in rows:  # compared with the most tokens of the same kind
        most = max((one for one in rows if one["train"] == row["train"]), key=lambda one: one["tokens"])
        for name, key in (("speedup", "seconds"), ("speedup_processor", "processor_seconds")):
            if row[key]:
                row[name] = round(most[key] / row[key], 3)
        rest = [(one["processor_seconds"] or one["seconds"]) - one["tower_seconds"] for one in (most, row)]
        row["speedup_without_tower"] = round(rest[0] / rest[1], 3)
        row["memory_ratio"] = round(row["peak_bytes"] / most["peak_bytes"], 3)
    names = ("batch_size", "text_tokens", "bf16", "rounds", "warmup", "steps", "ratio", "seed")
    return {
        "machine": machine(args.device),
        "model": args.dummy_model if args.model is None else args.model.name,
        "rows": rows,
        "goal": GOAL,
        **{name: getattr(args, name) for name in names},
    }


def _row(tokens: int, passes: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarize the passes of one setting."""

    def median(name: str) -> float | None:
        values = [one for taken in passes for one in taken[name] if one is not None]
        return round(statistics.median(values), 4) if values else None

    return {
        "tokens": tokens,
        "visual_tokens": passes[0]["visual_tokens"],
        "seconds": median("seconds"),
        "processor_seconds": median("processor"),
        "tower_seconds": median("tower"),
        "peak_bytes": max(one["peak_bytes"] for one in passes),
        "trained_parameters": passes[0]["trained_parameters"],
        "measured_steps": sum(len(one["seconds"]) for one in passes),
    }


def _in_process(args: argparse.Namespace, trained: str, tokens: int) -> dict[str, Any]:
    """Measure one pass in a new process."""
    code = f"from {__name__} import one_pass; one_pass()"
    given = json.dumps({**vars(args), "trained": trained, "kept": tokens}, default=str)
    done = subprocess.run([sys.executable, "-c", code], input=given, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{trained}, {tokens} tokens: the process ended with code {done.returncode}.")
    return json.loads(done.stdout.splitlines()[-1])


def one_pass() -> None:
    """Measure the pass that standard input describes; print one JSON document. Runs in its own process."""
    print(json.dumps(measure_pass(argparse.Namespace(**json.load(sys.stdin)))))


def measure_pass(given: argparse.Namespace) -> dict[str, Any]:
    """Take the steps of one pass.

    Args:
        given: the command's arguments, `trained` (of `TRAINED`) and `kept` (visual tokens).

    Returns:
        seconds, processor and tower, a list each; peak_bytes, visual_tokens, trained_parameters.
    """
    import torch

    from llava.analysis.efficiency.timing import seconds_of
    from llava.train.trainer import peak_memory

    device = torch.device(given.device)
    torch.manual_seed(given.seed)
    model, step = _prepared(given, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    llava = step.vision.model
    batch = _batch(given, llava.config.vocab_size, llava.get_vision_tower().image_size, device)

    def train() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=given.bf16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    found: dict[str, list[float | None]] = {"seconds": [], "processor": [], "tower": []}
    for turn in range(given.warmup + given.steps):
        step.vision.seconds = 0.0
        seconds, processor = seconds_of(train, device)
        if turn >= given.warmup:
            for name, value in zip(found, (seconds, processor, step.vision.seconds), strict=True):
                found[name].append(value)
    return {
        **found,
        "peak_bytes": peak_memory(),
        "visual_tokens": step.counts.visual_tokens // step.counts.images,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


class TimedTower:
    """Encodes the images of batches as training without a cache does, and measures how long that takes."""

    def __init__(self, model: Any, device: Any) -> None:
        self.model, self.device, self.seconds = model, device, 0.0

    def encode(self, images: Any, image_sizes: Any, image_paths: Any, cues: Any) -> Any:
        from llava.analysis.efficiency.timing import seconds_of

        found = []
        spent = seconds_of(
            lambda: found.extend(self.model.encode_vision(images, image_sizes, cues)), self.device
        )
        self.seconds += spent[0] if spent[1] is None else spent[1]  # of the processor, on a CPU
        return found


def _prepared(given: argparse.Namespace, device: Any) -> tuple[Any, Any]:
    """Return the model, wrapped for LoRA if that is trained, and its training step."""
    import tempfile

    import torch

    from llava.analysis.efficiency.dummy_models import build_model
    from llava.model.builder import load_pretrained_model
    from llava.train.arguments import ModelArguments, TrainingArguments
    from llava.train.budgets import Budgets
    from llava.train.forward import TrainingForward
    from llava.train.setup import add_lora, detach_tower, narrow_frozen

    if given.model is None:
        model = build_model(given.dummy_model, device, "float32", "float32", seed=given.seed)
    else:
        model = load_pretrained_model(given.model, device=str(device), dtype="float32")[1]
    tower = detach_tower(model)
    tower.to(torch.bfloat16 if given.bf16 else torch.float32)
    budgets = Budgets.parse("vispruner", str(given.kept), given.ratio, given.seed).within(tower.num_patches)
    model.train()
    model.requires_grad_(given.trained == "full")
    wrapped = model
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        bf16=given.bf16,
        use_cpu=device.type == "cpu",
        lora_r=_RANK,
        lora_alpha=_ALPHA,
        report_to="none",
    )
    if given.trained == "lora":
        wrapped = add_lora(model, ModelArguments(model_name_or_path="measured"), arguments).to(device)
    model.get_model().mm_projector.requires_grad_(True)
    narrow_frozen(model, arguments)
    model.train_step = step = TrainingForward(budgets.pruners[0], TimedTower(model, device))
    return wrapped, step


def _batch(given: argparse.Namespace, vocabulary: int, side: int, device: Any) -> dict[str, Any]:
    """Make random samples: an image first, then text of which the last fifth has labels."""
    import torch

    from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX

    generator = torch.Generator().manual_seed(given.seed)
    shape = (given.batch_size, given.text_tokens + 1)
    ids = torch.randint(3, vocabulary, shape, generator=generator)
    labels = torch.full(shape, IGNORE_INDEX)
    answer = -max(1, given.text_tokens // 5)
    labels[:, answer:] = ids[:, answer:]
    ids[:, 1] = IMAGE_TOKEN_INDEX
    images = torch.randn(given.batch_size, 3, side, side, generator=generator)
    return {"input_ids": ids.to(device), "labels": labels.to(device), "images": images.to(device)}


def render(document: dict[str, Any]) -> str:
    columns = {
        "train": lambda row: row["train"],
        "visual tokens": lambda row: row["visual_tokens"],
        "s/step": lambda row: row["seconds"],
        "CPU s/step": lambda row: row["processor_seconds"],
        "s in the tower": lambda row: row["tower_seconds"],
        "speedup": lambda row: row["speedup"],
        "by CPU time": lambda row: row.get("speedup_processor"),
        "cached": lambda row: row["speedup_without_tower"],
        "peak GB": lambda row: round(row["peak_bytes"] / 1e9, 2),
    }
    dtype = "bfloat16 autocast" if document["bf16"] else "float32"
    return "\n".join(
        [
            f"Training step of {document['model']} on {document['machine']['name']}, {dtype}: batches of "
            f"{document['batch_size']}, {document['text_tokens']} text tokens per sample",
            options.table(columns, document["rows"]),
            f"Medians of {document['rows'][0]['measured_steps']} steps. Speedup: over the most tokens (goal "
            f"at 64: {document['goal']:g}); by CPU time, which other programs hardly change; and where the "
            "features of all images are cached.",
        ]
    )
