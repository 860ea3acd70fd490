"""Rows recomputed beside SDPA equal the eager attention of the whole decoder, for every kind of decoder.

The eager kernel of transformers takes its softmax in float32, which sets the tolerance.
"""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from llava.analysis.attention import rows
from llava.model.transformers_compat import watch_attention

START, COUNT, LENGTH = 5, 12, 26


def decoder(kind, heads, groups, window, attention):
    torch.manual_seed(0)
    given = dict(vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    given |= dict(num_attention_heads=heads, num_key_value_heads=groups, attn_implementation=attention)
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**given, sliding_window=window)).double().eval()
    scaling = {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 100.0,
        "original_max_position_embeddings": 16,
    }
    if kind == "yarn":
        given |= {"rope_parameters": scaling, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**given)).double().eval()


def plain(model, embeds):
    """Means over heads by their definitions, from the matrices of an eager run, (layers, N) each."""
    states, matrices = {}, model(inputs_embeds=embeds, output_attentions=True).attentions

    def see(module, hidden, rotary):
        states[module.layer_idx] = (module, hidden[0], rotary)

    with watch_attention(model.model, see):
        model(inputs_embeds=embeds)
    end = START + COUNT
    found = {kind: [] for kind in rows.KINDS[:-1]}
    for layer, matrix in enumerate(matrices):
        p = matrix[0].mean(0).numpy()
        seen = p > 0
        found["last"].append(p[-1, START:end])
        for kind, places in (("full", range(START, LENGTH)), ("image", range(START, end))):
            column = [[p[i, j] for i in places if seen[i, j]] for j in range(START, end)]
            found[kind].append(np.array([np.mean(values) for values in column]))
        found["text"].append(p[end : LENGTH - 1, START:end].sum(0) / (LENGTH - 1 - end))
        module, hidden, (cos, sin) = states[layer]
        size, heads = module.head_dim, model.config.num_attention_heads
        window = getattr(model.config, "sliding_window", None) or LENGTH
        equi = np.zeros(COUNT)
        for head in range(heads):
            pair = head * model.config.num_key_value_heads // heads
            q = module.q_proj(hidden[-1])[head * size : (head + 1) * size]
            keys = module.k_proj(hidden)[:, pair * size : (pair + 1) * size]
            scores = []
            for j in range(LENGTH):
                at = LENGTH - 1 if START <= j < end else j
                turned = [rows.rotate(one, cos[0, i], sin[0, i]) for one, i in ((q, -1), (keys[j], at))]
                scores.append(
                    float(turned[0] @ turned[1]) * module.scaling if LENGTH - 1 - j < window else -np.inf
                )
            weights = np.exp(np.array(scores) - max(scores))
            equi += (weights / weights.sum())[START:end] / heads
        found["equi_last"].append(equi)
    return {kind: np.stack(values) for kind, values in found.items()}


@torch.no_grad()
@pytest.mark.parametrize("kind, heads, groups, window", [
    ("llama", 4, 4, None), ("llama", 4, 2, None), ("yarn", 4, 1, None),
    ("mistral", 4, 2, None), ("mistral", 4, 2, 15),
])  # fmt: skip
def test_rows_equal_those_of_an_eager_run(kind, heads, groups, window, monkeypatch):
    embeds = torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = plain(decoder(kind, heads, groups, window, "eager"), embeds)
    model, found = decoder(kind, heads, groups, window, "sdpa"), []
    monkeypatch.setattr(rows, "_CHUNK", 5 * heads * LENGTH)  # several chunks, the last one shorter

    def see(module, hidden, rotary):
        found.append(rows.layer_rows(module, hidden, rotary, START, COUNT))

    with watch_attention(model.model, see):
        model(inputs_embeds=embeds)
    assert len(found) == 3
    for name, vectors in wanted.items():
        np.testing.assert_allclose(np.stack([one[name] for one in found]), vectors, rtol=5e-6, atol=1e-9)


def test_half_precision_is_computed_in_float32():
    model, found = decoder("llama", 4, 2, None, "sdpa").to(torch.bfloat16), []
    with watch_attention(model.model, lambda *given: found.append(rows.layer_rows(*given, START, COUNT))):
        model(inputs_embeds=torch.randn(1, LENGTH, 32, dtype=torch.bfloat16))
    assert all(np.isfinite(vector).all() and len(set(vector)) == COUNT for vector in found[0].values())
    assert not model.model.layers[0].self_attn._forward_pre_hooks  # the hooks are gone
