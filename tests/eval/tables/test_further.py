"""Numbers that the paper does not print: its predecessor, other people's runs, figures, and reprints."""

from __future__ import annotations

import json

import pytest

from llava.eval.tables.__main__ import choose_tables, main
from llava.eval.tables.collect import read_results
from llava.eval.tables.paper import build_paper_table
from llava.eval.tables.published import (
    COLUMNS,
    METHODS,
    MORE,
    derived_columns,
    load_further,
    load_published,
    published_figure,
    restrict,
)

RAW = json.loads(MORE.read_bytes())
PAPER, FURTHER = load_published(), load_further()
REPRINTS = RAW["reprints"]["rows"]


def row_of(table, method, tokens):
    return next(row for row in table.rows if (row.method, row.tokens) == (method, tokens))


def test_all_rows_are_there_with_source_and_certainty():
    assert {name: len(table.rows) for name, table in FURTHER.items() if name.startswith("fastervlm")} == {
        "fastervlm-llava-1.5-7b": 21,
        "fastervlm-llava-1.5-13b": 16,
        "fastervlm-llava-next-7b": 16,
        "fastervlm-video-llava-7b": 12,
        "fastervlm-efficiency": 16,
    }
    others = [name for name, table in FURTHER.items() if table.second_hand]
    assert len(others) == 7 and all(name.startswith("others-") for name in others)
    for table in FURTHER.values():
        assert table.source and table.certainty and set(table.columns) <= COLUMNS.keys()
        assert {row.method for row in table.rows} <= METHODS.keys()
    assert not FURTHER.keys() & PAPER.keys()


def test_numbers_as_they_were_read():
    assert row_of(FURTHER["fastervlm-llava-1.5-13b"], "fastervlm", 29).values["mme"] == 1267.09
    assert row_of(FURTHER["fastervlm-efficiency"], "fastervlm-flash", 145).values["kv_cache_MB"] == 72.5
    assert row_of(FURTHER["others-restore-llava-1.5-7b"], "vispruner", 64).values["seed"] == 52.6


def test_relative_means_of_the_predecessor_follow_from_its_scores():
    wrong = []
    for name in ("llava-1.5-7b", "llava-1.5-13b", "llava-next-7b"):
        table = FURTHER[f"fastervlm-{name}"]
        full = next(row for row in table.rows if row.method == "none").values
        for row in table.rows:
            if abs(derived_columns(table.columns, row.values, full)["rel"] - row.values["rel"]) > 0.0151:
                wrong.append((name, row.method, row.tokens))
    assert wrong == [  # in the source
        ("llava-1.5-7b", "sparsevlm", 288),
        ("llava-1.5-7b", "sparsevlm", 144),
        ("llava-1.5-7b", "sparsevlm", 58),
        ("llava-next-7b", "sparsevlm", 720),
    ]
    table = FURTHER["fastervlm-video-llava-7b"]
    full = row_of(table, "none", 2048).values
    for row in table.rows:
        found = derived_columns(table.columns, row.values, full)
        for name in ("rel_acc", "rel_score"):
            assert found[name] == pytest.approx(row.values[name], abs=0.4), (
                row
            )  # of scores with 2 or 3 digits


@pytest.mark.parametrize("one", REPRINTS, ids=lambda one: "-".join(map(str, list(one.values())[:3])))
def test_reprinted_numbers_are_equal_after_rounding_and_no_others_are(one):
    """Which numbers of the pair of rows are equal is computed here, from both papers' tables."""
    paper, before = PAPER[one["table"]], FURTHER[f"fastervlm-{one['table']}"]
    row = row_of(paper, one["v2_method"], one["v2_tokens"])
    old = row_of(before, one["v1_method"], one["v1_tokens"]).values
    equal = {
        name
        for name in set(paper.columns) & set(before.columns) - {"rel"}
        if abs(row.values[name] - old[name]) <= 0.5 * 10 ** -paper.digits(name) * (1 + 1e-9)
    }
    assert equal == row.reprint.columns == set(one["equal_columns"])
    assert row.tokens != one["v1_tokens"]


