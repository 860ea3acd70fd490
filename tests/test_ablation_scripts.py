"""The scripts for ablations: arguments and environment become the options of one command. No model is run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers.script_sandbox import ROOT, Sandbox

UNSET = dict.fromkeys("CKPT_DIR CKPT DATA_DIR OUT_DIR VISPRUNER_PRESET".split(), "")
COMMAND = "module -m llava.analysis.ablation"


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    made = Sandbox(tmp_path)
    shutil.copytree(ROOT / "scripts", made.repo / "scripts", dirs_exist_ok=True)
    return made


def run(sandbox: Sandbox, line: str, **variables: str) -> tuple[str, str]:
    """Run a script; return its command, with relative paths, and the preset."""
    script, *arguments = line.split()
    settings = {**UNSET, "VISPRUNER_SYSTEM_PYTHON": "1", **variables}
    done = sandbox.run(*arguments, script=f"ablation/{script}.sh", cwd=sandbox.repo, **settings)
    assert done.returncode == 0, done.stderr
    (call,) = [call for call in sandbox.calls("module") if "llava.tiny.tower" not in call]
    preset = sandbox.calls("preset")[-1].removeprefix("preset").strip()
    return call.replace(f"{sandbox.repo}/", ""), preset


def test_the_bundled_model_is_prepared(sandbox: Sandbox) -> None:
    assert run(sandbox, "ratio") == (f"{COMMAND} ratio --output outputs/ablation", "")
    assert "llava.tiny.tower" in sandbox.calls("module")[0]


@pytest.mark.parametrize(
    ("line", "model", "preset"),
    [
        ("cue", "c/llava-v1.5-7b", "published"),
        ("crops", "c/llava-v1.6-vicuna-7b", "published"),
        ("dtype", "c/llava-v1.5-7b", ""),  # the preset sets a dtype of the tower
    ],
)
def test_your_own_checkpoints_and_data(sandbox: Sandbox, line: str, model: str, preset: str) -> None:
    found = run(sandbox, f"{line} --tokens 64 --limit 9", CKPT_DIR="c/", DATA_DIR="-d", OUT_DIR="mine")
    more = f"--data ./-d --model {model} --output mine/ablation --tokens 64 --limit 9"
    assert found == (f"{COMMAND} {line} {more}", preset)
    assert not any("llava.tiny.tower" in call for call in sandbox.calls("module"))
