"""Training runs of the tiny reference checkpoint in processes of their own, and their losses."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data" / "model"
BASE = DATA / "ckpt_llava15s"  # 64 wide, 3 layers, with a projector
TOWER = DATA / "ckpt_clip336p42"  # 336 pixels in patches of 42: 64 visual tokens
SIZES = [(336, 336), (200, 120), (90, 300), (640, 480)]
WORDS = "a red cat sits near the big green table under two small birds and one dog".split()


def write_data(folder: Path, kinds: str, tokens: str = "v1") -> list[str]:
    """Write data.json and images; return the arguments that name them.

    Args:
        kinds: one letter per sample: i with an image, t text only.
        tokens: "plain" for captions of stage 1, else conversations.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    stream = random.Random(5)
    samples = []
    for index, kind in enumerate(kinds):
        words = [" ".join(stream.choices(WORDS, k=stream.randrange(3, 9))) for _ in range(4)]
        turns = [("human", words[0]), ("gpt", words[1]), ("human", words[2]), ("gpt", words[3])]
        sample = {"id": f"s{index}"}
        if kind == "i":
            image = Image.effect_mandelbrot(SIZES[index % 4], (-2, -1.5, 1, 1.5), 5 + index).convert("RGB")
            image.save(folder / "images" / f"{index}.png")
            sample["image"] = f"{index}.png"
            turns[0] = ("human", f"<image>\n{words[0]}")
        if tokens == "plain":
            turns = turns[:2]
        sample["conversations"] = [{"from": who, "value": value} for who, value in turns]
        samples.append(sample)
    (folder / "data.json").write_text(json.dumps(samples), encoding="utf-8")
    return ["--data_path", str(folder / "data.json"), "--image_folder", str(folder / "images")]


# Float32, without dropout; rates high enough that a wrong step is seen in the next loss.
STEADY = (
    "--version v1 --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_patch_token False "
    "--image_aspect_ratio pad --model_max_length 512 --learning_rate 1e-3 --warmup_ratio 0.1 "
    "--lr_scheduler_type cosine --weight_decay 0.1 --num_train_epochs 1 --logging_steps 1 --save_strategy no "
    "--dataloader_num_workers 0 --report_to none --lora_dropout 0 --lora_r 4 --group_by_modality_length True "
    "--disable_tqdm True"
).split()
LORA = ["--lora_enable", "True"]
STAGE_1 = ["--version", "plain", "--tune_mm_mlp_adapter", "True", "--group_by_modality_length", "False"]


def command(
    processes: int, arguments: Sequence[str], zero: str | None = None, launcher: str = "torchrun"
) -> list[str]:
    """Return the command of a run; the global batch has four samples."""
    script = str(ROOT / "llava" / "train" / "train.py")
    start = [sys.executable, script]
    if launcher == "torchrun" and (processes > 1 or zero):
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start += ["--nproc_per_node", str(processes), script]
    batch = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", str(2 // processes)]
    base = ["--model_name_or_path", str(BASE), "--vision_tower", str(TOWER), *STEADY, *batch]
    if zero:
        base += ["--deepspeed", zero if zero.endswith(".json") else str(ROOT / "scripts" / f"{zero}.json")]
    return [*start, *base, *arguments]


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a run: one thread, offline, this checkout."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VISPRUNER", "WORLD_", "RANK"))}
    one = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    return {**kept, **one, "TOKENIZERS_PARALLELISM": "false", **variables}


def run(words: Sequence[str], seconds: float = 600, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; a run that hangs fails the test."""
    return subprocess.run(
        words,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
    )


def losses(folder: Path) -> list[float]:
    """Return the loss of every step of a finished run."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def train(folder: Path, processes: int, arguments: Sequence[str], zero: str | None = None) -> list[float]:
    """Train in processes of their own; return the losses."""
    done = run([*command(processes, arguments, zero), "--output_dir", str(folder)])
    assert done.returncode == 0, done.stderr[-3000:]
    return losses(folder)
