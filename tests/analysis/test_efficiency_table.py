"""The paper's efficiency table from shapes, and measured columns from reports that were really made."""

import json
import subprocess
from pathlib import Path

import pytest

from llava.analysis.efficiency.__main__ import main
from llava.analysis.efficiency.table import analytic

ROOT = Path(__file__).resolve().parents[2]


def table(capsys, *argv):
    code = main(["table", *map(str, argv)])
    out = capsys.readouterr().out
    return code, out, json.loads(out.splitlines()[-1])


def test_flops_of_the_paper_within_three_percent_but_for_640(tmp_path, capsys):
    code, out, document = table(capsys, "--measured", tmp_path)
    assert code == 0 and len(document["rows"]) == 5
    for row in document["rows"]:
        published, ours = row["published"]["flops_T"], row["analytic"]["flops_as_published"] / 1e12
        assert row["flops_difference"] == pytest.approx(ours / published - 1, abs=1e-4)
        assert (abs(row["flops_difference"]) < 0.03) == (row["tokens"] != 640)
        if row["tokens"] == 640:  # as if 720 tokens had been counted
            counted = analytic(row["method"], 720)["flops_as_published"] / 1e12
            assert counted == pytest.approx(published, rel=0.03)
        assert row["measured"] is None
    kept = {(row["method"], row["tokens"]): row["analytic"]["kv_bytes"] for row in document["rows"]}
    assert kept["none", 2880] == 1440 * 2**20 and kept["vispruner", 160] == 80 * 2**20
    assert "--shapes llava-next-7b --device cuda" in out and "not measured" in out


def test_measured_columns_come_from_reports_of_that_shape(tmp_path, capsys):
    row = {
        "method": "vispruner",
        "visual_tokens": 160,
        "first_token": {"median_ms": 77.0},
        "peak_bytes": 10**9,
        "first_token_of_unpruned": 0.2,
    }
    report = {
        "part": "whole",
        "model": "llava-next-7b",
        "batch_size": 1,
        "machine": {"name": "some card"},
        "weights_bytes": {"vision_tower": 10**9, "language_model": 12 * 10**9},
        "dtype": "float16",
    }
    (tmp_path / "a.json").write_text(json.dumps({**report, "rows": [row]}))
    (tmp_path / "b.json").write_text(json.dumps({**report, "model": "tiny", "rows": [row]}))
    (tmp_path / "c.json").write_text(json.dumps({**report, "batch_size": 8, "rows": [row]}))
    _, out, document = table(capsys, "--measured", tmp_path, "--markdown", tmp_path / "table.md")
    measured = {(one["method"], one["tokens"]): one["measured"] for one in document["rows"]}
    assert measured.pop(("vispruner", 160)) == {
        "first_token_ms": 77.0,
        "memory_GB": 14.0,
        "of_unpruned": 0.2,
        "device": "some card",
    }
    assert not any(measured.values()) and "not measured" not in out
    assert "some card" in (tmp_path / "table.md").read_text()


def test_a_broken_report_is_named(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{")
    assert main(["table", "--measured", str(tmp_path)]) == 1
    assert "x.json" in capsys.readouterr().err


def test_the_script_asks_for_the_table(tmp_path):
    shown = tmp_path / "python"  # stands for Python: prints what it is asked to run
    shown.write_text('#!/usr/bin/env bash\necho "$@"\n')
    shown.chmod(0o755)
    script = ROOT / "scripts" / "tables" / "efficiency.sh"
    code = (
        'source() { builtin source "$@"; vispruner_env() { PY=$FAKE; }; }; '
        f'builtin source "{script}" --markdown x'
    )
    made = subprocess.run(
        ["bash", "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "FAKE": str(shown), "OUT_DIR": "/o"},
    )
    assert made.stdout.split() == [
        "-m",
        "llava.analysis.efficiency",
        "table",
        "--measured",
        "/o/efficiency",
        "--markdown",
        "x",
    ], made.stderr
