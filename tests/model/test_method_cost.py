"""Cost of every method: parts that can be counted by hand, and an order that has to hold."""

from __future__ import annotations

import pytest

from llava.model.flops import LanguageShape, VisionShape, llm_prefill_macs, pipeline_cost, selection_macs
from llava.model.method_cost import method_cost
from llava.pruning import get_pruner, list_pruners

LANGUAGE, VISION = LanguageShape(32, 4096, 11008), VisionShape(24, 1024, 4096, 576, 14)


@pytest.mark.parametrize("name", [name for name in list_pruners() if name not in ("none", "vtw")])
def test_methods_meet_one_budget_and_cost_less_than_no_pruning(name):
    cost, full = (method_cost(get_pruner(one, tokens=128), LANGUAGE, VISION, 60) for one in (name, "none"))
    assert len(cost.visual_per_layer) == 32 and full.entering_mean == 576
    if get_pruner(name).acts_in == "image":
        assert cost.entering_mean == 128
    assert sum(cost.flops().values()) == pytest.approx(2 * cost.total)
    assert cost.total < 0.55 * full.total
    assert cost.cues + cost.selection < 0.02 * cost.total


def test_vispruner_is_counted_as_in_the_cost_model():
    cost = method_cost(get_pruner("vispruner", tokens=64), LANGUAGE, VISION, 60)
    plain = pipeline_cost(LANGUAGE, VISION, 64, 60, tokens_per_crop=64)
    assert cost.selection == 2 * selection_macs(576, 1024, 64)
    assert cost.total == pytest.approx(plain.flops()["total"], rel=1e-6)
    crops = method_cost(get_pruner("vispruner", tokens=64), LANGUAGE, VISION, 60, crops=5)
    assert crops.selection == 5 * cost.selection
    assert crops.language_model == 2 * llm_prefill_macs(5 * 64 + 60, LANGUAGE)


def test_what_a_method_reads_is_counted():
    def cost(name, **options):
        return method_cost(get_pruner(name, tokens=64, **options), LANGUAGE, VISION, 60)

    plain = cost("fastervlm")
    assert cost("divprune").projector == 9 * plain.projector  # all 576 patches
    assert cost("hiprune").cues > 2 * 2 * 577**2 * 1024
    assert cost("tome").vision_tower < 0.6 * plain.vision_tower
    per_image = method_cost(get_pruner("divprune", tokens=64), LANGUAGE, VISION, 60, crops=5)
    assert per_image.selection > 20 * cost("divprune").selection  # one pool of five crops
