"""Every method on every host: what it may do to a prompt, and what it reads."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers

import llava
from helpers import host_oracle as oracle
from helpers.host_oracle import every_host, logits
from helpers.hosts import HOSTS
from llava.integrations import shortening
from llava.integrations.hosts import find_host
from llava.integrations.tiny_hosts import IMAGE, spread_weights
from llava.integrations.watch import dry_run
from llava.pruning import get_pruner, list_pruners

TEXT_FREE = [
    name
    for name in list_pruners()
    if get_pruner(name, 4).acts_in == "image" and not get_pruner(name, 4).needs_question and name != "none"
]
NO_CLS = {"visionzip": "keys", "prumerge": "last_query", "prumerge+": "last_query", "tome": "merged@4"}
STITCHED = dict.fromkeys(["visionzip", "prumerge", "prumerge+", "downsample"], "merges") | {
    "tome": "merged@4"
}
INSIDE = [name for name in list_pruners() if get_pruner(name, 4).acts_in == "decoder"]
NOT_INSIDE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # hosts that refuse all of these
# Methods that a host refuses, and what it lacks for them; all others work
REFUSED = {
    "llava": {"tome": "merged@4"},
    "llava_siglip": NO_CLS,
    "llava_next": STITCHED,
    "llava_next_video": {**NO_CLS, "visionzip": "merges", "prumerge": "merges", "prumerge+": "merges"},
    "llava_onevision": {**NO_CLS, "downsample": "merges"},
    "llava_onevision_interpolated": {**NO_CLS, "downsample": "merges"},
    "video_llava": {"tome": "merged@4"},
    "internvl": NO_CLS,
    "qwen2_vl": NO_CLS,
    "qwen2_5_vl": NO_CLS,
    "qwen3_vl": {**NO_CLS, "downsample": "merges"},
}


def served(name):
    return [method for method in TEXT_FREE if method not in REFUSED.get(name, {})]


@every_host
def test_methods_run_or_say_what_is_missing(name, model):
    for method in TEXT_FREE:
        lacking = REFUSED[name].get(method)
        if lacking is None:
            llava.unprune(llava.prune(model, method, tokens=4))
        else:
            with pytest.raises(ValueError, match=f"{method!r}.*{lacking}".replace("+", r"\+")):
                llava.prune(model, method, tokens=4)


@every_host
def test_methods_inside_the_language_model_run_or_say_what_is_missing(name, model):
    assert len(INSIDE) >= 5
    for method in INSIDE:
        if name not in NOT_INSIDE:
            with llava.pruned(model, method, tokens=4) as pruning:
                assert pruning.acts_inside and pruning.positions == get_pruner(method, 4).positions
        else:
            with pytest.raises(ValueError, match=f"{method!r} prunes inside .* rows and columns"):
                llava.prune(model, method, tokens=4)


def _batch(name):
    """Return a batch whose modality all methods of the host serve."""
    return "video" if name == "llava_next_video" else "padded"


# Variants of a class differ in their rows, not in what methods do with them
@pytest.mark.parametrize(
    "name", [name for name in REFUSED if name not in ("llava_siglip", "llava_onevision")]
)
def test_invariants_of_every_method(name, model):
    """All text stays; positions as asked; as many placeholders as features; nobody sees another row."""
    batch = _batch(name)
    inputs = HOSTS[name].batches()[batch]
    row = oracle.rows_of(inputs, oracle.MEDIA[batch])[1]
    visual, real = oracle.visual(inputs["input_ids"]), inputs["attention_mask"].bool()
    always = _always_kept(model, inputs)
    for method in served(name):
        with llava.pruned(model, method, tokens=4, important_ratio=0.5):
            short = llava.integrations.shorten(model, **inputs)
            plan = short.plan
            alone = llava.integrations.shorten(model, **row)
        stays = torch.zeros_like(real)
        for sample, (sel, valid) in enumerate(zip(plan.sel, plan.valid, strict=True)):
            kept = sel[valid]
            assert (kept.diff() > 0).all(), method
            stays[sample, kept] = True
        assert torch.equal(stays & ~visual, real & ~visual), method
        budget = [0] * len(real)
        for one in plan.rows:
            grid = 2 if "interpolated" in name and one.total == 36 else 1  # crops that were resized together
            budget[one.sample] += min(4 * grid, one.total)
        counts = [int(n) for n in (stays & visual).sum(1)]
        if "next" not in name and "onevision" not in name:  # crops may choose patches that are cut off
            assert counts == [a + b for a, b in zip(budget, always, strict=True)], method
        assert all(a <= b + c for a, b, c in zip(counts, budget, always, strict=True)), method
        features = sum(int(short.visual[kind].sum()) for kind in short.visual)
        assert features == sum(counts), method
        for layer in short.deepstack.get("deepstack_visual_embeds", []):
            assert len(layer) == features, method
        assert (short.embeds[1, plan.valid[1]] - alone.embeds[0]).abs().max() < 1e-5, method
        together = [one.kept.tolist() for one in plan.rows if one.sample == 1]
        assert together == [one.kept.tolist() for one in alone.plan.rows], method


def _always_kept(model, inputs):
    """Return the placeholders of each row that no method may drop: newlines."""
    host = find_host(model)[1]
    base = host.base(model)
    _, seen = dry_run(model, host, inputs, get_pruner("vispruner", 4))
    counts = [0] * len(inputs["input_ids"])
    for one in seen:
        found = host.rows(base, one)
        free = torch.ones(found.count, dtype=torch.bool)
        for row in found.rows:
            free[row.places[row.places >= 0]] = False
            if row.extra is not None:
                free[row.extra] = False
        token = inputs["input_ids"] == getattr(base.config, host.modalities[one.modality])
        for sample in token.nonzero()[free][:, 0].tolist():
            counts[sample] += 1
    return counts


@every_host
def test_features_of_rows_are_at_their_places(name, model):
    host = find_host(model)[1]
    base = host.base(model)
    for batch, inputs in HOSTS[name].batches().items():
        _, seen = dry_run(model, host, inputs, get_pruner("vispruner+", 4))
        assert len(seen) == ("pixel_values" in inputs) + ("pixel_values_videos" in inputs), batch
        for one in seen:
            found, embeds = host.rows(base, one), one.embeds()
            assert found.count == len(embeds), batch
            covered = torch.zeros(len(embeds), dtype=torch.int64)
            for row in found.rows:
                has = row.places >= 0
                assert torch.equal(embeds[row.places[has]], row.cues["projected"][has]), batch
                covered[row.places[has]] += 1
                assert row.cues["attention"].shape[1] == len(row.places) == len(row.features), batch
            assert covered.max() == 1, batch
            extra = [row.extra for row in found.rows if row.extra is not None]
            for place in (covered == 0).nonzero()[:, 0].tolist():
                newline = hasattr(base, "image_newline") and torch.equal(embeds[place], base.image_newline)
                assert newline or any(place in one for one in extra), (batch, place)


@every_host
def test_another_row_of_the_batch_changes_nothing(name, model):
    inputs = HOSTS[name].batches()["padded"]
    other = {key: value.clone() for key, value in inputs.items()}
    first = oracle.rows_of(inputs, ["i", "iii"])[0]["pixel_values"].shape[0]
    other["pixel_values"][first:] = other["pixel_values"][first:].flip(-1) * 1.5
    with llava.pruned(model, tokens=4) as pruning:
        logits(model, inputs)
        before = pruning.last
        logits(model, other)
    found = [
        [[row.kept.tolist() for row in plan.rows if row.sample == sample] for plan in (before, pruning.last)]
        for sample in (0, 1)
    ]
    assert found[0][0] == found[0][1] and found[1][0] != found[1][1]


@every_host
def test_shortening_touches_each_tensor_once(name, model, monkeypatch):
    inputs, touched = HOSTS[name].batches("right")["padded"], []
    labels = inputs["input_ids"].clone()
    original = shortening.take

    def counted(tensor, plan, dim=0):
        touched.append(tensor)
        return original(tensor, plan, dim)

    monkeypatch.setattr(shortening, "take", counted)
    with llava.pruned(model, tokens=4):
        short = llava.integrations.shorten(model, **inputs, labels=labels)
    assert len({id(tensor) for tensor in touched}) == len(touched)
    texts = [labels, *(inputs[key] for key in ("input_ids", "mm_token_type_ids") if key in inputs)]
    assert all(sum(tensor is text for tensor in touched) == 1 for text in texts)
    wide = [tensor for tensor in touched if tensor.is_floating_point()]
    assert len(wide) == 1 and wide[0].shape[:2] == inputs["input_ids"].shape
    assert (short.others["labels"] == -100).sum() == (~short.plan.valid).sum()


@every_host
def test_scores_are_those_of_eager_attention(name, model, monkeypatch):
    """Cues equal what follows from the attention weights that the tower's own eager code returns."""
    host = find_host(model)[1]
    base = host.base(model)
    kinds = ("attention", "received", *(["received@1"] if name != "qwen2_5_vl" else ["received@2"]))
    parts = host.towers(base)["image"]
    module = getattr(parts.layers[parts.select], parts.attention)
    source = sys.modules[type(module).__module__]
    original, weights = source.eager_attention_forward, []

    def recorded(module, *args, **kwargs):
        output, found = original(module, *args, **kwargs)
        weights.append((module, found))
        return output, found

    monkeypatch.setattr(source, "eager_attention_forward", recorded)
    inputs = HOSTS[name].batches()["padded"]

    class Reads:
        cues = kinds[1:]

    before = model.config.vision_config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        _, (seen,) = dry_run(model, host, inputs, Reads)
    finally:
        model.set_attn_implementation(before)
    for cue in kinds:
        kind, index = parts.layer_of(cue)
        read = getattr(parts.layers[index], parts.attention)
        mine = [one for owner, one in weights if owner is read]
        first = int(parts.has_cls)
        assert len(mine) == len(seen.cues[cue]) > 0
        for one, found in zip(mine, seen.cues[cue], strict=True):
            if cue == "attention":
                expected = one[:, :, 0, 1:] if parts.has_cls else one.mean(2)
            else:
                expected = one.mean((1, 2))[:, first:]
            assert (found - expected).abs().max() < 1e-6
            assert found.std() > 1e-3  # not flat


