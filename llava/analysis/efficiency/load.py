"""What the report on a whole model times: pictures, prompts, and every stage as a function that can be run.

Made by `whole.py`, which turns it into a document. Does not print.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.analysis.efficiency.plain import plain_tokens
from llava.analysis.efficiency.shapes import build_model, shape_named
from llava.analysis.efficiency.timing import Timing, compare, measure, peak_bytes
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import load_image, process_images
from llava.model import flops
from llava.pruning import Kept, Pruner, get_pruner

_SIMILARITIES = ("vispruner",)  # methods whose selection is charged with the product of all pairs


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """(model, image processor) of --shapes or --model; unpruned, crops merged as --anyres says."""
    if args.shapes:
        model = build_model(
            args.shapes, args.device, args.dtype, args.tower_dtype, args.attn_implementation, args.seed
        )
        video = shape_named(args.shapes).crops > 1 and model.config.image_aspect_ratio != "anyres"
        model.set_pruner("none", anyres="llava" if video else args.anyres)
    else:
        from llava.model import load_pretrained_model

        _, model, _, _ = load_pretrained_model(
            args.model,
            device_map=args.device,
            attn_implementation=args.attn_implementation,
            method="none",
            dtype=args.dtype,
            tower_dtype=args.tower_dtype,
            anyres=args.anyres,
        )
    return model, model.get_vision_tower().image_processor


class _Known(Pruner):
    """Hands out a choice that was made before, so that what comes after it can be timed alone."""

    def keep(self, features: Tensor, attention: Tensor, keys: Any = None) -> Kept:
        return self.__dict__["kept"]

    @classmethod
    def of(cls, kept: Kept) -> _Known:
        known = cls()
        known.__dict__["kept"] = kept
        return known


@dataclass
class Load:
    """A batch of pictures and prompts before a model."""

    model: Any
    device: str
    pixels: Any  # of process_images: (B, 3, H, W), or (crops, 3, H, W) for each picture
    sizes: list[tuple[int, int]]
    input_ids: Tensor  # (B, L), the picture's place once in each
    decoding: Timing  # of one picture, from the file to pixels
    crops: int
    weights_bytes: dict[str, int]
    ratio: float = 0.5
    seed: int = 0
    visuals: dict[tuple[str, int | None], list[Tensor]] = field(default_factory=dict)

    @classmethod
    def prepare(cls, model: Any, processor: Any, args: argparse.Namespace) -> Load:
        """Decode the picture (timed), copy it to the batch, draw prompts."""
        frames = 1
        if args.shapes and model.config.image_aspect_ratio != "anyres":
            frames = shape_named(args.shapes).crops
        with tempfile.TemporaryDirectory() as folder:
            path = args.image or draw(Path(folder, "picture.jpg"))

            def decode() -> Any:
                found = process_images([load_image(path)] * frames, processor, model.config)
                return found if frames > 1 else found[0]

            decoding = measure(decode, "cpu", args.repeats, max(1, args.warmup))
            one, size = decode(), load_image(path).size
        pixels = [one] * args.batch_size if one.ndim == 4 else torch.stack([one] * args.batch_size)
        generator = torch.Generator().manual_seed(args.seed)
        ids = torch.randint(
            3, model.config.vocab_size, (args.batch_size, args.text_tokens + 1), generator=generator
        )
        ids[:, 0] = 1
        ids[:, args.text_tokens // 2] = IMAGE_TOKEN_INDEX
        size = None if frames > 1 else size
        return cls(
            model,
            args.device,
            pixels,
            [size] * args.batch_size,
            ids.to(args.device),
            decoding,
            one.shape[0] if one.ndim == 4 else 1,
            weights_bytes(model),
            args.ratio,
            args.seed,
        )

    # --- stages ------------------------------------------------------------------------------------------
    def vision(self) -> list[Any]:
        """Pixels -> features and attention of every picture, upload and identities of crops included."""
        sizes = None if None in self.sizes else self.sizes
        return self.model.encode_vision(self.pixels, sizes)

    def tokens(self, encoded: list[Any], pruners: list[Pruner]) -> list[Tensor]:
        """Selection, projector and merging."""
        return [
            self.model.visual_tokens(one, pruner).embeds for one, pruner in zip(encoded, pruners, strict=True)
        ]

    def prefill(self, visual: list[Tensor], cache: Any = None, ids: Tensor | None = None) -> Tensor:
        """Prompt -> the first new token (B,)."""
        out = self.model(
            input_ids=self.input_ids if ids is None else ids,
            visual=visual,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].argmax(-1)

    def first_token(self, pruner: Pruner) -> Tensor:
        """Vision, selection, projector, prefill in one go."""
        encoded = self.vision()
        return self.prefill(self.tokens(encoded, [pruner] * len(encoded)))

    def plain_first_token(self, tokens: int | None) -> list[Tensor]:
        """The plain way's: one question after the other, nothing shared, everything projected."""
        found = []
        for line in range(len(self.input_ids)):
            visual = plain_tokens(
                self.model, self.pixels[line].to(self.device), tokens, self.ratio, self.sizes[line]
            )
            found.append(self.prefill([visual], ids=self.input_ids[line, None]))
        return found

    # --- measuring ---------------------------------------------------------------------------------------
    @torch.inference_mode()
    def measure(self, args: argparse.Namespace) -> list[dict[str, Any]]:
        """A row for every method and budget; each stage of all of them is timed in turns."""
        settings = {}
        for budget in args.tokens:
            for method in ["none"] if budget == "none" else args.methods:
                settings[method, None if budget == "none" else budget] = get_pruner(
                    method, None if budget == "none" else budget, self.ratio, self.seed
                )
        stages: dict[str, dict[Any, Callable[[], Any]]] = {
            name: {} for name in ("selection", "projector", "prefill", "first_token", "plain")
        }
        encoded = self.vision()
        visuals = {}
        for key, pruner in settings.items():
            kept = [pruner.keep(one.features, one.attention, one.keys) for one in encoded]
            known = [_Known.of(one) for one in kept]
            visuals[key] = self.tokens(encoded, known)
            stages["selection"][key] = lambda p=pruner: [
                p.keep(one.features, one.attention, one.keys) for one in encoded
            ]
            stages["projector"][key] = lambda k=known: self.tokens(encoded, k)
            stages["prefill"][key] = lambda v=visuals[key]: self.prefill(v)
            stages["first_token"][key] = lambda p=pruner: self.first_token(p)
            if args.vs and pruner.name in ("vispruner", "none"):
                stages["plain"][key] = lambda p=pruner: self.plain_first_token(p.tokens)
        how = (self.device, args.repeats, args.warmup)
        spent = {
            name: compare(runs, *how) for name, runs in stages.items() if name not in ("first_token", "plain")
        }
        ends = compare(
            {(name, key): run for name in ("first_token", "plain") for key, run in stages[name].items()}, *how
        )
        vision = measure(self.vision, *how)
        rows = []
        for key, pruner in settings.items():
            memory = peak_bytes(stages["first_token"][key], self.device)
            token, kv_bytes = self.decode(visuals[key], args)
            row = {
                "method": key[0],
                "tokens": key[1],
                "settings": pruner.config(),
                "visual_tokens": len(visuals[key][0]),
                "flops": self.flops(pruner, len(visuals[key][0])),
                "kv_bytes": kv_bytes,
                "peak_bytes": memory,
                "stages": {
                    "vision": vision.as_json(),
                    **{name: spent[name][key].as_json() for name in spent},
                    "decoded_token": token.as_json(),
                },
                "first_token": ends["first_token", key].as_json(),
            }
            if ("plain", key) in ends:
                ours, plain = ends["first_token", key], ends["plain", key]
                row["plain"] = plain.as_json()
                row["ratio"] = round(plain.median / ours.median, 3)
                if ours.processor:
                    row["ratio_processor"] = round(plain.processor / ours.processor, 3)
            if ("none", None) in settings:
                whole = ends["first_token", ("none", None)]
                row["first_token_of_unpruned"] = round(ends["first_token", key].median / whole.median, 4)
            rows.append(row)
        return rows

    def decode(self, visual: list[Tensor], args: argparse.Namespace) -> tuple[Timing, int]:
        """Time of one decoded token behind the prompt, and bytes of keys and values after the prefill."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        first = self.prefill(visual, cache)
        held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))

        def steps() -> None:
            token = first
            for _ in range(args.new_tokens):
                out = self.model(input_ids=token[:, None], past_key_values=cache, use_cache=True)
                token = out.logits[:, -1].argmax(-1)

        taken: list[Timing] = []
        for _ in range(args.repeats):
            taken.append(compare({"it": steps}, self.device, 1, 0)["it"])
            cache.crop(-args.new_tokens)
        per_token = [
            (one.median / args.new_tokens, None if one.processor is None else one.processor / args.new_tokens)
            for one in taken
        ]
        return Timing.of(per_token, 0), held

    def flops(self, pruner: Pruner, visual_tokens: int) -> dict[str, int]:
        """FLOPs by part and in total, of the whole batch."""
        tower = self.model.get_vision_tower()
        vision = flops.VisionShape.from_config({**tower.config.to_dict(), "image_size": tower.image_size})
        charged = pruner.name in _SIMILARITIES and pruner.tokens is not None
        cost = flops.pipeline_cost(
            self.model.config,
            vision,
            visual_tokens,
            self.input_ids.shape[1] - 1,
            self.crops,
            pruner.tokens if charged else None,
            pruner.important_ratio,
            getattr(self.model.config, "mm_projector_type", None) or "linear",
            tower.select_layer,
        )
        return {part: len(self.input_ids) * value for part, value in cost.flops().items()}


def weights_bytes(model: Any) -> dict[str, int]:
    """Bytes of weights: vision tower, language model with projector."""
    tower = sum(p.nbytes for p in model.get_vision_tower().parameters())
    return {"vision_tower": tower, "language_model": sum(p.nbytes for p in model.parameters()) - tower}


def draw(path: Path) -> Path:
    """A picture of 640 x 480 as a camera's file would be: smooth colours and some noise, in JPEG."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:480, 0:640]
    colours = 25 + 200 * np.stack([x / 640, y / 480, (x + y) / 1120], axis=2)
    colours += rng.normal(0, 12, colours.shape)
    Image.fromarray(colours.clip(0, 255).astype("uint8")).save(path, quality=90)
    return path
