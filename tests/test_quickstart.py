"""scripts/quickstart.sh and .ci/run: output, exit codes, and the image that is drawn."""

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


def test_quickstart_ends_with_json(sandbox: Sandbox, tmp_path: Path) -> None:
    image = tmp_path / "my cat.jpg"
    image.write_bytes(b"")
    result = sandbox.run(
        "--limit", "30", script="quickstart.sh", cwd=tmp_path, IMAGE="my cat.jpg", OUTPUT="out"
    )
    assert result.returncode == 0, result.stderr
    # Everything but the table goes to stderr, so that the last line of stdout is the JSON document.
    assert result.stdout == "words of llava.eval.sweep\n" + '{"cells": []}\n'
    _, overlay, sweep = sandbox.calls("module")
    assert f"--image {image} " in overlay and f"{tmp_path}/out/overlay.png" in overlay
    assert sweep.endswith(f"--output {tmp_path}/out --limit 30")


def test_quickstart_draws_a_bundled_image_by_default(sandbox: Sandbox) -> None:
    image = sandbox.repo / "playground/tiny/eval/pope/val2014/COCO_val2014_000000000001.jpg"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"")
    assert sandbox.run(script="quickstart.sh").returncode == 0
    assert f"--image {image} " in sandbox.calls("module")[1]


@pytest.mark.parametrize(
    "arguments, variables",
    [
        (["--model", "smol"], {}),
        (["--model=smol"], {}),
        ([], {"SMOL": "1"}),
        (["--dtype", "float32"], {"SMOL": "1"}),
    ],
)
def test_quickstart_on_smol_fetches_its_parts_and_asks_fewer_questions(
    sandbox: Sandbox, arguments: list[str], variables: dict[str, str]
) -> None:
    done = sandbox.run(*arguments, script="quickstart.sh", **variables)
    assert done.returncode == 0, done.stderr
    tower, base, overlay, build, sweep = sandbox.calls("module")
    assert "llava.tiny.tower" in tower and "llava.tiny.base" in base and "--model smol" in overlay
    assert "--benchmarks pope --num-images 40" in build
    words = sweep.split()
    assert words[words.index("--limit") + 1] == "400" and "none,vispruner,random" in words
    assert f"--data {build.partition('--output ')[2]} --limit" in sweep
    assert "smol" in words or "--model=smol" in words
    assert all(word in words for word in arguments)


@pytest.mark.parametrize("module", ["llava.tiny.tower", "llava.analysis.overlay", "llava.eval.sweep"])
def test_quickstart_fails_if_a_step_fails(sandbox: Sandbox, module: str) -> None:
    assert sandbox.run(script="quickstart.sh", FAKE_FAILS=module).returncode == 4


def test_quickstart_checks_the_image_before_set_up(sandbox: Sandbox) -> None:
    message = failure(sandbox.run(script="quickstart.sh", IMAGE="nowhere.jpg"))
    assert message.startswith("IMAGE=nowhere.jpg: no such file.")
    assert sandbox.calls("") == []


# ---- .ci/run --------------------------------------------------------------------------------------


def ci(tmp_path: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run .ci/run with a stand-in for scripts/test.sh."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "scripts" / "test.sh").write_text(textwrap.dedent(script), encoding="utf-8")
    command = ["bash", str(tmp_path / ".ci" / "run")]
    return subprocess.run(command, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True)


def test_ci_ends_with_the_summary_line_of_pytest(tmp_path: Path) -> None:
    summary = "12 passed, 2 warnings in 61.20s (0:01:01)"
    result = ci(tmp_path, f"echo '3 passed in 0.10s'\necho '{summary}'\necho later\n")
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == summary


def test_ci_fails_if_a_test_fails(tmp_path: Path) -> None:
    result = ci(tmp_path, "echo '1 failed, 3 passed in 0.10s'\nexit 1\n")
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "1 failed, 3 passed in 0.10s"


def test_ci_fails_if_the_lint_fails(tmp_path: Path) -> None:
    assert ci(tmp_path, "echo '3 passed in 0.10s'\nexit 2\n").returncode == 2


NOTHING_RAN = ["no tests ran in 0.01s", "3 skipped in 0.01s", "5 deselected in 0.02s", "nothing"]


@pytest.mark.parametrize("summary", NOTHING_RAN)
def test_ci_fails_if_no_test_ran(tmp_path: Path, summary: str) -> None:
    result = ci(tmp_path, f"echo '{summary}'\n")
    assert result.returncode == 1
    assert "no test was executed" in result.stderr
