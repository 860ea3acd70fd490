"""Tables: the paper's sums on all its rows, what of score.json files stands where, and what is written."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from llava.eval.benchmarks.base import DataError
from llava.eval.tables import __main__ as tables
from llava.eval.tables import paper_forms as forms
from llava.eval.tables.__main__ import build_report, main
from llava.eval.tables.collect import read_results
from llava.eval.tables.plots import Series, line_chart
from llava.eval.tables.published import (
    COLUMNS,
    Model,
    accuracy,
    load_published,
    prefill_flops,
    relative,
    restrict,
    summarise,
)

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "data" / "benchmarks" / "aggregate"
TABLES = load_published()
CHECKPOINT = "llava-v1.5-7b"


def full_of(table, model):
    return next(row for row in table.rows if (row.model, row.method) == (model, "none"))


SUMMED = [
    (table, row)
    for table in TABLES.values()
    if "rel" in table.columns
    for row in table.rows
    if row.method != "none"
]


def test_the_published_rows_are_all_there():
    assert len(SUMMED) == 36
    assert {name: len(table.rows) for name, table in TABLES.items()} == {
        "llava-1.5-7b": 19,
        "llava-next-7b": 13,
        "video-llava-7b": 7,
        "other-vlms": 9,
        "efficiency": 5,
    }
    assert all("arXiv:2412.01818" in table.source for table in TABLES.values())


@pytest.mark.parametrize(
    "table, row",
    SUMMED,
    ids=lambda one: str(getattr(one, "name", None) or f"{one.model}-{one.method}-{one.tokens}"),
)
def test_published_sums_follow_from_published_scores(table, row):
    full = full_of(table, row.model).values
    scores = {name: row.values[name] for name in table.scored}
    assert accuracy(scores) == pytest.approx(row.values["acc"], abs=0.0501)  # as printed, to one digit
    whole = {name: full[name] for name in table.scored}
    # inputs are rounded to 0.1; VisPruner at 128 tokens is the one row that this moves past the last digit
    assert relative(scores, whole) == pytest.approx(row.values["rel"], abs=0.0601)


def test_rel_is_no_ratio_of_means():
    apart = []
    for table, row in SUMMED:
        full = full_of(table, row.model).values
        apart.append(abs(100 * row.values["acc"] / full["acc"] - row.values["rel"]))
    assert max(apart) > 2


def test_full_rows_sum_up_too():
    for name, acc in (("llava-1.5-7b", 63.0635), ("llava-next-7b", 73.138)):
        table = TABLES[name]
        values = full_of(table, name).values
        found = summarise(table.columns, values, values)
        assert found["acc"] == pytest.approx(acc) and found["rel"] == pytest.approx(100)


def test_video_means():
    table = TABLES["video-llava-7b"]
    for row in table.rows:
        found = summarise(table.columns, row.values, None)
        assert found["avg_acc"] == pytest.approx(row.values["avg_acc"], abs=0.0501)
        assert found["avg_score"] == pytest.approx(row.values["avg_score"], abs=0.00501)


@pytest.mark.parametrize(
    "name, file", [("llava-1.5-7b", "table_llava15_7b"), ("llava-next-7b", "table_llavanext_7b")]
)
def test_sums_equal_the_golden_ones(name, file):
    golden = json.loads((GOLDEN / f"{file}.json").read_text())
    rows = {(row.method, row.tokens): row for row in TABLES[name].rows}
    whole = {key.lower(): value for key, value in golden["reference"]["scores"].items()}
    assert accuracy(whole) == pytest.approx(golden["reference"]["acc"], abs=1e-9)
    assert len(golden["rows"]) == len(rows) - 1
    for one in golden["rows"]:
        scores = {key.lower(): value for key, value in one["scores"].items()}
        assert accuracy(scores) == pytest.approx(one["acc"], abs=1e-9)
        assert relative(scores, whole) == pytest.approx(one["rel_pct"], abs=1e-9)
        ours = rows[one["method"].lower(), one["tokens"]].values
        assert {key: ours[key] for key in scores} == scores
        assert (ours["acc"], ours["rel"]) == (one["published_acc"], one["published_rel_pct"])


def test_sums_refuse_what_has_none():
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
            assert tera == pytest.approx(row.values["flops_T"] - 0.6, abs=0.2)  # the tower is not in it
    assert prefill_flops("sparsevlm", 64, model) is None


def broken(change):
    row = {"model": "m", "method": "x", "tokens": 1, "values": [1.0]}
    model = {"title": "M", "full_tokens": 9, "checkpoints": ["m"], "language": [1, 2, 3]}
    table = {"title": "T", "tokens_per_budget": 1, "models": {"m": model}, "columns": ["pope"], "rows": [row]}
    change(table)
    return {"source": "S", "tables": {"t": table}}


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t["rows"][0].update(values=[1.0, 2.0]), "row 1: 2 values for 1 columns"),
        (lambda t: t["rows"][0].update(values=["1"]), "'1' is not a number"),
        (lambda t: t["rows"][0].update(model="n"), "model 'n' is not among m"),
        (lambda t: t.update(columns=["poppe"]), "unknown column 'poppe'"),
        (lambda t: t["rows"].append(t["rows"][0]), "two rows"),
        (lambda t: t.pop("title"), "'title'"),
    ],
)
def test_damaged_published_data_is_named(tmp_path, change, says):
    path = tmp_path / "published.json"
    path.write_text(json.dumps(broken(lambda table: None)))
    assert load_published(path)["t"].rows[0].values == {"pope": 1.0}
    path.write_text(json.dumps(broken(change)))
    with pytest.raises(DataError, match=re.escape(says)) as caught:
        load_published(path)
    assert str(path) in str(caught.value) and "table t" in str(caught.value)


def test_missing_published_data(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_published(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match="not a JSON"):
        load_published(tmp_path / "x.json")


def test_published_data_is_installed_with_the_package():
    section = (ROOT / "pyproject.toml").read_text().split("[tool.setuptools.package-data]")[1].split("[")[1]
    assert "published.json" in section


def leave(folder, benchmark, score, method="vispruner", tokens=64, ratio=0.5, model=CHECKPOINT, **more):
    """A score.json as runs and sweeps leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "benchmark": benchmark,
        "score": score,
        "details": {},
        "model": model,
        "method": method,
        "tokens": tokens,
        "important_ratio": ratio,
        **more,
    }
    (folder / "score.json").write_text(json.dumps(document))


