"""Verdicts on published numbers, from made-up score.json files."""

from __future__ import annotations

import csv
import json

import pytest

from helpers.score_files import write_score
from llava.eval.tables.__main__ import main
from llava.eval.tables.collect import read_results
from llava.eval.tables.paper import build_paper_table
from llava.eval.tables.published import load_further, load_published
from llava.eval.tables.verdict import count_statuses, verdict_csv, verdict_table, verdicts

TABLES = load_published()
MAIN, NEXT = TABLES["llava-1.5-7b"], TABLES["llava-next-7b"]
SHAPE = {"shape": [32, 4096, 11008, None], "text_tokens": 60}
ALL = 19 * 12 - 1  # published numbers of the main table, without Rel. = 100


def judge(folder, table=MAIN, **options):
    paper = build_paper_table(table, read_results([folder])[0], **options)
    return paper, {(one.method, one.tokens, one.column): one for one in verdicts(paper)}


def pope(folder, score, name="pope", **more):
    write_score(folder, name, score, **{"prefill": SHAPE, **more})


@pytest.mark.parametrize(
    "score, low, high, status, inside",
    [
        (80.4, 79.0, 81.5, "equal", True),
        (80.44, 79.0, 81.5, "equal", True),
        (80.46, 79.0, 81.5, "inside", True),
        (81.0, 80.0, 82.0, "inside", True),
        (81.4, 80.45, 82.0, "inside", True),  # 80.45 is printed as 80.4 or 80.5
        (81.4, 80.46, 82.0, "outside", False),
        (79.0, 78.0, 80.3, "outside", False),
        (81.0, None, None, "no interval", None),
        (80.4, None, None, "equal", None),
    ],
)
def test_a_measured_score_against_the_published_80_4(score, low, high, status, inside, tmp_path):
    pope(tmp_path, score, ci_low=low, ci_high=high)
    one = judge(tmp_path)[1]["vispruner", 64, "pope"]
    assert (one.status, one.inside) == (status, inside)
    assert one.difference == pytest.approx(score - 80.4) and one.why == ""


def test_every_published_number_has_one_verdict(tmp_path):
    pope(tmp_path, 80.4)
    paper, found = judge(tmp_path)
    assert len(found) == ALL == len(verdicts(paper))
    assert count_statuses(list(found.values())) == {"equal": 1, "missing": ALL - 1}
    assert found["fastv", 32, "gqa"].measured is None is found["fastv", 32, "gqa"].difference


@pytest.mark.parametrize(
    "shape, model, why",
    [
        ([3, 192, 512], "llava-v1.5-7b", "layers, width, MLP"),  # a small model under the published name
        ([32, 4096, 14336, 1024], "llava-v1.5-7b", "layers, width, MLP"),
        ([3, 192, 512], "llava-tiny", "layers, width, MLP"),
        (None, "llava-tiny", "size was not recorded"),
        ([32, 4096, 11008, None], "my-copy", ""),
        (None, "llava-v1.5-7b", ""),
    ],
)
def test_another_model_is_never_compared(shape, model, why, tmp_path):
    prefill = {"shape": shape, "text_tokens": 9} if shape else None
    write_score(tmp_path, "pope", 80.4, model=model, prefill=prefill, ci_low=80, ci_high=81)
    one = judge(tmp_path, names={"llava-1.5-7b": {model}})[1]["vispruner", 64, "pope"]
    assert one.status == ("not comparable" if why else "equal") and why in one.why
    assert (one.inside is None) == bool(why)


@pytest.mark.parametrize(
    "more, why",
    [
        ({"limit": 50}, "not the full set"),
        ({"answered": 50}, "not the full set"),
        ({"details": {"rule": "fixed: joined by id"}}, "--fixed"),
        ({"visual_tokens": 60.0}, "visual tokens"),
    ],
)
def test_part_of_a_set_or_another_rule_is_not_comparable(more, why, tmp_path):
    pope(tmp_path, 80.4, ci_low=80, ci_high=81, **more)
    one = judge(tmp_path)[1]["vispruner", 64, "pope"]
    assert one.status == "not comparable" and why in one.why


