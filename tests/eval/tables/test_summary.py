"""The summary of a sweep: means over benchmarks above the constant answer, their intervals, and the page."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from llava.eval.benchmarks import Benchmark, Question, QuestionScore, get_benchmark
from llava.eval.metrics.scorecard import Scorecard
from llava.eval.metrics.statistics import bootstrap_interval
from llava.eval.tables.summary import (
    ScoredBenchmark,
    ScoredSetting,
    build_summary,
)
from llava.paths import BUNDLED_DATA

IMAGES = 40
NAMES = ("none", "random-64", "vispruner-r0.5-64", "vispruner-r0-64")


class Yes(Benchmark):
    """Right is "Yes" for the first questions, `share` of them; two questions per image."""

    metric, constants_ = "accuracy", ("Yes", "No")

    def __init__(self, name: str, share: float = 0.5) -> None:
        self.name, self.title, self.share = name, name.upper(), share

    def questions(self, data, problems):
        raise NotImplementedError

    def score(self, data, answers, fixed=False):
        raise NotImplementedError

    def constants(self, data):
        return list(self.constants_)

    def question_scores(self, data, answers):
        many = round(self.share * 2 * IMAGES)
        return [
            QuestionScore(
                str(row["question_id"]),
                str(row["question_id"] // 2),
                float((row["text"] == "Yes") == (row["question_id"] < many)),
            )
            for row in answers
        ]


def asked() -> list[Question]:
    return [Question(number, number, Path(f"{number // 2}.png"), "?") for number in range(2 * IMAGES)]


def setting(benchmark: Yes, name: str, right: int) -> ScoredSetting:
    """A setting that has the first `right` of its 80 questions right."""
    many = round(benchmark.share * 2 * IMAGES)
    rows = [
        {"question_id": number, "text": "Yes" if (number < many) == (number < right) else "No"}
        for number in range(2 * IMAGES)
    ]
    counts = benchmark.per_image_counts(Path(), rows)
    low, high = bootstrap_interval(counts, benchmark.score_counts, 500, 0)
    method, _, ratio = name.removesuffix("-64").partition("-r")
    tokens = None if method == "none" else 64
    card = Scorecard(
        benchmark.name,
        float(benchmark.score_counts(counts.counts.sum(0))),
        method=method,
        tokens=tokens,
        important_ratio=float(ratio) if ratio else None,
        ci_low=low,
        ci_high=high,
        visual_tokens=float(tokens or 576),
        llm_gflops=(tokens or 576) / 100,
        answered=len(rows),
    )
    assert card.score == pytest.approx(100 * right / (2 * IMAGES))
    return ScoredSetting(name, card, counts)


def scored(benchmark: Yes, *rights: int) -> ScoredBenchmark:
    pairs = zip(NAMES, rights, strict=False)
    return ScoredBenchmark(benchmark, Path(), asked(), [setting(benchmark, *pair) for pair in pairs])


@pytest.fixture
def summary():
    found = [
        scored(Yes("a"), 80, 48, 72, 64),
        scored(Yes("b", 0.25), 76, 70, 74, 72),
        scored(Yes("c"), 42, 40, 44, 38),
    ]
    return build_summary("toy", found, ["FREE"], resamples=500)


def acc(row):
    return row.cards["acc"].score


def test_benchmarks_near_the_constant_answer_are_not_in_the_means(summary):
    assert [column.constant for column in summary.columns] == [50, 75, 50]
    assert [column.in_mean for column in summary.columns] == [True, True, False]
    assert [(len(column.questions), column.images) for column in summary.columns] == [(80, 40)] * 3
    none, random, half, _ = summary.rows
    assert acc(none) == pytest.approx((100 + 95) / 2) and none.cards["rel"].score == 100
    assert acc(random) == pytest.approx((60 + 87.5) / 2)
    assert random.cards["rel"].score == pytest.approx(100 * (0.6 + 87.5 / 95) / 2)  # a mean of ratios
    assert half.cards["rel"].score != pytest.approx(100 * acc(half) / acc(none), abs=0.01)
    for row in summary.rows:
        for key in ("acc", "rel"):
            card = row.cards[key]
            assert card.ci_low <= card.score <= card.ci_high
    assert random.cards["acc"].ci_low < random.cards["acc"].ci_high


def test_differences_are_computed_from_the_same_draws(summary):
    ours = "VisPruner (r = 0.5)"
    found = {row.cells[0].text: [cell.text for cell in row.cells[1:]] for row in summary.differences().rows}
    assert set(found) == {f"{ours} - Random", f"{ours} - VisPruner (r = 0)"}
    tokens, points, interval, significant = found[f"{ours} - VisPruner (r = 0)"]
    expected = (90 - 80 + 92.5 - 90) / 2
    assert (tokens, points, significant) == ("64", f"{expected:+.1f}", "yes")
    low, high = map(float, interval.strip("[]").split(", "))
    first, second = (row.draws["acc"] for row in summary.rows[2:])
    apart = np.quantile(first - np.random.default_rng(0).permutation(second), [0.025, 0.975])
    assert low <= expected <= high and high - low < apart[1] - apart[0]
    same = build_summary("toy", [scored(Yes("a"), 80, 48, 64, 64)], resamples=500)
    assert [row.cells[-1].text for row in same.differences().rows] == ["yes", "no"]


def test_a_setting_that_is_missing_somewhere_has_no_mean():
    found = build_summary("toy", [scored(Yes("a"), 80, 48, 72), scored(Yes("b"), 76, 60)], resamples=200)
    assert ["acc" in row.cards for row in found.rows] == [True, True, False]
    assert found.text() and found.html()


def test_without_a_benchmark_above_the_constant_answer_there_is_no_mean():
    found = build_summary("toy", [scored(Yes("c"), 42, 40)], resamples=200)
    assert not any("acc" in row.cards for row in found.rows)
    assert "mean over no benchmark" in " ".join(found.notes)
    assert "Acc. against" not in found.html()


def test_mme_counts_in_percent_of_its_highest_score():
    mme = Yes("mme")
    mme.unit = "points"
    one = scored(mme, 80, 60)
    details = {"perception": {"subtasks": {"count": 1.0, "color": 2.0}}}
    mme.score_counts = lambda counts: 4 * Benchmark.score_counts(mme, counts)
    settings = [
        ScoredSetting(
            part.name,
            part.card.replace(details=details, score=4 * part.card.score, ci_low=4 * part.card.ci_low),
            part.counts,
        )
        for part in one.settings
    ]
    found = build_summary("toy", [ScoredBenchmark(mme, Path(), asked(), settings)], resamples=200)
    assert [acc(row) for row in found.rows] == [100, 75]  # of two tasks with 200 points each
    assert found.rows[1].cards["acc"].ci_low < 75 < found.rows[1].cards["acc"].ci_high < 100
    assert found.rows[1].cards["rel"].score == pytest.approx(75)


def test_without_all_tokens_every_benchmark_is_in_the_mean():
    one = ScoredBenchmark(Yes("c"), Path(), asked(), [setting(Yes("c"), "vispruner-r0.5-64", 41)])
    (row,) = build_summary("toy", [one], resamples=200).rows
    assert acc(row) == pytest.approx(51.25) and "rel" not in row.cards


def test_rel_is_undefined_where_all_tokens_score_nothing():
    """A benchmark without constant answers may have a score of 0 with all tokens."""
    benchmark = Yes("c")
    benchmark.constants_ = ()
    found = build_summary("toy", [scored(benchmark, 0, 40)], resamples=200)
    assert [acc(row) for row in found.rows] == [0, 50]
    assert not any("rel" in row.cards for row in found.rows)


def test_scores_without_counts_are_shown_but_not_in_a_mean():
    one = scored(Yes("a"), 80, 48)
    bare = ScoredSetting("random-64", one.settings[1].card.replace(ci_low=None, ci_high=None))
    found = build_summary("toy", [ScoredBenchmark(Yes("a"), Path(), asked(), [one.settings[0], bare])])
    assert found.rows[1].cards.keys() == {"a"} and "60.0" in found.text() and found.html()


def test_forms(summary):
    text, markdown = summary.text(), summary.files()["grid.md"]
    assert "C†" in text and "Constant answer" in text and "97.5" in text
    assert re.search(r"\*\*91\.2\*\* \[", markdown) and "| Constant answer " in markdown
    assert "† Not in the means" in markdown and "not scored here: FREE" in markdown
    assert markdown.count("| VisPruner (r = 0.5) - ") == 2 and "55.0** [" not in markdown
    rows = list(csv.DictReader(summary.csv().splitlines()))
    assert len(rows) == 3 * 4 + 2 * 4
    half = next(row for row in rows if row["set"] == "a" and row["important_ratio"] == "0.5")
    assert float(half["score"]) == 90 and float(half["low"]) <= 90 <= float(half["high"])
    assert half["counted"] == "true" and float(half["majority"]) == 50 and half["questions"] == "80"
    latex = summary.table().latex()
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len({line.count("&") for line in body}) == 1 and r"$^\dagger$" in latex
    assert latex.count(r"\midrule") == 3


def test_document_keeps_the_first_names(summary):
    found = summary.document()
    assert found["in_mean"] == found["counted"] == ["a", "b"]
    assert found["constant_answer"] == found["majority"] == {"a": 50, "b": 75, "c": 50}
    assert found["summary"] == found["sums"]
    row = found["summary"][1]
    assert row["setting"] == row["cell"] == "random-64" and row["acc"] == acc(summary.rows[1])
    assert row["rel_interval"][0] < row["rel"] < row["rel_interval"][1]


def test_the_page_loads_nothing(summary):
    pytest.importorskip("matplotlib")
    page = summary.html()
    assert not re.search(r"""(?:src|href)\s*=\s*"[^#]|@import|url\([^#]""", page)
    drawings = re.findall(r"<svg .*?</svg>", page, re.S)
    assert len(drawings) == 2 + 3
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    table = ElementTree.fromstring(re.search(r"<table>.*?</table>", page, re.S).group(0))
    assert [row.get("class").strip() for row in table] == ["", "constant", "group", "group", "", ""]
    assert "published" not in page and "<h2>Benchmarks</h2>" in page


def test_files_are_deterministic(summary):
    files = summary.files()
    assert list(files) == ["grid.html", "grid.md", "grid.csv", "grid.tex"] and summary.files() == files


@pytest.mark.parametrize(
    "name, expected",
    [
        ("pope", 200 / 3),
        ("mme", 200.0),
        ("scienceqa", 25.0),
        ("mmbench", 0.0),
        ("mmbench_cn", 0.0),
        ("mmvet", None),
        ("vizwiz", 40.0),
        ("vqav2", 100 * 131 / 564),
        ("gqa", 100 * 211 / 522),
        ("textvqa", 11.0),
    ],
)
def test_the_constant_answer_of_bundled_benchmarks(name, expected):
    benchmark = get_benchmark(name)
    folder = benchmark.locate(BUNDLED_DATA / benchmark.folder)
    questions = list(benchmark.questions(folder, []))
    found = ScoredBenchmark(benchmark, folder, questions, []).constant
    assert found == (None if expected is None else pytest.approx(expected, abs=0.01))
