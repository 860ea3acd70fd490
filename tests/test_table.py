"""One table type: its text, Markdown, LaTeX, HTML and CSV forms, and what each escapes."""

from __future__ import annotations

import csv
import re
from xml.etree import ElementTree

from llava import table as module
from llava.table import Table, TableCell, TableRow, csv_text, number, text_table

SPECIAL = r"a_b & 50% | *c* <d> {e} \f ~^#$ †"
TABLE = Table(
    "T <1>",
    ["method", "score"],
    [
        TableRow([TableCell("x"), TableCell("80.4", "[79.0, 81.0]", strong=True)], "measured", True),
        TableRow([TableCell(""), TableCell("-0.5")]),
        TableRow([TableCell(SPECIAL), TableCell("", strong=True)], starts_group=True),
    ],
    ["* a note & more"],
    ["left", "mean"],
)


def test_text_is_aligned_under_a_rule():
    lines = text_table(["a", "long header", "c"], [["xyz", "1", "2.50"], ["", "22", number(None, ".1f")]])
    assert lines.split("\n") == [
        "a    long header     c",
        "----------------------",
        "xyz            1  2.50",
        "              22     -",
    ]
    assert text_table(["a", "b"], []).split("\n") == ["a  b", "----"]
    assert "1e5" in text_table(["a", "b"], [["007", "1e5"]]) and number(1.25, ".1f") == "1.2"


def test_text_of_a_table_has_title_and_notes():
    lines = TABLE.text().split("\n")
    assert lines[0] == "T <1>" and lines[-1] == "* a note & more"
    assert "[79.0" not in TABLE.text() and len(lines) == 1 + 2 + 3 + 1


def test_markdown_escapes_its_own_markup():
    text = TABLE.markdown(2)
    assert text.startswith("## T \\<1>\n\n| method") and "\n\n\\* a note & more\n" in text
    assert "**80.4** [79.0, 81.0] |" in text and "****" not in text
    assert r"a\_b & 50% \| \*c\* \<d> {e} \\f ~^#$ †" in text


def test_latex_has_the_rules_of_booktabs():
    lines = TABLE.latex().splitlines()
    rules = [place for place, line in enumerate(lines) if line.endswith("rule")]
    assert [lines[place] for place in rules] == [r"\toprule", r"\midrule", r"\midrule", r"\bottomrule"]
    assert lines[:2] == ["% * a note & more", r"\begin{tabular}{lr}"] and lines[-1] == r"\end{tabular}"
    body = [line for line in lines if line.endswith(r"\\")]
    assert len(body) == 4 and r"\textbf{80.4}" in body[1] and "$-0.5$" in body[2]
    assert r"a\_b \& 50\% | *c* <d> \{e\} \textbackslash{}f" in body[3]
    assert r"\textasciitilde{}\textasciicircum{}\#\$ $^\dagger$" in body[3]


def test_html_is_well_formed_and_escaped():
    root = ElementTree.fromstring(TABLE.html(3))
    assert root.find("h3").text == "T <1>" and root.find("p").text == "* a note & more"
    header, *rows = root.iter("tr")
    assert [cell.get("class") for cell in header] == ["left", "mean"]
    assert [row.get("class").split() for row in rows] == [["measured", "group"], [], ["group"]]
    assert rows[0][1].get("class") == "mean strong" and rows[0][1].find("small").text == "[79.0, 81.0]"
    assert rows[2][0].text == SPECIAL


def test_csv_keeps_every_digit_and_quotes():
    text = csv_text(["a", "b"], [[1 / 3, None], ['x,"y"', "z"]])
    assert list(csv.reader(text.splitlines())) == [["a", "b"], [str(1 / 3), ""], ['x,"y"', "z"]]


def test_module_imports_nothing_else_of_the_package():
    with open(module.__file__, encoding="utf-8") as file:
        assert not re.search(r"^\s*(from|import) (llava|\.)", file.read(), re.M)