def test_a_mean_is_judged_by_its_parts(tmp_path):
    for tokens in (None, 64):
        for name in ("vqav2", "gqa", "textvqa", "pope", "mme"):
            method, ratio = ("none", None) if tokens is None else ("vispruner", 0.5)
            shape = {**SHAPE, "shape": [2, 8, 16]} if name == "mme" else SHAPE
            more = {"prefill": shape, "method": method, "ratio": ratio, "tokens": tokens}
            pope(tmp_path / f"{name}{tokens}", 60.0, name, model="llava-v1.6-vicuna-7b", **more)
    found = judge(tmp_path, NEXT)[1]
    assert found["none", 2880, "gqa"].status == "no interval"
    assert found["vispruner", 320, "rel"].status == "not comparable"  # 64 per crop
    assert {found["none", 2880, name].status for name in ("mme", "acc")} == {"not comparable"}
    assert ("none", 2880, "rel") not in found  # 100 by definition


def test_reprinted_numbers_are_not_missed(tmp_path):
    for name, score in [("pope", 85.0), ("textvqa", 58.0)]:
        more = {"tokens": 128, "ci_low": score - 0.1, "ci_high": score + 0.1}
        pope(tmp_path / name, score, name, model="llava-v1.6-vicuna-7b", **more)
    found = judge(tmp_path, NEXT)[1]
    one = found["vispruner", 640, "textvqa"]
    assert (one.status, one.inside, one.why) == ("reprinted", False, "fastervlm at 720")
    assert found["vispruner", 640, "pope"].status == "outside"  # printed for this budget
    assert found["fastv", 640, "textvqa"].status == "missing"


def test_a_servers_score_has_no_interval_of_the_local_one(tmp_path):
    pope(tmp_path, 60.0, ci_low=59.0, ci_high=61.0)
    (tmp_path / "server.json").write_text('{"benchmark": "pope", "score": 80.0}')
    one = judge(tmp_path)[1]["vispruner", 64, "pope"]
    assert (one.status, one.ci_low) == ("no interval", None)


def test_the_predecessors_tables_are_judged_too(tmp_path):
    pope(tmp_path, 83.4, method="fastervlm", ratio=None, tokens=144, ci_low=83, ci_high=84)
    found = judge(tmp_path, load_further()["fastervlm-llava-1.5-7b"])[1]
    assert found["fastervlm", 144, "pope"].status == "inside"  # of 83.46, printed with two digits


def test_forms_and_command(tmp_path, capsys):
    pope(tmp_path / "in", 80.0, ci_low=79.0, ci_high=81.0)
    paper, found = judge(tmp_path / "in")
    text = verdict_table(paper, list(found.values())).text()
    assert "80.0" in text and "80.4" in text and "-0.4" in text and "[79.0, 81.0]" in text
    assert f"inside: 1; missing: {ALL - 1}." in text
    rows = list(csv.DictReader(verdict_csv(list(found.values())).splitlines()))
    assert len(rows) == ALL and [row["status"] for row in rows].count("inside") == 1
    arguments = ["--results", str(tmp_path / "in"), "--output", str(tmp_path / "o"), "--columns", "pope"]
    assert main(["--table", "llava-1.5-7b", "--verdict", *arguments]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    counts = {"inside": 1, "no interval": 1, "missing": 19 * 3 - 3}  # of POPE, and Acc. and Rel. over it
    assert document["verdict"]["counts"] == counts == document["verdict"]["by_table"]["llava-1.5-7b"]
    assert len(document["verdict"]["cells"]) == 19 * 3 - 1
    assert (tmp_path / "o" / "llava-1.5-7b_verdict.csv").is_file()
    assert "measured against published" in (tmp_path / "o" / "llava-1.5-7b.html").read_text()
