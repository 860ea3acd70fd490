"""The cost model equals a counter of real products, and the paper's numbers."""

from dataclasses import astuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model, LlamaConfig, LlamaModel

from llava.analysis.efficiency.baseline import baseline_select
from llava.analysis.efficiency.dummy_models import build_model
from llava.model import flops
from llava.model.flops import LanguageShape, VisionShape
from llava.pruning import get_pruner
from llava.pruning.diversity import DROP_PER_ROUND

VICUNA_7B = LanguageShape(layers=32, width=4096, mlp=11008)
CLIP_L_336 = VisionShape(layers=24, width=1024, mlp=4096, patches=576, patch_size=14)
TEXT = 80  # text tokens with which the paper's rows follow
OTHER_FLOPS = 0.7e12  # of everything but the decoder, as the paper's rows imply


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("n", [1, 13, 50])
def test_prefill_equals_counted_products(kv_heads, n):
    config = LlamaConfig(
        num_hidden_layers=3,
        hidden_size=48,
        intermediate_size=112,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=64,
        attn_implementation="eager",
    )
    model = LlamaModel(config)
    measured = counted(lambda: model(torch.ones(1, n, dtype=torch.int64), use_cache=False))
    rotary = 2 * n * config.hidden_size // config.num_attention_heads // 2  # angles are a tiny product too
    assert measured - 2 * flops.llm_prefill_macs(n, LanguageShape.from_config(config)) in (0, rotary)


def test_vision_towers_equal_counted_products():
    clip = CLIPVisionConfig(
        num_hidden_layers=4,
        hidden_size=32,
        intermediate_size=72,
        num_attention_heads=4,
        image_size=42,
        patch_size=7,
        attn_implementation="eager",
    )
    dino = Dinov2Config(
        num_hidden_layers=3,
        hidden_size=32,
        mlp_ratio=4,
        num_attention_heads=4,
        image_size=42,
        patch_size=7,
        attn_implementation="eager",
    )
    swiglu = Dinov2Config(**{**dino.to_dict(), "use_swiglu_ffn": True}, attn_implementation="eager")
    for config, kind in ((clip, CLIPVisionModel), (dino, Dinov2Model), (swiglu, Dinov2Model)):
        model = kind(config)
        shape = VisionShape.from_config(config)
        measured = counted(lambda m=model: m(torch.zeros(1, 3, 42, 42)))
        assert measured == 2 * flops.vision_tower_macs(shape, select_layer=-1)


def test_vision_tower_counts_only_layers_that_run():
    layer = flops.vision_tower_macs(CLIP_L_336, -1) - flops.vision_tower_macs(CLIP_L_336, -2)
    assert flops.vision_tower_macs(CLIP_L_336, -2) == flops.vision_tower_macs(CLIP_L_336, 23)
    assert flops.vision_tower_macs(CLIP_L_336, 0) == 576 * 588 * 1024  # patch embedding only
    assert layer * 23 + 576 * 588 * 1024 == flops.vision_tower_macs(CLIP_L_336, -2)
    for outside in (25, -26):
        with pytest.raises(ValueError, match="select_layer"):
            flops.vision_tower_macs(CLIP_L_336, outside)


@pytest.mark.parametrize(
    ("tokens", "published"),
    [(2880 + TEXT, 43.6e12), (160 + TEXT, 3.8e12), ([2880 + TEXT] * 2 + [160 + TEXT] * 30, 6.3e12)],
)
def test_published_efficiency_table(tokens, published):
    assert 2 * flops.llm_prefill_macs(tokens, VICUNA_7B) + OTHER_FLOPS == pytest.approx(published, rel=0.03)


def test_mac_convention_of_other_papers():
    assert flops.llm_prefill_macs(576, VICUNA_7B) == pytest.approx(3.82e12, rel=0.005)


def test_kv_cache():
    assert flops.kv_cache_bytes(1, VICUNA_7B) == 512 * 1024
    assert flops.kv_cache_bytes(2880, VICUNA_7B) == 1440 * 2**20
    assert flops.kv_cache_bytes(160, VICUNA_7B) == 80 * 2**20
    assert flops.kv_cache_bytes([160] * 32, VICUNA_7B, 4) == 160 * 2**20
    mistral = {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
    }
    assert flops.kv_cache_bytes(1, LanguageShape.from_config(mistral)) == 128 * 1024


