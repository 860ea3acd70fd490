"""The diverse part of VisPruner: each backend selects the same, and a backend that fails is replaced."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.oracle_vispruner import select_row
from helpers.selection_inputs import EXACT_TIES, make_inputs
from llava.pruning import base, diversity, get_pruner, kernels


@pytest.mark.parametrize("kind", ["gauss", "cluster", *EXACT_TIES, "zero"])
def test_similarities_without_syncs_select_the_same(kind, monkeypatch):
    """A row with ties or zero norms and one without in a batch: each is selected as if alone."""
    special, normal = (make_inputs(one, 3, 1, 100, 48, 2) for one in (kind, "gauss"))
    features, attention = (
        torch.from_numpy(np.concatenate([a, b])) for a, b in zip(special, normal, strict=True)
    )
    monkeypatch.setattr(diversity, "_similarity_of_rows", diversity._similarity_of_rows_without_syncs)
    kept = get_pruner("vispruner", 20, 0.5).keep(features, attention)
    for row in range(2):
        expected, important = select_row(features[row].numpy(), attention[row].numpy(), 20, 0.5)
        assert kept.indices[row].tolist() == expected
        assert set(kept.indices[row][kept.important[row]].tolist()) == important


def test_similarities_without_syncs_refuse_too_large_features(monkeypatch):
    monkeypatch.setattr(diversity, "_similarity_of_rows", diversity._similarity_of_rows_without_syncs)
    for scale in (1e60, 1e90, 1e200):
        with pytest.raises(ValueError, match="too large"):
            get_pruner("vispruner", 2, 0.5).select(scale * torch.randn(1, 6, 3).double(), torch.rand(1, 1, 6))


def test_a_kernel_that_fails_is_replaced_with_one_warning(monkeypatch):
    monkeypatch.setattr(kernels, "_failed", failed := set())
    monkeypatch.setattr(kernels, "rounds_backend", lambda _: "torch" if failed else "triton")

    def broken(*_):
        raise RuntimeError("no compiler")

    for module in ("attention", "rounds"):  # the modules need Triton
        functions = dict.fromkeys(("mean_attention", "descending", "remove_duplicates"), broken)
        monkeypatch.setitem(sys.modules, f"{kernels.__name__}.{module}", SimpleNamespace(**functions))
    features, attention = map(torch.from_numpy, make_inputs("gauss", 1, 1, 60, 8, 2))
    with pytest.warns(UserWarning, match="falls back to torch.*RuntimeError: no compiler") as caught:
        kept = [get_pruner("vispruner", 16, 0.5).select(features, attention)[0].tolist() for _ in range(2)]
    assert failed == {"triton"} and len(caught) == 1
    assert kept == 2 * [select_row(features[0].numpy(), attention[0].numpy(), 16, 0.5)[0]]


def test_kernels_run_where_the_backend_is_triton(monkeypatch):
    """Every step of a deferred selection is replaced, and long rows use torch."""
    monkeypatch.setattr(kernels, "rounds_backend", lambda _: "triton")
    called = []

    def noting(name, in_torch):
        return lambda *args: called.append(name) or in_torch(*args)

    replaced = {
        "attention": {"mean_attention": base._mean_attention, "descending": base._descending},
        "rounds": {
            "signed_square_cosines": diversity._similarity_of_products,
            "remove_duplicates": diversity.remove_duplicates_in_torch,
        },
    }
    for module, functions in replaced.items():
        noted = {name: noting(name, function) for name, function in functions.items()}
        monkeypatch.setitem(sys.modules, f"{kernels.__name__}.{module}", SimpleNamespace(**noted))
    features, attention = map(torch.from_numpy, make_inputs("gauss", 1, 2, 60, 8, 2))
    pruner = get_pruner("vispruner", 16, 0.5)
    kept, doubt = pruner.keep_deferred(features, attention)
    assert called == ["mean_attention", "descending", "signed_square_cosines", "remove_duplicates"]
    assert not doubt and torch.equal(kept.indices, pruner.select(features, attention))
    monkeypatch.setattr(kernels, "MAX_RESIDUAL", 40)
    called.clear()
    assert torch.equal(kept.indices, pruner.keep_deferred(features, attention)[0].indices)
    assert called == ["mean_attention", "descending"]


def test_backend_is_triton_on_cuda_where_it_is_installed_and_has_not_failed(monkeypatch):
    monkeypatch.setattr(kernels, "_failed", failed := set())
    monkeypatch.delenv("VISPRUNER_ROUNDS", raising=False)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert kernels.rounds_backend("cuda") == "torch"
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    assert kernels.rounds_backend("cuda") == "triton" and kernels.rounds_backend("cpu") == "torch"
    for value in ("triton", "torch"):
        monkeypatch.setenv("VISPRUNER_ROUNDS", value)
        assert kernels.rounds_backend("cuda:1") == value and kernels.rounds_backend("cpu") == "torch"
    monkeypatch.setenv("VISPRUNER_ROUNDS", "triton")
    failed.add("triton")
    assert kernels.rounds_backend("cuda") == "torch"


@pytest.mark.parametrize("value", ["tritn", "Torch", "graph"])
def test_unknown_values_of_the_environment_variable_are_refused(value, monkeypatch):
    pruner = get_pruner("vispruner", 4)
    monkeypatch.setenv("VISPRUNER_ROUNDS", value)
    with pytest.raises(ValueError, match=f"VISPRUNER_ROUNDS: .*'{value}' .choose from triton, torch"):
        pruner.select(torch.randn(1, 20, 3), torch.rand(1, 2, 20))
    with pytest.raises(ValueError, match="VISPRUNER_ROUNDS"):  # so commands refuse it before loading a model
        get_pruner("vispruner", 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_every_backend_keeps_the_same_on_cuda(backend, monkeypatch):
    monkeypatch.setenv("VISPRUNER_ROUNDS", backend)
    for seed, kind in enumerate(["gauss", "cluster", *EXACT_TIES, "zero"]):
        features, attention = map(torch.from_numpy, make_inputs(kind, seed, 5, 576, 64, 4))
        for tokens in (128, 33):
            pruner = get_pruner("vispruner", tokens, 0.5)
            assert torch.equal(
                pruner.select(features.cuda(), attention.cuda()).cpu(), pruner.select(features, attention)
            )
            kept, doubt = pruner.keep_deferred(features.cuda(), attention.cuda())
            assert bool(doubt) == (kind in ("const", "dup", "zero"))
            assert doubt or torch.equal(kept.indices.cpu(), pruner.select(features, attention))
    assert backend not in kernels._failed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_captured_selection_keeps_the_same(backend, monkeypatch):
    """And nothing in it waits for the device."""
    monkeypatch.setenv("VISPRUNER_ROUNDS", backend)
    inputs = [
        [torch.from_numpy(array).cuda() for array in make_inputs("gauss", seed, 5, 576, 64, 4)]
        for seed in (0, 1)
    ]
    features, attention = (tensor.clone() for tensor in inputs[0])
    for method in ("vispruner", "fastervlm", "uniform", "none"):
        pruner = get_pruner(method, 64, 0.5)
        features.copy_(inputs[0][0]), attention.copy_(inputs[0][1])
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            pruner.keep_deferred(features, attention)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            pruner.keep_deferred(features, attention)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept, doubt = pruner.keep_deferred(features, attention)
        for new in reversed(inputs):
            features.copy_(new[0]), attention.copy_(new[1])
            graph.replay()
            assert not doubt and torch.equal(kept.indices, pruner.select(*new))
        features[3, 7] = float("nan")
        attention[2, 1, 5] = float("inf")
        graph.replay()
        assert bool(doubt) and int(kept.indices.min()) >= 0 and int(kept.indices.max()) < 576


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [2, 5, 9])
def test_products_of_a_row_do_not_depend_on_the_batch(rows):
    x = torch.randn(rows, 544, 1024, generator=torch.Generator().manual_seed(rows)).double().cuda()
    together = diversity.dot_products(x)
    for row in range(rows):
        assert torch.equal(diversity.dot_products(x[row : row + 1])[0], together[row])


def test_rounds_can_be_followed():
    """Each round is what the selection with that many tokens keeps, and following changes nothing."""
    features, attention = map(torch.from_numpy, make_inputs("cluster", 5, 2, 60, 8, 2))
    residual = base.attention_order(attention)
    rounds = []
    kept = diversity.most_diverse(features, residual, 13, on_round=rounds.append)
    assert torch.equal(kept, diversity.most_diverse(features, residual, 13))
    assert [one.shape[1] for one in rounds] == [52, 44, 36, 28, 20, 13]
    assert torch.equal(rounds[-1], kept)
    for one in rounds:
        for row in range(2):
            wanted, _ = select_row(features[row].numpy(), attention[row].numpy(), one.shape[1], 0.0)
            assert sorted(one[row].tolist()) == wanted