@pytest.fixture
def measured(tmp_path):
    """Every benchmark of LLaVA-1.5's table with all tokens and at 64, but no more than POPE at 32."""
    table = TABLES["llava-1.5-7b"]
    for name in table.scored:
        benchmark, whole = COLUMNS[name].benchmark, full_of(table, table.name).values[name]
        leave(tmp_path / "none" / name, benchmark, whole, "none", None, None)
        leave(tmp_path / "64" / name, benchmark, 50.0, low=49.0, high=51.0, visual_tokens=64.0)
    leave(tmp_path / "32", "pope", 70.7, tokens=32)
    return tmp_path


def lines_of(report):
    return {(line.method, line.tokens, line.ratio): line for line in report.lines}


def test_measured_beside_published(measured):
    results, warnings = read_results([measured])
    assert warnings == [] and len(results) == 21
    lines = lines_of(build_report(TABLES["llava-1.5-7b"], results))
    ours = lines["vispruner", 64, None]
    assert ours.published["pope"] == 80.4 and ours.measured["pope"] == 50.0
    assert ours.difference["pope"] == pytest.approx(-30.4)
    assert ours.measured["acc"] == pytest.approx((9 * 50 + 2.5) / 10)  # MME of 50 points is 2.5 %
    whole = lines["none", 576, None].measured
    expected = sum(50 / whole[name] for name in TABLES["llava-1.5-7b"].scored) * 10
    assert ours.measured["rel"] == pytest.approx(expected) and whole["rel"] == pytest.approx(100)


def test_what_was_not_measured_is_empty(measured, tmp_path):
    report = build_report(TABLES["llava-1.5-7b"], read_results([measured])[0])
    lines = lines_of(report)
    assert lines["vispruner", 32, None].measured == {"pope": 70.7}  # and no Acc., no Rel.
    assert lines["fastv", 64, None].measured == {}
    cells = [
        row
        for row in csv.DictReader(forms.as_csv(report).splitlines())
        if (row["method"], row["tokens"]) == ("vispruner", "32")
    ]
    assert len(cells) == 12 and all(row["published"] for row in cells)
    assert [row["column"] for row in cells if row["measured"] or row["difference"]] == ["pope"]
    empty = build_report(TABLES["llava-1.5-7b"], [])
    assert "measured" not in "".join(kind for _, kind, _ in forms._rows(empty))