def test_reprinted_cells_are_marked_in_every_form():
    paper = build_paper_table(PAPER["llava-next-7b"], [])
    lines = {(line.method, line.tokens): line for line in paper.lines}
    marked = [name for name in paper.published.columns if lines["vispruner", 640].is_reprinted(name)]
    assert marked == ["textvqa", "mme", "acc", "rel"]  # means of some reprinted numbers
    assert not any(lines["visionzip", 640].is_reprinted(name) for name in paper.published.columns)
    text = paper.table().text()
    assert "59.3^" in text and "85.9 " in text and "VisPruner at 160" in text and "FasterVLM at 145" in text
    assert "1480.7\\^" not in paper.table().markdown() and "1480.7^" in paper.table().markdown()
    assert "59.3\\textasciicircum{}" in paper.table().latex()
    assert sum(line.endswith(",true") for line in paper.csv().splitlines()) == 3 * 7 + 2 * 4 + 7
    rows = {(row["method"], row["tokens"]): row for row in paper.document()["rows"]}
    assert rows["vispruner", 640]["reprinted"] == marked and rows["none", 2880]["reprinted"] == []
    main_table = build_paper_table(PAPER["llava-1.5-7b"], []).table()
    assert "^" not in main_table.text()
    narrow = build_paper_table(restrict(PAPER["llava-next-7b"], ["gqa"]), [])
    assert [line.tokens for line in narrow.lines if line.is_reprinted("gqa")] == [640, 320, 160, 160]
    assert "VisPruner at 640" not in narrow.table().text()


def test_figures():
    curve = published_figure("figure-3a")
    assert len(curve.columns) == 14 and set(curve.rows) == {"cls", "last", "equi_last"}
    assert all(list(values) == sorted(values) and len(values) == 14 for values in curve.rows.values())
    assert curve.rows["cls"][curve.columns.index(20)] == 76.8 and "0.3" in curve.certainty
    shares = published_figure("figure-2b")
    assert list(shares.rows) == list(range(32)) and shares.columns == ("q1", "q2", "q3", "q4")
    assert all(sum(values) == pytest.approx(100, abs=2.1) for values in shares.rows.values())
    assert published_figure("figure-2c").rows[31] == (None, None, None, 70.3)
    assert published_figure("figure-2a").rows == {} and published_figure("figure-2a").note
    with pytest.raises(ValueError, match="figure-9.*Choose from figure-2a"):
        published_figure("figure-9")


def test_digits_follow_the_print():
    assert [PAPER["llava-1.5-7b"].digits(name) for name in ("pope", "mme", "rel")] == [1, 1, 1]
    assert all(
        table.digits(name) == COLUMNS[name].digits for table in PAPER.values() for name in table.columns
    )
    before = FURTHER["fastervlm-llava-1.5-7b"]
    assert (before.digits("pope"), before.digits("mmvet")) == (2, 1)


def test_the_command_shows_further_tables_only_when_named(tmp_path, capsys):
    assert [table.name for table in choose_tables("all")] == list(PAPER)
    assert len(choose_tables("fastervlm")) == 5 and len(choose_tables("Others")) == 7
    assert [one.name for one in choose_tables("all,fastervlm_llava_1_5_13b")][-1] == "fastervlm-llava-1.5-13b"
    (tmp_path / "results").mkdir()
    arguments = ["--results", str(tmp_path / "results"), "--output", str(tmp_path / "out")]
    assert main(["--table", "fastervlm-llava-1.5-13b,others-visco-1-token", *arguments]) == 0
    out = capsys.readouterr().out
    assert "LLaVA-1.5-13B" in out and "1267.09" in out and "Second hand: VisCo" in out
    assert read_results([tmp_path / "out"]) == ([], [])
    with pytest.raises(SystemExit):
        main(["--table", "fastervlm-none", *arguments])
    assert "Choose from all, fastervlm, others, llava-1.5-7b" in capsys.readouterr().err
