"""The ledger: every number in the tables of README.md and docs has an entry, and what `check` finds."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("ledger_script", ROOT / "scripts" / "ledger.py")
ledger = importlib.util.module_from_spec(SPEC)
sys.modules["ledger_script"] = ledger  # dataclasses look their module up
SPEC.loader.exec_module(ledger)

PAGE = """# Page

## Scores

| method | score |
|---|---|
| a | 91.5 [90.1, 92.3] |
| b | **88.0** |

```
| in | code | 7 |
```

## Files

| file | meaning |
|---|---|
| `a1.json` | LLaVA-1.5-7B, [link](x_2.md) |
"""
MEASURED = ["--command", "bash run.sh", "--machine", "2 cores", "--commit", "abc"]


@pytest.fixture
def repo(tmp_path):
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "page.md").write_text(PAGE)
    return tmp_path


def add(repo, *arguments):
    return ledger.add(ledger.build_parser().parse_args(["add", *arguments]), repo)


def test_every_number_in_the_tables_of_this_repository_is_in_the_ledger():
    assert ledger.problems() == []
    assert len(ledger.read_tables()) == len(ledger.read_ledger()) > 20


def test_most_numbers_follow_from_their_raw_file():
    """Not all: tables have ratios and differences of what was measured."""
    for entry in ledger.read_ledger():
        if entry["raw"] is not None:
            table = ledger.DocTable(entry["file"], entry["heading"], entry["table"], 0, entry["rows"])
            missing = ledger.not_in_raw(table, (ROOT / entry["raw"]).read_text(encoding="utf-8"))
            assert len(missing) <= len(" ".join(table.rows).split()) / 2, (table, missing)


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("| a | 91.5 [90.1, 92.3] |", ["91.5", "90.1", "92.3"]),
        ("| −0.74 | +3.81 | 1,755 | 57 / 204 |", ["−0.74", "+3.81", "1,755", "57", "204"]),
        ("| **88.0** | 13.4ms | 44 % | 2.5x |", ["88.0", "13.4", "44", "2.5"]),
        ("| LLaVA-1.5-7B | `64` | v2 | [x](a_3.md) | fig3 |", []),
    ],
)
def test_numbers_of_a_line(text, numbers):
    assert ledger.numbers_of(text) == numbers


def test_a_number_without_an_entry_is_found(repo):
    (first, second) = ledger.problems(repo)
    assert first.startswith("docs/page.md:7: not in the ledger: 91.5 90.1 92.3.")
    assert "add docs/page.md 'Scores' --table 1" in second
    add(repo, "docs/page.md", "Scores", *MEASURED)
    assert ledger.problems(repo) == []
    page = repo / "docs" / "page.md"
    page.write_text(PAGE.replace("88.0", "88.1"))
    (problem,) = ledger.problems(repo)
    assert "docs/page.md:8" in problem and "88.1" in problem
    add(repo, "docs/page.md", "Scores", *MEASURED)
    page.write_text(page.read_text() + "\n| x |\n|---|\n| 5 |\n")
    (problem,) = ledger.problems(repo)
    assert "not in the ledger: 5." in problem and "--table 2" in problem
    add(repo, "docs/page.md", "Files", "--table", "2", "--source", "configuration")
    assert ledger.problems(repo) == [] and len(ledger.read_ledger(repo)) == 2


def test_moved_tables_and_lost_files_are_found(repo):
    (repo / "docs" / "results" / "raw.json").write_text("[0.9149, 90.06, 92.3, 87.96]")
    entry = add(repo, "docs/page.md", "Scores", *MEASURED, "--raw", "docs/results/raw.json")
    assert entry["rows"] == ["91.5 90.1 92.3", "88.0"]
    table = ledger.read_tables(repo)[0]
    assert ledger.not_in_raw(table, "[0.9149, 90.06, 92.3, 87.96]") == []
    assert ledger.not_in_raw(table, "[0.9149, 90.06]") == ["92.3", "88.0"]
    (repo / "docs" / "results" / "raw.json").unlink()
    (repo / "docs" / "page.md").write_text(PAGE.replace("## Scores", "## Accuracy"))
    text = "\n".join(ledger.problems(repo))
    assert "there is no such table" in text and "does not exist" in text and "'Accuracy' --table 1" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["docs/page.md", "Score", *MEASURED], "Choose from 'Scores' --table 1"),
        (["docs/page.md", "Scores", "--table", "2", *MEASURED], "no table 2"),
        (["docs/none.md", "Scores", *MEASURED], "none in this file"),
        (["docs/page.md", "Scores", "--command", "x"], "need --command and --machine"),
        (["docs/page.md", "Scores", *MEASURED, "--raw", "docs/results/no.json"], "no such file"),
    ],
)
def test_wrong_arguments_write_nothing(arguments, message, repo):
    with pytest.raises(ledger.LedgerError, match=message):
        add(repo, *arguments)
    assert not (repo / ledger.LEDGER).exists()


@pytest.mark.parametrize("text", ["{", "{}", '[{"file": "README.md"}]', "[1]"])
def test_a_file_that_is_not_a_ledger_is_refused(text, repo):
    (repo / ledger.LEDGER).write_text(text)
    with pytest.raises(ledger.LedgerError, match=r"ledger\.json: "):
        ledger.problems(repo)


def test_an_incomplete_entry_is_found(repo):
    add(repo, "docs/page.md", "Scores", *MEASURED)
    entries = ledger.read_ledger(repo)
    (repo / ledger.LEDGER).write_text(json.dumps([{**entries[0], "machine": ""}, entries[0]]))
    text = "\n".join(ledger.problems(repo))
    assert "machine is empty" in text and "two entries" in text
