"""Measured next to published numbers: which result belongs in which line, and the forms of the table."""

from __future__ import annotations

import csv
import re

import pytest

from helpers.score_files import write_score
from llava.eval.tables.collect import read_results
from llava.eval.tables.paper import build_paper_table, flops_of
from llava.eval.tables.plots import html_page
from llava.eval.tables.published import COLUMNS, PublishedModel, load_published, prefill_flops

TABLES = load_published()
MAIN = TABLES["llava-1.5-7b"]


@pytest.fixture
def measured(tmp_path):
    """Every benchmark of LLaVA-1.5's table with all tokens and at 64, but only POPE at 32."""
    full = next(row for row in MAIN.rows if row.method == "none").values
    for name in MAIN.scored:
        benchmark = COLUMNS[name].benchmark
        write_score(tmp_path / "none" / name, benchmark, full[name], "none", None, None)
        write_score(tmp_path / "64" / name, benchmark, 50.0, low=49.0, high=51.0, visual_tokens=64.0)
    write_score(tmp_path / "32", "pope", 70.7, tokens=32)
    return tmp_path


def build(folder, table=MAIN, **options):
    return build_paper_table(table, read_results([folder])[0], **options)


def lines_of(paper):
    return {(line.method, line.tokens, line.important_ratio): line for line in paper.lines}


def test_measured_next_to_published(measured):
    results, warnings = read_results([measured])
    assert warnings == [] and len(results) == 21
    lines = lines_of(build_paper_table(MAIN, results))
    ours = lines["vispruner", 64, None]
    assert ours.published["pope"] == 80.4 and ours.measured["pope"] == 50.0
    assert ours.difference["pope"] == pytest.approx(-30.4)
    assert ours.measured["acc"] == pytest.approx((9 * 50 + 2.5) / 10)  # MME of 50 points is 2.5 %
    full = lines["none", 576, None].measured
    expected = sum(50 / full[name] for name in MAIN.scored) * 10
    assert ours.measured["rel"] == pytest.approx(expected) and full["rel"] == pytest.approx(100)


def test_what_was_not_measured_is_empty(measured):
    paper = build(measured)
    lines = lines_of(paper)
    assert lines["vispruner", 32, None].measured == {"pope": 70.7}  # no Acc., no Rel.
    assert lines["fastv", 64, None].measured == {}
    rows = [
        row
        for row in csv.DictReader(paper.csv().splitlines())
        if (row["method"], row["tokens"]) == ("vispruner", "32")
    ]
    assert len(rows) == 12 and all(row["published"] for row in rows)
    assert [row["column"] for row in rows if row["measured"] or row["difference"]] == ["pope"]
    assert "measured" not in {row.kind for row in build_paper_table(MAIN, []).table().rows}


def test_rel_needs_all_tokens_measured(tmp_path):
    table = TABLES["llava-next-7b"]
    for name in table.scored:
        write_score(tmp_path / name, name, 50.0, model="llava-v1.6-vicuna-7b", tokens=32)
    ours = lines_of(build(tmp_path, table))["vispruner", 160, None]  # a budget of 32 per crop
    assert ours.measured["acc"] == pytest.approx((4 * 50 + 2.5) / 5) and "rel" not in ours.measured


def test_other_methods_and_ratios_have_lines_of_their_own(measured):
    write_score(measured / "r0", "pope", 60.0, ratio=0.0)
    write_score(measured / "random", "pope", 40.0, "random", ratio=None)
    paper = build(measured)
    lines = lines_of(paper)
    assert lines["vispruner", 64, 0.0].measured == {"pope": 60.0}
    assert lines["vispruner", 64, 0.0].published == {} == lines["random", 64, None].published
    assert lines["vispruner", 64, None].measured["pope"] == 50.0
    order = [(line.method, line.tokens) for line in paper.lines]
    assert order.index(("vispruner", 64)) < order.index(("random", 64)) < order.index(("tome", 32))
    other = lines_of(build(measured, ratio=0.0))
    assert other["vispruner", 64, None].measured == {"pope": 60.0}


def test_other_checkpoints_are_shown_only_by_name(tmp_path):
    write_score(tmp_path, "pope", 99.0, model="llava-tiny")
    paper = build(tmp_path)
    assert not any(line.measured for line in paper.lines)
    assert any("llava-tiny (1)" in note for note in paper.notes)
    named = build(tmp_path, names={"llava-1.5-7b": {"llava-tiny"}})
    assert lines_of(named)["vispruner", 64, None].measured == {"pope": 99.0}
    assert "Measured: llava-tiny." in named.notes


