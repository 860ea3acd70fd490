"""Measure efficiency: print a table, then one JSON document as the last line of standard output.

    python -m llava.analysis.efficiency [--dummy-model NAME | --model FOLDER] [--vs baseline]  the whole model
    python -m llava.analysis.efficiency selection | tower | engine | gpu_check | peak ...      one part

--output FILE also writes the document. torch is imported only after the arguments have been parsed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from llava.eval.cli import guarded

COMMANDS = {
    "selection": "token selection, compared with one similarity product per round",
    "tower": "vision tower with its [CLS] row and selection, compared with bare and eager towers",
    "engine": "questions per second, compared with one question at a time without reuse",
    "training": "seconds and memory of a training step, at several numbers of visual tokens",
    "peak": "matrix-product rate and memory bandwidth of the device",
    "gpu_check": "every claim about GPUs: tests, measurements, goals; resumable, with a report",
    "table": "the paper's efficiency table with measured rows; runs no model",
}
_WHOLE = "whole"
# Keys of documents that were renamed: readers of the old keys find the same values there.
_FORMER_WORDS = (
    ("speedup", "ratio"),
    ("optimized", "ours"),
    ("baseline", "plain"),
    ("unshared_batches", "plain_engine_batches"),
    ("roofline", "floor"),
    ("dummy_model", "shapes"),
)


def build_parser(command: str) -> argparse.ArgumentParser:
    """Build the parser of one subcommand; "whole" is the report on a whole model, which has no subcommand."""
    module = import_module(f"{__package__}.{command}")
    listed = "\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}" + ("" if command == _WHOLE else f" {command}"),
        description=module.__doc__,
        epilog=f"subcommands:\n{listed}" if command == _WHOLE else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    if not getattr(module, "WRITES_FOLDER", False):
        parser.add_argument(
            "--output", type=Path, metavar="FILE", help="also write the JSON document to FILE"
        )
    return parser


def with_former_keys(value: Any) -> Any:
    """Copy a document, with every renamed key also under its former name."""
    if isinstance(value, list):
        return [with_former_keys(one) for one in value]
    if not isinstance(value, dict):
        return value
    copied = {key: with_former_keys(one) for key, one in value.items()}
    for key in value:
        former = key
        for word, former_word in _FORMER_WORDS:
            former = former.replace(word, former_word)
        copied.setdefault(former, copied[key])
    return copied


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv and not argv[0].startswith("-") else _WHOLE
    if command not in (*COMMANDS, _WHOLE):
        print(f"error: unknown subcommand {command!r} (choose from {', '.join(COMMANDS)})", file=sys.stderr)
        return 2
    parser = build_parser(command)
    args = parser.parse_args(argv)
    module = import_module(f"{__package__}.{command}")
    try:
        if hasattr(module, "check"):
            module.check(args)
        output = None if getattr(module, "WRITES_FOLDER", False) else args.output
        if output is not None and not output.parent.is_dir():
            raise ValueError(f"--output {output}: there is no folder {output.parent}")
    except ValueError as error:
        parser.error(str(error))
    document = {"part": command, **module.run(args)}
    print(module.render(document))
    text = json.dumps(with_former_keys(document))
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
        print(f"written: {output}")
    print(text)
    return 1 if document.get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
