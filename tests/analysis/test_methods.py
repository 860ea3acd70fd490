"""The table of all methods: ranked by score, with tokens and FLOPs, and what is not available."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.analysis import methods
from llava.pruning import list_pruners

GRID = """set,counted,questions,pictures,majority,method,important_ratio,tokens,score,low,high,visual_tokens
pope,true,9,9,50,none,,,98.0,97,99,576
pope,true,9,9,50,scope,,64,96.9,96,97.5,64
pope,true,9,9,50,vispruner,0.5,64,95,94,96,64
pope,true,9,9,50,vispruner,0.0,64,96.2,95,97,64
gqa,true,9,9,50,scope,,64,10,9,11,64
"""


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[dict, list[str]]:
    grid = tmp_path / "grid.csv"
    grid.write_text(GRID)
    assert methods.main(["--grid", str(grid), "--tokens", "64", "32", "--output", str(tmp_path), *more]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return json.loads(last), lines


def test_methods_are_ranked_by_score_and_all_are_there(tmp_path, capsys):
    times = {"rows": [{"batch": 1, "tokens": 64, "method": "scope", "vs_vispruner": 1.25}]}
    (tmp_path / "selection.json").write_text(json.dumps(times))
    document, lines = run(tmp_path, capsys, "--selection", str(tmp_path / "selection.json"))
    table = [line.split() for line in lines[3 : lines.index("32 tokens")] if line.strip()]
    assert [row[0] for row in table[:3]] == ["scope", "vispruner", "vispruner"] and "r=0" in table[1]
    assert {row[0] for row in table} == set(list_pruners()) - {"none"}
    assert table[0][-1] == "1.25" and table[0][1] == "96.9"
    row = next(row for row in table if row[0] == "fastv")
    assert row[1:8] == ["96", "576", "x", "2,", "64", "x", "30"]
    assert any("pyramiddrop at 32: tokens: 'pyramiddrop' cannot" in line for line in lines)
    assert document["files"] == ["methods.md", "methods.csv", "methods.png", "methods.svg"]
    assert "| scope" in (tmp_path / "methods.md").read_text()


def test_wrong_files_are_named_with_their_line(tmp_path, capsys):
    (tmp_path / "grid.csv").write_text(GRID + "pope,true,9,9,50,scope,,x,1,0,2,64\n")
    assert methods.main(["--grid", str(tmp_path / "grid.csv")]) == 2
    assert "grid.csv:7: not a line of a sweep's grid" in capsys.readouterr().err
    assert methods.main(["--selection", str(tmp_path / "grid.csv")]) == 2
    assert "Give what it writes" in capsys.readouterr().err


def test_paths_that_cannot_be_used_are_named(tmp_path, capsys):
    assert methods.main(["--grid", str(tmp_path / "none.csv")]) == 2
    assert f"error: {tmp_path / 'none.csv'}: No such file or directory." in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert methods.main(["--output", str(tmp_path / "file" / "below")]) == 2
    assert f"error: {tmp_path / 'file' / 'below'}: Not a directory." in capsys.readouterr().err
