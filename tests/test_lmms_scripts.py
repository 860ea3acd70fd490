"""The scripts for lmms-eval: arguments and environment become its options. Nothing is installed or run."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from helpers.script_sandbox import FAKE_PYTHON, ROOT, Sandbox, failure

SCRIPTS = sorted(path.name for path in (ROOT / "scripts" / "lmms_eval").glob("[a-z]*.sh"))
BENCHMARKS = sorted(set(SCRIPTS) - {"install.sh", "tiny.sh", "speed.sh"})
# lmms-eval writes a result, unless FAKE_ERROR is set: it exits with 0 after an error, too.
LMMS_EVAL = """\
case "$*" in
    *"import lmms_eval"*) exit "${FAKE_MISSING:-0}" ;;
    *"lmms_eval eval"*)
        echo "lmms $*" >>"$FAKE_LOG"
        while [ "$1" != --output_path ]; do shift; done
        [ -n "${FAKE_ERROR:-}" ] || echo {} >"$2/$RANDOM$RANDOM_results.json"
        exit 0 ;;
esac
"""
LMMS_EVAL = LMMS_EVAL.replace("$RANDOM$RANDOM_results", "${RANDOM}_results")


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    made = Sandbox(tmp_path)
    shutil.copytree(ROOT / "scripts", made.repo / "scripts", dirs_exist_ok=True)
    first, rest = FAKE_PYTHON.replace("@REAL@", sys.executable).split("\n", 1)
    made.command("python3", f"{first}\n{LMMS_EVAL}{rest}")
    return made


def run(sandbox: Sandbox, line: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run a script; return the process and its call of lmms-eval."""
    script, *arguments = line.split()
    names = "CKPT_DIR CKPT HOST METHOD OUT_DIR CUDA_VISIBLE_DEVICES WORLD_SIZE".split()
    settings = {**dict.fromkeys(names, ""), "VISPRUNER_SYSTEM_PYTHON": "1", "OUT_DIR": "out", **variables}
    done = sandbox.run(*arguments, script=f"lmms_eval/{script}", cwd=sandbox.repo, **settings)
    calls = sandbox.calls("lmms ")
    return done, calls[-1] if calls else ""


@pytest.mark.parametrize(
    ("line", "variables", "expected"),
    [
        (
            "pope.sh",
            {},
            "-m lmms_eval eval --output_path out --model vispruner --model_args  --tasks pope --log_samples",
        ),
        (
            "gqa.sh 64 0.5",
            {},
            "--model vispruner --model_args method=vispruner,tokens=64,important_ratio=0.5 --tasks gqa",
        ),
        ("mme.sh 64", {"METHOD": "fastervlm"}, "--model_args method=fastervlm,tokens=64 --tasks mme"),
        ("mme.sh none", {"CKPT": "c"}, "--model_args pretrained=c,preset=published --tasks mme"),
        (
            "mme.sh 8",
            {"CKPT_DIR": "d"},
            "--model_args pretrained=d/llava-v1.5-7b,preset=published,method=vispruner,tokens=8",
        ),
        (
            "mme.sh",
            {"CKPT": "c", "VISPRUNER_PRESET": "exact"},
            "--model_args pretrained=c,preset=exact --tasks",
        ),
        (
            "textvqa.sh 64 0.5 --limit 3",
            {"HOST": "qwen2_5_vl", "CKPT": "q"},
            "--model vispruner_hf --model_args pretrained=q,host=qwen2_5_vl,method=vispruner,tokens=64,"
            "important_ratio=0.5 --tasks textvqa_val --log_samples --limit 3",
        ),
        ("activitynet.sh 227", {}, "--model_args host=video_llava,method=vispruner,clip_tokens=227 --tasks"),
        (
            "pope.sh",
            {"CUDA_VISIBLE_DEVICES": "0,1"},
            "-m accelerate.commands.launch --num_processes 2 -m lmms_eval eval --output_path out",
        ),
    ],
)
def test_arguments_become_those_of_lmms_eval(sandbox, line, variables, expected) -> None:
    done, call = run(sandbox, line, **variables)
    assert done.returncode == 0, done.stderr
    assert expected in call


def test_an_error_of_lmms_eval_is_an_error(sandbox) -> None:
    done, _ = run(sandbox, "pope.sh", FAKE_ERROR="1")
    assert done.returncode == 1 and "lmms-eval wrote no result to out" in done.stderr
    done, call = run(sandbox, "install.sh", FAKE_MISSING="1")
    assert "does not have lmms-eval" in failure(done)


def test_every_script_names_its_task() -> None:
    assert {"pope.sh", "gqa.sh", "mme.sh", "textvqa.sh", "activitynet.sh"} <= set(BENCHMARKS)
    page = (ROOT / "docs" / "lmms_eval.md").read_text(encoding="utf-8")
    for name in BENCHMARKS:
        text = (ROOT / "scripts" / "lmms_eval" / name).read_text(encoding="utf-8")
        task = re.fullmatch(r'vispruner_lmms(?:_video)? (\w+) "\$@"', text.splitlines()[-1])
        assert task and f"`{task.group(1)}`" in page and f"`{name}`" in page


def test_the_placeholder_is_a_wheel_without_modules(tmp_path) -> None:
    script = ROOT / "scripts" / "lmms_eval" / "_placeholder.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "0.28.0"], capture_output=True, text=True
    )
    path = Path(done.stdout.strip())
    assert path.name == "torchvision-0.28.0+none-py3-none-any.whl"
    with zipfile.ZipFile(path) as wheel:
        assert {name.split("/")[0] for name in wheel.namelist()} == {"torchvision-0.28.0+none.dist-info"}


def test_pins_are_of_packages_that_the_core_does_not_pin() -> None:
    names = []
    for path in (ROOT / "scripts" / "lmms_eval" / "constraints.txt", ROOT / "constraints.txt"):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
        names.append({line.split("==")[0].lower().replace("_", "-") for line in lines})
    assert not names[0] & names[1] and "lmms-eval" in names[0]


@pytest.mark.parametrize(("shift", "failed", "code"), [(0.0, 0, 0), (0.01, 0, 1), (0.0, 2, 1)])
def test_the_check_finds_a_score_that_differs(tmp_path, capsys, shift, failed, code) -> None:
    """Three answers to GQA, two of them right, as lmms-eval logs them."""
    spec = importlib.util.spec_from_file_location("tiny_tasks", ROOT / "scripts" / "lmms_eval" / "_tiny.py")
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    truth = [row["answer"] for row, _ in zip(tiny.rows("tiny_gqa"), range(3), strict=False)]
    samples = [{"doc_id": i, "filtered_resps": said} for i, said in enumerate([*truth[:2], "none of them"])]
    arguments = {"vispruner": {"method": "vispruner", "failed": failed}}
    scores = {"tiny_gqa": {"exact_match,none": 2 / 3 + shift}}
    document = {"results": scores, "config": {"resolved_cli_args": arguments}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a_results.json").write_text(json.dumps(document))
    lines = "".join(json.dumps(one) + "\n" for one in samples)
    (tmp_path / "run" / "a_samples_tiny_gqa.jsonl").write_text(lines)
    assert tiny.check(tmp_path, ["run"]) == code
    assert ("all scores agree" in capsys.readouterr().out) is (code == 0)
