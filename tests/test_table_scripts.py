"""Scripts for tables: the commands they run, and separate folders for separate bundled models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers.script_sandbox import ROOT, Sandbox
from llava.eval.sweep import build_parser
from llava.eval.tables.__main__ import choose_tables

PAPER = {
    "llava_1_5_7b": "llava-1.5-7b",
    "llava_next_7b": "llava-next-7b",
    "video_llava_7b": "video-llava-7b",
    "other_vlms": "other-vlms",
    "fastervlm": "fastervlm",
}
UNSET = {"CKPT_DIR": "", "CKPT": "", "OUT_DIR": "", "VISPRUNER_SYSTEM_PYTHON": "1"}


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    made = Sandbox(tmp_path)
    shutil.copytree(ROOT / "scripts", made.repo / "scripts", dirs_exist_ok=True)
    for folder in ("llava-tiny", "eval"):
        (made.repo / "playground" / "tiny" / folder).mkdir(parents=True)
    (made.bin / "cksum").symlink_to(shutil.which("cksum"))
    bundle(made, "weights", "sums")
    return made


def bundle(sandbox: Sandbox, weights: str, sums: str) -> None:
    """Put a bundled model and the checksums of its data into the sandbox."""
    tiny = sandbox.repo / "playground" / "tiny"
    (tiny / "llava-tiny" / "model.safetensors").write_text(weights)
    (tiny / "eval" / "SHA256SUMS").write_text(sums)


def command(sandbox: Sandbox, script: str, *arguments: str, **variables: str) -> str:
    sandbox.log.unlink(missing_ok=True)
    done = sandbox.run(*arguments, script=f"tables/{script}.sh", **{**UNSET, **variables})
    assert done.returncode == 0, done.stderr
    (call,) = [line for line in sandbox.calls("module") if "llava.tiny.tower" not in line]
    return call.removeprefix("module -m ").replace(f"{sandbox.repo}/", "")


@pytest.mark.parametrize("script, table", PAPER.items())
def test_the_papers_tables(script: str, table: str, sandbox: Sandbox) -> None:
    assert choose_tables(table)
    assert command(sandbox, script, "--ratio", "0.2") == (
        f"llava.eval.tables --table {table} --results outputs --output outputs/tables --ratio 0.2"
    )


def test_a_model_of_transformers(sandbox: Sandbox) -> None:
    assert command(sandbox, "native", "qwen3_vl", "--limit", "3") == (
        "llava.eval.native --host qwen3_vl --output outputs/native --limit 3"
    )
    given = {"CKPT_DIR": "models", "CKPT": "Qwen", "DATA_DIR": "-data", "METHOD": "random"}
    given["OUT_DIR"] = str(sandbox.repo / "elsewhere")
    assert command(sandbox, "native", "internvl", **given) == (
        "llava.eval.native --host internvl --model models/Qwen --data ./-data --method random "
        "--output elsewhere/native"
    )
    done = sandbox.run("--limit", "3", script="tables/native.sh", **UNSET)
    assert done.returncode == 2 and "HOST is missing" in done.stderr


def test_other_models_are_explained(sandbox: Sandbox) -> None:
    done = sandbox.run(script="tables/other_vlms.sh", **UNSET)
    assert all(name in done.stdout for name in ("Qwen/Qwen-VL", "OpenGVLab/InternVL-Chat", "THUDM/cogvlm"))


def test_the_extra_for_plots_is_installed(sandbox: Sandbox) -> None:
    done = sandbox.run(script="tables/llava_1_5_7b.sh", **{**UNSET, "VISPRUNER_SYSTEM_PYTHON": ""})
    assert done.returncode == 0, done.stderr
    assert any("[plot]" in call for call in sandbox.calls("pip"))


def test_the_bundled_sweep(sandbox: Sandbox) -> None:
    words = command(sandbox, "tiny", "--limit", "50").split()
    assert words.pop(0) == "llava.eval.sweep"
    args = build_parser().parse_args(words)
    assert args.benchmarks == [
        "pope",
        "vqav2_val",
        "gqa",
        "vizwiz_val",
        "scienceqa",
        "textvqa",
        "mme",
        "mmbench",
        "mmbench_cn",
        "mmvet",
    ]
    assert (args.tokens, args.ratios, args.limit) == ([128, 64, 32], [0.5, 0.0], 50)
    assert args.methods == ["none", "random", "fastervlm", "vispruner"] and args.model is args.data is None
    assert args.output.parent == Path("outputs/tiny") and args.report == args.output / "tables"


def test_another_bundled_model_or_benchmark_has_another_folder(sandbox: Sandbox, tmp_path: Path) -> None:
    def folder(**variables: str) -> str:
        return command(sandbox, "tiny", **variables).split("--output ")[1].split()[0]

    first = folder()
    assert first == folder()
    bundle(sandbox, "retrained", "sums")
    second = folder()
    bundle(sandbox, "retrained", "other images")
    assert len({first, second, folder()}) == 3
    assert folder(OUT_DIR=f"{tmp_path}/out").startswith(f"{tmp_path}/out/tiny/")


@pytest.mark.parametrize("words, folder", [([], "paper"), (["--list", "--quick"], "paper-quick")])
def test_everything_in_one_command(words: list[str], folder: str, sandbox: Sandbox) -> None:
    sandbox.log.unlink(missing_ok=True)
    done = sandbox.run(*words, script="paper.sh", **UNSET)
    assert done.returncode == 0, done.stderr
    calls = [line.replace(f"{sandbox.repo}/", "") for line in sandbox.calls("module")]
    assert any("llava.tiny.tower" in call for call in calls)
    assert calls[-1] == " ".join(["module -m llava.eval.paper --output", f"outputs/{folder}", *words])
    sandbox.log.unlink()
    done = sandbox.run(script="paper.sh", **{**UNSET, "CKPT_DIR": "c", "DATA_DIR": "d"})
    assert done.returncode == 0 and not any("llava.tiny.tower" in line for line in sandbox.calls("module"))