def test_rel_needs_all_tokens_measured(tmp_path):
    for name in TABLES["llava-next-7b"].scored:
        leave(tmp_path / name, name, 50.0, model="llava-v1.6-vicuna-7b", tokens=32)
    report = build_report(TABLES["llava-next-7b"], read_results([tmp_path])[0])
    ours = lines_of(report)["vispruner", 160, None]  # a budget of 32 per crop
    assert ours.measured["acc"] == pytest.approx((4 * 50 + 2.5) / 5) and "rel" not in ours.measured


def test_other_methods_and_ratios_have_rows_of_their_own(measured):
    leave(measured / "r0", "pope", 60.0, ratio=0.0)
    leave(measured / "random", "pope", 40.0, "random", ratio=None)
    results, _ = read_results([measured])
    report = build_report(TABLES["llava-1.5-7b"], results)
    lines = lines_of(report)
    assert lines["vispruner", 64, 0.0].measured == {"pope": 60.0}
    assert lines["vispruner", 64, 0.0].published == {}
    assert lines["random", 64, None].published == {}
    assert lines["vispruner", 64, None].measured["pope"] == 50.0
    order = [(line.method, line.tokens) for line in report.lines]
    assert order.index(("vispruner", 64)) < order.index(("random", 64)) < order.index(("tome", 32))
    other = lines_of(build_report(TABLES["llava-1.5-7b"], results, ratio=0.0))
    assert other["vispruner", 64, None].measured == {"pope": 60.0}


def test_other_checkpoints_stay_out_unless_named(tmp_path):
    leave(tmp_path, "pope", 99.0, model="llava-tiny")
    results, _ = read_results([tmp_path])
    report = build_report(TABLES["llava-1.5-7b"], results)
    assert not any(line.measured for line in report.lines)
    assert any("llava-tiny (1)" in note for note in report.notes)
    named = build_report(TABLES["llava-1.5-7b"], results, names={"llava-1.5-7b": {"llava-tiny"}})
    assert lines_of(named)["vispruner", 64, None].measured == {"pope": 99.0}
    assert "Measured: llava-tiny." in named.notes


@pytest.mark.parametrize("name", ["vizwiz_val", "vizwiz"])
def test_validation_splits_do_not_stand_for_test(name, tmp_path):
    leave(tmp_path, name, 54.0, details={"split": "validation"})
    report = build_report(TABLES["llava-1.5-7b"], read_results([tmp_path])[0])
    assert not any(line.measured for line in report.lines)
    leave(tmp_path / "pope", "pope", 80.0)
    report = build_report(TABLES["llava-1.5-7b"], read_results([tmp_path])[0])
    assert any(f"Validation scores ({name})" in note for note in report.notes)
    (tmp_path / "server.json").write_text('{"benchmark": "vizwiz", "score": 52.0}')
    report = build_report(TABLES["llava-1.5-7b"], read_results([tmp_path])[0])
    found = lines_of(report)["vispruner", 64, None].measured.get("vizwiz")
    assert found == (52.0 if name == "vizwiz" else None)


def test_a_server_may_have_scored(tmp_path):
    leave(tmp_path, "vqav2", None)
    (tmp_path / "server.json").write_text('{"score": 72.5}')
    results, _ = read_results([tmp_path])
    assert results[0].score == 72.5
    (tmp_path / "server.json").write_text('{"points": 72.5}')
    results, warnings = read_results([tmp_path])
    assert results[0].score is None and "server.json" in warnings[0]
    report = build_report(TABLES["llava-1.5-7b"], results)
    assert not any(line.measured for line in report.lines)


