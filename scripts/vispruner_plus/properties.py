"""What methods keep: stability, regions of photographs, and properties of the worlds.

    python scripts/vispruner_plus/properties.py stability --methods vispruner,scope,fl2 --tokens 64,32,16
    python scripts/vispruner_plus/properties.py photos --methods vispruner,scope,fl2 --tokens 64,32,16
    python scripts/vispruner_plus/properties.py worlds --methods vispruner,scope,fl2 --tokens 32
    python scripts/vispruner_plus/properties.py time --methods vispruner,scope,fl2 --tokens 64,32

Everything is printed, and written as JSON with --output. Definitions are in docs/vispruner_plus.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import correlation, median
from time import process_time

import candidates  # noqa: F401
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import max_pool2d

from llava.mm_utils import load_image, process_images
from llava.model.builder import load_pretrained_model
from llava.paths import BUNDLED_DATA
from llava.pruning import Pruner, get_pruner
from llava.table import text_table
from llava.tiny import world
from llava.tiny.benchmarks.common import held_out_images

PHOTOS = BUNDLED_DATA.parent / "photos"
SIDE = 24  # patches per side of the bundled tower
CUES = ("projected",)
SEEDS = {"standard": 2_000_000_000, "many-small": 3_000_000_000, "few-large": 4_000_000_000}


class Encoder:
    """The bundled model's tower and projector."""

    def __init__(self) -> None:
        folder = str(BUNDLED_DATA.parent / "llava-tiny")
        _, self.model, self.processor, _ = load_pretrained_model(folder, None, "llava-tiny", device="cpu")

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return features (1, N, C), attention (1, H, N) and cues, all float32."""
        pixels = process_images([image], self.processor, self.model.config)[0]
        seen = self.model.encode_vision([pixels], [image.size])[0]
        features, attention = seen.features.float().clone(), seen.attention.float().clone()
        return features, attention, {"projected": self.project(features)}

    def project(self, features: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.model.get_model().mm_projector(features.to(self.model.dtype)).float().clone()


def methods_of(names: str, tokens: int) -> dict[str, Pruner]:
    """Make the pruners; "vispruner" is there with r = 0.5 and r = 0."""
    found = {}
    for name in names.split(","):
        if name == "vispruner":
            found["vispruner r = 0.5"] = get_pruner(name, tokens, 0.5)
            found["vispruner r = 0"] = get_pruner(name, tokens, 0.0)
        else:
            found[name] = get_pruner(name, tokens)
    return found


def grid(pruner: Pruner, seen: tuple[Tensor, Tensor, dict[str, Tensor]]) -> Tensor:
    """Return which patches are kept: (24, 24) bool."""
    features, attention, cues = seen
    kept = torch.zeros(features.shape[1], dtype=torch.bool)
    kept[pruner.keep(features, attention, cues=cues).indices[0]] = True
    return kept.view(SIDE, SIDE)


def near(kept: Tensor) -> Tensor:
    """Add the eight neighbors of kept patches."""
    return max_pool2d(kept[None, None].float(), 3, 1, 1)[0, 0] > 0


def patches_in(box: tuple[float, float, float, float], size: tuple[int, int]) -> Tensor:
    """Return the patches whose center is in a box of an image, padded to a square: (24, 24) bool."""
    side = max(size)
    left, top = (side - size[0]) / 2, (side - size[1]) / 2
    at = (torch.arange(SIDE) + 0.5) * side / SIDE
    x, y = at - left, at - top
    return ((y >= box[1]) & (y < box[3]))[:, None] & ((x >= box[0]) & (x < box[2]))[None]


def development_images(number: int) -> Iterator[tuple[str, int, Image.Image, world.Scene]]:
    for kind, seed in SEEDS.items():
        for one in held_out_images(number, seed=seed, kind=kind):
            yield kind, one.number, one.pixels, one.scene


def photographs() -> Iterator[tuple[str, Image.Image]]:
    for path in sorted(PHOTOS.glob("*.jpg")):
        yield path.name, load_image(str(path))


def stability(encode: Encoder, args: argparse.Namespace) -> dict:
    """Return the mean IoU of kept sets by source, disturbance, budget and method."""
    images = [("photos", image) for _, image in photographs()]
    images += [("worlds", image) for _, _, image, _ in development_images(args.num_images)]
    sums: dict = {}
    for source, image in images:
        features, attention, cues = encode(image)
        generator = torch.Generator().manual_seed(0)
        half = features.half().float()
        noise = features * (1 + 1e-3 * torch.randn(features.shape, generator=generator))
        for tokens in args.tokens:
            for name, pruner in methods_of(args.methods, tokens).items():
                kept = grid(pruner, (features, attention, cues))
                for what, x in (("float16", half), ("noise 1e-3", noise)):
                    other = grid(pruner, (x, attention, {"projected": encode.project(x)}))
                    both, either = (kept & other).sum().item(), (kept | other).sum().item()
                    key = (source, what, str(tokens))
                    sums.setdefault(key, {}).setdefault(name, []).append(both / either)
    found = {" / ".join(k): {m: 100 * sum(v) / len(v) for m, v in one.items()} for k, one in sums.items()}
    print(
        text_table(["IoU in %", *next(iter(found.values()))], [[k, *_numbers(v)] for k, v in found.items()])
    )
    return found


def photos(encode: Encoder, args: argparse.Namespace) -> dict:
    """Return by budget and method: boxes that are hit, covered share of the boxes and of the attention."""
    regions = json.loads(Path(__file__).with_name("regions.json").read_text(encoding="utf-8"))
    seen = {name: (encode(image), image.size) for name, image in photographs()}
    found: dict = {}
    for tokens in args.tokens:
        for method, pruner in methods_of(args.methods, tokens).items():
            hits, shares, mass = [], [], []
            for name, (inputs, size) in seen.items():
                kept = grid(pruner, inputs)
                attention = inputs[1].double().mean(1)[0].view(SIDE, SIDE)
                mass.append((attention[near(kept)].sum() / attention.sum()).item())
                for left, top, right, bottom in regions[name].values():
                    box = (left * size[0], top * size[1], right * size[0], bottom * size[1])
                    inside = patches_in(box, size)
                    hits.append((kept & inside).any().item())
                    shares.append((near(kept & inside) & inside).sum().item() / inside.sum().item())
            values = [sum(hits), 100 * sum(shares) / len(shares), 100 * sum(mass) / len(mass)]
            found.setdefault(str(tokens), {})[method] = values
    for tokens, methods in found.items():
        rows = [[m, str(v[0]), *_numbers({1: v[1], 2: v[2]})] for m, v in methods.items()]
        print(
            f"\n{tokens} tokens\n" + text_table(["", f"boxes of {len(hits)}", "box area", "attention"], rows)
        )
    return found


def worlds(encode: Encoder, args: argparse.Namespace) -> dict:
    """Return properties of each image, and what each method keeps of its objects."""
    found: dict = {kind: {} for kind in SEEDS}
    for kind, number, image, scene in development_images(args.num_images):
        inputs = encode(image)
        features, attention = inputs[0][0].double(), inputs[1].double().mean(1)[0]
        boxes = [patches_in(item.box, image.size) for item in scene.objects]
        boxes = [box for box in boxes if box.any()]
        objects = torch.stack(boxes).any(0)
        p = attention / attention.sum()
        spectrum = torch.linalg.svdvals(features - features.mean(0)).square()
        spectrum /= spectrum.sum()
        own = {
            "objects": len(boxes),
            "area %": 100 * objects.float().mean().item(),
            "attention on objects %": 100 * p[objects.flatten()].sum().item(),
            "attention spread %": 100 * torch.exp(-(p * p.log()).sum()).item() / len(p),
            "effective rank": torch.exp(-(spectrum * spectrum.clamp(min=1e-300).log()).sum()).item(),
        }
        for tokens in args.tokens:
            for name, pruner in methods_of(args.methods, tokens).items():
                kept = grid(pruner, inputs)
                own[f"{name} {tokens}: tokens on objects %"] = 100 * (kept & objects).sum().item() / tokens
                hit = sum((kept & box).any().item() for box in boxes)
                own[f"{name} {tokens}: objects hit %"] = 100 * hit / len(boxes)
        found[kind][str(number)] = own
    means = {kind: _mean(list(images.values())) for kind, images in found.items()}
    rows = [[key, *_numbers({k: means[k][key] for k in means})] for key in next(iter(means.values()))]
    print(text_table(["mean", *means], rows))
    print({kind: correlations(images) for kind, images in found.items()})
    return {"means": means, "correlations": {k: correlations(v) for k, v in found.items()}, "images": found}


def correlations(images: dict[str, dict[str, float]]) -> dict[str, float]:
    """Correlate, over images, the area of objects with how many more of them r = 0 hits than `fastervlm`."""
    rows, found = list(images.values()), {}
    for key in rows[0]:
        if key.startswith("fastervlm") and key.endswith("objects hit %"):
            other = key.replace("fastervlm", "vispruner r = 0")
            if other in rows[0]:
                gains = [row[other] - row[key] for row in rows]
                found[f"{other} - fastervlm"] = correlation([row["area %"] for row in rows], gains)
    return found


def time(encode: Encoder, args: argparse.Namespace) -> dict:
    """Return the median CPU time of a selection in ms, one thread: by shape, budget and method.

    C = 384, D = 192: features and projected tokens of the bundled model, on development images. C = 1024,
    D = 4096 (LLaVA-1.5-7B): their products with random matrices, since there is no such model here. Methods
    take turns. Projecting all tokens, which the cue "projected" needs, is not part of it.
    """
    torch.set_num_threads(1)
    seen = [encode(image) for _, _, image, _ in development_images(max(1, args.num_images // 3))]
    generator = torch.Generator().manual_seed(0)
    wider = torch.randn(384, 1024, generator=generator), torch.randn(192, 4096, generator=generator)
    found: dict = {}
    for shape in ("C = 384, D = 192", "C = 1024, D = 4096"):
        for tokens in args.tokens:
            taken: dict[str, list[float]] = {}
            for features, attention, cues in [*seen[:1], *seen]:  # the first one warms up
                x, projected = features, cues["projected"]
                if shape != "C = 384, D = 192":
                    x, projected = x @ wider[0], projected @ wider[1]
                for name, pruner in methods_of(args.methods, tokens).items():
                    before = process_time()
                    pruner.keep(x, attention, cues={"projected": projected})
                    taken.setdefault(name, []).append(1000 * (process_time() - before))
            found[f"{shape}, T = {tokens}"] = {m: median(times[1:]) for m, times in taken.items()}
    rows = [[key, *_numbers(values)] for key, values in found.items()]
    print(text_table(["CPU ms", *next(iter(found.values()))], rows))
    return found


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def _numbers(values: dict) -> list[str]:
    return [f"{value:.1f}" for value in values.values()]


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["stability", "photos", "worlds", "time"])
    parser.add_argument("--methods", default="vispruner,scope,fl2")
    parser.add_argument("--tokens", type=lambda text: [int(one) for one in text.split(",")], default=[32])
    parser.add_argument("--num-images", type=int, default=30, help="per world (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    found = {"stability": stability, "photos": photos, "worlds": worlds, "time": time}[args.what](
        Encoder(), args
    )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(_rounded(found)) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
