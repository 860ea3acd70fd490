"""Tiny random Llama models and inputs for the in-LLM reduction cases: plain numpy, no torch.

weights(model) -> {name: float32 array} in Hugging Face Llama naming (linear weights are (out, in)).
inputs(case_inputs) -> pre_ids, visual (N, hidden) float32, post_ids.
Every number is an integer of the frozen legacy stream np.random.RandomState, divided by a power of two and
multiplied by a constant that is exact in binary (or rounded once to float32): bit-identical everywhere.
crc(...) of the arrays is stored in cases.json (models[...]["crc"], case["crc"]): check it first.

Sequence fed to the model: [embed(pre_ids), visual, embed(post_ids)], position ids 0..L-1, batch 1.
"""

import zlib

import numpy as np

MODELS = {
    # 32 layers so that schedules at 2/6/15 and 8/16/24 apply as in a 7B model
    "a": dict(layers=32, hidden=32, heads=4, kv_heads=4, inter=64, vocab=64, seed=11),
    # 16 heads of width 4, for the variant that keeps the 14 strongest heads
    "b": dict(layers=32, hidden=64, heads=16, kv_heads=16, inter=96, vocab=64, seed=12),
    # grouped-query attention, few layers
    "c": dict(layers=8, hidden=32, heads=4, kv_heads=2, inter=64, vocab=64, seed=13),
}
RMS_EPS, ROPE_THETA, MAX_POS = 1e-5, 10000.0, 4096
A_EMBED, A_QK, A_V, A_O, A_GATE, A_DOWN, A_HEAD = 1.0, 0.375, 0.25, 0.25, 0.25, 0.125, 0.5


def _u(rs, shape, a):
    """uniform on the grid a * {-2^15, ..., 2^15 - 1} / 2^15"""
    return (rs.randint(-(2**15), 2**15, size=shape).astype(np.float64) * (a / 2.0**15)).astype(np.float32)


def weights(model):
    m = MODELS[model] if isinstance(model, str) else model
    rs = np.random.RandomState(m["seed"])
    C, inter, V = m["hidden"], m["inter"], m["vocab"]
    kv = m["kv_heads"] * (C // m["heads"])
    f = (32.0 / C) if C > 32 else 1.0  # keeps the scale of sums at larger width (a power of two)
    g = f**0.5
    g = 0.703125 if f == 0.5 else g  # exact stand-in for sqrt(1/2)
    w = {"model.embed_tokens.weight": _u(rs, (V, C), A_EMBED)}
    for i in range(m["layers"]):
        p = f"model.layers.{i}."
        w[p + "input_layernorm.weight"] = np.float32(1.0) + _u(rs, (C,), 0.25)
        w[p + "self_attn.q_proj.weight"] = _u(rs, (C, C), A_QK * g)
        w[p + "self_attn.k_proj.weight"] = _u(rs, (kv, C), A_QK * g)
        w[p + "self_attn.v_proj.weight"] = _u(rs, (kv, C), A_V * g)
        w[p + "self_attn.o_proj.weight"] = _u(rs, (C, C), A_O * g)
        w[p + "post_attention_layernorm.weight"] = np.float32(1.0) + _u(rs, (C,), 0.25)
        w[p + "mlp.gate_proj.weight"] = _u(rs, (inter, C), A_GATE * g)
        w[p + "mlp.up_proj.weight"] = _u(rs, (inter, C), A_GATE * g)
        w[p + "mlp.down_proj.weight"] = _u(rs, (C, inter), A_DOWN * g)
    w["model.norm.weight"] = np.float32(1.0) + _u(rs, (C,), 0.25)
    w["lm_head.weight"] = _u(rs, (V, C), A_HEAD)
    return w


def inputs(seed, model, n_pre, n_vis, n_post, kind="iid"):
    """kind iid: independent visual vectors; clump: 24 centres plus 1/4 noise; field: neighbours on a raster
    share half of their value (mean of two neighbouring draws)"""
    m = MODELS[model] if isinstance(model, str) else model
    rs = np.random.RandomState(seed)
    C, V = m["hidden"], m["vocab"]
    pre = rs.randint(3, V, size=n_pre)
    pre[0] = 1
    post = rs.randint(3, V, size=n_post)
    base = rs.randint(-(2**15), 2**15, size=(n_vis + 1, C)).astype(np.float64) / 2.0**15
    cen = rs.randint(-(2**15), 2**15, size=(24, C)).astype(np.float64) / 2.0**15
    lab = rs.randint(0, 24, size=n_vis)
    if kind == "iid":
        vis = 1.5 * base[:n_vis]
    elif kind == "clump":
        vis = 1.5 * cen[lab] + 0.375 * base[:n_vis]
    elif kind == "field":
        vis = base[:n_vis] + base[1:]
    else:
        raise ValueError(kind)
    return pre.astype(np.int64), np.ascontiguousarray(vis, dtype=np.float32), post.astype(np.int64)


def crc(*arrays):
    c = 0
    for a in arrays:
        a = np.ascontiguousarray(a)
        c = zlib.crc32(a.astype(a.dtype.newbyteorder("<")).tobytes(), c)
    return c & 0xFFFFFFFF


def crc_weights(w):
    return crc(*[w[k] for k in sorted(w)])
