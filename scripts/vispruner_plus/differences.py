"""Scores of sweeps and paired differences between methods, as in docs/vispruner_plus.md.

    python scripts/vispruner_plus/differences.py DATA=SWEEP [DATA=SWEEP ...] --ours fl2 --output FILE.json

DATA is the folder of all benchmarks, SWEEP the output of a sweep over them. Acc. is the mean over benchmarks.
Images are resampled, the same draws for all settings and all benchmarks of one SWEEP; over several ones the
mean is taken. Every setting of `--ours` is compared with every other one of its budget. The JSON file has
every SWEEP by its name, and "mean", which is printed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llava.eval.benchmarks import get_benchmark
from llava.table import text_table

DRAWS = 2000
Scores = dict[str, dict[str, np.ndarray]]  # setting -> benchmark or "acc" -> score, then its draws


def image_key(name: str) -> str:
    """Return the number of an image, by which benchmarks name it in different ways."""
    digits = re.findall(r"\d+", Path(name).stem)
    return str(int(digits[-1])) if digits else name


def read(data: Path, sweep: Path, seed: int) -> Scores:
    """Return the scores of all settings of a sweep that every benchmark has."""
    tallies: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for folder in sorted(path for path in sweep.iterdir() if path.is_dir()):
        benchmark = get_benchmark(folder.name)
        located = benchmark.locate(data / benchmark.folder)
        for answers in sorted(folder.glob("*/answers.jsonl")):
            counts = benchmark.per_image_counts(located, benchmark.read_answers(answers))
            keys = map(image_key, counts.images)
            tallies.setdefault(answers.parent.name, {})[folder.name] = dict(
                zip(keys, counts.counts, strict=True)
            )
    images = sorted({image for one in tallies.values() for counts in one.values() for image in counts})
    weights = np.random.default_rng(seed).multinomial(
        len(images), [1 / len(images)] * len(images), size=DRAWS
    )
    weights = np.concatenate([np.ones((1, len(images))), weights])
    names = {name for one in tallies.values() for name in one}
    found: Scores = {}
    for setting, one in tallies.items():
        if one.keys() != names:
            continue
        found[setting] = {}
        for name, counts in one.items():
            table = np.stack([counts.get(image, 0 * next(iter(counts.values()))) for image in images])
            sums = np.tensordot(weights, table, 1)
            found[setting][name] = get_benchmark(name).score_counts(sums)
        found[setting]["acc"] = np.mean(list(found[setting].values()), axis=0)
    return found


def mean_of(several: list[Scores]) -> Scores:
    """Average scores over sweeps, of the settings and benchmarks that all of them have."""
    settings = set.intersection(*(set(one) for one in several))
    return {
        setting: {
            key: np.mean([one[setting][key] for one in several], axis=0)
            for key in set.intersection(*(set(one[setting]) for one in several))
        }
        for setting in sorted(settings)
    }


def split(setting: str) -> tuple[str, str]:
    """Split a setting into method and budget: vispruner-r0.5-32 -> vispruner-r0.5, 32."""
    found = re.fullmatch(r"(.+)-(\d+)", setting)
    return (found[1], found[2]) if found else (setting, "all")


def bare(method: str) -> str:
    """Remove an option's value from a method: score-exponent=0.8 -> score."""
    return re.sub(r"-[a-z_]+=[^-]*", "", method)


def interval(values: np.ndarray) -> list[float]:
    """Return the value and the ends of its 95% interval: [score, low, high]."""
    return [float(values[0]), *map(float, np.quantile(values[1:], [0.025, 0.975]))]


def report(scores: Scores, ours: list[str]) -> dict[str, object]:
    """Return scores of all settings, and differences of ours from the others of the same budget."""
    by_budget: dict[str, dict[str, Mapping[str, np.ndarray]]] = {}
    for setting, values in scores.items():
        method, budget = split(setting)
        by_budget.setdefault(budget, {})[bare(method)] = values
    document: dict[str, object] = {}
    for budget, methods in by_budget.items():
        table = {m: {key: interval(v) for key, v in values.items()} for m, values in methods.items()}
        differences = {
            f"{our} - {other}": {key: interval(methods[our][key] - values[key]) for key in values}
            for our in ours
            if our in methods
            for other, values in methods.items()
            if other != our
        }
        document[budget] = {"scores": table, "differences": differences}
    return document


def show(document: dict[str, object]) -> None:
    """Print a document of `report`."""
    for budget, part in document.items():
        for kind in ("scores", "differences"):
            rows = part[kind]
            if not rows:
                continue
            keys = sorted(next(iter(rows.values())), key=lambda key: (key != "acc", key))
            ordered = sorted(rows.items(), key=lambda item: -item[1]["acc"][0])
            cells = [
                [m, *(f"{v[k][0]:.2f} [{v[k][1]:.2f}, {v[k][2]:.2f}]" for k in keys)] for m, v in ordered
            ]
            print(f"\n{budget} tokens, {kind}\n{text_table(['', *keys], cells)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="+", metavar="DATA=SWEEP")
    parser.add_argument("--ours", default="fl2", help="comma-separated methods (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    several = [read(*map(Path, pair.split("=")), seed) for seed, pair in enumerate(args.pairs)]
    ours, names = args.ours.split(","), [Path(pair.split("=")[1]).name for pair in args.pairs]
    document = {name: report(one, ours) for name, one in zip(names, several, strict=True)}
    document["mean"] = report(mean_of(several), ours)
    show(document["mean"])
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(_rounded(document)) + "\n", encoding="utf-8")
    return 0


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [round(part, 3) for part in value]


if __name__ == "__main__":
    sys.exit(main())
