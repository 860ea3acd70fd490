"""The plugin in the real lmms-eval, through its command line; skipped where it is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.golden_model import CHECKPOINT, DATA, golden_image

ROOT = Path(__file__).resolve().parents[2]
PATH = str(DATA / CHECKPOINT["15s"])


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("VISPRUNER_SLOW") != "1", reason="installs packages: set VISPRUNER_SLOW=1")
def test_the_installation_has_neither_cuda_nor_a_broken_torchvision(tmp_path):
    """In a fresh environment, whose plugin lmms-eval then finds."""
    script = ROOT / "scripts" / "lmms_eval" / "install.sh"
    left_out = ("VISPRUNER_SYSTEM_PYTHON", "PYTHON", "PYTHONPATH")
    settings = {name: value for name, value in os.environ.items() if name not in left_out}
    done = subprocess.run(
        ["bash", str(script)],
        env=settings | {"VENV": str(tmp_path / "venv")},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr
    python = done.stdout.strip().splitlines()[-1]
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True)
    packages = {one["name"].lower(): one["version"] for one in json.loads(listed.stdout)}
    assert not [name for name in packages if name.startswith(("nvidia", "cuda", "triton"))]
    assert packages["torchvision"].endswith("+none") and "lmms_eval" in {
        n.replace("-", "_") for n in packages
    }
    assert subprocess.run([python, "-m", "pip", "check"], capture_output=True).returncode == 0
    code = "import transformers; from transformers.utils import is_torchvision_available as f; assert not f()"
    assert subprocess.run([python, "-c", code], capture_output=True).returncode == 0
    models = subprocess.run([python, "-m", "lmms_eval", "models"], capture_output=True, text=True).stdout
    assert "vispruner" in models and "vispruner_hf" in models


@pytest.fixture
def tasks(tmp_path):
    """lmms-eval's own POPE task, and a multiple-choice one, on three documents."""
    lmms_eval_tasks = pytest.importorskip("lmms_eval.tasks")
    datasets = pytest.importorskip("datasets")
    documents = []
    for i, name in enumerate(("land640x480", "tall123x457", "land640x480")):
        golden_image(name).save(tmp_path / f"{i}.png")
        row = {
            "question_id": str(i),
            "question": "Is there a dog?",
            "answer": "yes",
            "choices": ["yes", "no"],
        }
        documents.append(row | {"image": str(tmp_path / f"{i}.png")})
    data = datasets.Dataset.from_list(documents).cast_column("image", datasets.Image())
    data.to_parquet(tmp_path / "data.parquet")
    folder = Path(lmms_eval_tasks.__file__).parent
    local = f"dataset_kwargs:\n  data_files:\n    test: {tmp_path}/data.parquet\n"
    local = f"dataset_path: parquet\ntest_split: test\n{local}"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "three_pope.yaml").write_text(
        f"include: {folder}/pope/pope.yaml\ntask: three_pope\n{local}"
        "generation_kwargs:\n  max_new_tokens: 3\n"
    )
    (tmp_path / "tasks" / "three_choices.yaml").write_text(
        f"task: three_choices\n{local}output_type: multiple_choice\n"
        "doc_to_visual: !function visual.images\ndoc_to_text: question\n"
        "doc_to_target: answer\ndoc_to_choice: choices\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (tmp_path / "tasks" / "visual.py").write_text("def images(doc):\n    return [doc['image']]\n")
    return tmp_path


def evaluate(folder: Path, arguments: str, *launch: str) -> tuple[dict, str]:
    """Run lmms-eval in a process of its own; return its result file and its output."""
    command = [
        sys.executable,
        *(launch or ("-m", "lmms_eval")),
        "eval",
        "--include_path",
        str(folder / "tasks"),
    ]
    command += ["--output_path", str(folder / "out"), "--log_samples", *arguments.split()]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    settings = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, cwd=folder)
    found = sorted((folder / "out").rglob("*_results.json"))
    return (json.loads(found[-1].read_text()) if found else {}), done.stdout + done.stderr


@pytest.mark.slow
def test_lmms_eval_runs_the_plugin(tasks):
    arguments = "--model vispruner --tasks three_pope,three_choices --device cpu "
    arguments += f"--model_args pretrained={PATH},tokens=8"
    document, output = evaluate(tasks, arguments)
    assert document, output
    settings = document["config"]["resolved_cli_args"]["vispruner"]
    named = {"method": "vispruner", "tokens": 8, "important_ratio": 0.5, "failed": 0, "dtype": "float32"}
    assert named.items() <= settings.items()
    assert document["throughput"]["avg_visual_tokens"] == 8
    assert {"pope_f1_score,none"} <= document["results"]["three_pope"].keys()
    assert document["results"]["three_choices"]["acc,none"] in (
        0.0,
        pytest.approx(1 / 3),
        pytest.approx(2 / 3),
        1.0,
    )

    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "lmms_eval"]
    twice, output = evaluate(tasks, arguments, *launch)
    assert twice["date"] != document["date"], output
    assert twice["results"] == document["results"]

    refused, output = evaluate(tasks, arguments.replace("tokens=8", "token=8"))
    assert refused["date"] == twice["date"] and "'token' is not an argument of model vispruner" in output
