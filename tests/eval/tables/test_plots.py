"""Charts: where points are, how published and measured ones look, and pages without matplotlib."""

from __future__ import annotations

import sys
from xml.etree import ElementTree

import pytest

from llava.eval.tables.paper import build_paper_table
from llava.eval.tables.plots import METHODS, Chart, ChartPoint, charts_html, draw, html_page, method_colors
from llava.eval.tables.published import load_published

SVG = "{http://www.w3.org/2000/svg}"
POINTS = [
    ChartPoint("a & b", 32, 50.0, 49.0, 51.0),
    ChartPoint("a & b", 64, 60.0),
    ChartPoint("a & b", 128, 55.0),
]
CHART = Chart("t < u", "x", "y", [*POINTS, ChartPoint("c", 32, 40.0, measured=False)])
COLORS = {"a & b": "#112233", "c": "#445566"}


def marks(drawing: str) -> dict[str, tuple[float, float, str]]:
    """(x, y, style) of the points by the text that pointing at them shows."""
    found = {}
    for group in ElementTree.fromstring(drawing).iter(f"{SVG}g"):
        title = group.find(f"{SVG}title")
        if title is not None:
            (one,) = group.iter(f"{SVG}use")
            found[title.text] = float(one.get("x")), float(one.get("y")), one.get("style")
    return found


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib")


def test_points_are_placed_on_a_logarithmic_axis(matplotlib):
    found = marks(draw(CHART, COLORS))
    (x0, y0, style), (x1, y1, _), (x2, y2, _) = (
        found[f"a & b, measured: {x}, {y:.2f}"] for x, y in ((32, 50), (64, 60), (128, 55))
    )
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)  # equal distances between doublings
    assert y0 > y2 > y1 and y0 - y2 == pytest.approx(y2 - y1, abs=0.2)
    assert "fill: #112233" in style
    assert "fill: #ffffff; stroke: #445566" in found["c, published: 32, 40.00"][2]


def test_points_on_a_linear_axis_and_on_one_of_names(matplotlib):
    points = [ChartPoint("a & b", x, y, y - 1, y + 1) for x, y in ((0.0, 50.0), (0.5, 60.0), (1.0, 55.0))]
    drawing = draw(Chart("t", "r", "y", points, [0, 0.5, 1], scale="linear"), COLORS, legend=True)
    (x0, _, _), (x1, _, _), (x2, _, _) = marks(drawing).values()
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and ">a &amp; b</text>" in drawing
    assert ">0.5</text>" in drawing and "stroke-width: 1.8" in drawing

    points = [ChartPoint(name, x, 50.0 + x, 40, 60) for name in ("a & b", "c") for x in (0.0, 1.0)]
    drawing = draw(Chart("t", "cue", "y", points, [0, 1], scale="names", names=["one", "two, b"]), COLORS)
    found = marks(drawing)
    assert ">one</text>" in drawing and ">two,</text>" in drawing and ">b</text>" in drawing
    first, second = found["a & b, measured: one, 50.00"], found["c, measured: one, 50.00"]
    assert 0 < second[0] - first[0] < 40  # side by side at their name
    assert "stroke-width: 1.8" not in drawing  # names are not joined


def test_the_same_chart_is_the_same_text_and_loads_nothing(matplotlib):
    drawing = draw(CHART, COLORS)
    assert drawing == draw(CHART, COLORS)
    assert drawing.count("stroke-dasharray: 4") <= 1 and "<metadata" not in drawing and "<!" not in drawing
    root = ElementTree.fromstring(drawing)
    assert root.find(f"{SVG}title").text == "t < u" and "t &lt; u</text>" in drawing
    targets = [value for one in root.iter() for key, value in one.items() if key.endswith("href")]
    assert targets and all(target.startswith("#") for target in targets)


def test_names_are_not_formulas_or_markup(matplotlib):
    """matplotlib reads text between dollar signs as TeX, and fails on what is none."""
    for name in (r"$\nope$ <script>", "a$b_{", "[x](y) & z"):
        drawing = draw(Chart(name, name, name, [ChartPoint(name, 32, 1.0)]), {name: "#112233"})
        root = ElementTree.fromstring(drawing)
        assert root.find(f"{SVG}title").text == name and not list(root.iter(f"{SVG}script"))
        page = html_page(name, [charts_html([CHART], COLORS, name)])
        assert "<script>" not in page


def test_published_lines_are_dashed_and_the_level_is_dotted(matplotlib):
    for measured, dashes in ((True, 0), (False, 1)):
        line = [ChartPoint("c", x, y, measured=measured) for x, y in ((32, 50.0), (64, 60.0))]
        assert draw(Chart("t", "x", "y", line), COLORS).count("stroke-dasharray") == dashes
    level = Chart("t", "x", "y", [ChartPoint("c", 32, 50.0), ChartPoint("c", 64, 60.0)], level=55.0)
    assert draw(level, COLORS).count("stroke-dasharray") == 1


def test_whiskers_at_one_budget_stand_side_by_side(matplotlib):
    both = [ChartPoint(name, 32, 50.0, 49.0, 51.0) for name in COLORS]
    both += [ChartPoint(name, 64, 60.0) for name in COLORS]
    found = marks(draw(Chart("t", "x", "y", both), COLORS))
    xs = [found[f"{name}, measured: 32, 50.00"][0] for name in COLORS]
    assert 2 < xs[1] - xs[0] < 10
    assert len({found[f"{name}, measured: 64, 60.00"][0] for name in COLORS}) == 1


def test_close_ticks_are_left_out(matplotlib):
    points = [ChartPoint("c", 32, 1.0), ChartPoint("c", 512, 2.0)]
    drawing = draw(Chart("t", "x", "y", points, ticks=[32, 33, 128, 512]), COLORS)
    labels = [one.text for one in ElementTree.fromstring(drawing).iter(f"{SVG}text")]
    assert {"32", "128", "512"} <= set(labels) and "33" not in labels


def test_a_method_has_one_color_on_all_pages():
    found: dict[str, set[str]] = {}
    for table in load_published().values():
        lines = build_paper_table(table, []).lines
        for label, color in method_colors((line.method, line.important_ratio) for line in lines).items():
            found.setdefault(label, set()).add(color)
    assert {"VisPruner", "FastV", "SparseVLM", "All tokens"} <= found.keys()
    assert all(len(colors) == 1 for colors in found.values())
    assert len(set.union(*found.values())) == len(found)


def test_further_ratios_and_methods_have_colors_of_their_own():
    found = method_colors([("none", None), ("vispruner", 0.5), ("vispruner", 0.0), ("mine", None)])
    assert found["VisPruner (r = 0.5)"] == METHODS["vispruner"][1]
    assert len(set(found.values())) == 4 and "mine" in found


def test_legend_names_what_is_drawn(matplotlib):
    page = charts_html([CHART], {**COLORS, "absent": "#000000"}, "A note.")
    assert "a &amp; b</span>" in page and "absent" not in page and "A note." in page and "published" in page
    measured = charts_html([Chart("t", "x", "y", POINTS)], COLORS, "")
    assert "dashed" not in measured
    assert charts_html([Chart("t", "x", "y", [])], COLORS, "A note.") == ""


def test_a_page_without_matplotlib_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = html_page("Title", [charts_html([CHART], COLORS, "A note."), "<p>table</p>"])
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and "pip install 'vispruner[plot]'" in warning
    assert warning.count("\n") == 1 and "<svg" not in page and "<p>table</p>" in page
    assert page.count("pip install &#x27;vispruner[plot]&#x27;") == 1
