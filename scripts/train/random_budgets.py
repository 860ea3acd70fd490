"""Train the bundled model further, at all tokens and at random budgets, and compare both on the bundled POPE.

    bash scripts/train/random_budgets.sh [--output outputs/random_budgets] [--steps 60] [--num-images 320]

All runs start from playground/tiny/llava-tiny and fine-tune projector and language model on POPE's questions
about new training images, with the same arguments but for the budgets:

    all-tokens      576 tokens
    equal-steps     32, 64, 128 or 576 tokens per batch, selected by VisPruner; as many steps
    equal-cost      the same, with as many steps as take the time of `all-tokens`

The cost of a step at random budgets is measured within `equal-steps`: its steps at 576 tokens are those of
`all-tokens`, and they alternate with the others, so that other programs slow down both.
Encoded images are stored before, by a pass whose result is discarded. An interrupted command resumes with the
run that it was in. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
START = ROOT / "playground" / "tiny" / "llava-tiny"
QUESTIONS = 6  # per image, half of them about present objects
SEED = 500_000  # of the first image: the bundled model was not trained on these
BUDGETS = "32,64,128,576"
BATCH, RATE = 8, 5e-4


def write_questions(folder: Path, count: int) -> Path:
    """Draw images, and write POPE's questions about each of them as one conversation."""
    from llava.tiny import training_data, world
    from llava.tiny.world.questions import SHORT, absent_like, existence

    entries = []
    for scene in training_data.draw_scenes(folder, count, SEED):
        rs = np.random.RandomState([314, scene.seed])
        there = [str(name) for name in rs.permutation(scene.names())[: QUESTIONS // 2]]
        others = [str(name) for name in rs.permutation(world.SPRITES) if name not in scene.names()]
        missing = list(dict.fromkeys([absent_like(scene, rs), *others]))[: len(there)]
        asked = [(name, "Yes") for name in there] + [(name, "No") for name in missing]
        turns = []
        for place in rs.permutation(len(asked)):
            name, answer = asked[place]
            image = "" if turns else "<image>\n"
            turns.append({"from": "human", "value": image + existence(name) + SHORT})
            turns.append({"from": "gpt", "value": answer})
        image = f"{training_data.IMAGES}/{training_data.image_name(scene.seed)}"
        entries.append({"id": f"exist_{scene.seed}", "image": image, "conversations": turns})
    path = folder / "existence.json"
    path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return path


def arguments(work: Path, output: Path, budgets: str, steps: int, rate: float = RATE) -> list[str]:
    """Return the command line of `llava/train/train.py`, the same for all runs but for budgets and steps."""
    from llava.tiny.tower import tower_folder

    given = {
        "model_name_or_path": START,
        "version": "v1",
        "data_path": work / "data" / "existence.json",
        "image_folder": work / "data",
        "vision_tower": tower_folder(),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "method": "vispruner",
        "visual_token_num": budgets,
        "vision_cache": work / "features",
        "output_dir": output,
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "model_max_length": 2048,
        "learning_rate": rate,
        "weight_decay": 0.0,
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "report_to": "none",
        "use_cpu": True,
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def run_once(work: Path, name: str, budgets: str, steps: int, rate: float = RATE) -> dict[str, float]:
    """Train in a process of its own, unless it was done; return its steps and mean loss."""
    output = work / name
    summary = work / f"{name}.json"
    if not summary.is_file():
        argv = arguments(work, output, budgets, steps, rate)
        subprocess.run([sys.executable, __file__, "--train", str(summary), *argv], check=True)
    return json.loads(summary.read_text(encoding="utf-8"))


def train(summary: Path, argv: list[str]) -> None:
    """Train in this process."""
    import torch

    from llava.train.train import train as run

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        found = run(argv)
    summary.write_text(json.dumps({"steps": found["steps"], "loss": round(found["train_loss"], 4)}))


def step_seconds(run: Path) -> dict[str, float]:
    """Return the median seconds of a step by visual tokens, of a run at random budgets."""
    history = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    found: dict[str, list[float]] = {}
    for entry in history[1:]:  # the first step prepares the optimizer
        if "loss" in entry:
            found.setdefault(f"{entry['visual_tokens_per_image']:g}", []).append(entry["seconds_per_step"])
    return {tokens: round(statistics.median(found[tokens]), 3) for tokens in BUDGETS.split(",")}


def evaluate(work: Path, models: dict[str, Path]) -> dict[str, dict[str, dict]]:
    """Score every model on the bundled POPE; return its scores by budget."""
    scores = {}
    for name, model in models.items():
        output = work / "pope" / name
        command = ["--benchmarks", "pope", "--methods", "none,vispruner", "--tokens", "128,64,32"]
        command += ["--ratios", "0.5", "--model", str(model), "--output", str(output), "--device", "cpu"]
        subprocess.run(
            [sys.executable, "-m", "llava.eval.sweep", *command, "--num-processes", "1"],
            check=True,
            stdout=sys.stderr,
        )
        scores[name] = {tokens: summary(folder) for tokens, folder in answer_folders(output).items()}
    return scores


def summary(folder: Path) -> dict[str, float]:
    """Return F1 with its interval, and the mean accuracy of the three parts, in %."""
    card = json.loads((folder / "score.json").read_text(encoding="utf-8"))
    parts = [100 * card["details"][part]["accuracy"] for part in ("adversarial", "popular", "random")]
    found = {"f1": card["score"], "ci_low": card["ci_low"], "ci_high": card["ci_high"]}
    return {name: round(value, 2) for name, value in {**found, "accuracy": statistics.mean(parts)}.items()}


def answer_folders(output: Path) -> dict[str, Path]:
    """Return the folders of a sweep by budget."""
    names = {"576": "none", "128": "vispruner-r0.5-128", "64": "vispruner-r0.5-64", "32": "vispruner-r0.5-32"}
    return {tokens: next(output.rglob(f"{name}/score.json")).parent for tokens, name in names.items()}


def differences(work: Path, a: str, b: str) -> dict[str, dict]:
    """Return the paired differences b - a by budget."""
    found = {}
    one, other = answer_folders(work / "pope" / a), answer_folders(work / "pope" / b)
    for tokens in one:
        command = [sys.executable, "-m", "llava.eval.compare", str(other[tokens]), str(one[tokens])]
        said = subprocess.run(
            [*command, "--benchmark", "pope", "--show", "0"], check=True, capture_output=True, text=True
        )
        document = json.loads(said.stdout.splitlines()[-1])
        found[tokens] = {name: document[name] for name in ("difference", "ci_low", "ci_high", "p")}
    return found


def main(argv: list[str]) -> int:
    if argv[:1] == ["--train"]:
        train(Path(argv[1]), argv[2:])
        return 0
    from llava.argtypes import at_least

    parser = argparse.ArgumentParser(
        prog="bash scripts/train/random_budgets.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("outputs", "random_budgets"))
    parser.add_argument("--steps", type=at_least(20), default=60, help="of all-tokens (default: %(default)s)")
    parser.add_argument(
        "--num-images", type=at_least(BATCH), default=320, help="training images (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    work = args.output.resolve()
    work.mkdir(parents=True, exist_ok=True)
    write_questions(work / "data", args.num_images)
    run_once(work, "fill-cache", "32", -(-args.num_images // BATCH), rate=1e-9)
    runs = {"all-tokens": run_once(work, "all-tokens", "none", args.steps)}
    runs["equal-steps"] = run_once(work, "equal-steps", BUDGETS, args.steps)
    seconds = step_seconds(work / "equal-steps")
    cheaper = seconds["576"] / statistics.mean(seconds.values())
    runs["equal-cost"] = run_once(work, "equal-cost", BUDGETS, round(args.steps * cheaper))
    scores = evaluate(work, {**{name: work / name for name in runs}, "start": START})
    document = {
        "runs": runs,
        "seconds_per_step": seconds,
        "scores": scores,
        "differences": {
            name: differences(work, "all-tokens", name) for name in ("equal-steps", "equal-cost")
        },
    }
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
