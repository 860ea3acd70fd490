"""The command `python -m llava.eval.tables`: its files, its JSON document, and wrong arguments."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from helpers.score_files import write_score
from llava.eval.tables.__main__ import main
from llava.eval.tables.published import load_published


def run(capsys, *argv):
    code = main([str(part) for part in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_all_forms_are_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_score(tmp_path / "r", "pope", 70.7, tokens=32)
    output = tmp_path / "tables"
    argv = ["--table", "llava_1_5_7b", "--results", tmp_path / "r", "--output", output]
    code, out, err = run(capsys, *argv)
    document = json.loads(out.splitlines()[-1])
    assert code == 0 and err == "" and [one["table"] for one in document["tables"]] == ["llava-1.5-7b"]
    names = {f"llava-1.5-7b.{suffix}" for suffix in ("md", "csv", "tex", "html")}
    assert {Path(file).name for file in document["files"]} == names == {p.name for p in output.iterdir()}
    assert document["results"] == document["tables"][0]["measured_cells"] == 1
    rows = {(row["method"], row["tokens"]): row for row in document["tables"][0]["rows"]}
    row = rows["vispruner", 32]
    assert row["measured"] == {"pope": 70.7} and row["difference"]["pope"] == pytest.approx(-2.0)
    page = (output / "llava-1.5-7b.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*"[^#]|@import|<script|url\([^#]""", page)  # loads nothing
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    run(capsys, *argv)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_marked_cells_and_files_left_out_are_warnings(tmp_path, capsys):
    write_score(tmp_path / "r" / "a", "pope", 70.7, tokens=32, visual_tokens=576.0)
    write_score(tmp_path / "r" / "b", "gqa", float("nan"))
    argv = ["--table", "llava_1_5_7b", "--results", tmp_path / "r", "--output", tmp_path / "o"]
    code, out, err = run(capsys, *argv)
    document = json.loads(out.splitlines()[-1])
    assert code == 0 and len(document["warnings"]) == 2 and "nan" not in out.splitlines()[-2].lower()
    assert all(f"warning: {warning}" in err for warning in document["warnings"])
    assert "marked with #" in err and "score is nan" in err and "NaN" not in out


def test_one_page_for_all_tables(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)  # there is no outputs/ here: published numbers only
    code, out, _ = run(capsys, "--output", tmp_path / "o")
    document = json.loads(out.splitlines()[-1])
    assert code == 0 and [one["table"] for one in document["tables"]] == list(load_published())
    assert all(one["measured_cells"] == 0 for one in document["tables"])
    page = (tmp_path / "o" / "tables.html").read_text()
    assert page.count("<h2>") == 5
    assert page.count("against FLOPs</title>") == 6  # three other models, and no chart of efficiency


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--table", "llava-13b"], "no such table"),
        (["--table", ","], "no such table"),
        (["--ratio", "2"], "argument --ratio"),
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
    code, _, err = run(capsys, "--results", tmp_path / "none", "--output", tmp_path / "o")
    assert code == 1 and f"{tmp_path / 'none'}: no such folder" in err


def test_models_may_be_named(tmp_path, capsys):
    write_score(tmp_path / "r", "textvqa", 60.0, model="my-qwen", tokens=128)
    argv = ["--table", "other-vlms", "--model", "qwen-vl-7b=some/my-qwen/"]
    code, out, _ = run(capsys, *argv, "--results", tmp_path / "r", "--output", tmp_path / "o")
    rows = json.loads(out.splitlines()[-1])["tables"][0]["rows"]
    assert code == 0
    assert [row["model"] for row in rows if row["measured"]] == ["qwen-vl-7b"]