def test_a_servers_number_may_stand_beside_answers_alone(tmp_path):
    metadata = {"model": CHECKPOINT, "method": "vispruner", "tokens": 64, "important_ratio": 0.5}
    (tmp_path / "answers.jsonl").write_text(json.dumps({"question_id": 1, "metadata": metadata}) + "\n")
    (tmp_path / "server.json").write_text('{"benchmark": "vqav2", "score": 72.5}')
    results, warnings = read_results([tmp_path])
    assert warnings == []
    line = lines_of(build_report(TABLES["llava-1.5-7b"], results))["vispruner", 64, None]
    assert line.measured == {"vqav2": 72.5} and line.difference["vqav2"] == pytest.approx(-0.2)


def test_parts_of_a_set_are_marked_and_whole_ones_win(tmp_path):
    leave(tmp_path / "a", "pope", 90.0, answers=120)
    results, _ = read_results([tmp_path])
    table = TABLES["llava-1.5-7b"]
    line = lines_of(build_report(table, results))["vispruner", 64, None]
    assert line.doubts("pope") == "*"
    text = forms.as_text(build_report(table, results))
    assert "90.0*" in text and "* not the full set" in text
    leave(tmp_path / "b", "pope", 80.0, answers=8910)
    (tmp_path / "a" / "score.json").touch()  # newer, and yet a part
    results, warnings = read_results([tmp_path])
    assert [one.score for one in results] == [80.0] and "left out (90.00)" in warnings[0]


def test_fixed_scores_are_marked(tmp_path):
    leave(tmp_path, "pope", 90.0, details={"rule": "fixed: joined by id"})
    report = build_report(TABLES["llava-1.5-7b"], read_results([tmp_path])[0])
    assert lines_of(report)["vispruner", 64, None].doubts("pope") == "+"


@pytest.mark.parametrize(
    "content, says",
    [
        ("{", "not a JSON document"),
        ("[1]", "no score of a benchmark"),
        ('{"benchmark": "nope", "score": 1}', "unknown benchmark 'nope'"),
        ('{"benchmark": "pope", "score": "1"}', "not a number"),
        ('{"benchmark": "pope", "score": 1, "method": "none"}', "does not say model and tokens"),
        (
            '{"benchmark": "pope", "score": 1, "method": "x", "model": "m", "tokens": "64"}',
            "neither a number",
        ),
    ],
)
def test_unusable_results_are_named_and_left_out(tmp_path, content, says):
    leave(tmp_path / "good", "pope", 80.0)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "score.json").write_text(content)
    results, warnings = read_results([tmp_path])
    assert len(results) == 1 and len(warnings) == 1
    assert str(tmp_path / "bad" / "score.json") in warnings[0] and says in warnings[0]


def test_answers_beside_say_what_a_score_does_not(tmp_path):
    (tmp_path / "score.json").write_text('{"benchmark": "pope", "score": 80.0}')
    metadata = {"model": CHECKPOINT, "method": "vispruner", "tokens": 64, "important_ratio": 0.5}
    (tmp_path / "answers.jsonl").write_text(json.dumps({"question_id": 1, "metadata": metadata}) + "\n")
    results, warnings = read_results([tmp_path])
    assert warnings == [] and results[0].key == (CHECKPOINT, "pope", "vispruner", 64, 0.5)


def test_video_scores_come_from_the_details(tmp_path):
    leave(tmp_path, "msvd", 69.0, tokens=227, model="Video-LLaVA-7B", details={"average_score": 3.9})
    report = build_report(TABLES["video-llava-7b"], read_results([tmp_path])[0])
    line = lines_of(report)["vispruner", 227, None]
    assert line.measured == {"msvd_acc": 69.0, "msvd_score": 3.9}


def test_efficiency_is_what_runs_know(tmp_path):
    leave(
        tmp_path,
        "pope",
        80.0,
        tokens=32,
        model="llava-v1.6-vicuna-7b",
        visual_tokens=160.0,
        llm_gflops=3000.0,
    )
    line = lines_of(build_report(TABLES["efficiency"], read_results([tmp_path])[0]))["vispruner", 160, None]
    assert line.measured == {"flops_T": 3.0, "kv_cache_MB": 80.0}  # memory and time nobody took
    names = {"llava-next-7b": {"other"}}
    shape = {"gflops": {"shape": [2, 64, 99, 32], "text_tokens": 9}}
    for more, expected in (({}, None), (shape, 160 / 4096)):
        leave(tmp_path, "pope", 80.0, tokens=32, model="other", visual_tokens=160.0, **more)
        report = build_report(TABLES["efficiency"], read_results([tmp_path])[0], names=names)
        assert lines_of(report)["vispruner", 160, None].measured.get("kv_cache_MB") == expected


