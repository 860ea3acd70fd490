"""The evaluation scripts: which command they run for which arguments and environment; no model is asked."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.script_sandbox import ROOT, Sandbox
from llava.eval.benchmarks import benchmark_name, get_benchmark, list_benchmarks

NAMES = ["vqav2", "gqa", "vizwiz", "sqa", "textvqa", "pope", "mme", "mmbench", "mmbench_cn", "mmvet"]
VIDEO = ["tgif", "msvd", "msrvtt", "activitynet"]
UNSET = {
    name: ""
    for name in (
        "CKPT_DIR",
        "CKPT",
        "DATA_DIR",
        "SPLIT",
        "METHOD",
        "OUT_DIR",
        "JUDGE",
        "CUDA_VISIBLE_DEVICES",
        "WORLD_SIZE",
        "VISPRUNER_PROCESSES",
    )
}


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    made = Sandbox(tmp_path)
    shutil.copytree(ROOT / "scripts", made.repo / "scripts", dirs_exist_ok=True)
    return made


def ask(
    sandbox: Sandbox, script: str, *arguments: str, **variables: str
) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """The words of the one command that a script ends in, paths within the repository made relative."""
    sandbox.log.unlink(missing_ok=True)
    done = sandbox.run(*arguments, script=script, VISPRUNER_SYSTEM_PYTHON="1", **{**UNSET, **variables})
    calls = [line for line in sandbox.calls("module") if "llava.tiny.tower" not in line]
    assert len(calls) <= 1
    return [
        word
        for call in calls
        for word in call.removeprefix("module -m ").replace(f"{sandbox.repo}/", "").split(" ")
    ], done


def options(words: list[str]) -> dict[str, str]:
    """--name value pairs, the last of each; flags are ''."""
    found: dict[str, str] = {}
    for place, word in enumerate(words):
        if word.startswith("--"):
            after = words[place + 1] if place + 1 < len(words) else "--"
            found[word] = "" if after.startswith("--") else after
    return found


@pytest.mark.parametrize("version", ["v1_5", "v1_6"])
def test_there_is_a_short_script_for_every_benchmark_by_the_name_its_users_know(version: str) -> None:
    folder = ROOT / "scripts" / version / "eval"
    assert sorted(path.stem for path in folder.glob("*.sh")) == sorted(NAMES)
    for path in folder.glob("*.sh"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 5
        assert lines[-1] == f'vispruner_eval {version} {benchmark_name(path.stem)} "$@"'
        assert benchmark_name(path.stem) in list_benchmarks()


def test_there_is_a_short_script_for_every_video_set() -> None:
    folder = ROOT / "scripts" / "video" / "eval"
    assert sorted(path.stem for path in folder.glob("*.sh")) == sorted(VIDEO)
    for path in folder.glob("*.sh"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 5 and lines[-1] == f'vispruner_video {path.stem} "$@"'
        assert get_benchmark(path.stem).media == "video"


def test_nothing_set(sandbox: Sandbox) -> None:
    words, done = ask(sandbox, "v1_5/eval/pope.sh", "64", "0.5")
    assert done.returncode == 0, done.stderr
    assert words == "llava.eval.run --benchmark pope --tokens 64 --ratio 0.5 --output-dir outputs".split()
    assert sandbox.calls("module")[0] == "module -m llava.tiny.tower"
    assert ask(sandbox, "v1_5/eval/sqa.sh")[0] == (
        "llava.eval.run --benchmark scienceqa --tokens none --output-dir outputs".split()
    )
    words, _ = ask(sandbox, "v1_6/eval/gqa.sh", "32")
    assert options(words)["--model"] == "playground/tiny/llava-tiny-anyres"


def test_everything_set(sandbox: Sandbox) -> None:
    words, done = ask(
        sandbox,
        "v1_6/eval/mme.sh",
        "32",
        "0.5",
        "--limit",
        "3",
        "--tokens=16",
        CKPT_DIR="ckpts/",
        DATA_DIR="playground/data/eval",
        METHOD="fastervlm",
        OUT_DIR="out",
        CUDA_VISIBLE_DEVICES="0,1,2,3",
    )
    assert done.returncode == 0, done.stderr
    found = options(words)
    assert found["--model"] == "ckpts/llava-v1.6-vicuna-7b" and found["--data"] == "playground/data/eval"
    assert (found["--method"], found["--processes"], found["--output-dir"]) == ("fastervlm", "4", "out")
    assert words[-3:] == ["--limit", "3", "--tokens=16"]  # last, so that they win
    assert not any("llava.tiny.tower" in call for call in sandbox.calls("module"))
    assert options(ask(sandbox, "v1_5/eval/mme.sh", CKPT_DIR="ckpts")[0])["--model"] == "ckpts/llava-v1.5-7b"
    assert options(ask(sandbox, "v1_5/eval/mme.sh", CKPT="my/one")[0])["--model"] == "my/one"


@pytest.mark.parametrize(
    ("variables", "arguments", "count"),
    [
        ({"CUDA_VISIBLE_DEVICES": "2"}, [], None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, [], "2"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "VISPRUNER_PROCESSES": "1"}, [], None),
        ({"VISPRUNER_PROCESSES": "3"}, [], "3"),
        (
            {"CUDA_VISIBLE_DEVICES": "0,1", "WORLD_SIZE": "2", "RANK": "0"},
            [],
            None,
        ),  # torchrun has started us
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, ["64", "--num-chunks", "2"], None),  # so has somebody's own loop
    ],
)
def test_one_process_per_gpu(
    sandbox: Sandbox, variables: dict[str, str], arguments: list[str], count: str | None
) -> None:
    words, done = ask(sandbox, "v1_5/eval/pope.sh", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    assert options(words).get("--processes") == count


@pytest.mark.parametrize(
    ("script", "variables", "benchmark", "submits"),
    [
        ("vqav2", {}, "vqav2_val", False),
        ("vqav2", {"DATA_DIR": "d"}, "vqav2", True),
        ("vqav2", {"DATA_DIR": "d", "SPLIT": "test-dev"}, "vqav2", True),
        ("vizwiz", {"DATA_DIR": "d", "SPLIT": "val"}, "vizwiz_val", False),
        ("mmbench_cn", {}, "mmbench_cn", True),
        ("mmvet", {"SPLIT": "val"}, "mmvet", True),
        ("textvqa", {"DATA_DIR": "d"}, "textvqa", False),
    ],
)
def test_which_split_and_whether_a_server_wants_a_file(
    sandbox: Sandbox, script: str, variables: dict[str, str], benchmark: str, submits: bool
) -> None:
    words, done = ask(sandbox, f"v1_5/eval/{script}.sh", "64", **variables)
    found = options(words)
    assert (found["--benchmark"], "--submit" in found) == (benchmark, submits)
    assert ("the embedded set is a validation set" in done.stderr) == (script == "vqav2" and not variables)


def test_a_split_there_is_not(sandbox: Sandbox) -> None:
    words, done = ask(sandbox, "v1_5/eval/vqav2.sh", "64", DATA_DIR="d", SPLIT="train")
    assert (words, done.returncode, done.stderr) == ([], 2, "error: SPLIT=train: val or test\n")


def test_video_answers_are_named_or_looked_for(sandbox: Sandbox, tmp_path: Path) -> None:
    answers = tmp_path / "merge.jsonl"
    answers.write_text("")
    words, done = ask(sandbox, "video/eval/msvd.sh", str(answers), DATA_DIR="d", JUDGE="gpt-3.5-turbo")
    assert done.returncode == 0, done.stderr
    assert (
        words
        == (
            f"llava.eval.video --benchmark msvd --output-dir outputs --answers {answers} "
            "--judge gpt-3.5-turbo --data d"
        ).split()
    )
    words, _ = ask(sandbox, "video/eval/tgif.sh", "227", "0.5", METHOD="random", CKPT_DIR="c")
    assert (
        words
        == (
            "llava.eval.video --benchmark tgif --model c/Video-LLaVA-7B --output-dir outputs "
            "--tokens 227 --ratio 0.5 --method random"
        ).split()
    )