def test_selection_counts_pairs():
    assert flops.DROP_PER_ROUND == DROP_PER_ROUND
    assert flops.selection_macs(10, 3, 10) == flops.selection_macs(10, 3, 4, 1.0) == 0
    assert flops.selection_macs(10, 3, 4, 0.5) == 8 * 9 // 2 * 3
    # residual 8 -> 4 evens, 4 odds; target 2: all four evens go (4), then two of the four odds (2 x 2 pairs)
    assert flops.selection_macs(10, 3, 4, 0.5, per_round=True) == (4 * 4 + 2 * 2) * 3
    for tokens in (128, 64, 32):  # computing all pairs once is cheaper at every budget of the paper
        once = flops.selection_macs(576, 1024, tokens)
        assert 7 * once < flops.selection_macs(576, 1024, tokens, per_round=True)


def test_projector_counts_layers():
    gelu = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.GELU(), torch.nn.Linear(12, 12))
    assert counted(lambda: gelu(torch.zeros(5, 8))) == 2 * flops.projector_macs(5, 8, 12, "mlp2x_gelu")
    assert flops.projector_macs(5, 8, 12, "linear") == 5 * 8 * 12
    assert flops.projector_macs(5, 8, 8, "identity") == 0
    with pytest.raises(ValueError, match="qformer"):
        flops.projector_macs(5, 8, 12, "qformer")


def test_pipeline_adds_up_and_reads_configs():
    text = LlamaConfig(
        num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, num_attention_heads=32
    )
    tower = CLIPVisionConfig(
        num_hidden_layers=24,
        hidden_size=1024,
        intermediate_size=4096,
        image_size=336,
        patch_size=14,
        num_attention_heads=16,
    )
    budget = {"visual_tokens": 160, "text_tokens": TEXT, "crops": 5, "tokens_per_crop": 32}
    cost = flops.pipeline_cost(VICUNA_7B, CLIP_L_336, **budget)
    assert cost == flops.pipeline_cost(text, tower, **budget)
    nested = {"text_config": text.to_dict(), "vision_config": tower.to_dict()}
    assert cost == flops.pipeline_cost(nested, nested, **budget)
    assert cost.total == sum(astuple(cost)[:4]) and cost.flops()["total"] == 2 * cost.total
    assert cost.vision_tower == 5 * flops.vision_tower_macs(CLIP_L_336)
    assert cost.selection < cost.vision_tower / 500
    assert flops.pipeline_cost(VICUNA_7B, CLIP_L_336, 2880, TEXT, crops=5).selection == 0


@pytest.mark.parametrize("kept", [None, 64, 7])
def test_every_part_of_a_whole_model_equals_counted_products(kept):
    """The tower is cut at the select layer, and only kept tokens are projected."""
    model = build_model("tiny", attn_implementation="eager")
    model.set_pruner("none" if kept is None else "fastervlm", kept)
    tower = model.get_vision_tower()
    count = 576 if kept is None else kept
    cost = flops.pipeline_cost(model.config, VisionShape.from_config(tower.config), count, 20)
    row = 2 * flops.cls_row_macs(VisionShape.from_config(tower.config))  # and the keys, computed once more
    keys = 2 * (577 + 1) * 192 * 192
    images = torch.randn(1, 3, 336, 336)
    assert counted(lambda: tower(images)) == 2 * cost.vision_tower + row + keys
    with torch.no_grad():
        vision = model.encode_vision(images)[0]
        visual = model.visual_tokens(vision).embeds
    assert counted(lambda: model.visual_tokens(vision)) == 2 * cost.projector
    ids = torch.tensor([[1] * 10 + [-200] + [5] * 10])
    measured = counted(lambda: model(input_ids=ids, visual=[visual], logits_to_keep=1))
    head = 2 * 256 * 1000
    rotary = 2 * (count + 20) * 64 // 2
    assert measured - 2 * cost.language_model - head in (0, rotary)


@pytest.mark.parametrize("tokens", [32, 8])
def test_selection_counts_fewer_products_than_strips_compute(tokens):
    """Strips of the lower triangle compute more than all pairs once, and less than the whole square."""
    features, attention = torch.randn(1, 400, 24), torch.rand(1, 2, 400)
    measured = counted(lambda: get_pruner("vispruner", tokens).keep(features, attention))
    expected = 2 * flops.selection_macs(400, 24, tokens)
    assert expected <= measured < 1.3 * expected


def test_per_round_selection_equals_counted_products_of_the_baseline():
    features, attention = torch.randn(1, 100, 24), torch.rand(1, 2, 100)
    for tokens in (40, 8):
        measured = counted(lambda t=tokens: baseline_select(features, attention, t, 0.5))
        assert measured == 2 * flops.selection_macs(100, 24, tokens, per_round=True)


def test_errors_name_what_is_missing():
    with pytest.raises(ValueError, match="num_hidden_layers"):
        LanguageShape.from_config({"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8})
    with pytest.raises(ValueError, match="expected one number per layer for 32 layers, got 2"):
        flops.llm_prefill_macs([1, 2], VICUNA_7B)
