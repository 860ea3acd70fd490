"""Check which benchmark data is present, what is missing, and where to get it.

    python -m llava.eval.data check all
    python -m llava.eval.data check pope gqa --data playground/data/eval

Reads every question file it finds, compares it with the ground truth and looks for its images. Downloads
nothing. --data is the folder above the benchmarks' own ones, as DATA_DIR of the scripts and LLaVA's
playground/data/eval. The last line of standard output is one JSON document. Exit code 1 if a benchmark that
was started or named is incomplete.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.eval import benchmarks, cli
from llava.eval.benchmarks import Benchmark, DataError, DataIssue, list_benchmarks
from llava.paths import BUNDLED_DATA, require_bundled

USUAL = Path("playground", "data", "eval")


def build_parser() -> argparse.ArgumentParser:
    names = ["all", *list_benchmarks()]
    parser = cli.new_parser("data", __doc__)
    add = parser.add_argument
    add("command", choices=["check"])
    note = f"benchmarks: {', '.join(names)}"
    add("benchmarks", nargs="+", type=benchmarks.benchmark_name, choices=names, metavar="NAME", help=note)
    note = "folder of all benchmarks (default: DATA_DIR, playground/data/eval, the bundled one)"
    add("--data", type=cli.user_path, help=note)
    cli.add_outside_argument(parser)
    return parser


def check(benchmark: Benchmark, root: Path) -> dict[str, Any]:
    """Return status (absent, incomplete, complete), counts, missing files and warnings of a benchmark."""
    folder = benchmark.locate(root)  # which is `root` if it finds nothing
    folder = folder if benchmark.owns(folder) else root / benchmark.folder
    missing = [file for file in benchmark.files if file.find(folder) is None]
    report: dict[str, Any] = {
        "status": "absent",
        "folder": str(folder),
        **dict.fromkeys(("questions", "release", "images")),
        "missing": [
            {"file": file.path, "what": file.what, "for": file.purpose, "from": file.source}
            for file in missing
        ],
        "warnings": [],
    }
    if len(missing) == len(benchmark.files):
        return report
    problems: list[DataIssue] = []
    try:
        questions = list(benchmark.questions(folder, problems))
        report["questions"] = len(questions)
        report["release"] = benchmark.sizes.get(len(questions))
        report["images"] = len({one.image for one in questions if one.image is not None})
        report["warnings"] += benchmark.check(folder, questions)
    except DataError as error:
        report["warnings"].append(str(error))
    if problems:
        report["warnings"].append(f"{len(problems)} malformed lines (first: {problems[0]})")
    report["status"] = "incomplete" if missing or report["warnings"] else "complete"
    report["pictures"] = report["images"]  # the name of earlier versions
    return report


def show(benchmark: Benchmark, report: dict[str, Any]) -> None:
    """Print a report."""
    line = f"{benchmark.name:<14} {report['status']:<11}"
    if report["questions"] is not None:
        sizes = ", ".join(f"{name} has {size:,}" for size, name in benchmark.sizes.items())
        release = report["release"] or f"not a full release: {sizes or 'size not known'}"
        line += (
            f" {report['questions']:,} questions about {report['images']:,} {benchmark.media}s ({release})"
        )
    print(line if not report["missing"] else f"{line} {report['folder']}", flush=True)
    for file in report["missing"]:
        wanted = {"ask": "", "score": ", for scoring", "submit": ", for submitting"}[file["for"]]
        print(f"    missing: {file['file']} ({file['what']}{wanted}); from {file['from']}")
    for warning in report["warnings"]:
        print(f"    {warning}", flush=True)


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    usual = Path(os.environ.get("DATA_DIR") or USUAL)
    root = args.data or (usual if usual.is_dir() else require_bundled(BUNDLED_DATA, "--data (DATA_DIR)"))
    if not root.is_dir():
        raise DataError(f"{root}: no such folder. Set --data (DATA_DIR) to the folder of all benchmarks.")
    names = list_benchmarks() if "all" in args.benchmarks else list(dict.fromkeys(args.benchmarks))
    print(f"data under {root}", flush=True)
    reports = {}
    for name in names:
        benchmark = benchmarks.get_benchmark(name)
        benchmark.allow_outside = args.allow_outside_images
        reports[name] = check(benchmark, root)
        show(benchmark, reports[name])
    print(json.dumps({"data": str(root), "benchmarks": reports}))
    wanted = ("complete", "absent") if "all" in args.benchmarks else ("complete",)
    return 0 if all(report["status"] in wanted for report in reports.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
