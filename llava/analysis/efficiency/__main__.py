"""Measure: a table for the eye, then one JSON document as the last line of standard output.

    python -m llava.analysis.efficiency [--shapes NAME | --model FOLDER] [--vs plain]   the whole model
    python -m llava.analysis.efficiency selection | tower | engine | peak | table ...   one part, see --help

--output FILE also keeps the document. Imports torch only after the arguments have been understood.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from llava.eval.cli import guarded

COMMANDS = {
    "selection": "which tokens stay: against the algorithm with one product per round",
    "tower": "the vision tower with its [CLS] row and selection: against bare and eager towers",
    "engine": "questions per second: against one question at a time without reuse",
    "peak": "matrix-product rate and memory bandwidth of the device: the floor of everything else",
    "table": "the paper's efficiency table with ours beside it; runs nothing",
}
_WHOLE = "whole"


def build_parser(command: str) -> argparse.ArgumentParser:
    """The parser of one subcommand; "whole" is the report on a whole model, which has no name of its own."""
    module = import_module(f"{__package__}.{command}")
    listed = "\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}" + ("" if command == _WHOLE else f" {command}"),
        description=module.__doc__,
        epilog=f"parts:\n{listed}" if command == _WHOLE else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON document there")
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv and not argv[0].startswith("-") else _WHOLE
    if command not in (*COMMANDS, _WHOLE):
        print(f"error: no part {command!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    parser = build_parser(command)
    args = parser.parse_args(argv)
    module = import_module(f"{__package__}.{command}")
    try:
        if hasattr(module, "check"):
            module.check(args)
        if args.output is not None and not args.output.parent.is_dir():
            raise ValueError(f"--output {args.output}: there is no folder {args.output.parent}")
    except ValueError as error:
        parser.error(str(error))
    document = module.run(args)
    if hasattr(module, "render"):
        print(module.render(document))
    text = json.dumps(document)
    if args.output is not None:
        args.output.write_text(text + "\n", encoding="utf-8")
        print(f"written: {args.output}")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
