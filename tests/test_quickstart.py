"""scripts/quickstart.sh and .ci/run: what they call, and how they end."""

from __future__ import annotations

import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

from helpers.script_sandbox import ROOT, Sandbox, failure


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


# ---- quickstart.sh ----------------------------------------------------------------------------------


def test_quickstart_ends_in_json(sandbox: Sandbox, tmp_path: Path) -> None:
    picture = tmp_path / "my cat.jpg"
    picture.write_bytes(b"")
    result = sandbox.run(
        "--limit", "30", script="quickstart.sh", cwd=tmp_path, IMAGE="my cat.jpg", OUTPUT="out"
    )
    assert result.returncode == 0, result.stderr
    # Everything but the table goes to stderr, so that the last line of stdout is the document.
    assert result.stdout == "words of llava.eval.sweep\n" + '{"cells": []}\n'
    tower, overlay, sweep = sandbox.calls("module")
    assert tower == "module -m llava.tiny.tower"
    assert f"--image {picture} --tokens 64 --output {tmp_path}/out/overlay.png" in overlay
    assert "--methods none,random,fastervlm,vispruner --tokens 128,64,32 --ratios 0.5,0" in sweep
    assert sweep.endswith(f"--output {tmp_path}/out --limit 30")
    assert (tmp_path / "out").is_dir()


def test_quickstart_takes_an_embedded_picture(sandbox: Sandbox) -> None:
    picture = sandbox.repo / "playground/tiny/eval/pope/val2014/COCO_val2014_000000000001.jpg"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"")
    assert sandbox.run(script="quickstart.sh").returncode == 0
    assert f"--image {picture.relative_to(sandbox.repo)} " in sandbox.calls("module")[1]


@pytest.mark.parametrize("module", ["llava.tiny.tower", "llava.analysis.overlay", "llava.eval.sweep"])
def test_quickstart_fails_with_its_steps(sandbox: Sandbox, module: str) -> None:
    assert sandbox.run(script="quickstart.sh", FAKE_FAILS=module).returncode == 4


def test_quickstart_checks_the_picture_first(sandbox: Sandbox) -> None:
    assert (
        failure(sandbox.run(script="quickstart.sh", IMAGE="nowhere.jpg")) == "IMAGE=nowhere.jpg is no file.\n"
    )
    assert sandbox.calls("") == []


# ---- .ci/run --------------------------------------------------------------------------------------


def ci(tmp_path: Path, script: str) -> subprocess.CompletedProcess[str]:
    """.ci/run with a stand-in for scripts/test.sh."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "scripts" / "test.sh").write_text(textwrap.dedent(script), encoding="utf-8")
    command = ["bash", str(tmp_path / ".ci" / "run")]
    return subprocess.run(command, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True)


def test_ci_ends_in_the_closing_line(tmp_path: Path) -> None:
    closing = "12 passed, 2 warnings in 61.20s (0:01:01)"
    result = ci(tmp_path, f"echo '3 passed in 0.10s'\necho '{closing}'\necho later\n")
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == closing


def test_ci_fails_with_the_tests(tmp_path: Path) -> None:
    result = ci(tmp_path, "echo '1 failed, 3 passed in 0.10s'\nexit 1\n")
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "1 failed, 3 passed in 0.10s"


def test_ci_fails_with_the_lint_when_tests_pass(tmp_path: Path) -> None:
    assert ci(tmp_path, "echo '3 passed in 0.10s'\nexit 2\n").returncode == 2


NOTHING_RAN = ["no tests ran in 0.01s", "3 skipped in 0.01s", "5 deselected in 0.02s", "nothing"]


@pytest.mark.parametrize("closing", NOTHING_RAN)
def test_ci_fails_when_no_test_was_executed(tmp_path: Path, closing: str) -> None:
    result = ci(tmp_path, f"echo '{closing}'\n")
    assert result.returncode == 1
    assert "no test was executed" in result.stderr
