"""The paper's efficiency table from model sizes, with measured columns from reports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava.analysis.efficiency.__main__ import main
from llava.analysis.efficiency.table import analytic

ROOT = Path(__file__).resolve().parents[3]


def table(capsys, *argv):
    code = main(["table", *map(str, argv)])
    out = capsys.readouterr().out
    return code, out, json.loads(out.splitlines()[-1])


def test_published_flops_are_reproduced_except_for_640_tokens(tmp_path, capsys):
    code, out, document = table(capsys, "--measured", tmp_path)
    assert code == 0 and len(document["rows"]) == 5
    for row in document["rows"]:
        published, ours = row["published"]["flops_T"], row["analytic"]["flops_as_published"] / 1e12
        assert row["flops_difference"] == pytest.approx(ours / published - 1, abs=1e-4)
        assert (abs(row["flops_difference"]) < 0.03) == (row["tokens"] != 640)
        if row["tokens"] == 640:  # reproduced with 720 tokens
            counted = analytic(row["method"], 720)["flops_as_published"] / 1e12
            assert counted == pytest.approx(published, rel=0.03)
        assert row["measured"] is None
    kept = {(row["method"], row["tokens"]): row["analytic"]["kv_bytes"] for row in document["rows"]}
    assert kept["none", 2880] == 1440 * 2**20 and kept["vispruner", 160] == 80 * 2**20
    assert "--dummy-model llava-next-7b --device cuda" in out and "not measured" in out


def test_measured_columns_are_read_from_reports_on_that_model(tmp_path, capsys):
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
        "machine": {"name": "some GPU"},
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
        "device": "some GPU",
    }
    assert not any(measured.values()) and "not measured" not in out
    assert "some GPU" in (tmp_path / "table.md").read_text()


def test_the_newest_of_a_report_and_a_gpu_check_is_used(tmp_path, capsys):
    def record(tokens, visual, ms):
        graph, weights = {"median_ms": ms}, {"vision_tower": 10**9, "language_model": 12 * 10**9}
        same = {"peak_bytes": 10**9, "weights_bytes": weights}
        return {"tokens": tokens, "visual_tokens": visual, "graph": graph, **same}

    measurements = {"none": record(None, 2880, 100.0), "32": record(32, 160, 17.0)}
    measurements["busy"] = {"budget": 32, "busy": 0.9}
    measurements["64"] = {"tokens": 64, "visual_tokens": 320, "graph_error": "CaptureError"}
    check = {
        "part": "gpu_check",
        "environment": {"dummy_model": "llava-1.5-7b"},
        "machine": {"name": "another GPU"},
        "parts": {"first-token-next": {"measurements": measurements}},
    }
    row = {"method": "vispruner", "visual_tokens": 160, "first_token": {"median_ms": 77.0}, "peak_bytes": 0}
    report = {
        "part": "whole",
        "model": "llava-next-7b",
        "batch_size": 1,
        "machine": {"name": "some GPU"},
        "weights_bytes": {},
        "rows": [row],
    }
    folders = [tmp_path / "efficiency", tmp_path / "gpu"]
    for folder, document, age in zip(folders, (report, check), (1, 2), strict=True):
        folder.mkdir()
        (folder / "x.json").write_text(json.dumps(document))
        os.utime(folder / "x.json", (age, age))
    _, _, document = table(capsys, "--measured", *folders)
    measured = {(one["method"], one["tokens"]): one["measured"] for one in document["rows"]}
    assert measured["none", 2880]["first_token_ms"] == 100.0
    pruned = {"first_token_ms": 17.0, "memory_GB": 14.0, "of_unpruned": 0.17, "device": "another GPU"}
    assert measured["vispruner", 160] == pruned
    os.utime(folders[0] / "x.json", (3, 3))
    _, _, document = table(capsys, "--measured", *folders)
    newest = next(one["measured"] for one in document["rows"] if one["tokens"] == 160 and one["measured"])
    assert newest["first_token_ms"] == 77.0 and newest["device"] == "some GPU"
    check["environment"]["dummy_model"] = "tiny"  # a rehearsal is no measurement of this model
    (folders[1] / "x.json").write_text(json.dumps(check))
    _, _, document = table(capsys, "--measured", folders[1])
    assert not any(one["measured"] for one in document["rows"])


WHOLE = {"part": "whole", "model": "llava-next-7b", "batch_size": 1, "machine": {"name": "x"}}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        '{"part": "gpu_check"}',
        json.dumps({**WHOLE, "weights_bytes": {}, "rows": 3}),
        json.dumps({**WHOLE, "weights_bytes": 3, "rows": []}),
        json.dumps(
            {
                **WHOLE,
                "weights_bytes": {},
                "rows": [{"method": "none", "visual_tokens": 2880, "first_token": None, "peak_bytes": 1}],
            }
        ),
        json.dumps(
            {
                "part": "gpu_check",
                "environment": {"dummy_model": "llava-1.5-7b"},
                "machine": {"name": "x"},
                "parts": {"first-token-next": {"measurements": {"none": 3}}},
            }
        ),
    ],
)
def test_an_invalid_report_is_named(content, tmp_path, capsys):
    (tmp_path / "x.json").write_text(content)
    assert main(["table", "--measured", str(tmp_path)]) == 1
    assert "x.json" in capsys.readouterr().err


def test_the_script_reads_reports_of_out_dir_and_passes_options_on(tmp_path):
    (tmp_path / "efficiency").mkdir()
    (tmp_path / "efficiency" / "broken.json").write_text("{")
    script = ROOT / "scripts" / "tables" / "efficiency.sh"
    environment = {"VISPRUNER_SYSTEM_PYTHON": "1", "PYTHON": sys.executable, "OUT_DIR": str(tmp_path)}
    command = ["bash", str(script), "--markdown", str(tmp_path / "table.md")]
    made = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert made.returncode == 1 and "broken.json" in made.stderr
    (tmp_path / "efficiency" / "broken.json").unlink()
    made = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert made.returncode == 0, made.stderr
    assert "vispruner 160" in made.stdout and "vispruner 160" in (tmp_path / "table.md").read_text()
