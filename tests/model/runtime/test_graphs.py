"""Capturing functions: keys, bits, eviction and fallback, with the stand-in of a CUDA graph and on a GPU."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llava.model.runtime import CaptureError, GraphCache, capture
from llava.model.runtime.graphs import is_out_of_memory, same_bits
from llava.model.runtime.stages import repeatable_attention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def affine(x, y):
    return x * 2 + y, (x > y).long()


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def test_a_captured_function_computes_new_inputs(device):
    draw = [torch.rand(3, 4, device=device) for _ in range(4)]
    captured = capture(affine, draw[:2])
    for inputs in (draw[:2], draw[2:], draw[1:3]):
        for found, expected in zip(captured(*inputs), affine(*inputs), strict=True):
            assert torch.equal(found, expected)


def test_outputs_are_overwritten_by_the_next_call_and_copied_by_the_cache(device):
    a, b = torch.ones(2, device=device), torch.zeros(2, device=device)
    captured = capture(lambda x: x + 1, [a])
    first = captured(a)
    captured(b)
    assert first.tolist() == [1, 1]
    graphs = GraphCache()
    first = graphs.run("sum", None, lambda x: x + 1, a)
    graphs.run("sum", None, lambda x: x + 1, b)
    assert first.tolist() == [2, 2] and len(graphs) == 1


def test_every_key_shape_and_dtype_has_its_own_graph(device):
    graphs, x = GraphCache(), torch.rand(4, device=device)
    for key, factor in (("a", 2), ("b", 3)):
        for inputs in (x, x[:2], x.double()):
            found = graphs.run("product", key, lambda one, factor=factor: one * factor, inputs)
            assert torch.equal(found, inputs * factor)
    assert len(graphs) == 6
    # an old key replays what was captured under it
    assert torch.equal(graphs.run("product", "a", lambda one: one * 7, x), x * 2)


def test_the_least_recently_used_graph_is_dropped():
    graphs, x = GraphCache(most_graphs=2), torch.rand(4)
    for key in "abac":
        graphs.run("it", key, lambda one: one + 1, x)
    assert [key[1] for key in graphs._graphs] == ["a", "c"]
    graphs.clear("other")
    assert len(graphs) == 2
    graphs.clear("it")
    assert len(graphs) == 0


def test_other_bits_at_capture_run_eagerly_with_one_warning():
    calls = []

    def changes(x):
        calls.append(1)
        return x + len(calls)

    graphs, x = GraphCache(), torch.zeros(2)
    with pytest.raises(CaptureError, match="other bits"):
        capture(changes, [x])
    with pytest.warns(UserWarning, match="counting: runs without a CUDA graph.*other bits"):
        graphs.run("counting", None, changes, x)
    before = len(calls)
    assert graphs.run("counting", None, changes, x).tolist() == [before + 1] * 2  # no second warning
    assert "other bits" in graphs.refused["counting"]


@pytest.mark.parametrize(
    "error", [RuntimeError("not permitted when stream is capturing"), torch.OutOfMemoryError()]
)
def test_an_error_at_capture_runs_eagerly(error, monkeypatch):
    from llava.model.runtime import graphs as module

    def refuse(*_):
        raise error

    monkeypatch.setattr(module, "_StandIn", refuse)
    graphs, x = GraphCache(), torch.ones(2)
    with pytest.warns(UserWarning, match="it: runs without a CUDA graph"):
        assert graphs.run("it", None, lambda one: one * 2, x).tolist() == [2, 2]
    assert len(graphs) == 0 and graphs.run("it", None, lambda one: one * 3, x).tolist() == [3, 3]


def test_an_error_of_the_function_itself_is_raised():
    def fails(_):
        raise ValueError("of the function")

    with pytest.raises(ValueError, match="of the function"):
        GraphCache().run("it", None, fails, torch.ones(1))


def test_a_capture_is_logged_once(caplog):
    graphs = GraphCache()
    with caplog.at_level(logging.INFO, logger="llava"):
        for _ in range(3):
            graphs.run("it", None, lambda one: one * 2, torch.ones(2, 3))
    assert [record.getMessage().split(" in ")[0] for record in caplog.records] == ["captured it of (2, 3)"]


def test_bits_and_not_values_are_compared():
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.ones(2), torch.ones(3)) and not same_bits(torch.ones(2), torch.ones(2).half())
    assert same_bits(torch.ones(4, 4)[:, 1], torch.ones(4)) and same_bits(torch.empty(0), torch.empty(0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_function_that_looks_at_the_device_runs_eagerly():
    graphs, x = GraphCache(), torch.rand(8, device="cuda")
    with pytest.warns(UserWarning, match="runs without a CUDA graph"):
        found = graphs.run("looking", None, lambda one: one[one > 0.5].sum(), x)
    assert torch.equal(found, x[x > 0.5].sum())
    assert torch.equal(graphs.run("other", None, lambda one: one + 1, x), x + 1)  # capturing still works


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("shape '[2, 3]' is invalid for input of size 5"), False),
        (MemoryError("out of memory"), False),  # of the host: fewer rows would not help
    ],
)
def test_errors_of_a_full_device_are_recognized(error, expected):
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize("other", [torch.ones(1, 4), torch.ones(3, 4).double(), torch.ones(3, 5)])
def test_inputs_of_another_shape_or_dtype_are_refused(other):
    captured = capture(affine, [torch.ones(3, 4), torch.ones(3, 4)])
    with pytest.raises(ValueError, match=r"captured with \(3, 4\)"):
        captured(torch.ones(3, 4), other)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_graphs_of_several_devices_compute_new_inputs():
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        captured = capture(lambda x: x * 2, [torch.ones(3, device=device)])
        assert captured(torch.full((3,), 4.0, device=device)).tolist() == [8.0] * 3


def test_graphs_are_captured_in_a_stream_of_their_device(monkeypatch):
    """A stand-in of torch.cuda: with the stream of another device, a graph would be empty."""
    from llava.model.runtime import graphs as module

    made, used = [], []

    class Stream:
        def __init__(self, device):
            made.append(device)

        def wait_stream(self, _):
            pass

    class Capture:
        def __init__(self, graph, pool, stream, capture_error_mode):
            used.append(stream)

        def __enter__(self):
            pass

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: Capture(None, None, None, None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_stream=lambda _: None))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    module._stream.cache_clear()
    for index in (0, 1, 0):
        device = torch.device("cuda", index)
        module._cuda_graph(lambda x: x, [torch.ones(1)], None, module._stream(device))
    streams = [one for one in used if one is not None]
    assert made == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert streams[0] is streams[2] and streams[0] is not streams[1]
    module._stream.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rows", [64, 96, 256])
def test_attention_with_a_mask_repeats_its_bits(rows):
    """cuDNN's does not, in shapes like these."""
    draw = torch.Generator("cuda").manual_seed(rows)
    same = {"device": "cuda", "dtype": torch.float16, "generator": draw}
    query = torch.randn(rows, 32, 1, 128, **same)
    keys, values = (torch.randn(rows, 32, 256, 128, **same) for _ in range(2))
    lengths = torch.randint(100, 250, (rows, 1), device="cuda", generator=draw)
    seen = torch.arange(256, device="cuda") < lengths
    mask = torch.zeros(rows, 1, 1, 256, device="cuda", dtype=torch.float16)
    mask.masked_fill_(~seen[:, None, None], float("-inf"))
    with repeatable_attention(query.device):
        first, *others = (scaled_dot_product_attention(query, keys, values, mask) for _ in range(4))
    assert all(same_bits(one, first) for one in others)
