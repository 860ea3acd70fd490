"""VisPruner equals masks recorded from the authors' released code, on inputs regenerated bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.oracle_vispruner import attention_ranking, select
from helpers.selection_inputs import EXACT_TIES, crc, make_inputs
from llava.pruning import get_pruner

CASES = json.loads((Path(__file__).parents[1] / "data/model/selection.json").read_text())["cases"]


def binding(case) -> bool:
    """The released code keeps the wrong number in group wrong_count and divides 0 by 0 in group nan."""
    return case["group"] not in ("wrong_count", "nan") and (case["robust"] or case["kind"] in EXACT_TIES)


BINDING = [case for case in CASES if binding(case)]
SENSITIVE = [case for case in CASES if not binding(case)]


def name(case) -> str:
    return f"{case['i']}-{case['kind']}-N{case['N']}-T{case['T']}-r{case['r']}"


def inputs(case):
    features, attention = make_inputs(*(case[key] for key in ("kind", "seed", "B", "N", "C", "H")))
    assert crc(features, attention) == case["crc"]
    return features, attention


def recorded(case) -> list[list[int]]:
    rows = []
    for mask in case.get("mask_stable", case["mask"]):
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(mask), dtype=np.uint8))
        rows.append(np.flatnonzero(bits[: case["N"]]).tolist())
    return rows


def test_enough_cases_bind():
    assert len(CASES) == 552 and len(BINDING) == 380
    assert {case["kind"] for case in BINDING} >= {"gauss", "spatial", "tie_attn", *EXACT_TIES}


@pytest.mark.parametrize("case", BINDING, ids=name)
def test_equals_released_code(case):
    features, attention = map(torch.from_numpy, inputs(case))
    indices = get_pruner("vispruner", case["T"], case["r"]).select(features, attention)
    assert indices.tolist() == recorded(case)


@pytest.mark.parametrize("case", SENSITIVE, ids=name)
def test_cases_that_rounding_decides(case):
    """One float32 rounding decides these: required are the parts no rounding changes."""
    features, attention = inputs(case)
    pruner = get_pruner("vispruner", case["T"], case["r"])
    kept = pruner.keep(torch.from_numpy(features), torch.from_numpy(attention))
    again = pruner.keep(torch.from_numpy(features), torch.from_numpy(attention))
    assert torch.equal(kept.indices, again.indices) and torch.equal(kept.important, again.important)
    assert kept.indices.shape == (case["B"], case["T"])
    t_imp = int(case["T"] * case["r"])
    for row in range(case["B"]):
        assert len(set(kept.indices[row].tolist())) == case["T"]
        top = attention_ranking(attention[row].astype(np.float64))[:t_imp]
        assert set(kept.indices[row][kept.important[row]].tolist()) == set(top)
        if case["group"] == "ok":  # the released code selects these by the same rules
            assert set(top) <= set(recorded(case)[row])
    if case["N"] <= 100:
        expected = select(features, attention, case["T"], case["r"])
        assert kept.indices.tolist() == [indices for indices, _ in expected]