@pytest.mark.parametrize("name", ["vizwiz_val", "vizwiz"])
def test_validation_scores_are_not_compared_with_test_scores(name, tmp_path):
    write_score(tmp_path, name, 54.0, details={"split": "validation"})
    assert not any(line.measured for line in build(tmp_path).lines)
    write_score(tmp_path / "pope", "pope", 80.0)
    assert any(f"Validation scores ({name})" in note for note in build(tmp_path).notes)
    (tmp_path / "server.json").write_text('{"benchmark": "vizwiz", "score": 52.0}')
    found = lines_of(build(tmp_path))["vispruner", 64, None].measured.get("vizwiz")
    assert found == (52.0 if name == "vizwiz" else None)


def test_parts_of_a_set_and_fixed_scores_are_marked(tmp_path):
    write_score(tmp_path / "part", "pope", 90.0, answers=120)
    write_score(tmp_path / "fixed", "gqa", 60.0, details={"rule": "fixed: joined by id"})
    paper = build(tmp_path)
    line = lines_of(paper)["vispruner", 64, None]
    assert (line.marks("pope"), line.marks("gqa")) == ("*", "+")
    text = paper.table().text()
    assert "90.0*" in text and "\n* not the full set" in text
    assert "60.0+" in text and "\n+ scored with --fixed" in text


NEXT = {"model": "llava-v1.6-vicuna-7b"}


def test_other_numbers_of_visual_tokens_are_marked(tmp_path):
    """LLaVA's own crops give other totals than the paper's 5 x 576; they stood unmarked in its rows."""
    table = TABLES["llava-next-7b"]
    write_score(tmp_path / "a", "pope", 86.4, "none", None, None, **NEXT, visual_tokens=2144.3)
    write_score(tmp_path / "b", "textvqa", 59.6, "none", None, None, **NEXT, visual_tokens=2880.0)
    write_score(tmp_path / "c", "pope", 75.0, tokens=32, **NEXT, visual_tokens=112.0)
    write_score(tmp_path / "d", "gqa", 58.0, tokens=32, **NEXT)  # not recorded
    paper = build(tmp_path, table)
    lines = lines_of(paper)
    full, pruned = lines["none", 2880, None], lines["vispruner", 160, None]
    assert (full.marks("pope"), full.marks("textvqa")) == ("#", "")
    assert (pruned.marks("pope"), pruned.marks("gqa")) == ("#", "")
    assert len(paper.warnings) == 2
    assert any("2144.3 visual tokens, in the row of 2880" in warning for warning in paper.warnings)
    text = paper.table().text()
    assert "86.4#" in text and "75.0#" in text and "59.6#" not in text and "\n# measured with another" in text
    differences = paper.document()["rows"][0]["marks"]
    assert differences == {"pope": "#"} and re.search(r"difference .*[+-]\d\.\d#", text)
    assert r"86.4\#" in paper.table().latex()
    rows = {(row["method"], row["column"]): row for row in csv.DictReader(paper.csv().splitlines())}
    assert rows["none", "pope"]["marks"] == "#" and rows["none", "textvqa"]["marks"] == ""


@pytest.mark.parametrize(
    "method, tokens, visual",
    [("fastv", 128, 156.0), ("sparsevlm", 64, 82.25), ("pyramiddrop", 128, 127.4375)],
)
def test_means_over_layers_are_those_of_the_row(tmp_path, method, tokens, visual):
    """FastV at 128 tokens has 128 from its layer on, a mean of 156: that is what the row of 128 means."""
    write_score(tmp_path / "a", "pope", 60.0, method, tokens, visual_tokens=visual)
    write_score(tmp_path / "b", "gqa", 60.0, method, tokens, visual_tokens=visual + 9)
    line = lines_of(build(tmp_path))[method, tokens, None]
    assert (line.marks("pope"), line.marks("gqa")) == ("", "#")


def test_marks_reach_the_means_of_a_row(measured):
    write_score(measured / "64" / "pope", "pope", 50.0, visual_tokens=128.0)
    lines = lines_of(build(measured))
    assert lines["vispruner", 64, None].marks("acc") == "#" == lines["vispruner", 64, None].marks("rel")
    write_score(measured / "64" / "pope", "pope", 50.0, visual_tokens=64.0)
    full = next(row for row in MAIN.rows if row.method == "none").values["pope"]
    write_score(measured / "none" / "pope", "pope", full, "none", None, None, visual_tokens=500.0)
    lines = lines_of(build(measured))
    assert (lines["vispruner", 64, None].marks("acc"), lines["vispruner", 64, None].marks("rel")) == ("", "#")


def test_of_two_protocols_that_of_the_row_is_shown(tmp_path):
    table = TABLES["llava-next-7b"]
    write_score(tmp_path / "a", "pope", 86.0, "none", None, None, **NEXT, visual_tokens=2880.0)
    write_score(tmp_path / "b", "pope", 87.0, "none", None, None, **NEXT, visual_tokens=2144.3)  # newer
    paper = build(tmp_path, table)
    assert lines_of(paper)["none", 2880, None].measured == {"pope": 86.0}
    (warning,) = paper.warnings
    assert str(tmp_path / "b") in warning and "2144.3 visual tokens" in warning


