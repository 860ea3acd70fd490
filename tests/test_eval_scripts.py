"""The evaluation scripts: arguments and environment become the options of one command. No model is run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers.script_sandbox import ROOT, Sandbox
from llava.eval.benchmarks import benchmark_name, get_benchmark

NAMES = ["vqav2", "gqa", "vizwiz", "sqa", "textvqa", "pope", "mme", "mmbench", "mmbench_cn", "mmvet"]
FOLDERS = {"v1_5": NAMES, "v1_6": NAMES, "video": ["tgif", "msvd", "msrvtt", "activitynet"]}
VARIABLES = (
    "CKPT_DIR CKPT DATA_DIR SPLIT METHOD OUT_DIR JUDGE CUDA_VISIBLE_DEVICES WORLD_SIZE VISPRUNER_PROCESSES"
)
GPUS = {"CUDA_VISIBLE_DEVICES": "0,1"}
# Script and arguments, environment, options of the command in order, options that must be absent.
CASES = [
    ("v1_5/eval/pope.sh 64 0.5", {}, "--benchmark pope --tokens 64 --ratio 0.5", "--model --data --submit"),
    (
        "v1_5/eval/sqa.sh",
        {},
        "--benchmark scienceqa --tokens none --output-dir outputs",
        "--ratio --processes",
    ),
    ("v1_6/eval/gqa.sh 32", {}, "--model playground/tiny/llava-tiny-anyres --tokens 32", "--data"),
    ("v1_5/eval/mme.sh", {"CKPT_DIR": "ckpts/"}, "--model ckpts/llava-v1.5-7b", ""),
    ("v1_6/eval/mme.sh", {"CKPT_DIR": "ckpts"}, "--model ckpts/llava-v1.6-vicuna-7b", ""),
    ("v1_5/eval/mme.sh", {"CKPT": "my/one"}, "--model my/one", ""),
    ("v1_5/eval/mme.sh", {"CKPT_DIR": "c", "CKPT": "x", "DATA_DIR": "d"}, "--model c/x --data d", ""),
    ("v1_5/eval/mme.sh", {"METHOD": "fastervlm", "OUT_DIR": "o"}, "--method fastervlm --output-dir o", ""),
    (
        "v1_5/eval/mme.sh 32 --limit 3 --tokens=16",
        {},
        "--tokens 32 --limit 3 --tokens=16",
        "",
    ),  # the last one wins
    ("v1_5/eval/vqav2.sh", {}, "--benchmark vqav2_val", "--submit"),
    ("v1_5/eval/vqav2.sh", {"DATA_DIR": "d"}, "--benchmark vqav2 --submit", ""),
    ("v1_5/eval/vqav2.sh", {"DATA_DIR": "d", "SPLIT": "test-dev"}, "--benchmark vqav2 --submit", ""),
    ("v1_5/eval/vizwiz.sh", {"DATA_DIR": "d", "SPLIT": "val"}, "--benchmark vizwiz_val", "--submit"),
    ("v1_5/eval/mmbench_cn.sh", {}, "--benchmark mmbench_cn --submit", ""),
    ("v1_5/eval/pope.sh", {"CUDA_VISIBLE_DEVICES": "2"}, "", "--processes"),
    ("v1_5/eval/pope.sh", GPUS, "--processes 2", ""),
    ("v1_5/eval/pope.sh", {**GPUS, "VISPRUNER_PROCESSES": "1"}, "", "--processes"),
    ("v1_5/eval/pope.sh", {"VISPRUNER_PROCESSES": "3"}, "--processes 3", ""),
    ("v1_5/eval/pope.sh", {**GPUS, "WORLD_SIZE": "2", "RANK": "0"}, "", "--processes"),  # started by torchrun
    (
        "v1_5/eval/pope.sh 64 --num-chunks 2",
        GPUS,
        "--num-chunks 2",
        "--processes",
    ),  # or by a loop of the user
    (
        "video/eval/msvd.sh scripts/_env.sh 227 0.5",
        {"JUDGE": "gpt", "CKPT_DIR": "c"},
        "--benchmark msvd --model c/Video-LLaVA-7B --answers scripts/_env.sh --tokens 227 --judge gpt",
        "--data",
    ),
    ("video/eval/msvd.sh missing.jsonl 227", {}, "--answers missing.jsonl --tokens 227", "--data"),
    ("video/eval/msvd.sh 227 0.5", {}, "--tokens 227 --ratio 0.5", "--answers --model --data"),
    ("video/eval/tgif.sh 114 0.5 --limit 3", GPUS, "--tokens 114 --processes 2 --limit 3", "--answers"),
    ("video/eval/tgif.sh merge.jsonl", GPUS, "--answers merge.jsonl", "--processes"),
]


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    made = Sandbox(tmp_path)
    shutil.copytree(ROOT / "scripts", made.repo / "scripts", dirs_exist_ok=True)
    return made


def run(sandbox: Sandbox, line: str, variables: dict[str, str]):
    """Run a script; return the process and the words of its evaluation command, paths made relative."""
    script, *arguments = line.split()
    settings = {**dict.fromkeys(VARIABLES.split(), ""), "VISPRUNER_SYSTEM_PYTHON": "1", **variables}
    done = sandbox.run(*arguments, script=script, cwd=sandbox.repo, **settings)
    calls = [call for call in sandbox.calls("module") if "llava.tiny." not in call]
    return done, " ".join(calls).replace(f"{sandbox.repo}/", "").split()


@pytest.mark.parametrize("line, variables, expected, absent", CASES, ids=[f"{c[0]} {c[1]}" for c in CASES])
def test_arguments_and_environment_become_options(sandbox, line, variables, expected, absent) -> None:
    done, words = run(sandbox, line, variables)
    assert done.returncode == 0, done.stderr
    following = iter(words)
    assert all(word in following for word in expected.split()), words
    assert not set(absent.split()) & set(words)


def test_without_settings_the_bundled_model_is_prepared_and_stdout_is_that_of_the_command(sandbox) -> None:
    done, _ = run(sandbox, "v1_5/eval/vqav2.sh", {})
    assert done.stdout == "words of llava.eval.run\n"
    assert done.stderr == "vqav2: the bundled benchmark is a validation set, which is scored locally\n"
    assert "llava.tiny.tower" in sandbox.calls("module")[0]
    sandbox.log.unlink()
    run(sandbox, "v1_5/eval/vqav2.sh", {"CKPT_DIR": "c", "DATA_DIR": "d"})
    assert not any("llava.tiny.tower" in call for call in sandbox.calls("module"))


def test_the_towers_of_the_video_model_are_prepared_where_it_is_asked(sandbox) -> None:
    given = {"CKPT_DIR": "", "CKPT": ""}
    run(sandbox, "video/eval/msvd.sh 114 0.5", given)
    assert "llava.tiny.video_tower" in sandbox.calls("module")[0]
    for line, variables in (
        ("video/eval/msvd.sh merge.jsonl", given),
        ("video/eval/msvd.sh 114 0.5", {"CKPT_DIR": "c"}),
        ("video/eval/msvd.sh 114 0.5", {**given, "OUT_DIR": "o"}),  # there are answers made elsewhere
    ):
        (sandbox.repo / "o" / "msvd" / "Video-LLaVA-7B").mkdir(parents=True, exist_ok=True)
        sandbox.log.unlink()
        run(sandbox, line, variables)
        assert not any("llava.tiny." in call for call in sandbox.calls("module"))


@pytest.mark.parametrize(
    "script", ["v1_5/eval/pope.sh", "v1_6/eval/gqa.sh", "ablation/ratio.sh", "figures/fig1.sh"]
)
def test_smol_is_fetched_and_keeps_exact_pixels(sandbox, script: str) -> None:
    for line, variables in ((f"{script} 64", {"CKPT": "smol"}), (f"{script} --model smol", {})):
        done, words = run(sandbox, line, variables)
        assert done.returncode == 0, done.stderr
        fetched = " ".join(sandbox.calls("module")[:2])
        assert "llava.tiny.tower" in fetched and "llava.tiny.base" in fetched
        assert "smol" in words and set(sandbox.calls("preset")) == {"preset "}
        sandbox.log.unlink()
    (sandbox.repo / "smol").mkdir()  # the user's own, in the caller's folder
    run(sandbox, f"{script} 64", {"CKPT": "smol"})
    assert not any("llava.tiny." in call for call in sandbox.calls("module"))


def test_an_unknown_split_is_refused(sandbox) -> None:
    done, words = run(sandbox, "v1_5/eval/vqav2.sh 64", {"DATA_DIR": "d", "SPLIT": "train"})
    assert (words, done.returncode) == ([], 2)
    assert done.stderr == "error: SPLIT=train: unknown split. Choose from val, test.\n"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_benchmark_has_a_script_of_its_usual_name(folder: str) -> None:
    scripts = {
        path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "scripts" / folder / "eval").glob("*")
    }
    assert sorted(scripts) == sorted(FOLDERS[folder])
    for name, text in scripts.items():
        benchmark = get_benchmark(benchmark_name(name))
        assert (benchmark.media == "video") == (folder == "video")
        assert f" {benchmark_name(name)} " in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "variables", "preset"),
    [
        ("v1_5/eval/pope.sh 64", {"CKPT": "my/llava"}, "published"),
        ("v1_6/eval/pope.sh", {"CKPT_DIR": "ckpts"}, "published"),
        ("v1_5/eval/pope.sh", {"CKPT": "my/llava", "VISPRUNER_PRESET": "exact"}, "exact"),
        ("v1_5/eval/pope.sh 64", {}, ""),
        ("v1_6/eval/pope.sh", {}, ""),
        ("v1_5/eval/pope.sh", {"CKPT": "playground/tiny/llava-tiny"}, ""),
        ("v1_6/eval/pope.sh", {"CKPT_DIR": "./playground/tiny/", "CKPT": "llava-tiny-anyres"}, ""),
        ("v1_5/eval/pope.sh", {"CKPT": "playground/../playground/tiny/llava-tiny"}, ""),
    ],
)
def test_your_own_checkpoints_are_measured_as_published(sandbox, line, variables, preset) -> None:
    for name in ("llava-tiny", "llava-tiny-anyres"):
        (sandbox.repo / "playground" / "tiny" / name).mkdir(parents=True)
    done, _ = run(sandbox, line, {"VISPRUNER_PRESET": "", **variables})
    assert done.returncode == 0, done.stderr
    assert sandbox.calls("preset")[-1].split()[1:] == preset.split()


def test_the_state_of_all_runs(sandbox) -> None:
    for line, variables, expected in (
        ("status.sh", {}, "outputs"),
        ("status.sh --json", {"OUT_DIR": "mine"}, "mine --json"),
        ("status.sh there --json", {"OUT_DIR": "mine"}, "there --json"),
    ):
        sandbox.log.unlink(missing_ok=True)
        done, words = run(sandbox, line, variables)
        assert done.returncode == 0 and words == f"module -m llava.eval.status {expected}".split()
