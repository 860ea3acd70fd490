"""Training in one process, in two, and with DeepSpeed gives one curve; a killed run resumes it.

Every run is a process of its own, as users start it: seconds each, minutes where DeepSpeed compiles first.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from helpers.train_runs import LORA, STAGE_1, command, environment, losses, run, train, write_data

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("VISPRUNER_SLOW") != "1", reason="trains in processes: set VISPRUNER_SLOW=1"
    ),
]
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
MODES = {
    "one": (1, None),
    "ddp": (2, None),
    "zero2": (2, "zero2"),
    "zero3": (2, "zero3"),
}
PINPOINTS = "[[336,672],[672,336],[672,672]]"
# Samples with an image (i) and without (t). A step takes four, two per process.
MIXED = "itiititiiitiitii"
ANYRES = [
    "--image_aspect_ratio", "anyres", "--mm_patch_merge_type", "spatial_unpad",
    "--image_grid_pinpoints", PINPOINTS,
    "--model_max_length", "2048",
]  # fmt: skip
RANDOM_ORDER = ["--group_by_modality_length", "False"]
CHECKPOINTING = ["--gradient_checkpointing", "True"]
# Name -> samples, arguments
CASES: dict[str, tuple[str, list[str]]] = {
    "all_weights": (MIXED, []),
    "gradient_checkpointing": (MIXED, CHECKPOINTING),
    "lora": (MIXED, LORA),
    "projector_only": ("i" * 16, STAGE_1),
    "pruned": (MIXED, ["--visual_token_num", "16"]),
    "anyres": (MIXED, ANYRES),
    # In file order, a process has two images, and the other has none.
    "a_process_without_images": ("iittiitt", ["--train_sampling_strategy", "sequential", *RANDOM_ORDER]),
    "a_process_without_images_checkpointed": (
        "iittiitt",
        ["--train_sampling_strategy", "sequential", *RANDOM_ORDER, *CHECKPOINTING],
    ),
    "projector_only_and_a_process_without_images": (
        "iittiitt",
        ["--train_sampling_strategy", "sequential", *RANDOM_ORDER, "--tune_mm_mlp_adapter", "True"],
    ),
    "only_text_in_a_step": ("ttttiitt", ["--train_sampling_strategy", "sequential", *RANDOM_ORDER]),
}


@functools.cache
def folder() -> Path:
    """One folder for all runs of this file, so that the curve of one process is computed once per case."""
    return Path(tempfile.mkdtemp(prefix="vispruner-train-"))


@functools.cache
def curve(case: str, mode: str, *more: str) -> tuple[float, ...]:
    """Train a case and return its losses."""
    processes, zero = MODES[mode]
    kinds, arguments = CASES[case]
    place = folder() / f"{case}-{mode}-{len(more)}"
    files = write_data(place / "data", kinds, "plain" if "plain" in arguments else "v1")
    return tuple(train(place / "out", processes, [*files, *arguments, *more], zero))


@needs_deepspeed
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "one"])
@pytest.mark.parametrize("case", CASES)
def test_processes_give_one_loss_curve(case: str, mode: str) -> None:
    expected = curve(case, "one")
    assert len(expected) >= 2 and expected[-1] != expected[0]
    assert curve(case, mode) == pytest.approx(expected, abs=1e-6, rel=0)


def test_checkpointing_changes_nothing() -> None:
    assert curve("gradient_checkpointing", "one") == curve("all_weights", "one")


@needs_deepspeed
def test_random_budgets_are_the_same_on_all_processes() -> None:
    """Otherwise processes would wait for different numbers of calls, and the curves would differ."""
    arguments = ["--visual_token_num", "4,8,12,16,24,64"]
    expected = curve("all_weights", "ddp", *arguments)
    assert expected != curve("all_weights", "ddp")
    assert curve("all_weights", "zero3", *arguments) == pytest.approx(expected, abs=1e-6, rel=0)


@pytest.mark.parametrize(
    "case, mode",
    [
        ("all_weights", "one"),
        ("lora", "one"),
        ("projector_only", "one"),
        pytest.param("all_weights", "zero2", marks=needs_deepspeed),
        pytest.param("all_weights", "zero3", marks=needs_deepspeed),
        pytest.param("lora", "zero3", marks=needs_deepspeed),
    ],
)
def test_a_killed_run_resumes_its_curve(case: str, mode: str, tmp_path: Path) -> None:
    processes, zero = MODES[mode]
    kinds, arguments = CASES[case]
    files = write_data(tmp_path / "data", kinds, "plain" if "plain" in arguments else "v1")
    saving = ["--save_strategy", "steps", "--save_steps", "1", "--output_dir", str(tmp_path / "out")]
    words = command(processes, [*files, *arguments, *saving], zero)
    kill_at_step(words, tmp_path / "out", random.randrange(1, 4))
    done = run(words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "out") == pytest.approx(curve(case, mode), abs=1e-6, rel=0)


def kill_at_step(words: Sequence[str], output: Path, step: int) -> None:
    """Start a run, and kill all of its processes when it begins to write the checkpoint of a step."""
    with open(output.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(words, env=environment(), stdout=log, stderr=log)
    deadline = time.monotonic() + 600
    while not (output / f"checkpoint-{step}").is_dir():
        assert process.poll() is None, output.with_suffix(".log").read_text()[-3000:]
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.01)
    tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed", "module"])
def test_launchers_train(launcher: str, tmp_path: Path) -> None:
    if launcher == "deepspeed" and not find_spec("deepspeed"):
        pytest.skip("needs deepspeed")
    files = write_data(tmp_path / "data", "itii")
    one = command(1, [*files, "--output_dir", str(tmp_path / "out"), "--max_steps", "1"])
    script, options = one[1], one[2:]
    port = str(random.randrange(20000, 40000))
    start = {
        "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", script],
        "deepspeed": [
            *("-m", "deepspeed.launcher.runner", "--num_accelerators", "2"),
            *("--master_port", port, script),
        ],
        "module": ["-m", "llava.train.train_mem"],
    }[launcher]
    done = run([sys.executable, *start, *options])
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(tmp_path / "out")) == 1