@pytest.mark.parametrize(
    "fact, usual, other",
    [
        ("dtype", "float16", "float32"),
        ("tower_dtype", "float32", "float16"),
        ("conv_mode", "vicuna_v1", "v0"),
        ("preset", "published", None),
        ("weights", "aa", "bb"),
        ("temperature", 0.0, 0.2),
        ("num_beams", 1, 5),
    ],
)
def test_cells_of_another_configuration_are_marked(tmp_path, fact, usual, other):
    """A table is of one dtype, conversation and preset; files of earlier versions do not record them."""
    known = {"dtype": "bfloat16"}
    for place, name in enumerate(("pope", "gqa", "textvqa")):
        write_score(tmp_path / name, name, 60.0, **known | {fact: other if place == 1 else usual})
    write_score(tmp_path / "old", "mme", 1400.0)
    paper = build(tmp_path)
    line = lines_of(paper)["vispruner", 64, None]
    assert {name: line.marks(name) for name in line.measured} == {
        "pope": "",
        "gqa": "~",
        "textvqa": "",
        "mme": "",
    }
    (warning,) = paper.warnings
    assert f"different {fact}: {usual} (2 cells), {other} (1 cells)" in warning
    assert (
        "60.0~" in paper.table().text() and "\n~ measured with another configuration" in paper.table().text()
    )
    rows = {row["column"]: row for row in csv.DictReader(paper.csv().splitlines()) if row["measured"]}
    assert rows["gqa"]["marks"] == "~" and rows["pope"][fact] == str(usual)


def test_video_scores_come_from_the_details(tmp_path):
    details = {"average_score": 3.9}
    write_score(tmp_path, "msvd", 69.0, tokens=227, model="Video-LLaVA-7B", details=details)
    line = lines_of(build(tmp_path, TABLES["video-llava-7b"]))["vispruner", 227, None]
    assert line.measured == {"msvd_acc": 69.0, "msvd_score": 3.9}


def test_efficiency_is_what_runs_record(tmp_path):
    known = {"tokens": 32, "visual_tokens": 160.0}
    write_score(tmp_path, "pope", 80.0, model="llava-v1.6-vicuna-7b", llm_gflops=3000.0, **known)
    line = lines_of(build(tmp_path, TABLES["efficiency"]))["vispruner", 160, None]
    assert line.measured == {"flops_T": 3.0, "kv_cache_MB": 80.0}  # runs do not record memory and time
    shape = {"gflops": {"shape": [2, 64, 99, 32], "text_tokens": 9}}
    for more, expected in (({}, None), (shape, 160 / 4096)):
        write_score(tmp_path, "pope", 80.0, model="other", **known, **more)
        paper = build(tmp_path, TABLES["efficiency"], names={"llava-next-7b": {"other"}})
        assert lines_of(paper)["vispruner", 160, None].measured.get("kv_cache_MB") == expected


def test_forms_of_the_table(measured):
    table = build(measured).table()
    markdown, latex = table.markdown(), table.latex()
    assert {line.count("|") for line in markdown.splitlines() if line.startswith("|")} == {16}
    assert "**50.0**" in markdown and re.search(r"\| +-30\.4 \|", markdown)
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {line.count("&") for line in body} == {14}
    assert r"\textbf{50.0}" in latex and "$-30.4$" in latex and latex.count(r"\midrule") == 4


def test_page_has_charts_of_means_and_of_measured_benchmarks(measured):
    pytest.importorskip("matplotlib")
    page = html_page("Title", [build(measured).html()])
    drawn = re.findall(r'role="img">\s*<title>LLaVA-1.5-7B: (.*?)</title>', page)
    assert drawn[:2] == ["Acc. against tokens", "Acc. against FLOPs"] and len(drawn) == 2 + len(MAIN.scored)
    assert "VisPruner, measured: 64, 50.00" in page and "VisPruner, published: 64, 80.40" in page


def test_flops_of_other_models_are_unknown(tmp_path):
    write_score(tmp_path / "a", "pope", 80.0, model="llava-tiny")
    write_score(tmp_path / "b", "gqa", 80.0, model="llava-tiny", llm_gflops=5.0, tokens=32)
    lines = lines_of(build(tmp_path, names={"llava-1.5-7b": {"llava-tiny"}}))
    assert flops_of(MAIN, lines["vispruner", 64, None], True) is None
    assert flops_of(MAIN, lines["vispruner", 32, None], True) == pytest.approx(0.005)
    seven = PublishedModel("m", "M", 576, (), (32, 4096, 11008))
    expected = prefill_flops("vispruner", 64, seven) / 1e12
    assert flops_of(MAIN, lines["vispruner", 64, None], False) == pytest.approx(expected)
