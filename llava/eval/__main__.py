"""All commands under one name, for an installed package without a clone.

    vispruner run --benchmark pope ...     # the same as python -m llava.eval.run --benchmark pope ...
    vispruner run --help

`vispruner` is installed with the package; `python -m llava.eval` is another spelling. Imports nothing heavy
before a command is chosen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

# name -> (module with a function `main`, what it does)
COMMANDS = {
    "run": ("llava.eval.run", "evaluate one model with one pruning setting on one benchmark"),
    "sweep": ("llava.eval.sweep", "evaluate many pruning settings in one pass"),
    "status": ("llava.eval.status", "list the runs below a folder and how to continue them"),
    "score": ("llava.eval.score", "score an answer file"),
    "submit": ("llava.eval.submit", "convert an answer file for a benchmark's server"),
    "judge": ("llava.eval.judge", "grade answers by a judge model"),
    "video": ("llava.eval.video", "ask a video set and score the answers, or score answers made elsewhere"),
    "compare": ("llava.eval.compare", "compare two answer files question by question"),
    "data": ("llava.eval.data", "check which benchmark data is present"),
    "native": ("llava.eval.native", "evaluate a model of transformers at several budgets"),
    "tables": ("llava.eval.tables.__main__", "compare scores with the published tables"),
    "paper": ("llava.eval.paper", "run everything that the paper reports, into one report"),
    "overlay": ("llava.analysis.overlay", "draw the kept tokens on an image"),
    "figures": ("llava.analysis.figures.__main__", "draw Figures 2 and 3: where the model looks"),
    "methods": ("llava.analysis.methods", "compare all methods: score, tokens, FLOPs"),
    "clips": ("llava.analysis.clip_budgets", "compare budgets per frame with budgets of a clip"),
    "efficiency": ("llava.analysis.efficiency.__main__", "measure time and memory"),
}


def build_parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {name:<12}{what}" for name, (_, what) in COMMANDS.items())
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "vispruner",
        description="VisPruner for LLaVA: evaluate pruned models, score, compare and measure.",
        epilog=f"commands:\n{lines}\n\nvispruner COMMAND --help describes the arguments of a command.",
        formatter_class=form,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the command")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return import_module(COMMANDS[args.command][0]).main(args.arguments)


if __name__ == "__main__":
    sys.exit(main())
