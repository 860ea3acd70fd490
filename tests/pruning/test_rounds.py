"""Ways to run the selection that serve a GPU, against the rounds in torch and the oracle."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.oracle_vispruner import select_row
from helpers.rounds_cases import compare
from helpers.selection_inputs import EXACT_TIES, make_inputs
from llava.pruning import get_pruner, vispruner

CARD = torch.cuda.is_available()
ROOT = Path(__file__).resolve().parents[2]


def test_the_kernel_thins_like_torch():
    """Ties and zero norms included; without a card the kernel is interpreted, a tenth of a second each."""
    pytest.importorskip("triton")
    if CARD:
        assert compare(2000, device="cuda") == 2000
        return
    made = subprocess.run(
        [sys.executable, "-m", "helpers.rounds_cases", "20"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        },
    )
    assert made.stdout.split() == ["20"], made.stderr


@pytest.mark.parametrize("kind", ["gauss", "cluster", *EXACT_TIES, "zero"])
def test_similarities_in_few_launches_select_the_same(kind, monkeypatch):
    """Rows with ties and zero norms beside rows without: each is what it is alone."""
    odd, plain = (make_inputs(one, 3, 1, 100, 48, 2) for one in (kind, "gauss"))
    features, attention = (torch.from_numpy(np.concatenate([a, b])) for a, b in zip(odd, plain, strict=True))
    monkeypatch.setattr(vispruner, "_similar_rows", vispruner._similar_rows_in_few_launches)
    kept = get_pruner("vispruner", 20, 0.5).keep(features, attention)
    for row in range(2):
        expected, important = select_row(features[row].numpy(), attention[row].numpy(), 20, 0.5)
        assert kept.indices[row].tolist() == expected
        assert set(kept.indices[row][kept.important[row]].tolist()) == important


def test_few_launches_refuse_features_that_are_too_large(monkeypatch):
    monkeypatch.setattr(vispruner, "_similar_rows", vispruner._similar_rows_in_few_launches)
    for scale in (1e60, 1e90, 1e200):
        with pytest.raises(ValueError, match="too large"):
            get_pruner("vispruner", 2, 0.5).select(scale * torch.randn(1, 6, 3).double(), torch.rand(1, 1, 6))


def test_what_fails_is_left_out_with_a_warning(monkeypatch):
    """As on a card whose compiler and graphs both fail: rounds in torch, told once each."""
    monkeypatch.setattr(vispruner, "_failed", failed := set())
    ways = ["triton", "graph", "torch"]
    monkeypatch.setattr(vispruner, "rounds_run_on", lambda _: next(way for way in ways if way not in failed))

    def broken(*_):
        raise RuntimeError("no compiler")

    package = importlib.import_module("llava.pruning.kernels")
    for name in ("rounds", "graph"):
        monkeypatch.setitem(sys.modules, f"{package.__name__}.{name}", SimpleNamespace(thin=broken))
        monkeypatch.setattr(package, name, SimpleNamespace(thin=broken), raising=False)
    features, attention = map(torch.from_numpy, make_inputs("gauss", 1, 1, 60, 8, 2))
    with pytest.warns(UserWarning, match="goes on without (triton|graph): RuntimeError: no compiler") as told:
        kept = get_pruner("vispruner", 16, 0.5).select(features, attention)
    assert failed == {"triton", "graph"} and len(told) == 2
    assert kept[0].tolist() == select_row(features[0].numpy(), attention[0].numpy(), 16, 0.5)[0]


def test_the_environment_picks_a_way(monkeypatch):
    monkeypatch.setattr(vispruner, "_failed", set())
    assert vispruner.rounds_run_on("cpu") == "torch"
    monkeypatch.setattr(vispruner, "find_spec", lambda name: None)
    assert vispruner.rounds_run_on("cuda") == "graph"
    monkeypatch.setattr(vispruner, "find_spec", lambda name: object())
    assert vispruner.rounds_run_on("cuda") == "triton"
    for way in ("triton", "graph", "torch"):
        monkeypatch.setenv("VISPRUNER_ROUNDS", way)
        assert vispruner.rounds_run_on("cuda:1") == way and vispruner.rounds_run_on("cpu") == "torch"


@pytest.mark.gpu
@pytest.mark.skipif(not CARD, reason="needs a CUDA device")
@pytest.mark.parametrize("way", ["triton", "graph", "torch"])
def test_every_way_keeps_the_same_on_cuda(way, monkeypatch):
    monkeypatch.setenv("VISPRUNER_ROUNDS", way)
    for seed, kind in enumerate(["gauss", "cluster", *EXACT_TIES, "zero"]):
        features, attention = map(torch.from_numpy, make_inputs(kind, seed, 5, 576, 64, 4))
        for tokens in (128, 33):
            pruner = get_pruner("vispruner", tokens, 0.5)
            assert torch.equal(
                pruner.select(features.cuda(), attention.cuda()).cpu(), pruner.select(features, attention)
            )
    assert way not in vispruner._failed
