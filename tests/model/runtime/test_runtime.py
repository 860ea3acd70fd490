"""What a model's graphs depend on, and when there are none: weights, modules, kernels, modes, threads."""

from __future__ import annotations

import copy
import gc
import pickle
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.builder import load_pretrained_model
from llava.model.decode import Row
from llava.model.runtime.generation import answer_rows
from llava.model.transformers_compat import run_layer

CHECKPOINT = Path(__file__).parents[2] / "data" / "model" / "ckpt_llava15s"


def load():
    _, model, *_ = load_pretrained_model(str(CHECKPOINT), device="cpu", dtype="float32")
    model.set_runtime(graphs=True)
    return model


@pytest.fixture
def model():
    return load()


def _move_a_weight(model):
    weight = model.get_model().layers[0].mlp.up_proj.weight
    weight.data = weight.data.clone()


def _replace_a_weight(model):
    layer = model.get_model().layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


def _move_a_buffer(model):
    rotary = model.get_model().rotary_emb
    rotary.inv_freq = rotary.inv_freq.clone()


def _wrap_a_module(model):
    mlp = model.get_model().layers[0].mlp
    mlp.up_proj = torch.nn.Sequential(mlp.up_proj)


def _replace_a_function(model):
    mlp = model.get_model().layers[0].mlp
    mlp.forward = types.MethodType(lambda self, x: x, mlp)


def _choose_kernels_of_the_tower(model):
    model.get_vision_tower().vision_tower.set_attn_implementation("eager")


CHANGES = [
    _move_a_weight,
    _replace_a_weight,
    _move_a_buffer,
    _wrap_a_module,
    _replace_a_function,
    _choose_kernels_of_the_tower,
    lambda model: model.bfloat16(),
    lambda model: torch.set_float32_matmul_precision("high"),
]


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_graphs_are_dropped_when_what_they_contain_changes(model, change):
    runtime = model.runtime
    assert runtime.ready(model)
    runtime.run("it", None, lambda x: x + 1, torch.ones(1))
    assert runtime.ready(model) and len(runtime.captured) == 1
    try:
        change(model)
        assert runtime.ready(model) and len(runtime.captured) == 0
    finally:
        torch.set_float32_matmul_precision("highest")


@torch.no_grad()
def test_a_model_runs_eagerly_where_a_graph_would_do_something_else(model):
    runtime, layer = model.runtime, model.get_model().layers[0].mlp.up_proj
    assert runtime.ready(model) and runtime.decodes(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not runtime.ready(model) and not runtime.decodes(model)
    with torch.enable_grad():
        assert not runtime.ready(model)
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        hook = register(lambda *_: None)
        assert not runtime.ready(model)
        hook.remove()
        assert runtime.ready(model)
    layer._hf_hook, layer.forward = None, layer.forward  # as accelerate does
    assert not runtime.ready(model)
    del layer._hf_hook, layer.forward
    assert runtime.ready(model)
    adapter = torch.nn.Sequential(layer)
    adapter._disable_adapters = False  # as peft does; it can become True at any time
    model.get_model().layers[0].mlp.up_proj = adapter
    assert not runtime.ready(model)
    model.get_model().layers[0].mlp.up_proj = layer
    assert runtime.ready(model)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
@torch.no_grad()
def test_the_precision_of_products_may_be_set_either_way(model):
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for value in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = value
            runtime = model.runtime
            runtime.run("it", None, lambda x: x + 1, torch.ones(1))
            assert runtime.ready(model) and not len(runtime.captured)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@torch.no_grad()
def test_the_memory_of_a_model_is_freed_with_its_last_reference():
    model = load()
    gc.collect()
    gc.disable()
    try:
        assert model.runtime.ready(model)
        weight = weakref.ref(model.get_input_embeddings().weight)
        del model
        assert weight() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_threads_that_encode_images_at_once_get_their_own_tokens(model):
    """A graph has one set of buffers."""
    model.set_pruner("vispruner", tokens=4)
    side = model.get_vision_tower().image_size
    draw = torch.Generator().manual_seed(0)
    images = [torch.rand(1, 3, side, side, generator=draw) for _ in range(24)]
    expected = [model.encode_images(one)[0] for one in images]

    @torch.no_grad()
    def encode(image):
        return model.encode_images(image)[0]

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(encode, images))
    assert all(map(torch.equal, found, expected))


@torch.no_grad()
def test_a_pickled_model_has_an_empty_runtime_of_the_same_kind(model):
    assert model.runtime.ready(model)
    other = pickle.loads(pickle.dumps(model))
    assert other.runtime.graphs and other.runtime.ready(other) and not len(other.runtime.captured)
    assert other.get_vision_tower().run_layer is model.get_vision_tower().run_layer
    model.set_runtime(graphs=False, compiled=True)  # nothing is compiled before the first pass
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert other.runtime.compiled and other.runtime.decoder_layer is not None
        assert other.get_vision_tower().run_layer not in (run_layer, None)


@torch.no_grad()
def test_flags_of_an_image_are_not_lost_to_the_graph_of_the_prompt(model, monkeypatch):
    """They are read with the first token, after graphs of the same memory were replayed."""
    side = model.get_vision_tower().image_size
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, IMAGE_TOKEN_INDEX, 7, 8]])
    given = {"images": images, "do_sample": False, "max_new_tokens": 4}
    for method in ("uniform", "vispruner"):  # the graph of the prompt is captured before the second one's
        model.set_pruner(method, tokens=4)
        expected = model.generate(ids, **given)
    monkeypatch.setattr(model, "encode_images", lambda *_: pytest.fail("the careful way was taken"))
    assert torch.equal(model.generate(ids, **given), expected)


@torch.no_grad()
def test_an_image_may_keep_no_tokens(model):
    side = model.get_vision_tower().image_size
    images, ids = torch.rand(1, 3, side, side), torch.tensor([[1, 5, IMAGE_TOKEN_INDEX, 7, 8]])
    model.set_pruner("vispruner", tokens=0)
    found = model.generate(ids, images=images, do_sample=False, max_new_tokens=4)
    without = model.generate(ids[ids != IMAGE_TOKEN_INDEX][None], do_sample=False, max_new_tokens=4)
    assert torch.equal(found, without)
    rows = [Row(tuple(ids[0].tolist()), model.encode_images(images)[0], "image")]
    assert answer_rows(model, rows, 4, set()) == found.tolist()
