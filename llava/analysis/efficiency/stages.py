"""The stages of a model as functions that can be timed: vision, selection, projector, prefill, decoding.

`whole.py` prints the result as a report.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.analysis.efficiency.baseline import baseline_tokens
from llava.analysis.efficiency.dummy_models import DUMMY_MODELS, build_model, dummy_image
from llava.analysis.efficiency.timing import Timing, compare, measure, peak_bytes, quotient
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import load_image, process_images
from llava.model import flops
from llava.pruning import Kept, Pruner, get_pruner


def load_model(args: argparse.Namespace) -> Any:
    """Load --dummy-model or --model without pruning; crops are merged as --anyres says."""
    if args.dummy_model:
        model = build_model(
            args.dummy_model, args.device, args.dtype, args.tower_dtype, args.attn_implementation, args.seed
        )
        model.set_pruner("none", anyres="llava" if _frames(args, model) > 1 else args.anyres)
        return model
    from llava.model import load_pretrained_model

    return load_pretrained_model(
        args.model,
        device_map=args.device,
        attn_implementation=args.attn_implementation,
        method="none",
        dtype=args.dtype,
        tower_dtype=args.tower_dtype,
        anyres=args.anyres,
    )[1]


def _frames(args: argparse.Namespace, model: Any) -> int:
    """Count the frames of a question: several crops without anyres are the frames of a video."""
    if args.dummy_model and model.config.image_aspect_ratio != "anyres":
        return DUMMY_MODELS[args.dummy_model].crops
    return 1


@dataclass(frozen=True)
class FixedSelection(Pruner):
    """Return a selection that was made before, so that later stages can be timed alone."""

    kept: Kept | None = None

    def keep(self, *_: Any, **__: Any) -> Kept:
        return self.kept


@dataclass
class PipelineStages:
    """A model with a batch of images and prompts, and every stage as a function."""

    model: Any
    device: str
    pixels: Any  # as from process_images: (B, 3, H, W), or (crops, 3, H, W) per image
    sizes: list[tuple[int, int] | None]
    input_ids: Tensor  # (B, L), one image placeholder in each row
    decoding: Timing | None = None  # of one image, from the file to pixels
    ratio: float = 0.5

    @classmethod
    def prepare(cls, model: Any, args: argparse.Namespace) -> PipelineStages:
        """Decode the image (timed), repeat it for the batch, and draw random prompts."""
        frames, processor = _frames(args, model), model.get_vision_tower().image_processor
        with tempfile.TemporaryDirectory() as folder:
            path = args.image or dummy_image(Path(folder, "image.jpg"))

            def decode() -> Any:
                found = process_images([load_image(path)] * frames, processor, model.config)
                return found if frames > 1 else found[0]

            decoding = measure(decode, "cpu", args.repeats, max(1, args.warmup))
            one, size = decode(), load_image(path).size
        pixels = [one] * args.batch_size if one.ndim == 4 else torch.stack([one] * args.batch_size)
        sizes = [size if frames == 1 else None] * args.batch_size
        ids = _prompts(model, args.batch_size, args.text_tokens, args.seed)
        return cls(model, args.device, pixels, sizes, ids.to(args.device), decoding, args.ratio)

    @classmethod
    def random(
        cls, model: Any, device: str, crops: int, batch: int, text_tokens: int, seed: int, video: bool = False
    ) -> PipelineStages:
        """Draw pixels and prompts: `crops` of an image of 640 x 480, or as many frames of a video."""
        side = model.get_vision_tower().image_size
        shape = (batch, 3, side, side) if crops == 1 else (batch, crops, 3, side, side)
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        sizes = [None if video else (640, 480)] * batch
        ids = _prompts(model, batch, text_tokens, seed).to(device)
        return cls(model, device, pixels if crops == 1 else list(pixels), sizes, ids)

    @property
    def crops(self) -> int:
        """Crops of one image."""
        return self.pixels[0].shape[0] if self.pixels[0].ndim == 4 else 1

    # --- stages ------------------------------------------------------------------------------------------
    def vision(self) -> list[Any]:
        """Compute features and attention of every image, upload and identities of crops included."""
        return self.model.encode_vision(self.pixels, None if None in self.sizes else self.sizes)

    def selection(self, encoded: list[Any], pruner: Pruner) -> list[Kept]:
        """Select tokens."""
        return [pruner.keep(one.features, one.attention, one.keys) for one in encoded]

    def tokens(self, encoded: list[Any], pruners: list[Pruner]) -> list[Tensor]:
        """Select, project and merge."""
        return [self.model.visual_tokens(*pair).embeds for pair in zip(encoded, pruners, strict=True)]

    def prefill(self, visual: list[Tensor], cache: Any = None, ids: Tensor | None = None) -> Tensor:
        """Compute the first new token (B,) of the prompts."""
        out = self.model(
            input_ids=self.input_ids if ids is None else ids,
            visual=visual,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].argmax(-1)

    def first_token(self, pruner: Pruner) -> Tensor:
        """Run vision, selection, projector and prefill."""
        encoded = self.vision()
        return self.prefill(self.tokens(encoded, [pruner] * len(encoded)))

    def generate(self, new_tokens: int = 1) -> Tensor:
        """Answer the questions by the model's own `generate`, images uploaded first: new ids (B, new)."""
        return self.model.generate(
            self.input_ids,
            images=[pixels.to(self.device) for pixels in self.pixels],
            image_sizes=None if None in self.sizes else self.sizes,
            do_sample=False,
            max_new_tokens=new_tokens,
        )

    def baseline_first_token(self, tokens: int | None) -> list[Tensor]:
        """Compute the first token naively: one question at a time, nothing shared, all patches projected."""
        found = []
        for row, (pixels, size) in enumerate(zip(self.pixels, self.sizes, strict=True)):
            visual = baseline_tokens(self.model, pixels.to(self.device), tokens, self.ratio, size)
            found.append(self.prefill([visual], ids=self.input_ids[row, None]))
        return found

    # --- measuring ---------------------------------------------------------------------------------------
    @torch.inference_mode()
    def measure(self, args: argparse.Namespace) -> list[dict[str, Any]]:
        """Measure every method at every budget, stage by stage and to the first token, interleaved."""
        settings = [
            get_pruner(method, None if budget == "none" else budget, self.ratio, args.seed)
            for budget in args.tokens
            for method in (["none"] if budget == "none" else args.methods)
        ]
        settings = list(dict.fromkeys(settings))
        graphs = self.model.runtime.graphs and not args.no_graphs
        self.model.set_runtime(graphs=False)  # stages are timed eagerly first
        encoded = self.vision()
        fixed = {p: [FixedSelection(kept=kept) for kept in self.selection(encoded, p)] for p in settings}
        visual = {p: self.tokens(encoded, fixed[p]) for p in settings}
        stages: dict[str, Callable[[Pruner], Any]] = {
            "selection": lambda p: self.selection(encoded, p),
            "projector": lambda p: self.tokens(encoded, fixed[p]),
            "prefill": lambda p: self.prefill(visual[p]),
        }
        how = (self.device, args.repeats, args.warmup)
        spent = {
            name: compare({p: lambda s=stage, p=p: s(p) for p in settings}, *how)
            for name, stage in stages.items()
        }
        whole = {(p, "optimized"): lambda p=p: self.first_token(p) for p in settings}
        if args.vs:
            whole |= {
                (p, "baseline"): lambda p=p: self.baseline_first_token(p.tokens)
                for p in settings
                if p.name in ("vispruner", "none")
            }
        first_token = compare(whole, *how)
        vision = measure(self.vision, *how)
        rows = []
        for pruner in settings:
            per_token, kv_bytes = self.decode(visual[pruner], args)
            row = {
                "method": pruner.name,
                "tokens": pruner.tokens,
                "settings": pruner.config(),
                "visual_tokens": len(visual[pruner][0]),
                "flops": self.flops(pruner, len(visual[pruner][0])),
                "kv_bytes": kv_bytes,
                "peak_bytes": peak_bytes(whole[pruner, "optimized"], self.device),
                "stages": {
                    "vision": vision.as_json(),
                    **{name: timings[pruner].as_json() for name, timings in spent.items()},
                    "decoded_token": per_token.as_json(),
                },
                "first_token": first_token[pruner, "optimized"].as_json(),
            }
            if (pruner, "baseline") in first_token:
                timings = first_token[pruner, "baseline"], first_token[pruner, "optimized"]
                row |= {"baseline": timings[0].as_json(), **quotient("speedup", *timings)}
            for unpruned in (p for p in settings if p.name == "none"):
                share = first_token[pruner, "optimized"].median / first_token[unpruned, "optimized"].median
                row["first_token_of_unpruned"] = round(share, 4)
            rows.append(row)
        if graphs or args.compile:
            self.model.set_runtime(graphs=graphs, compiled=args.compile)
            self._measure_generate(settings, rows, args)
        return rows

    def _measure_generate(
        self, settings: list[Pruner], rows: list[dict[str, Any]], args: argparse.Namespace
    ) -> None:
        """Add the times of the model's own `generate`, from images to one token and to more."""

        def answer(pruner: Pruner, count: int) -> None:
            self.model.set_pruner(pruner)
            if (found := self.generate(count).shape[1]) != count:
                raise RuntimeError(
                    f"an answer ended after {found} of {count} tokens. Set a lower --new-tokens"
                )

        how, counts = (self.device, args.repeats, max(2, args.warmup)), (1, 1 + args.new_tokens)
        spent = compare({(p, n): partial(answer, p, n) for p in settings for n in counts}, *how)
        for pruner, row in zip(settings, rows, strict=True):
            first, last = (spent[pruner, count] for count in counts)
            row |= {
                "graph_first_token": first.as_json(),
                "graph_of_eager": round(first.as_json()["median_ms"] / row["first_token"]["median_ms"], 4),
                "graph_decoded_token_ms": round(1000 * (last.median - first.median) / args.new_tokens, 4),
            }
            if "baseline" in row:
                speedup = row["baseline"]["median_ms"] / row["graph_first_token"]["median_ms"]
                row["graph_speedup"] = round(speedup, 3)
            for unpruned in (p for p in settings if p.name == "none"):
                row["graph_first_token_of_unpruned"] = round(first.median / spent[unpruned, 1].median, 4)
            if refused := self.model.runtime.captured.refused:
                row["not_captured"] = dict(refused)

    def decode(self, visual: list[Tensor], args: argparse.Namespace) -> tuple[Timing, int]:
        """Time one decoded token after the prompt; also return the bytes of the KV cache after prefill."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        first = self.prefill(visual, cache)
        kv_bytes = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))

        def steps() -> None:
            token = first
            for _ in range(args.new_tokens):
                out = self.model(input_ids=token[:, None], past_key_values=cache, use_cache=True)
                token = out.logits[:, -1].argmax(-1)

        per_token = []
        for _ in range(args.repeats):
            taken = measure(steps, self.device, 1, 0)
            cache.crop(-args.new_tokens)
            processor = None if taken.processor is None else taken.processor / args.new_tokens
            per_token.append((taken.median / args.new_tokens, processor))
        return Timing.of(per_token, 0), kv_bytes

    def flops(self, pruner: Pruner, visual_tokens: int) -> dict[str, int]:
        """Count the FLOPs of the batch, by part and in total."""
        tower = self.model.get_vision_tower()
        vision = flops.VisionShape.from_config({**tower.config.to_dict(), "image_size": tower.image_size})
        cost = flops.pipeline_cost(
            self.model.config,
            vision,
            visual_tokens,
            self.input_ids.shape[1] - 1,
            self.crops,
            pruner.tokens if pruner.name == "vispruner" else None,  # only VisPruner computes similarities
            pruner.important_ratio,
            getattr(self.model.config, "mm_projector_type", None) or "linear",
            tower.select_layer,
        )
        return {part: len(self.input_ids) * value for part, value in cost.flops().items()}


def _prompts(model: Any, batch: int, text_tokens: int, seed: int) -> Tensor:
    """Draw prompts (B, text_tokens + 1) with one image placeholder in the middle of each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (batch, text_tokens + 1), generator=generator)
    ids[:, 0] = 1
    ids[:, text_tokens // 2] = IMAGE_TOKEN_INDEX
    return ids


def weights_bytes(model: Any) -> dict[str, int]:
    """Count the bytes of weights: vision tower, and language model with projector."""
    tower = sum(p.nbytes for p in model.get_vision_tower().parameters())
    return {"vision_tower": tower, "language_model": sum(p.nbytes for p in model.parameters()) - tower}
