"""What the parts of `gpu_check.py` share: the device, models on shared weights, and questions."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llava.analysis.efficiency.dummy_models import DUMMY_MODELS, DummyModel, build_model
from llava.analysis.efficiency.stages import PipelineStages
from llava.analysis.efficiency.timing import compare
from llava.pruning import Pruner, get_pruner
from llava.pruning.kernels import rounds_backend

TEXT_TOKENS = 80


CheckStep = tuple[str, Callable[[], Any]]


CheckPart = Callable[["CheckContext"], Iterator[CheckStep]]


class NotMeasuredError(RuntimeError):
    """A measurement is impossible here; the message is the reason."""


@dataclass
class CheckContext:
    """The device, the sizes of the models, and the weights that they share."""

    device: str
    base: DummyModel
    repeats: int
    seed: int
    _parameters: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def prepare(cls, args: argparse.Namespace) -> CheckContext:
        """Choose the models; on a CPU they are cut to two layers and small images, because it rehearses."""
        base = DUMMY_MODELS[args.dummy_model]
        if args.device == "cpu":
            language = {**base.language, "num_hidden_layers": 2}
            tower = {**base.tower, "num_hidden_layers": 3, "image_size": 12 * base.tower["patch_size"]}
            base = replace(base, language=language, tower=tower)
        return cls(args.device, base, args.repeats, args.seed)

    @property
    def on_card(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.on_card else torch.float32

    def kernels(self) -> dict[str, str]:
        """Name the attention kernels."""
        return {
            "language_model": "sdpa",
            "tower": "sdpa",
            "baseline_language_model": "sdpa",
            "baseline_tower": "eager",
            "selection": rounds_backend(self.device),
        }

    def sizes(self, form: str) -> DummyModel:
        """Return the sizes of a form: "1.5" (one crop), "next" (five) or "video" (eight smaller frames)."""
        if form == "1.5":
            return self.base
        like = DUMMY_MODELS["llava-next-7b" if form == "next" else "video-llava-7b"]
        tower = self.base.tower
        if form == "video":
            side = tower["image_size"] // tower["patch_size"] * 2 // 3
            tower = {**tower, "image_size": side * tower["patch_size"]}
        return replace(self.base, tower=tower, crops=like.crops, budgets=like.budgets, extra=like.extra)

    def budgets(self, form: str = "1.5") -> list[int | None]:
        """Return the budgets per crop, all tokens first; None keeps all."""
        return [None, *(budget for budget in self.sizes(form).budgets)]

    def model(self, form: str = "1.5", graphs: bool = True, compiled: bool = False) -> Any:
        """Build a model on the weights that all of them share. On a CPU a stand-in captures, not compiled."""
        made = build_model(self.sizes(form), self.device, self.dtype, seed=self.seed, share=self._parameters)
        self._parameters = dict(made.named_parameters()) | self._parameters
        made.set_runtime(graphs=graphs, compiled=compiled and self.on_card)
        made.set_pruner("none", anyres="llava" if form == "video" else "paper")
        return made

    def questions(self, model: Any, form: str = "1.5", batch: int = 1) -> PipelineStages:
        """Draw images and prompts for a model of this form."""
        return PipelineStages.random(
            model, self.device, self.sizes(form).crops, batch, TEXT_TOKENS, self.seed, video=form == "video"
        )

    def compare(self, runs: dict[str, Callable[[], Any]], repeats: int | None = None) -> dict[str, Any]:
        """Time interleaved variants; warm-up includes what is captured on first use."""
        with torch.inference_mode():
            found = compare(runs, self.device, repeats or self.repeats, 2 if self.on_card else 1)
        return {name: timing.as_json() for name, timing in found.items()}

    def release(self) -> None:
        """Free what the last part built, except for the shared weights."""
        gc.collect()
        if self.on_card:
            torch.cuda.empty_cache()


def pruner_of(budget: int | None) -> Pruner:
    """Return VisPruner at a budget, no pruning for None."""
    return get_pruner("none" if budget is None else "vispruner", budget)


def name_of(budget: int | None) -> str:
    return "none" if budget is None else str(budget)


def graphs_of(model: Any) -> dict[str, Any]:
    """Return the graphs that a model holds, and the stages that could not be captured, with the reasons."""
    found = {"graphs": len(model.runtime.captured)}
    failed = dict(model.runtime.captured.refused)
    return {**found, "not_captured": failed} if failed else found


def answer(stages: PipelineStages, budget: int | None, new_tokens: int = 1) -> Tensor:
    """Ask the model itself, from pixels on the device to new ids (B, new)."""
    stages.model.set_pruner(pruner_of(budget))
    return stages.generate(new_tokens)


def visual_tokens(model: Any, images: Tensor, budget: int | None) -> list[Any]:
    """Turn images on the device into projected tokens: tower, row, selection and projector."""
    return model.visual_tokens_deferred(model.encode_vision(images), pruner_of(budget))
