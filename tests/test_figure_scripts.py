"""The scripts of the figures: arguments and environment become options of one command. No model is run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers.script_sandbox import ROOT, Sandbox, failure
from llava.analysis.figures.__main__ import build_parser

UNSET = {"CKPT_DIR": "", "CKPT": "", "DATA_DIR": "", "OUT_DIR": "", "VISPRUNER_SYSTEM_PYTHON": "1"}


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    made = Sandbox(tmp_path)
    shutil.copytree(ROOT / "scripts", made.repo / "scripts", dirs_exist_ok=True)
    return made


@pytest.mark.parametrize("figure", ["fig1", "fig2", "fig3", "fig4", "fig5"])
def test_the_bundled_model_by_default(figure: str, sandbox: Sandbox) -> None:
    done = sandbox.run("--limit", "5", script=f"figures/{figure}.sh", **UNSET)
    assert done.returncode == 0, done.stderr
    tower, call = [line.replace(f"{sandbox.repo}/", "") for line in sandbox.calls("module")]
    assert "llava.tiny.tower" in tower
    words = call.removeprefix("module -m llava.analysis.figures ").split()
    shared = ["--ablation", "outputs/ablation"] if figure == "fig5" else []
    assert words == [figure, *shared, "--output", "outputs/figures", "--limit", "5"]
    args = build_parser().parse_args(words)
    assert (args.figure, args.limit, args.model, args.data) == (figure, 5, None, None)
    assert sandbox.calls("preset") == ["preset "] * 2


def test_a_checkpoint_and_data_of_the_environment(sandbox: Sandbox, tmp_path: Path) -> None:
    given = {**UNSET, "CKPT_DIR": "ckpts", "CKPT": "mine", "DATA_DIR": "-d", "OUT_DIR": "a b"}
    done = sandbox.run(script="figures/fig3.sh", cwd=tmp_path, **given)
    assert done.returncode == 0, done.stderr
    (call,) = sandbox.calls("module")
    wanted = f"--data ./-d --model ckpts/mine --output {tmp_path}/a b/figures"
    assert call == f"module -m llava.analysis.figures fig3 {wanted}"
    assert sandbox.calls("preset") == ["preset published"] and (tmp_path / "a b").is_dir()
    given["VISPRUNER_SYSTEM_PYTHON"] = ""
    assert sandbox.run(script="figures/fig2.sh", cwd=tmp_path, **given).returncode == 0
    assert any("[plot]" in call for call in sandbox.calls("pip"))


def test_a_copied_script_names_the_repository(sandbox: Sandbox, tmp_path: Path) -> None:
    shutil.copy(ROOT / "scripts" / "figures" / "fig2.sh", sandbox.repo / "scripts" / "fig2.sh")
    done = sandbox.run(script="fig2.sh", **UNSET)
    assert "is a copy" in failure(done) and "scripts/figures/fig2.sh" in done.stderr
