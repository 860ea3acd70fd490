"""Train the projector and language model of the bundled Video-LLaVA on clips of the synthetic dataset.

    python -m llava.tiny.train_video --output DIR

An interrupted run resumes with the same command. `training.clip_trainer` describes the losses.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from llava.argtypes import at_least
from llava.paths import cache_folder

from .training.clip_features import prepare_clips
from .training.clip_trainer import ClipRecipe, ClipTrainer
from .training.export import export_video


def main(argv: list[str] | None = None) -> int:
    description = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m llava.tiny.train_video", description=description)
    workers = "processes that encode clips (default: %(default)s)"
    parser.add_argument("--num-workers", type=at_least(1), default=2, help=workers)
    parser.add_argument("--work", type=Path, help="folder of the run's state (default: a cache folder)")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder")
    args = parser.parse_args(argv)
    if not hasattr(torch.optim, "Muon"):
        parser.error(f"torch {torch.__version__}: torch.optim.Muon is missing. Install torch >= 2.9.")
    recipe = ClipRecipe()
    store = prepare_clips(recipe.clips, args.num_workers)
    torch.set_num_threads(1)
    trainer = ClipTrainer(recipe, store, args.work or cache_folder() / "tiny" / "run-video")
    trainer.resume()
    trainer.run()
    export_video(trainer.student, trainer.folder, args.output, asdict(recipe))
    print(json.dumps({"checkpoint": str(args.output), "step": trainer.step, **trainer.log[-1]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
