"""Equality with the reference cases of methods that prune inside the language model.

    PYTHONPATH=.:tests python -m helpers.golden_methods_inside FOLDER [--only METHOD]

FOLDER has cases.json, arrays.npz and recipe.py, which makes weights and inputs.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.decode import Row
from llava.model.inside import prefill
from llava.pruning import get_pruner, list_pruners
from llava.pruning.inside import DecoderPruner

FEATURES, LOGITS = 2e-5, 1e-4  # absolute tolerances


class Mismatch(Exception):
    """Something that has to be equal is not."""


def inside_cases(folder: Path, only: str | None = None) -> Iterator[tuple[str, str, bool]]:
    """Yield method, id and equality of every case that binds ("robust") and whose method exists here."""
    for method, name, reason in compared(folder, only):
        yield method, name, reason is None


def compared(folder: Path, only: str | None = None) -> Iterator[tuple[str, str, str | None]]:
    """Yield method, id, and the first difference (None: equal) of the cases of `inside_cases`."""
    document = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    recipe = _recipe(folder / "recipe.py")
    arrays = np.load(folder / "arrays.npz")
    models: dict[str, Any] = {}
    for case in document["cases"]:
        if not case.get("robust", True) or only not in (None, case["method"]):
            continue
        if case["method"] not in list_pruners():
            continue
        name = case["inputs"]["model"]
        try:
            if name not in models:
                models[name] = _model(recipe, name, document["models"][name])
            with torch.inference_mode():
                _compare(case, models[name], recipe, arrays)
        except (Mismatch, RuntimeError, ValueError) as error:
            yield case["method"], case["id"], str(error)
        else:
            yield case["method"], case["id"], None


def not_implemented(folder: Path) -> dict[str, int]:
    """Return the number of cases by method that does not exist here."""
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))["cases"]
    return dict(Counter(one["method"] for one in cases if one["method"] not in list_pruners()))


def _recipe(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("inside_recipe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _model(recipe: ModuleType, name: str, sizes: dict[str, int]) -> Any:
    """Return a causal model with `get_model`, as LLaVA's classes have it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    weights = recipe.weights(name)
    if recipe.crc_weights(weights) != sizes["crc"]:
        raise Mismatch(f"weights of model {name}: another checksum")
    config = LlamaConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["inter"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        rms_norm_eps=recipe.RMS_EPS,
        rope_theta=recipe.ROPE_THETA,
        max_position_embeddings=recipe.MAX_POS,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({key: torch.from_numpy(one) for key, one in weights.items()})
    model.get_model = lambda: model.model
    return model


def pruner_of(case: dict[str, Any]) -> DecoderPruner:
    """Return the method of a case with its settings."""
    method, params = case["method"], case["params"]
    if method in ("fastv", "vtw"):
        return get_pruner(method, tokens=params.get("keep"), layer=params["K"])
    if method == "pyramiddrop":
        return get_pruner(method, layers=params["layers"], ratios=params["ratios"])
    if method == "sparsevlm":
        if params["preset"] is not None:  # the method's own schedule
            return get_pruner(method, tokens=params["preset"])
        return get_pruner(method, layers=params["layers"], counts=params["keep"])
    if method == "dart":
        visual = case["inputs"]["n_vis"]
        pivots = {name: params[name] for name in ("pivots_visual", "pivots_text")}
        share = int(visual * (1 - params["ratio"]) / sum(pivots.values()))
        keep = params["pivots_visual"] + share * sum(pivots.values())
        return get_pruner(method, tokens=keep, layer=params["K"], **pivots)
    raise Mismatch(f"method {method!r}: its params {params} have no settings here")


def _compare(case: dict[str, Any], model: Any, recipe: ModuleType, arrays: Any) -> None:
    before, visual, after = recipe.inputs(**case["inputs"])
    _same("inputs", recipe.crc(before, visual, after), case["crc"])
    pruner = pruner_of(case)
    depth, n_visual = len(model.model.layers), case["inputs"]["n_vis"]
    ids = (*before.tolist(), IMAGE_TOKEN_INDEX, *after.tolist())
    row = Row(ids, torch.from_numpy(visual))
    per_layer = pruner.visual_per_layer(depth, n_visual)
    _same("visual_per_layer", per_layer, _unrolled(case["visual_per_layer"]))
    _close("mean_visual", np.mean(per_layer), case["mean_visual"], 1e-4)

    watch = _Positions(model.model)
    with watch:
        run = prefill(model, [row], pruner)
        logits = [model.lm_head(run.last)[0]]
        prompt_positions, watch.seen = watch.seen, []
        for _ in range(3):
            token = logits[-1].argmax()[None, None]
            logits.append(model.lm_head(run.advance(model.model.embed_tokens(token)))[0])
    spans = [span.layers for span in run.spans]
    listed = [(one["layer"], one["n_visual"], one["n_new"]) for one in case["stages"]]
    found = [
        (one.stage.layer, len(one.ids), 0 if one.new is None else len(one.new)) for one in run.reductions[0]
    ]
    _same("stages", found, listed)
    for number, (stage, reduction) in enumerate(zip(case["stages"], run.reductions[0], strict=True)):
        _same(f"ids of stage {number}", reduction.ids.tolist(), arrays[stage["ids"]].tolist())
        if stage["features"] is not None:
            _close(f"features of stage {number}", reduction.new, arrays[stage["features"]], FEATURES)
    for want in case["prefill_positions"]:
        first, last = want["layers"]
        expected = want["positions"]
        expected = range(expected) if isinstance(expected, int) else arrays[expected]
        for layers, positions in zip(spans, prompt_positions, strict=True):
            if layers.start <= last and first <= layers.stop - 1:
                _same(f"positions from layer {first}", positions, list(expected))
    steps = [watch.seen[len(spans) * step : len(spans) * (step + 1)] for step in range(3)]
    for step, (positions, want) in enumerate(zip(steps, case["decode_positions"], strict=True)):
        per_layer = [place[0] for layers, place in zip(spans, positions, strict=True) for _ in layers]
        _same(f"positions of step {step + 1}", per_layer, _unrolled(want))
    lengths = [layer.keys.shape[2] for span in run.spans for layer in span.held]
    _same("kv_lengths", lengths, _unrolled(case["kv_lengths"]))
    _close("logits", torch.stack(logits), arrays[case["logits"]], LOGITS)
    if case.get("gen_robust", True):
        _same("generated", [int(one.argmax()) for one in logits], case["generated"])


class _Positions:
    """Records the positions of every call of a decoder's rotary embedding that is for a whole span."""

    def __init__(self, decoder: Any) -> None:
        self.seen: list[list[int]] = []
        self._decoder = decoder

    def __enter__(self) -> _Positions:
        import llava.model.inside as module

        self._module, self._run = module, module._run

        @functools.wraps(self._run)
        def run(decoder, span, hidden, positions):
            self.seen.append(positions[0].tolist())
            return self._run(decoder, span, hidden, positions)

        module._run = run
        return self

    def __exit__(self, *_: object) -> None:
        self._module._run = self._run


def _unrolled(pairs: list[list[int]]) -> list[int]:
    return [value for value, count in pairs for _ in range(count)]


def _same(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise Mismatch(f"{what}: {found} differs from {expected}")


def _close(what: str, found: Any, expected: Any, tolerance: float) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        raise Mismatch(f"{what}: shape {found.shape} differs from {expected.shape}")
    worst = float(np.abs(found.astype(np.float64) - expected).max(initial=0.0))
    if not worst <= tolerance:
        raise Mismatch(f"{what}: differs by {worst:.3g}, more than {tolerance:g}")


def main() -> None:
    """Compare all cases, and print the result as JSON in the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only")
    args = parser.parse_args()
    by_method: dict[str, dict[str, int]] = {}
    failed = []
    for method, name, reason in compared(args.folder, args.only):
        counts = by_method.setdefault(method, {"cases": 0, "equal": 0})
        counts["cases"] += 1
        counts["equal"] += reason is None
        if reason is not None:
            failed.append(name)
            print(f"{name}: {reason[:300]}")
    cases, equal = (sum(one[key] for one in by_method.values()) for key in ("cases", "equal"))
    print(f"not implemented: {not_implemented(args.folder)}")
    print(json.dumps({"cases": cases, "equal": equal, "failed": failed, "by_method": by_method}))


if __name__ == "__main__":
    main()