def test_restricted_columns():
    table = restrict(TABLES["llava-1.5-7b"], ["pope", "gqa"])
    assert table.columns == ("gqa", "pope", "acc", "rel")
    row = next(row for row in table.rows if (row.method, row.tokens) == ("vispruner", 64))
    assert row.values["acc"] == pytest.approx((55.4 + 80.4) / 2)
    assert row.values["rel"] == pytest.approx(50 * (55.4 / 62.0 + 80.4 / 85.9))
    with pytest.raises(ValueError, match="no column 'tgif'"):
        restrict(table, ["tgif"])


def run(argv, capsys):
    code = main([str(part) for part in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_command_writes_all_forms(measured, tmp_path, capsys):
    output = tmp_path / "tables"
    code, out, err = run(["--table", "llava_1_5_7b", "--results", measured, "--output", output], capsys)
    document = json.loads(out.splitlines()[-1])
    assert code == 0 and err == "" and [one["table"] for one in document["tables"]] == ["llava-1.5-7b"]
    names = {f"llava-1.5-7b.{suffix}" for suffix in ("md", "csv", "tex", "html")}
    assert {Path(file).name for file in document["files"]} == names == {p.name for p in output.iterdir()}
    rows = {(row["method"], row["tokens"]): row for row in document["tables"][0]["rows"]}
    row = rows["vispruner", 32]
    assert row["measured"] == {"pope": 70.7} and row["difference"]["pope"] == pytest.approx(-2.0)
    markdown = (output / "llava-1.5-7b.md").read_text()
    widths = {line.count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert widths == {16} and "**50.0**" in markdown and "| -30.4 |" in markdown
    latex = (output / "llava-1.5-7b.tex").read_text()
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert {line.count("&") for line in body} == {14} and r"\textbf{50.0}" in latex and "$-30.4$" in latex
    page = (output / "llava-1.5-7b.html").read_text()
    assert "against tokens" in page and "against FLOPs" in page
    assert not re.search(r"""(src|href)\s*=|@import|<script|url\(""", page)  # nothing from elsewhere
    for drawing in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(drawing)


def test_command_makes_one_page_of_all(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no outputs/ here: nothing but published numbers
    code, out, _ = run(["--output", tmp_path / "o"], capsys)
    document = json.loads(out.splitlines()[-1])
    assert code == 0 and [one["table"] for one in document["tables"]] == list(TABLES)
    assert all(one["measured_cells"] == 0 for one in document["tables"])
    page = (tmp_path / "o" / "tables.html").read_text()
    assert page.count("<h2>") == 5
    assert page.count("against FLOPs</title>") == 6  # three models of others, none of efficiency


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--table", "llava-13b"], "no such table"),
        (["--ratio", "2"], "expected a number from 0 to 1"),
        (["--table", "other-vlms", "--model", "qwen"], "qwen-vl-7b=NAME"),
        (["--table", "llava-1.5-7b", "--model", "qwen=x"], "llava-1.5-7b=NAME"),
        (["--table", "llava-1.5-7b", "--columns", "tgif"], "no column 'tgif'"),
    ],
)
def test_wrong_arguments(argv, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--output", str(tmp_path / "o")])
    assert stop.value.code == 2 and says in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_missing_results_folder(tmp_path, capsys):
    code, _, err = run(["--results", tmp_path / "none", "--output", tmp_path / "o"], capsys)
    assert code == 1 and f"{tmp_path / 'none'}: no such folder" in err


def test_models_may_be_named(tmp_path, capsys):
    leave(tmp_path / "r", "textvqa", 60.0, model="my-qwen", tokens=128)
    code, out, _ = run(
        [
            "--table",
            "other-vlms",
            "--model",
            "qwen-vl-7b=some/my-qwen/",
            "--results",
            tmp_path / "r",
            "--output",
            tmp_path / "o",
        ],
        capsys,
    )
    rows = json.loads(out.splitlines()[-1])["tables"][0]["rows"]
    assert code == 0
    assert [row["model"] for row in rows if row["measured"]] == ["qwen-vl-7b"]


def points_of(drawing):
    """(x, y) of the circles."""
    return [
        (float(one.get("cx")), float(one.get("cy")))
        for one in ElementTree.fromstring(drawing).iter()
        if one.tag.endswith("circle")
    ]


def test_charts_place_points():
    series = Series("a & b", ((32, 50.0, 49.0, 51.0), (64, 60.0, None, None), (128, 55.0, None, None)), True)
    drawing = line_chart("t < u", "x", "y", [series], {"a & b": "#000"}, [32, 64, 128])
    (x0, y0), (x1, y1), (x2, y2) = points_of(drawing)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)  # doublings are as far apart
    assert y0 > y2 > y1 and y0 - y2 == pytest.approx(y2 - y1, abs=0.2)
    for x, y in points_of(drawing):
        assert 0 < x < 480 and 0 < y < 320
    with pytest.raises(ValueError, match="no points"):
        line_chart("t", "x", "y", [], {})
    assert (
        len(
            points_of(line_chart("t", "x", "y", [Series("a", ((7, 3.0, None, None),), False)], {"a": "#000"}))
        )
        == 1
    )


def test_a_method_has_one_colour_in_all_tables():
    page = forms.as_html([build_report(table, []) for table in TABLES.values()])
    inks: dict[str, set[str]] = {}
    for ink, name in re.findall(r'<circle [^>]*stroke="(#\w+)"[^>]*><title>([^,]+), published', page):
        inks.setdefault(name, set()).add(ink)
    assert {"VisPruner", "FastV", "SparseVLM", "All tokens"} <= inks.keys()
    assert all(len(found) == 1 for found in inks.values())
    assert len(set.union(*inks.values())) == len(inks)


def test_plots_know_flops_of_the_tables_models_only(tmp_path):
    leave(tmp_path / "a", "pope", 80.0, model="llava-tiny")
    leave(tmp_path / "b", "gqa", 80.0, model="llava-tiny", llm_gflops=5.0, tokens=32)
    table = TABLES["llava-1.5-7b"]
    report = build_report(table, read_results([tmp_path])[0], names={"llava-1.5-7b": {"llava-tiny"}})
    lines = lines_of(report)
    assert tables.flops_of(table, lines["vispruner", 64, None], True) is None
    assert tables.flops_of(table, lines["vispruner", 32, None], True) == pytest.approx(0.005)
    seven = Model("m", "M", 576, (), (32, 4096, 11008))
    assert tables.flops_of(table, lines["vispruner", 64, None], False) == pytest.approx(
        prefill_flops("vispruner", 64, seven) / 1e12
    )


@pytest.mark.parametrize("name", ["llava_1_5_7b", "llava_next_7b", "video_llava_7b", "other_vlms"])
def test_scripts_name_their_table(name, tmp_path):
    script = ROOT / "scripts" / "tables" / f"{name}.sh"
    assert len(script.read_text().splitlines()) <= 5
    shown = tmp_path / "python"  # stands for Python: prints what it is asked to run
    shown.write_text('#!/usr/bin/env bash\n[ "$1" = -m ] || exit 0\necho "$@"\n')
    shown.chmod(0o755)
    code = (
        'source() { builtin source "$@"; vispruner_env() { PY=$FAKE; }; }; '
        f'builtin source "{script}" --ratio 0.5'
    )
    made = subprocess.run(
        ["bash", "-c", code],
        capture_output=True,
        text=True,
        env={
            "PATH": "/usr/bin:/bin",
            "FAKE": str(shown),
            "OUT_DIR": str(tmp_path / "out"),
            "CKPT": "folder/mine",
        },
    )
    assert made.returncode == 0, made.stderr
    words = made.stdout.split()
    assert words[:4] == ["-m", "llava.eval.tables", "--table", words[3]]
    assert tables._chosen(words[3], TABLES)[0] is TABLES[name.replace("_1_5_", "-1.5-").replace("_", "-")]
    assert words[-2:] == ["--ratio", "0.5"] and ("folder/mine" in words) == (name != "other_vlms")
    assert str(tmp_path / "out") in words