@pytest.mark.parametrize("name", ["qwen2_5_vl"])
def test_scores_of_windows_are_in_the_order_of_patches(name, model):
    """Inside the tower, patches are ordered by window; the tower's own permutation tells which is which."""
    host, tower = find_host(model)[1], model.model.visual
    inputs, order = HOSTS[name].batches()["padded"], []
    original = tower.permute_input_for_window_attn

    def permuted(tensor, window_index, seq_len):
        order.append(original(torch.arange(seq_len)[:, None], window_index, seq_len)[:, 0])
        return original(tensor, window_index, seq_len)

    tower.permute_input_for_window_attn = permuted
    try:
        _, (seen,) = dry_run(model, host, inputs, get_pruner("vispruner", 4))
    finally:
        del tower.permute_input_for_window_attn
    inside = torch.cat([cue[0] for cue in seen.cues["attention"]], dim=-1)
    assert not torch.equal(order[0], torch.arange(len(order[0])))
    patches = torch.empty_like(inside)
    patches[:, order[0]] = inside
    expected = patches.unflatten(1, (-1, 4)).mean(-1)
    found = torch.cat([row.cues["attention"] for row in host.rows(model.model, seen).rows], dim=-1)
    assert torch.allclose(found, expected, atol=1e-7)


def test_a_clip_shares_one_budget():
    case = HOSTS["video_llava"]
    model, inputs = case.build(), case.batches()["mixed"]
    llava.prune(model, clip_tokens=13)
    logits(model, inputs)
    plan = llava.pruning_of(model).last
    clips = [len(row.kept) for row in plan.rows if row.modality == "video"]
    assert clips == [3, 3, 3, 4] * 2 and [row.frame for row in plan.rows][1:5] == [(i, 4) for i in range(4)]
    images = [(len(row.kept), row.total) for row in plan.rows if row.modality == "image"]
    assert images == [(16, 16)]  # whole without a budget of their own
    llava.unprune(model)
    with llava.pruned(model, tokens=16) as pruning:  # all patches, but not [CLS]
        logits(model, inputs)
        assert pruning.last.sel.shape[1] == inputs["input_ids"].shape[1] - 4


