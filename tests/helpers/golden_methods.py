"""Compare the pruning methods with recorded outputs of their official code.

    PYTHONPATH=.:tests python -m helpers.golden_methods DIR [--only METHOD]

DIR contains `before/`, `inside/` or both, each with `cases.json`, `arrays.npz` and `recipe.py`. Binding cases
count: indices have to be equal, and features within 2e-5. The last line of the output is JSON:
{"cases": n, "equal": m, "failed": [ids], "by_method": {method: {"cases": n, "equal": m}}}.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from llava.model.anyres import token_layout
from llava.pruning import Kept, TextCue, get_pruner, tome
from llava.pruning.base import CLS_PLACE, NO_PLACE

TOLERANCE = 2e-5
CHECKPOINTS = Path(__file__).resolve().parents[1] / "data" / "model"
Arrays = dict[str, np.ndarray]
Inputs = dict[str, Tensor]


class Outputs:
    """What a case recorded, and comparisons with it."""

    def __init__(self, case: dict[str, Any], arrays: Arrays) -> None:
        self.rows = case["outputs"]
        self.arrays = {
            name.rpartition("/")[2]: torch.from_numpy(value)
            for name, value in arrays.items()
            if name.rpartition("/")[0] == case["id"]
        }

    def equal(self, name: str, found: Sequence[Any]) -> bool:
        """Whether every row has the recorded entry `name`."""
        return [row[name] for row in self.rows] == list(found)

    def equal_if_recorded(self, name: str, found: Sequence[Any]) -> bool:
        """Whether every row has the entry `name`; True if none is recorded."""
        return not any(name in row for row in self.rows) or self.equal(name, found)

    def near(self, name: str, found: Tensor) -> bool:
        """Whether an array has the recorded shape and values."""
        wanted = self.arrays[name]
        return found.shape == wanted.shape and bool((found.double() - wanted).abs().max() <= TOLERANCE)

    def kept(self, kept: Kept, order: Tensor | None) -> bool:
        """Whether the patches are the recorded ones, chosen in the recorded order (if it is known)."""
        in_order = order is None or self.equal_if_recorded("order", order.tolist())
        return self.equal("kept", kept.indices.tolist()) and in_order


def keep(name: str, tokens: int, options: dict, features: Tensor, attention: Tensor | None, cues: Inputs):
    """Run a method; return what it keeps, and the patches in the order of choice (None if it has none)."""
    if attention is None:
        attention = torch.zeros(len(features), 1, features.shape[1])
    pruner = get_pruner(name, tokens, **options)
    chosen: list[Tensor] = []

    def from_selected(selected: Tensor, n_important: int) -> Kept:
        chosen.append(selected)
        indices, rank = selected.sort(dim=1)
        return Kept(indices, rank < n_important)

    with mock.patch.object(Kept, "from_selected", from_selected):
        kept = pruner.keep(features, attention, None, TextCue("", None), cues)
    return kept, chosen[0] if chosen else None


def merged_layout(places: list[Tensor], side: int, grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the order of an image's tokens as (crop, column) under protocol "paper".

    Args:
        places: (K,) places of each crop's columns, the base image first (see `token_layout`).
        side: patches along a crop's side.
        grid: (columns, rows) of tiles.
    """
    indices = torch.stack(places)
    layout = token_layout(indices, side, "paper", "flat", grid=grid)
    kept = indices.shape[1]
    return [(place // kept, place % kept) for place in layout.tolist()]


# --- one function per method: whether a case's inputs give its outputs -------------------------------------
def divprune(case: dict, inputs: Inputs, outputs: Outputs) -> bool:
    x = inputs["projected"]
    return outputs.kept(*keep("divprune", round(case["ratio"] * case["N"]), {}, x, None, {"projected": x}))


def fastervlm(case: dict, inputs: Inputs, outputs: Outputs) -> bool:
    attention = inputs["cls_attention"][:, :, 1:]
    return outputs.kept(*keep("fastervlm", case["budget"], {}, inputs["features"], attention, {}))


def scope(case: dict, inputs: Inputs, outputs: Outputs) -> bool:
    budget, options = case["budget"] // case["B"], {"alpha": case.get("alpha", 1.0)}
    attention = inputs["cls_attention"][:, :, 1:]
    return outputs.kept(*keep("scope", budget, options, inputs["features"], attention, {}))


def hiprune(case: dict, inputs: Inputs, outputs: Outputs) -> bool:
    received = {
        name: inputs[f"attention_{layer}"].double().mean((1, 2))[:, 1:]
        for name, layer in (("received", "deep"), ("received@9/24", "object"))
    }
    features = torch.zeros(case["B"], case["N"], 1)
    options = {"alpha": case.get("alpha", 0.1)}
    return outputs.kept(*keep("hiprune", case["budget"] // case["B"], options, features, None, received))


def cdpruner(case: dict, inputs: Inputs, outputs: Outputs) -> bool:
    return outputs.kept(*keep("cdpruner", case["budget"], {}, inputs["projected"], None, inputs))


def visionzip(case: dict, inputs: Inputs, outputs: Outputs) -> bool:
    options = {name: case[name] for name in ("dominant", "contextual")}
    hidden, attention = inputs["hidden"], inputs["cls_attention"][:, :, 1:]
    cues = {"keys": inputs["keys"].double().mean(1), "cls": hidden[:, 0]}
    kept, _ = keep("visionzip", sum(options.values()), options, hidden[:, 1:], attention, cues)
    return same_visionzip(case, kept, outputs)


def same_visionzip(case: dict, kept: Kept, outputs: Outputs) -> bool:
    positions = [sorted(1 + place for place in row if place != NO_PLACE) for row in kept.indices.tolist()]
    return outputs.equal("dominant", positions) and outputs.near("features", kept.features)


def prumerge(case: dict, inputs: Inputs, outputs: Outputs) -> bool:
    cues = {"last_query": inputs["q"][:, 0], "last_keys": inputs["k"]}
    options = {"adaptive": case["adaptive"]}
    tokens = None if case["adaptive"] else int(case["N"] * case["ratio"]) + 1
    kept, _ = keep(case["method"], tokens, options, inputs["features"], None, cues)
    return same_prumerge(kept, outputs)


def same_prumerge(kept: Kept, outputs: Outputs) -> bool:
    extra = kept.indices.shape[1] - 1
    return (
        outputs.equal("order", kept.indices[:, :-1].tolist())
        and outputs.equal_if_recorded("n_top", kept.important.sum(1).tolist())
        and outputs.equal_if_recorded("n_rest", (kept.groups == extra).sum(1).tolist())
        and outputs.near("features", kept.features)
    )


def tome_rounds(case: dict, inputs: Inputs, outputs: Outputs) -> bool:
    x, metric = inputs["x"].double(), inputs["metric"].double()
    rows, size = x.shape[:2]
    sizes = inputs["size"][..., 0].double() if case["sized"] else torch.ones(rows, size, dtype=torch.float64)
    groups = torch.arange(size).repeat(rows, 1)
    for number, r in enumerate(case["r"]):
        matching = tome.match(x[..., : case["D"]] if number else metric, r, case["class_token"])
        x, sizes = tome.merge(x, sizes, matching)
        groups = tome.regroup(groups, matching)
    return same_tome(x, sizes, groups, outputs)


def same_tome(x: Tensor, sizes: Tensor, groups: Tensor, outputs: Outputs) -> bool:
    members = [
        [[i for i, column in enumerate(row) if column == c] for c in range(x.shape[1])]
        for row in groups.tolist()
    ]
    return outputs.equal("groups", members) and outputs.near("features", x) and outputs.near("sizes", sizes)


def tome_blocks(case: dict, inputs: Inputs, outputs: Outputs) -> bool:
    """Run a small transformer that merges tokens in every layer."""
    weights = {name: value.double() for name, value in inputs.items()}
    x, heads = weights.pop("x"), case["H"]
    rows, size, width = x.shape
    sizes, groups = torch.ones(rows, size, dtype=torch.float64), torch.arange(size).repeat(rows, 1)
    for layer, r in enumerate(case["r"]):
        w = {name: value[layer] for name, value in weights.items()}
        normed = layer_norm(x, (width,), w["ln1_w"], w["ln1_b"], 1e-5)
        parts = linear(normed, w["qkv_w"], w["qkv_b"]).view(rows, x.shape[1], 3, heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        if case["prop_attn"]:
            logits = logits + sizes.log()[:, None, None]
        mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(mixed, w["proj_w"], w["proj_b"])
        matching = tome.match(k.mean(1), r)
        x, sizes = tome.merge(x, sizes, matching)
        groups = tome.regroup(groups, matching)
        inner = linear(layer_norm(x, (width,), w["ln2_w"], w["ln2_b"], 1e-5), w["fc1_w"], w["fc1_b"])
        x = x + linear(inner * torch.sigmoid(1.702 * inner), w["fc2_w"], w["fc2_b"])
    return same_tome(x, sizes, groups, outputs)


def anyres_order(case: dict, inputs: Inputs, outputs: Outputs) -> bool:
    """Compare the order of a grid's tokens; the base image, which the case leaves out, is added first."""
    (wanted,) = outputs.rows
    merges = case["of"] == "visionzip"
    places = [
        [CLS_PLACE, *patches, *[NO_PLACE] * case["contextual"]] if merges else patches
        for patches in wanted["selected"]
    ]
    places = [torch.tensor(one) for one in [places[0], *places]]
    found = merged_layout(places, case.get("side", 24), tuple(case["grid"]))
    return [[crop - 1, slot] for crop, slot in found if crop] == wanted["sequence"]


@functools.cache
def vision_tower(checkpoint: str) -> Any:
    from helpers.checkpoints import load_vision_tower

    return load_vision_tower(CHECKPOINTS / checkpoint)


@torch.no_grad()
def tower(case: dict, inputs: Inputs, outputs: Outputs) -> bool:
    from llava.model.multimodal_encoder.cues import tower_cues

    name = case["of"]
    options = {key: case[key] for key in ("alpha", "dominant", "contextual") if key in case}
    if name.startswith("prumerge"):
        options["adaptive"] = case.get("adaptive", True)
    tokens = case.get("budget", case.get("dominant", 0) + case.get("contextual", 0)) or None
    if tokens is None and "ratio" in case:
        tokens = int(case["N"] * case["ratio"]) + 1
    names = dict.fromkeys(get_pruner(name, tokens, **options).cues)
    read = {cue: f"received@{case['object_layer']}" if "@9/24" in cue else cue for cue in names}
    model, wanted = vision_tower(case["checkpoint"]), tower_cues(list(read.values()))
    features, attention, *found = model(inputs["pixels"], cues=wanted)
    found = {"projected": features, **dict(zip(wanted, found, strict=True))}  # no projector
    kept, order = keep(name, tokens, options, features, attention, {cue: found[read[cue]] for cue in read})
    if name == "visionzip":
        return same_visionzip(case, kept, outputs)
    return same_prumerge(kept, outputs) if name.startswith("prumerge") else outputs.kept(kept, order)


METHODS = {
    "divprune": divprune,
    "fastervlm": fastervlm,
    "scope": scope,
    "hiprune": hiprune,
    "cdpruner": cdpruner,
    "visionzip": visionzip,
    "prumerge": prumerge,
    "prumerge+": prumerge,
    "tome": tome_rounds,
    "tome_blocks": tome_blocks,
    "anyres_order": anyres_order,
    "tower": tower,
}


# --- folders -----------------------------------------------------------------------------------------------
def load_recipe(folder: Path) -> ModuleType:
    """Import recipe.py of a folder, which makes the inputs."""
    spec = importlib.util.spec_from_file_location(f"recipe_{folder.name}", folder / "recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def before_cases(folder: Path, only: str | None = None) -> Iterator[tuple[str, str, bool]]:
    """Yield (method, id, whether it is equal) of the binding cases of a folder `before`."""
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))["cases"]
    recipe = load_recipe(folder)
    with np.load(folder / "arrays.npz") as file:
        arrays = {name: file[name] for name in file.files}
    for case in cases:
        method = case["method"]
        if not case["binding"] or only not in (None, method, case.get("of")):
            continue
        if method not in METHODS:
            print(f"{case['id']}: no such method here: {method}", file=sys.stderr)
            yield method, case["id"], False
            continue
        made = recipe.make_inputs(case) if "crc" in case else {}
        if "crc" in case and recipe.crc(made) != case["crc"]:
            print(f"{case['id']}: recipe.py makes other inputs than those of the case", file=sys.stderr)
            yield method, case["id"], False
            continue
        inputs = {name: torch.from_numpy(value) for name, value in made.items()}
        yield method, case["id"], METHODS[method](case, inputs, Outputs(case, arrays))


def all_cases(folder: Path, only: str | None = None) -> Iterator[tuple[str, str, bool]]:
    """Yield the cases of `before` and `inside`, of those that exist."""
    if (folder / "before").is_dir():
        yield from before_cases(folder / "before", only)
    if (folder / "inside").is_dir():
        from helpers.golden_methods_inside import inside_cases

        yield from inside_cases(folder / "inside", only)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m helpers.golden_methods", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--only", metavar="METHOD", help="compare this method only (default: all)")
    args = parser.parse_args(argv)
    if not any((args.folder / half).is_dir() for half in ("before", "inside")):
        parser.error(f"{args.folder}: contains neither before/ nor inside/")
    failed: list[str] = []
    by_method: dict[str, dict[str, int]] = {}
    for method, name, ok in all_cases(args.folder, args.only):
        counts = by_method.setdefault(method, {"cases": 0, "equal": 0})
        counts["cases"] += 1
        counts["equal"] += ok
        if not ok:
            failed.append(name)
    n, equal = (sum(counts[key] for counts in by_method.values()) for key in ("cases", "equal"))
    for method, counts in sorted(by_method.items()):
        print(f"{method:14} {counts['equal']:4} of {counts['cases']:4}")
    print(json.dumps({"cases": n, "equal": equal, "failed": failed, "by_method": by_method}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
