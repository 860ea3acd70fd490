"""Train a LLaVA: stage 1 (projector), stage 2 (full or LoRA), with all or with pruned visual tokens.

    python llava/train/train.py --model_name_or_path vicuna-7b-v1.5 --version plain \\
        --data_path captions.json --image_folder images --vision_tower clip-vit-large-patch14-336 \\
        --mm_vision_select_layer -2 --mm_projector_type mlp2x_gelu --tune_mm_mlp_adapter True \\
        --output_dir checkpoints/pretrain ...

also by `deepspeed`, `torchrun` and `accelerate launch`; scripts/v1_5 contains LLaVA's recipes. A run whose
output folder contains a checkpoint is resumed. The last line of standard output is one JSON document.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # started by path: this folder would hide modules of the same names
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec

from llava.train.arguments import Arguments, describe, parse_arguments
from llava.train.samples import SampleFile


def train(argv: Sequence[str] | None = None, attn_implementation: str | None = None) -> dict[str, object]:
    """Train as the command line says; return a summary of the run.

    Args:
        argv: arguments (default: those of the process).
        attn_implementation: kernels of the language model, e.g. flash_attention_2 (default: sdpa).

    Raises:
        ValueError, FileNotFoundError: invalid arguments, files or samples; the message says what to do.
    """
    from llava.train.data import read_samples

    arguments = parse_arguments(argv)
    model_args, _, _ = arguments
    model_args.attn_implementation = model_args.attn_implementation or attn_implementation
    return run(arguments, read_samples(arguments))


def run(arguments: Arguments, samples: SampleFile) -> dict[str, object]:
    """Train with parsed arguments and a checked data file; see `train`."""
    from transformers import set_seed

    from llava.train.budgets import Budgets
    from llava.train.data import make_supervised_data_module
    from llava.train.forward import TrainingForward
    from llava.train.setup import build_model
    from llava.train.trainer import LLaVATrainer, last_checkpoint
    from llava.train.vision import TrainingVision

    model_args, data_args, training_args = arguments
    output_dir = Path(training_args.output_dir)
    budgets = Budgets.parse(
        model_args.method, model_args.visual_token_num, model_args.important_ratio, training_args.seed
    )
    recipe = describe(arguments)
    resumed = last_checkpoint(output_dir, recipe)

    set_seed(training_args.seed)
    model, tokenizer, base = build_model(arguments)
    inner = model.get_base_model() if training_args.part == "lora" else model
    if model_args.attn_implementation:
        inner.set_attn_implementation(model_args.attn_implementation)
    tower, vision = inner.get_vision_tower(), None
    if tower is not None:
        budgets = budgets.within(tower.num_patches)
    inner.set_pruner(budgets.pruners[0])
    data = make_supervised_data_module(tokenizer, arguments, inner, samples)
    if data_args.vision_cache:
        dataset = data["train_dataset"]
        vision = TrainingVision(
            inner,
            tower.image_processor,
            data_args.vision_cache,
            data_args.vision_cache_gb,
            budgets.cues,
            load=dataset.load_image,
            writers=training_args.world_size,
        )
        dataset.is_cached = vision.is_cached
    step = TrainingForward(budgets.pruners[0], vision)
    inner.train_step = step
    trainer = LLaVATrainer(
        model=model,
        processing_class=tokenizer,
        args=training_args,
        base=base,
        step=step,
        draw=budgets.draw if budgets.varies else None,
        recipe=recipe,
        **data,
    )
    result = trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    trainer.save_state()
    trainer.save_model()
    inner.train_step = None
    summary = {"output_dir": str(output_dir), **result.metrics, "steps": trainer.state.global_step}
    dataset = data["train_dataset"]
    found = trainer.accelerator.reduce(dataset.found.int().to(training_args.device))
    dataset.found.copy_(found.cpu() > 0)  # by any process
    bad = dataset.bad
    summary["bad_samples"] = len(bad)
    if bad and trainer.is_world_process_zero():
        print(f"{samples.path}: skipped: {samples.describe(bad)}", file=sys.stderr)
    if vision is not None:
        summary |= {"images_encoded": vision.encoded, "images_read": vision.read}  # of this process
    if trainer.is_world_process_zero():
        plot_loss(trainer.state.log_history, output_dir / "loss.png")
    return summary


def plot_loss(history: list[dict], path: Path) -> None:
    """Draw the loss and the learning rate of a run; does nothing without matplotlib."""
    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if not points or not find_spec("matplotlib"):
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    steps, losses = zip(*points, strict=True)
    axis.plot(steps, losses, lw=0.6, alpha=0.4, color="tab:blue")
    width = max(1, len(losses) // 50)
    smooth = [
        sum(losses[max(0, i - width) : i + 1]) / (i + 1 - max(0, i - width)) for i in range(len(losses))
    ]
    axis.plot(steps, smooth, color="tab:blue", label=f"mean of the last {width + 1} entries")
    axis.set(xlabel="step", ylabel="loss (nats per answer token)", title="Training loss")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


def end_together() -> None:
    """Wait for the other processes and close the connections: one that ends earlier can hang at its exit."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def main(argv: Sequence[str] | None = None, attn_implementation: str | None = None) -> int:
    try:
        summary = train(argv, attn_implementation)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted. The same command resumes the last checkpoint.", file=sys.stderr)
        return 130
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(summary), flush=True)
    end_together()
    return 0


if __name__ == "__main__":
    sys.exit(main())
