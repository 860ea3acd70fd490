"""Canaries: what this package relies on in transformers without a promise. A failure names what changed.

Run them on the oldest and the newest version that pyproject.toml allows.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from llava.model import transformers_compat as compat
from llava.model.prefix_cache import RoomyLayer
from llava.model.tokenizer import SentencePieceTokenizer

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
TOWERS = {
    "clip": (CLIPVisionModel, CLIPVisionConfig(**SMALL, image_size=28, patch_size=14)),
    "dinov2": (Dinov2Model, Dinov2Config(**SMALL, image_size=28, patch_size=14)),
}


def llama(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=50, **options)).eval()


@pytest.mark.parametrize("kernels", ["eager", "sdpa"])
def test_attention_kernels_are_chosen_by_attn_implementation(kernels):
    config = LlamaConfig(**SMALL, vocab_size=50)
    compat.set_attention(config, kernels)
    model = LlamaForCausalLM(config)
    assert compat.attention_of(model.config) == kernels, "config._attn_implementation no longer decides"
    assert model.model.layers[0].self_attn.config._attn_implementation == kernels


@pytest.mark.parametrize("kind", TOWERS)
def test_layers_of_towers_can_be_run_one_by_one(kind):
    model_class, config = TOWERS[kind]
    torch.manual_seed(0)
    model = model_class(config).eval()
    inner = getattr(model, "vision_model", model)
    layers = getattr(inner.encoder, "layer", None) or inner.encoder.layers
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        states = model(images, output_hidden_states=True).hidden_states
        for layer, before, after in zip(layers, states[:-1], states[1:], strict=True):
            assert torch.equal(compat.run_layer(layer, before), after), (
                f"{type(layer).__name__}.forward changed"
            )


def test_the_rotary_embedding_is_rebuilt_with_the_same_values():
    model = llama()
    before = {name: buffer.clone() for name, buffer in model.model.rotary_emb.named_buffers()}
    assert before, "LlamaModel.rotary_emb has no buffers any more: rebuild_rotary may be unnecessary"
    with torch.device("meta"):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    compat.rebuild_rotary(model, torch.device("cpu"))
    for name, buffer in model.model.rotary_emb.named_buffers():
        assert torch.equal(buffer, before[name])


def test_modules_that_must_stay_whole_are_named():
    assert compat.whole_modules(llama()) == ["LlamaDecoderLayer"], "PreTrainedModel._no_split_modules changed"


def test_a_dynamic_cache_is_a_list_of_growing_layers():
    model = llama()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.arange(6)[None], past_key_values=cache)
    assert len(cache.layers) == 2 and all(map(compat.is_growing_layer, cache.layers)), "DynamicCache.layers"
    for layer in cache.layers:
        assert layer.keys.shape == layer.values.shape == (1, 2, 6, 16), "DynamicLayer.keys, .values"
    windowed = DynamicCache(
        config=LlamaConfig(**SMALL, layer_types=["sliding_attention"] * 2, sliding_window=4)
    )
    assert not any(map(compat.is_growing_layer, windowed.layers)), "sliding layers look like growing ones"


def test_a_model_runs_on_cache_layers_of_ours():
    """Masks, positions and attention use `get_seq_length`, `get_mask_sizes`, `update`, `keys`, `values`."""
    model, ids = llama(), torch.arange(10)[None]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(ids).logits
        model(ids[:, :6], past_key_values=cache)
        for number, layer in enumerate(cache.layers):
            buffers = [torch.zeros(1, 2, 16, 16) for _ in range(2)]
            buffers[0][:, :, :6], buffers[1][:, :, :6] = layer.keys, layer.values
            cache.layers[number] = RoomyLayer(*buffers, 0, 6)
        assert cache.get_seq_length() == 6, "the cache's length no longer comes from layer.keys"
        suffix = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(6, 10)]
    torch.testing.assert_close(torch.cat(suffix, dim=1), whole[:, 6:], atol=1e-5, rtol=1e-5)


def test_the_sentencepiece_backend_calls_what_our_tokenizer_overrides():
    for name in (
        *("_tokenize", "_convert_id_to_token", "convert_tokens_to_string", "tokenize"),
        "build_inputs_with_special_tokens",
    ):
        assert hasattr(SentencePieceBackend, name), f"SentencePieceBackend.{name} is gone"
        assert name in vars(SentencePieceTokenizer)
    assert "sp_model" in inspect.getsource(SentencePieceBackend.__init__), (
        "the processor is no longer sp_model"
    )


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, False),
        ({"rope_type": "linear", "factor": 2.0}, False),
        ({"rope_type": "yarn", "factor": 2.0}, False),
        ({"rope_type": "dynamic", "factor": 2.0}, True),
        ({"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}, True),
    ],
    ids=str,
)
def test_angles_that_follow_the_length_are_known(rope, expected):
    entries = {} if rope is None else {"rope_scaling": {"rope_theta": 10000.0, **rope}}
    assert compat.rope_follows_length(llama(**entries).model) == expected


def test_hooks_that_transformers_leaves_behind_are_known():
    model = llama()
    ids = torch.arange(5)[None]
    with torch.no_grad():
        model(ids, output_hidden_states=True)
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert compat.all_idle(hooks), "transformers.utils.output_capturing moved"
    assert not compat.all_idle([*hooks, lambda *_: None])


@pytest.mark.parametrize("kernels", ["sdpa", "eager"])
def test_the_input_of_every_attention_is_seen(kernels):
    model, seen = llama(attn_implementation=kernels), []
    with compat.watch_attention(model.model, lambda *given: seen.append(given)):
        states = model(torch.arange(5)[None], output_hidden_states=True).hidden_states
    assert len(seen) == len(model.model.layers), "decoder layers have no self_attn, or call it otherwise"
    for (module, hidden, (cos, sin)), layer, before in zip(seen, model.model.layers, states, strict=False):
        assert module is layer.self_attn and torch.equal(hidden, layer.input_layernorm(before))
        assert cos.shape == sin.shape == (1, 5, module.head_dim)
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)
