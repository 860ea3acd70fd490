"""The paper's numbers: the file is consistent, and the rule for Acc. and Rel. gives what is printed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llava.eval.tables.published import (
    COLUMNS,
    PUBLISHED,
    accuracy,
    derived_columns,
    load_published,
    prefill_flops,
    relative,
    restrict,
)

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "data" / "benchmarks" / "aggregate"
TABLES = load_published()
SUMMED = [
    (table, row)
    for table in TABLES.values()
    if "rel" in table.columns
    for row in table.rows
    if row.method != "none"
]


def full_of(table, model):
    return next(row for row in table.rows if (row.model, row.method) == (model, "none")).values


def test_all_published_rows_are_there():
    assert [len(table.rows) for table in TABLES.values()] == [19, 13, 7, 9, 5] and len(SUMMED) == 36


@pytest.mark.parametrize("name", TABLES)
def test_the_published_file_is_consistent(name):
    raw, table = json.loads(PUBLISHED.read_bytes())["tables"][name], TABLES[name]
    assert set(table.columns) <= COLUMNS.keys() and len(set(table.columns)) == len(table.columns)
    for row in raw["rows"]:
        assert row.keys() == {"model", "method", "tokens", "values"} and row["model"] in table.models
        assert len(row["values"]) == len(table.columns) and type(row["tokens"]) is int
        assert all(type(value) in (int, float) for value in row["values"])
    assert max(Counter((row.model, row.method, row.tokens) for row in table.rows).values()) == 1
    assert {row.model for row in table.rows if row.method == "none"} == table.models.keys()


@pytest.mark.parametrize("table, row", SUMMED, ids=lambda one: getattr(one, "name", None) or str(one)[:60])
def test_published_means_follow_from_published_scores(table, row):
    scores = {name: row.values[name] for name in table.scored}
    assert accuracy(scores) == pytest.approx(row.values["acc"], abs=0.0501)  # as printed, to one digit
    full = {name: full_of(table, row.model)[name] for name in table.scored}
    # inputs are rounded to 0.1; VisPruner at 128 tokens is the one row that this moves past the last digit
    assert relative(scores, full) == pytest.approx(row.values["rel"], abs=0.0601)


def test_video_means():
    table = TABLES["video-llava-7b"]
    for row in table.rows:
        found = derived_columns(table.columns, row.values, None)
        assert found["avg_acc"] == pytest.approx(row.values["avg_acc"], abs=0.0501)
        assert found["avg_score"] == pytest.approx(row.values["avg_score"], abs=0.00501)


@pytest.mark.parametrize(
    "name, file", [("llava-1.5-7b", "table_llava15_7b"), ("llava-next-7b", "table_llavanext_7b")]
)
def test_means_equal_the_golden_ones(name, file):
    golden = json.loads((GOLDEN / f"{file}.json").read_text())
    rows = {(row.method, row.tokens): row for row in TABLES[name].rows}
    full = {key.lower(): value for key, value in golden["reference"]["scores"].items()}
    assert accuracy(full) == pytest.approx(golden["reference"]["acc"], abs=1e-9)
    assert len(golden["rows"]) == len(rows) - 1
    for one in golden["rows"]:
        scores = {key.lower(): value for key, value in one["scores"].items()}
        assert accuracy(scores) == pytest.approx(one["acc"], abs=1e-9)
        assert relative(scores, full) == pytest.approx(one["rel_pct"], abs=1e-9)
        ours = rows[one["method"].lower(), one["tokens"]].values
        assert {key: ours[key] for key in scores} == scores
        assert (ours["acc"], ours["rel"]) == (one["published_acc"], one["published_rel_pct"])


def test_the_rule_serves_bootstrap_draws():
    draws = {"pope": np.array([80.0, 60.0]), "mme": np.array([1000.0, 500.0])}
    full = {"pope": np.array([80.0, 80.0]), "mme": np.array([2000.0, 1000.0])}
    assert accuracy(draws).tolist() == [65.0, 42.5]
    assert relative(draws, full).tolist() == [75.0, 62.5]
    for place in (0, 1):
        single = {name: float(values[place]) for name, values in draws.items()}
        assert accuracy(single) == accuracy(draws)[place]
    assert accuracy({"mme": 100.0}, mme_tasks=2) == 25.0


def test_means_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no scores"):
        accuracy({})
    with pytest.raises(ValueError, match="same benchmarks"):
        relative({"pope": 1.0}, {"gqa": 1.0})
    with pytest.raises(ValueError, match="is 0"):
        relative({"pope": 1.0}, {"pope": 0.0})


def test_flops_explain_the_efficiency_table():
    table = TABLES["efficiency"]
    model = table.models["llava-next-7b"]
    for row in table.rows:
        if row.tokens != 640:  # these follow with 720 tokens only
            tera = prefill_flops(row.method, row.tokens, model) / 1e12
            assert tera == pytest.approx(row.values["flops_T"] - 0.6, abs=0.2)  # without the vision tower
    assert prefill_flops("sparsevlm", 64, model) is None


def test_restricted_columns():
    table = restrict(TABLES["llava-1.5-7b"], ["pope", "gqa"])
    assert table.columns == ("gqa", "pope", "acc", "rel")
    row = next(row for row in table.rows if (row.method, row.tokens) == ("vispruner", 64))
    assert row.values["acc"] == pytest.approx((55.4 + 80.4) / 2)
    assert row.values["rel"] == pytest.approx(50 * (55.4 / 62.0 + 80.4 / 85.9))
    with pytest.raises(ValueError, match="no column 'tgif'"):
        restrict(table, ["tgif"])
