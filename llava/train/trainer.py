"""LLaVA's trainer on transformers' `Trainer`: sampler, groups of parameters, checkpoints, log.

Checkpoints contain what was trained, in LLaVA's files, with config and tokenizer of the base:

- stage 1: mm_projector.bin;
- LoRA: adapter_config.json, adapter_model.safetensors, non_lora_trainables.bin;
- full: model.safetensors.

A checkpoint-N folder is complete when it contains `COMPLETE`, which is written last.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from llava.model.checkpoint.find import PROJECTOR, TRAINABLES
from llava.model.checkpoint.write import TOKENIZER_FILES, copy_files, write_config
from llava.train.forward import StepCounts, TrainingForward
from llava.train.sampler import LengthGroupedSampler
from llava.train.setup import (
    gathered,
    is_projector,
    load_lora,
    load_projector,
    name_from_elsewhere,
)

COMPLETE = "complete.json"


class LLaVATrainer(Trainer):
    """Trains what `llava.train.setup.build_model` made.

    Args:
        base: folder of the base, whose tokenizer files are copied into checkpoints.
        step: the model's `train_step`.
        draw: (global step, micro step) -> pruner of that batch; None keeps `step.pruner`.
        recipe: arguments of the run, held against those of a checkpoint when it is resumed.
    """

    def __init__(
        self,
        *args: Any,
        base: Path,
        step: TrainingForward,
        draw: Callable[[int, int], Any] | None = None,
        recipe: dict[str, object] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # LLaVA's loss is the mean of the means of all batches; transformers' is that over all tokens.
        self.model_accepts_loss_kwargs = False
        self.base, self.step, self.draw, self.recipe = base, step, draw, recipe or {}
        self._last_batch = (-1, 0)  # its step, and the batches before it in that step
        self._since = time.monotonic()
        self._steps_before = 0

    @property
    def llava(self) -> Any:
        """The LLaVA model, without peft's wrapper."""
        return self.model.get_base_model() if self.args.part == "lora" else self.model

    # --- data --------------------------------------------------------------------------------------------
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if dataset is None or not self.args.group_by_modality_length:
            return super()._get_train_sampler(dataset)
        return LengthGroupedSampler(
            self.args.train_batch_size,
            world_size=self.args.world_size * self.args.gradient_accumulation_steps,
            lengths=dataset.modality_lengths,
            group_by_modality=True,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )

    # --- optimizer ---------------------------------------------------------------------------------------
    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer with LLaVA's groups: decay and no decay, twice with `mm_projector_lr`."""
        if self.optimizer is None:
            chosen = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, chosen)
            self.optimizer = kind(
                parameter_groups(
                    chosen,
                    self.get_decay_parameter_names(chosen),
                    self.args.weight_decay,
                    self.args.mm_projector_lr,
                ),
                **options,
            )
        return self.optimizer

    # --- steps -------------------------------------------------------------------------------------------
    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run one batch, with the pruner of this step."""
        step, before = self.state.global_step, self._last_batch
        self._last_batch = (step, before[1] + 1 if before[0] == step else 0)  # an epoch may end within a step
        if self.draw is not None:
            self.step.pruner = self.draw(*self._last_batch)
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add throughput, tokens and memory of this process to the log of every few steps."""
        if "loss" in logs:
            logs = {**logs, **self._rates()}
        super().log(logs, start_time)

    def _rates(self) -> dict[str, float]:
        counts, now = self.step.counts, time.monotonic()
        seconds, steps = max(now - self._since, 1e-9), self.state.global_step - self._steps_before
        self.step.counts, self._since, self._steps_before = StepCounts(), now, self.state.global_step
        if not counts.samples or not steps:
            return {}
        rates = {
            "seconds_per_step": round(seconds / steps, 4),
            "samples_per_second": round(counts.samples / seconds, 3),
            "tokens_per_second": round(counts.tokens / seconds, 1),
            "visual_tokens_per_image": round(counts.visual_tokens / max(counts.images, 1), 1),
            "memory_gb": round(peak_memory() / 1e9, 3),
            "eta_minutes": round((self.state.max_steps - self.state.global_step) * seconds / steps / 60, 1),
        }
        if counts.unlabeled:
            rates["samples_without_label"] = counts.unlabeled
        return rates

    # --- checkpoints -------------------------------------------------------------------------------------
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the trained weights in LLaVA's files. All processes must call it."""
        folder = Path(output_dir or self.args.output_dir)
        if self.args.part == "full":
            super().save_model(str(folder), _internal_call)
        else:
            trained = self._trained()
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                self._save_part(folder, trained)
        if self.args.should_save:
            self._save_settings(folder)

    def _trained(self) -> dict[str, Tensor]:
        """Return all trained weights, on the CPU of the process that saves; {} on the others."""
        found = {
            name: p for name, p in self.model.named_parameters() if p.requires_grad or is_projector(name)
        }
        with gathered(list(found.values())):
            if not self.args.should_save:
                return {}
            return {name: p.detach().cpu().clone() for name, p in found.items()}

    def _save_part(self, folder: Path, trained: dict[str, Tensor]) -> None:
        if self.args.part == "projector":
            torch.save(trained, folder / PROJECTOR)
            return
        adapter = {name: tensor for name, tensor in trained.items() if ".lora_" in name}
        self.model.save_pretrained(str(folder), state_dict=adapter, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        torch.save({n: t for n, t in trained.items() if n not in adapter}, folder / TRAINABLES)

    def _save_settings(self, folder: Path) -> None:
        """Write config.json and copy the base's tokenizer, so that the folder loads from everywhere."""
        config = self.llava.config
        entries = json.loads(config.to_json_string(use_diff=False))
        entries["use_cache"] = True
        entries["model_type"] = type(config).model_type  # also of a base that is a bare language model
        entries["architectures"] = [type(self.llava).__name__]
        if tower := getattr(config, "mm_vision_tower", None):
            entries["mm_vision_tower"] = name_from_elsewhere(tower)
        entries.pop("anyres_protocol", None)
        entries.pop("_name_or_path", None)
        write_config(folder, entries)
        if self.args.part == "projector":
            return
        for one in TOKENIZER_FILES:  # transformers' have a class name that LLaVA cannot read
            (folder / one).unlink(missing_ok=True)
        copy_files(self.base, folder, TOKENIZER_FILES)
        tokenizer = self.processing_class
        if added := getattr(tokenizer, "tokens_added_by_training", None):
            path = folder / "added_tokens.json"
            before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            path.write_text(json.dumps(before | added, indent=2) + "\n", encoding="utf-8")
        self.llava.generation_config.to_json_file(str(folder / "generation_config.json"))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            (folder / COMPLETE).unlink(missing_ok=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            text = json.dumps({"step": self.state.global_step, "recipe": self.recipe}, indent=2)
            (folder / COMPLETE).write_text(text + "\n", encoding="utf-8")
            if limit:  # older ones are deleted when this one is complete
                for old in checkpoints(Path(self.args.output_dir))[:-limit]:
                    shutil.rmtree(old, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self.args.part == "projector":
            load_projector(self.model, folder / PROJECTOR)
        elif self.args.part == "lora":
            load_lora(self.model, folder)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def parameter_groups(
    model: torch.nn.Module, decayed: list[str], weight_decay: float, projector_lr: float | None
) -> list[dict[str, Any]]:
    """Return LLaVA's groups: decay, no decay; with a rate of the projector, the same of the projector.

    Args:
        decayed: names of parameters with weight decay: all but norms and biases.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = set(decayed)

    def group(decay: bool, of_projector: bool | None, **more: float) -> dict[str, Any]:
        chosen = [
            p
            for name, p in trained.items()
            if (name in names) == decay and of_projector in (None, "mm_projector" in name)
        ]
        return {"params": chosen, "weight_decay": weight_decay if decay else 0.0, **more}

    if projector_lr is None:
        return [group(True, None), group(False, None)]
    rest = [group(True, False), group(False, False)]
    return [*rest, group(True, True, lr=projector_lr), group(False, True, lr=projector_lr)]


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoint folders of a run, by step."""
    found = [path for path in output_dir.glob("checkpoint-*") if (path / COMPLETE).is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(output_dir: Path, recipe: dict[str, object]) -> Path | None:
    """Return the checkpoint to resume, None if there is no complete one.

    Raises:
        ValueError: the run has other arguments than the checkpoint.
    """
    found = checkpoints(output_dir)
    for path in output_dir.glob("checkpoint-*"):
        if path not in found:
            print(f"{path}: incomplete, the run was stopped while it was written; ignored", file=sys.stderr)
    if not found:
        return None
    before = json.loads((found[-1] / COMPLETE).read_text(encoding="utf-8"))["recipe"]
    now = json.loads(json.dumps(recipe))
    other = [name for name in now if before.get(name, now[name]) != now[name]]
    if other:
        first = "; ".join(
            f"{name} is {before[name]!r} there, {now[name]!r} in this run" for name in other[:5]
        )
        raise ValueError(
            f"{found[-1]}: cannot resume: {first}. Restore the arguments, or use a new --output_dir."
        )
    return found[-1]


def peak_memory() -> int:
    """Return the most bytes in use so far: of the GPU, or of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
