"""Train the projector and language model of the bundled model on the synthetic dataset.

    bash scripts/tiny/train.sh            # features, training, checkpoint and curves
    python -m llava.tiny.train --scale 0.05 --num-images 300 --output DIR     # a trial run

An interrupted run resumes with the same command. `training.trainer` describes the losses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from llava.argtypes import at_least
from llava.paths import cache_folder

from .cache_key import RUN_SOURCES, source_key
from .tower import TOWER_NAME
from .training.export import curves, export, export_anyres
from .training.features import prepare
from .training.student import Recipe
from .training.tokenizer import train as train_tokenizer
from .training.trainer import Trainer


def run_folder(recipe: Recipe) -> Path:
    """Return the cache folder of a run, keyed by its recipe and by the source code of the training."""
    digest = hashlib.sha256(json.dumps(asdict(recipe)).encode()).hexdigest()[:12]
    return cache_folder() / "tiny" / f"run-{digest}-{source_key(*RUN_SOURCES)}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llava.tiny.train", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--num-images",
        "--pictures",
        type=int,
        default=Recipe.pictures,
        help="training and validation images (default: %(default)s)",
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on the steps of every phase (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=Recipe.seed, help="seed of the run (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument(
        "--threads",
        type=at_least(1),
        default=1,
        help="torch threads of the training; more rarely help a model this small (default: %(default)s)",
    )
    parser.add_argument(
        "--num-workers",
        "--workers",
        type=at_least(1),
        default=2,
        help="processes that encode images (default: %(default)s)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="folder of the run's state (default: a cache folder per recipe and source code)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("playground/tiny/llava-tiny"),
        help="checkpoint folder (default: %(default)s)",
    )
    parser.add_argument("--docs", type=Path, help="folder for the log and the curves (default: none)")
    args = parser.parse_args(argv)
    first, last = Recipe.validation
    held, least = last - first, max(phase.pictures for phase in Recipe.phases)
    if args.num_images < held + least:
        parser.error(
            f"--num-images: expected at least {held + least}, got {args.num_images}. "
            f"{held} images are kept for validation."
        )
    if not hasattr(torch.optim, "Muon"):
        parser.error(f"torch {torch.__version__}: torch.optim.Muon is missing. Install torch >= 2.9.")
    if args.scale <= 0:
        parser.error(f"--scale: expected a number above 0, got {args.scale}.")
    remaining = args.num_images - held
    phases = tuple(
        replace(phase, steps=max(1, round(phase.steps * args.scale)), pool=min(phase.pool, remaining))
        for phase in Recipe.phases
    )
    recipe = Recipe(
        pictures=args.num_images,
        validation=(min(first, remaining), min(last, args.num_images)),
        phases=phases,
        seed=args.seed,
    )
    work = args.work or run_folder(recipe)
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer.model").exists():
        train_tokenizer(work)
    store = prepare(recipe.pictures, workers=args.num_workers)
    torch.set_num_threads(args.threads)
    trainer = Trainer(recipe, store, work, args.device)
    trainer.resume()
    try:
        trainer.run()
    except KeyboardInterrupt:
        trainer.save()
        print("stopped; run the same command to resume")
        return 130
    found = trainer.finish()
    export(trainer.student, work, args.output, asdict(recipe), TOWER_NAME)
    export_anyres(args.output, args.output.with_name(args.output.name + "-anyres"))
    if args.docs:
        curves(trainer.log, asdict(recipe), args.docs)
    print(json.dumps({"checkpoint": str(args.output), "step": trainer.step, **found}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
