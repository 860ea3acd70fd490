"""The report: one file with everything in it, looked at in a browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from llava.eval.benchmarks import DataError
from llava.eval.tables.plots import html_page
from llava.eval.tables.report import ReportSection, read_markdown, report_page
from llava.table import Table, TableCell, TableRow

SVG = (
    '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'width="300" height="120"><defs><circle id="a" r="20" fill="#0072b2"/></defs>'
    '<use xlink:href="#a" x="60" y="60"/><text x="100" y="60">dispersion</text></svg>'
)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Resources(HTMLParser):
    """Collect what a page refers to."""

    def __init__(self):
        super().__init__()
        self.tags, self.loaded, self.links, self.ids, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name == "href" and tag == "a":
                self.links.append((value, dict(attrs).get("class")))
            elif name in ("src", "href", "srcset", "data", "poster", "action"):
                self.loaded.append(value)

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def page(tmp_path):
    Image.new("RGB", (640, 200), "#56b4e9").save(tmp_path / "kept.png")
    Image.new("RGB", (64, 64), "#d55e00").save(tmp_path / "photo.jpg")
    (tmp_path / "fig3.svg").write_text(SVG)
    (tmp_path / "fig3.csv").write_text("x,y\n1,2\n")
    (tmp_path / "grid.html").write_text(html_page("Grid", ["<h2>All sets</h2><p>5 < 6</p>"]))
    cells = [[TableCell("<b>vispruner</b>"), TableCell("95.0", "[93.7, 96.2]", strong=True)]]
    table = Table("POPE", ["method", "F1"], [TableRow(row, "measured") for row in cells], ["A note & more."])
    sections = [
        ReportSection("Tables <1>", ["First & second."], [table]),
        ReportSection(
            "Figures",
            images=[(tmp_path / "fig3.svg", 'Figure "3"'), (tmp_path / "kept.png", "Kept")],
            data=[tmp_path / "fig3.csv"],
        ),
        ReportSection("Pages", images=[(tmp_path / "photo.jpg", "A photo")], pages=[tmp_path / "grid.html"]),
    ]
    return report_page("Report <now>", sections, {"The paper": "https://arxiv.org/abs/2412.01818"})


def test_everything_is_in_the_one_file(page):
    found = Resources()
    found.feed(page)
    assert len(found.loaded) == 3 and all(one.startswith("data:image/") for one in found.loaded)
    assert {one.partition(";")[0] for one in found.loaded} == {
        "data:image/svg+xml",
        "data:image/png",
        "data:image/jpeg",
    }
    outside = [
        (link, kind) for link, kind in found.links if not link.startswith(("#", "data:text/csv;base64,"))
    ]
    assert outside == [("https://arxiv.org/abs/2412.01818", "credit")]
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(found.tags)
    assert not re.search(r"@import|@font-face|url\(\s*['\"]?http", page)


def test_contents_lead_to_every_section(page):
    found = Resources()
    found.feed(page)
    assert [link for link, _ in found.links if link.startswith("#")] == [f"#section-{n}" for n in (1, 2, 3)]
    assert [one for one in found.ids if one.startswith("section-")] == ["section-1", "section-2", "section-3"]
    text = " ".join(found.text)
    assert "Tables <1>" in text and "<b>vispruner</b>" in text and "First & second." in text
    assert "<h3>All sets</h3>" in page and "<h3>Grid</h3>" in page and page.count("<h1>") == 1
    assert 'alt="Figure &quot;3&quot;"' in page and "@media print" in page


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not a PNG"),
        (b"<html></html>", "not a PNG"),
        (b"GIF89a", "not a PNG"),
        (b'<svg><image href="https://example.org/x.png"/></svg>', "loads something from elsewhere"),
        (b'<svg><style>@import url("x.css");</style></svg>', "loads something from elsewhere"),
        (b"<svg><rect fill='url(x.svg#a)'/></svg>", "loads something from elsewhere"),
        (b'<svg><image xlink:href = "photo.png"/></svg>', "loads something from elsewhere"),
    ],
)
def test_images_that_cannot_be_inlined_are_refused(content, message, tmp_path):
    (tmp_path / "x.svg").write_bytes(content)
    with pytest.raises(DataError, match=f"x.svg: .*{message}"):
        report_page("R", [ReportSection("S", images=[(tmp_path / "x.svg", "c")])])


def test_missing_and_foreign_files_are_refused_and_large_data_is_named(tmp_path):
    with pytest.raises(DataError, match="none.png: cannot be read"):
        report_page("R", [ReportSection("S", images=[(tmp_path / "none.png", "c")])])
    (tmp_path / "a.html").write_text("<p>no body")
    with pytest.raises(DataError, match="a.html: not a page of this package"):
        report_page("R", [ReportSection("S", pages=[tmp_path / "a.html"])])
    (tmp_path / "big.csv").write_bytes(b"1,2\n" * (1 << 20) + b"\n")
    text = report_page("R", [ReportSection("S", data=[tmp_path / "big.csv"])])
    assert "big.csv (4194 kB, not part of this page)" in text and len(text) < 10000
    (tmp_path / "a.svg").write_text(
        SVG.replace("</svg>", "<g clip-path='url(#a)' fill='url(\"#b\")'/></svg>")
    )
    assert "data:image/svg" in report_page("R", [ReportSection("S", images=[(tmp_path / "a.svg", "c")])])


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_shows_it_without_errors(page, tmp_path):
    (tmp_path / "index.html").write_text(page)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--disable-sync", "--disable-component-update", "--no-first-run", "--hide-scrollbars"]
    command += [
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1000,1400",
    ]
    done = subprocess.run(
        [*command, f"--screenshot={tmp_path / 'shot.png'}", (tmp_path / "index.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    shot = Image.open(tmp_path / "shot.png").convert("RGB")
    colors = {color for _, color in shot.getcolors(1 << 20)}
    assert shot.width == 1000  # every image was drawn: SVG, PNG, and the color of the JPEG
    assert (0, 114, 178) in colors and (86, 180, 233) in colors
    assert any(abs(r - 213) + abs(g - 94) + abs(b) < 12 for r, g, b in colors)


def test_markdown_becomes_paragraphs_tables_and_code(tmp_path):
    cells = [[TableCell("a_b|c"), TableCell("95.0", strong=True)], [TableCell("x"), TableCell("")]]
    table = Table("Scores of *r*", ["method", "F1"], [TableRow(row) for row in cells], ["1. A note, <b>."])
    (tmp_path / "a.md").write_text(
        f"# Page\n\nFirst\nline.\n\n{table.markdown(2)}\n```\n| code |\n```\nLast `x`."
    )
    found = read_markdown(tmp_path / "a.md")
    assert (found.title, found.paragraphs) == ("Page", ["First line.", "1. A note, <b>.", "Last x."])
    (read,) = found.tables
    assert (read.title, read.header) == ("Scores of *r*", ["method", "F1"])
    assert [[cell.text for cell in row.cells] for row in read.rows] == [["a_b|c", "95.0"], ["x", ""]]
    assert read.rows[0].cells[1].strong and not read.rows[0].cells[0].strong
    assert found.preformatted == ["| code |"]
