"""One table type: its text, Markdown, LaTeX, HTML and CSV forms, and what each escapes."""

from __future__ import annotations

import csv
import io
import re
from xml.etree import ElementTree

import pytest

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
    assert text.startswith("## T \\<1\\>\n\n| method") and "\n\n\\* a note & more\n" in text
    assert "**80.4** [79.0, 81.0] |" in text and "****" not in text
    assert r"a\_b & 50% \| \*c\* \<d\> {e} \\f \~^\#\$ †" in text


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


HOSTILE = [
    "=HYPERLINK(1)",
    "+1+1",
    "-2+3+cmd|' /C calc'!A0",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "\n=1",
    " =1",
    "\uff1d1",
    "-",
    "--output",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_csv_has_no_formulas(text):
    """A spreadsheet would run them, also in the header."""
    (header, row) = csv.reader(io.StringIO(csv_text([text], [[text]]), newline=""))
    assert header == row == ["'" + re.sub(r"[\t\r\n]", " ", text)]


@pytest.mark.parametrize("value", [-0.5, -3, 0, "-0.5", "+1e-3", "-3", "", "a=1", "x-1", True, None])
def test_csv_keeps_numbers_and_other_texts(value):
    (_, row) = csv.reader(io.StringIO(csv_text(["a", "b"], [[value, 1]])))
    assert row == ["" if value is None else str(value), "1"]


def hostile(text):
    cell = TableCell(text, text, strong=True)
    return Table(text, [text, "n"], [TableRow([cell, TableCell("1")])], [text])


@pytest.mark.parametrize("text", ["a\nb", "a\r\n| b", "a\u2028b", "a\x1b[31mb\x00", "a\x85b", "a\udcffb"])
def test_line_breaks_and_control_characters_are_spaces(text):
    """They broke rows, ended LaTeX's comments, and reached the terminal."""
    forms = ("text", "markdown", "latex", "html")
    for form, expected in ((getattr(hostile(text), name)(), getattr(hostile("a"), name)()) for name in forms):
        assert len(form.splitlines()) == len(expected.splitlines())
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", form) and form.encode()
    assert len(csv_text(["a"], [[text]]).encode().splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<img src=x>", r"\<img src=x\>"),
        ("&lt;b>", r"\&lt;b\>"),
        ("[a](javascript:b)", r"[a\](javascript:b)"),
        ("![a][b]", r"![a\][b]"),
        ("~~a~~", r"\~\~a\~\~"),
        ("$a$", r"\$a\$"),
        ("a|b`c`", r"a\|b\`c\`"),
        ("R&D [79.0, 81.0]", "R&D [79.0, 81.0]"),
    ],
)
def test_markdown_of_hostile_texts(text, shown):
    title, _, table, *_ = hostile(text).markdown().split("\n\n", 1)[0], "", hostile(text).markdown()
    assert title == f"# {shown}" and f"**{shown}** {shown} |" in table and table.endswith(f"\n\n{shown}\n")


@pytest.mark.parametrize(
    ("note", "shown"),
    [
        ("# a", r"\# a"),
        ("+ a", r"\+ a"),
        ("- a", r"\- a"),
        ("> a", r"\> a"),
        ("1. a", r"1\. a"),
        ("12) a", r"12\) a"),
        ("---", r"\---"),
        ("    a", "a"),
    ],
)
def test_markdown_notes_start_no_list_heading_or_rule(note, shown):
    assert Table("T", ["a"], [], [note]).markdown().endswith(f"\n\n{shown}\n")


def test_latex_of_hostile_texts():
    rows = [TableRow([TableCell(text)]) for text in ("[1cm]", "*", "\\input{x}", "-0.5#", "+1.5*")]
    lines = Table("T", ["a"], rows).latex().splitlines()[4:-2]
    expected = ["{}[1cm]", "{}*", r"\textbackslash{}input\{x\}", r"$-0.5$\#", "$+1.5$*"]
    assert [line.removesuffix(r"\\").strip() for line in lines] == expected


def test_html_of_hostile_texts():
    root = ElementTree.fromstring(hostile("<script>\"'&lt;\x00</script>").html())
    assert root.find("h2").text == root.find("p").text == "<script>\"'&lt; </script>"
    assert not list(root.iter("script"))


def test_module_imports_nothing_else_of_the_package():
    with open(module.__file__, encoding="utf-8") as file:
        assert not re.search(r"^\s*(from|import) (llava|\.)", file.read(), re.M)