def test_a_modality_that_a_method_cannot_serve_is_refused_in_the_call():
    case = HOSTS["llava_next_video"]
    model = llava.prune(case.build(), "downsample", tokens=4)
    logits(model, case.batches()["video"])
    with pytest.raises(ValueError, match="method: 'downsample' merges tokens, for which image tokens"):
        model(**case.batches()["single"])


def test_a_method_that_merges_without_saying_so_is_refused_in_the_call(monkeypatch):
    monkeypatch.setattr(type(get_pruner("downsample", 4)), "merges", False)
    case = HOSTS["qwen3_vl"]
    model = llava.prune(case.build(), "downsample", tokens=2)
    with pytest.raises(ValueError, match="'downsample' merges tokens, for which image tokens have no place"):
        model(**case.batches()["single"])


def test_features_of_several_layers():
    case = HOSTS["llava"]
    config = case.make_config()
    vision, text = config.vision_config, config.text_config
    layers = {"vision_feature_layers": [-1, -3], "image_token_index": IMAGE, "tie_word_embeddings": False}
    vip = transformers.VipLlavaConfig(vision_config=vision, text_config=text, **layers)
    model = transformers.VipLlavaForConditionalGeneration(vip)
    spread_weights(model, 0)
    inputs = case.batches()["padded"]
    with llava.pruned(model.eval(), tokens=6) as pruning:
        found = logits(model, inputs)
        plan = pruning.last
    expected = oracle.at(logits(model, oracle.by_hand(model, inputs, plan)), plan)
    assert (oracle.kept(found, plan) - expected).abs().max() < oracle.TOLERANCE
    host = find_host(model)[1]
    _, (seen,) = dry_run(model, host, inputs, get_pruner("visionzip", 6))
    states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    cls = torch.cat([states[-1][:, 0], states[-3][:, 0]], dim=-1)
    assert torch.allclose(seen.cues["cls"][0], cls, atol=1e-6)
    with llava.pruned(model, "visionzip", tokens=6):
        assert logits(model, inputs).shape[1] < inputs["input_ids"].shape[1]


def test_random_tokens_do_not_depend_on_the_batch():
    inputs = HOSTS["qwen2_vl"].batches()["padded"]
    model = llava.prune(HOSTS["qwen2_vl"].build(), "random", tokens=4)
    logits(model, inputs)
    together = [row.kept.tolist() for row in llava.pruning_of(model).last.rows]
    logits(model, oracle.rows_of(inputs, ["i", "iii"])[1])
    assert [row.kept.tolist() for row in llava.pruning_of(model).last.rows] == together[1:]
