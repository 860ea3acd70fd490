"""One budget over a whole clip against a budget per frame, at equal totals: exact match with intervals.

    python -m llava.analysis.clip_budgets --output outputs/clip_budgets
    python -m llava.analysis.clip_budgets --model CHECKPOINT --data playground/data/eval --benchmarks msvd

"frame" splits the budget over the eight frames; "clip" chooses among the patches of all frames at once, so
that what stays the same is removed as a duplicate and paid once. The sweeps in OUTPUT/total and OUTPUT/clip
are resumable; further options are theirs (`llava.eval.sweep`). The score is the offline exact match over all
questions, without a judge, and not comparable with papers. Intervals: bootstrap over clips; differences are
paired. Writes clip_budgets.json; the last line of standard output is this document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava import argtypes
from llava.eval import cli, sweep
from llava.eval.benchmarks import PerImageCounts, get_benchmark
from llava.eval.benchmarks.base import grouped, ratio
from llava.eval.benchmarks.video import exact_match
from llava.eval.jobs.job import setting_name
from llava.eval.metrics.statistics import bootstrap_interval, paired_bootstrap
from llava.eval.store.atomic import write_atomically
from llava.eval.store.shards import ANSWERS
from llava.eval.video import VIDEO
from llava.paths import BUNDLED_CLIPS
from llava.table import text_table

SHOWN = {"total": "frame", "clip": "clip"}  # value of --clip-budget -> name in the table
_FREQUENT = 10  # questions that a beginning has at least, to be shown


def build_parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m llava.analysis.clip_budgets", description=__doc__, formatter_class=form, allow_abbrev=False
    )
    add = parser.add_argument
    names = f"comma-separated (default: all); choose from {', '.join(VIDEO)}"
    add("--benchmarks", type=argtypes.comma_separated(str), default=list(VIDEO), help=names)
    methods = ["random", "fastervlm", "vispruner"]
    known = f"comma-separated pruning methods (default: {','.join(methods)})"
    add("--methods", type=argtypes.comma_separated(str), default=methods, help=known)
    budgets = "comma-separated budgets of a clip (default: 455,227,114)"
    add("--tokens", type=argtypes.comma_separated(argtypes.tokens), default=[455, 227, 114], help=budgets)
    ratios = "comma-separated shares selected by [CLS] attention (default: 0.5,0)"
    add("--ratios", type=argtypes.comma_separated(argtypes.ratio), default=[0.5, 0.0], help=ratios)
    cli.add_data_argument(parser)
    add("--output", type=Path, default=Path("outputs", "clip_budgets"), help="(default: %(default)s)")
    cli.add_bootstrap_argument(parser)
    return parser


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args, others = parser.parse_known_args(argv)
    if unknown := [name for name in args.benchmarks if name not in VIDEO]:
        parser.error(f"--benchmarks {','.join(unknown)}: not a video set. Choose from {', '.join(VIDEO)}.")
    try:
        pruners = sweep.grid(["none", *args.methods], args.tokens, args.ratios, 0)
    except ValueError as error:
        parser.error(str(error))
    command = ["--benchmarks", ",".join(args.benchmarks), "--tokens", ",".join(map(str, args.tokens))]
    command += ["--ratios", ",".join(map(str, args.ratios))]
    command += [f"--data={args.data}"] if args.data is not None else []
    settings = {}
    for kind in SHOWN:
        methods = args.methods if kind == "clip" else ["none", *args.methods]
        given = ["--methods", ",".join(methods), "--clip-budget", kind, f"--output={args.output / kind}"]
        if code := sweep.main([*command, *given, *others]):
            return code
        settings |= {(kind, one): None for one in pruners if kind == "total" or one.tokens is not None}
    folders = {
        name: (args.data or BUNDLED_CLIPS / get_benchmark(name).folder).expanduser()
        for name in args.benchmarks
    }
    found = {one: Pooled(args.output / one[0], one[1], folders) for one in settings}
    document = report(found, args.bootstrap_iters)
    write_atomically(args.output / "clip_budgets.json", json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    return 0


class Pooled:
    """The answers of one setting to several sets.

    Attributes:
        counts: (clips, 2) exact matches and questions of every clip, over all sets.
        matches: (beginning of the question, correct answer, exact match) of every answer.
    """

    def __init__(self, output: Path, pruner: Any, folders: dict[str, Path]) -> None:
        table: dict[str, np.ndarray] = {}
        self.matches: list[tuple[str, str, bool]] = []
        for name, given in folders.items():
            benchmark = get_benchmark(name)
            data, answers = benchmark.locate(given), output / name / setting_name(pruner) / ANSWERS
            rows = benchmark.read_answers(answers)
            counts = benchmark.offline_counts(data, rows)
            for image, one in zip(counts.images, counts.counts, strict=True):
                table[image] = table.get(image, 0.0) + one
            for _, entry, row in benchmark.matched(data, rows):
                right = str(entry["answer"])
                start = " ".join(entry["question"].split()[:2]).rstrip("?")
                self.matches.append((start, right, exact_match(row["text"], right)))
        self.counts = PerImageCounts(tuple(table), np.stack(list(table.values())))


def report(found: dict[tuple[str, Any], Pooled], iterations: int) -> dict[str, Any]:
    """Print the tables, and return their numbers."""

    def score_of(counts: np.ndarray) -> np.ndarray:
        return 100 * ratio(counts[..., 0], counts[..., 1])

    rows, paired = [], []
    for (kind, pruner), one in found.items():
        low, high = bootstrap_interval(one.counts, score_of, iterations)
        row = {
            "budget": SHOWN[kind] if pruner.tokens is not None else "",
            "method": pruner.name,
            "ratio": pruner.important_ratio if pruner.uses_ratio else None,
            "tokens": pruner.tokens,
            "exact_match": float(score_of(one.counts.counts.sum(0))),
            "ci_low": low,
            "ci_high": high,
        }
        rows.append(row)
        if kind == "clip":
            other = found["total", pruner]
            difference = paired_bootstrap(one.counts, other.counts, score_of, iterations)
            named = {key: row[key] for key in ("method", "ratio", "tokens")}
            paired.append({**named, **difference.document()})
    first = next(iter(found.values()))
    beginnings = _beginnings(found)
    questions, clips = int(first.counts.counts[:, 1].sum()), len(first.counts.images)
    print(f"\n{questions} questions about {clips} clips; exact match in %, 95% CI over clips\n")
    header = ["budget of", "method", "ratio", "tokens", "exact match", "95% CI"]
    print(text_table(header, [[*_named(one), f"{one['exact_match']:.1f}", _interval(one)] for one in rows]))
    print("\nA budget over the clip minus one per frame\n")
    header = ["method", "ratio", "tokens", "difference", "95% CI"]
    shown = [[*_named(one)[1:], f"{one['difference']:+.1f}", _interval(one, "+")] for one in paired]
    print(text_table(header, shown))
    print("\nBy the beginning of the question; constant: the most frequent correct answer\n")
    least = min((pruner.tokens for _, pruner in found if pruner.tokens is not None), default=None)
    names = [_name(*one) for one in found if one[1].tokens in (None, least)]
    table = [
        [one["beginning"], str(one["questions"]), f"{one['constant']:.1f}"]
        + [f"{one['exact_match'][name]:.1f}" for name in names]
        for one in beginnings
    ]
    print(text_table(["question", "n", "constant", *names], table), flush=True)
    return {
        "questions": questions,
        "clips": clips,
        "settings": rows,
        "paired": paired,
        "beginnings": beginnings,
    }


def _beginnings(found: dict[tuple[str, Any], Pooled]) -> list[dict[str, Any]]:
    """Return exact matches by the first two words of the question, of the frequent ones."""
    scores: dict[str, dict[str, float]] = {}
    answers: dict[str, list[Any]] = {}
    for (kind, pruner), one in found.items():
        name = _name(kind, pruner)
        for start, hits in grouped((start, hit) for start, _, hit in one.matches).items():
            scores.setdefault(start, {})[name] = 100 * sum(hits) / len(hits)
        answers = grouped((start, right) for start, right, _ in one.matches)
    return [
        {
            "beginning": start,
            "questions": len(right),
            "constant": 100 * Counter(right).most_common(1)[0][1] / len(right),
            "exact_match": scores[start],
        }
        for start, right in sorted(answers.items(), key=lambda item: -len(item[1]))
        if len(right) >= _FREQUENT
    ]


def _name(kind: str, pruner: Any) -> str:
    return "none" if pruner.tokens is None else f"{SHOWN[kind]}: {setting_name(pruner)}"


def _named(row: dict[str, Any]) -> list[str]:
    share = "" if row["ratio"] is None else f"{row['ratio']:g}"
    budget = "all" if row["tokens"] is None else str(row["tokens"])
    return [row.get("budget", ""), row["method"], share, budget]


def _interval(row: dict[str, Any], sign: str = "") -> str:
    return f"[{row['ci_low']:{sign}.1f}, {row['ci_high']:{sign}.1f}]"


if __name__ == "__main__":
    sys.exit(main())
