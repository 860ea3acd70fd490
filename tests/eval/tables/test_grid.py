"""Adding up a sweep: means over the sets above the best constant answer, their intervals, and the page."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from llava.eval.benchmarks import Benchmark, Question, QuestionScore, get_benchmark
from llava.eval.jobs.cells import Cell
from llava.eval.metrics.statistics import bootstrap_interval
from llava.eval.tables import grid_forms, grid_page
from llava.eval.tables.grid import Measured, build_grid, majority
from llava.pruning import get_pruner
from llava.tiny.build import SHIPPED

IMAGES = 40


class Yes(Benchmark):
    """Right is "Yes" for the first questions, `share` of them; two questions a picture."""

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


def cell(benchmark, pruner, right: int, speed=None) -> Cell:
    """A cell that has the first `right` of its 80 questions right."""
    many = round(benchmark.share * 2 * IMAGES)
    rows = [
        {"question_id": number, "text": "Yes" if (number < many) == (number < right) else "No"}
        for number in range(2 * IMAGES)
    ]
    tallies = benchmark.per_image_counts(Path(), rows)
    low, high = bootstrap_interval(tallies, benchmark.score_counts, 500, 0)
    settings = pruner.config()
    name = "-".join(str(value) for value in settings.values() if value is not None)
    score = float(benchmark.score_counts(tallies.counts.sum(0)))
    assert score == pytest.approx(100 * right / (2 * IMAGES))
    return Cell(
        name,
        pruner,
        Path(),
        None,
        {
            "score": score,
            "low": low,
            "high": high,
            "visual_tokens": float(settings["tokens"] or 576),
            "llm_gflops": (settings["tokens"] or 576) / 100,
            "speed": speed,
            "answers": len(rows),
            "details": {},
        },
        tallies,
    )


NONE, RANDOM = get_pruner("none"), get_pruner("random", 64)
HALF, ZERO = (get_pruner("vispruner", 64, ratio) for ratio in (0.5, 0.0))


def measured(benchmark, *rights) -> Measured:
    pruners = (NONE, RANDOM, HALF, ZERO)
    return Measured(
        benchmark,
        Path(),
        asked(),
        [cell(benchmark, pruner, right) for pruner, right in zip(pruners, rights, strict=False)],
    )


@pytest.fixture
def grid():
    sets = [
        measured(Yes("a"), 80, 48, 72, 64),
        measured(Yes("b", 0.25), 76, 70, 74, 72),
        measured(Yes("c"), 42, 40, 44, 38),
    ]
    return build_grid("toy", sets, ["FREE"], resamples=500)


def test_sets_at_chance_stay_out_of_the_means(grid):
    assert [column.majority for column in grid.columns] == [50, 75, 50]
    assert [column.counted for column in grid.columns] == [True, True, False]
    assert [(column.questions, column.pictures) for column in grid.columns] == [(80, 40)] * 3
    none, random, half, zero = grid.rows
    assert none.acc == pytest.approx((100 + 95) / 2) and none.rel == 100
    assert random.acc == pytest.approx((60 + 87.5) / 2)
    assert random.rel == pytest.approx(100 * (0.6 + 87.5 / 95) / 2)  # a mean of ratios
    assert half.rel != pytest.approx(100 * half.acc / none.acc, abs=0.01)
    for row in grid.rows:
        assert row.acc_interval[0] <= row.acc <= row.acc_interval[1]
        assert row.rel_interval[0] <= row.rel <= row.rel_interval[1]
    assert random.acc_interval[0] < random.acc_interval[1]


def test_differences_are_resampled_alike(grid):
    found = {one.second.name: one for one in grid.contrasts}
    assert set(found) == {"random-64-0", "vispruner-64-0.0"}
    zero = found["vispruner-64-0.0"]
    assert zero.difference == pytest.approx((90 - 80 + 92.5 - 90) / 2) and zero.separates
    apart = np.sqrt(sum(np.std(row.draws) ** 2 for row in (zero.first, zero.second)))
    assert np.std(zero.first.draws - zero.second.draws) < apart
    same = build_grid("toy", [measured(Yes("a"), 80, 48, 64, 64)], resamples=500)
    assert not {one.second.name: one for one in same.contrasts}["vispruner-64-0.0"].separates


def test_a_missing_cell_has_no_mean():
    sets = [measured(Yes("a"), 80, 48, 72), measured(Yes("b"), 76, 60)]
    found = build_grid("toy", sets, resamples=200)
    assert [row.acc is None for row in found.rows] == [False, False, True]
    assert "" in grid_forms.as_text(found) and grid_page.as_html(found)


def test_nothing_above_chance_has_no_mean_at_all():
    found = build_grid("toy", [measured(Yes("c"), 42, 40)], resamples=200)
    assert found.counted == [] and all(row.acc is None for row in found.rows)
    assert "mean over no set" in " ".join(grid_forms.notes(found))
    assert "Acc. against" not in grid_page.as_html(found)


def test_mme_counts_as_a_share():
    mme = Yes("mme")
    mme.unit = "points"
    one = measured(mme, 80, 60)
    for part in one.cells:
        part.document["details"] = {"perception": {"subtasks": {"count": 1.0, "color": 2.0}}}
        for key in ("score", "low", "high"):
            part.document[key] *= 4
    found = build_grid("toy", [one], resamples=200)
    assert found.columns[0].share == 100 / 400
    assert [row.acc for row in found.rows] == [100, 75]


def test_without_all_tokens_everything_counts():
    one = Measured(Yes("c"), Path(), asked(), [cell(Yes("c"), HALF, 41)])
    found = build_grid("toy", [one], resamples=200)
    assert found.rows[0].acc == pytest.approx(51.25) and found.rows[0].rel is None


def test_forms(grid):
    text, markdown = grid_forms.as_text(grid), grid_forms.as_markdown(grid)
    assert "C†" in text and "Majority" in text and "97.5" in text
    assert "**81.2** [" not in text and "| Majority |" in markdown and "**91.2** [" in markdown
    assert "† Not in the means" in markdown and "without a number here: FREE" in markdown
    assert markdown.count("| VisPruner (r = 0.5) - ") == 2
    rows = list(csv.DictReader(io.StringIO(grid_forms.as_csv(grid))))
    assert len(rows) == 3 * 4 + 2 * 4
    half = next(row for row in rows if row["set"] == "a" and row["important_ratio"] == "0.5")
    assert float(half["score"]) == 90 and float(half["low"]) <= 90 <= float(half["high"])
    assert half["counted"] == "true" and float(half["majority"]) == 50 and half["questions"] == "80"
    latex = grid_forms.as_latex(grid)
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len({line.count("&") for line in body}) == 1 and r"$^\dagger$" in latex
    assert latex.count(r"\midrule") == 3


def test_the_page_stands_alone(grid):
    page = grid_page.as_html(grid)
    assert not re.search(r"(?:src|href)\s*=|@import|url\(", page)
    drawings = re.findall(r"<svg viewBox.*?</svg>", page, re.S)
    assert len(drawings) == 2 + 3
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    table = ElementTree.fromstring(re.search(r'<table class="whole">.*?</table>', page, re.S).group(0))
    assert len(table) == 1 + 1 + 4  # head, majority, cells
    assert page.count("published") == 0 and "Set by set" in page


def test_writing_twice_writes_the_same(grid, tmp_path):
    files = grid_page.write(grid, tmp_path / "new")
    assert [path.name for path in files] == ["grid.html", "grid.md", "grid.csv", "grid.tex"]
    before = [path.read_bytes() for path in files]
    assert [path.read_bytes() for path in grid_page.write(grid, tmp_path / "new")] == before


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
def test_the_best_constant_answer_of_the_embedded_sets(name, expected):
    benchmark = get_benchmark(name)
    folder = benchmark.locate(SHIPPED / benchmark.folder)
    found = majority(benchmark, folder, list(benchmark.questions(folder, [])))
    assert found == (None if expected is None else pytest.approx(expected, abs=0.01))
