"""Which method runs on which host, and what was checked, as the table of docs/hosts.md.

    python -m llava.integrations.table            # print it
    python -m llava.integrations.table --write docs/hosts.md

It is made from what the descriptors say of tiny models, by the check that `llava.prune` makes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava.pruning import Pruner

START, END = "<!-- made by python -m llava.integrations.table -->", "<!-- end -->"


def text_free_methods() -> dict[str, Pruner]:
    """Return the methods that choose before the language model, without a question."""
    from llava.pruning import get_pruner, list_pruners

    sample = {name: get_pruner(name, tokens=4) for name in list_pruners() if name != "none"}
    return {name: one for name, one in sample.items() if one.acts_in == "image" and not one.needs_question}


def table_lines() -> list[str]:
    """Return a Markdown table with a row per class and a column per method."""
    from llava.integrations.equivalence import CHECKS, WINDOWED
    from llava.integrations.hosts import find_host
    from llava.integrations.selection import problem_of
    from llava.integrations.tiny_hosts import HOSTS

    methods = text_free_methods()
    head = ["class of transformers", *(f"`{name}`" for name in methods), "checked"]
    lines = [_line(head), _line(["---", *[":-:"] * len(methods), "---"])]
    for name, case in HOSTS.items():
        model = case.build()
        inner, host = find_host(model)
        base = host.base(inner)
        cells = []
        for pruner in methods.values():
            served = [kind for kind in host.modalities if problem_of(base, host, pruner, kind) is None]
            every = len(served) == len(host.modalities)
            cells.append("yes" if every else " ".join(served) or "-")
        checks = [check for check in CHECKS if check != "masked" or name not in WINDOWED]
        title = case.class_name.removesuffix("ForConditionalGeneration")
        variant = name.removeprefix(model.config.model_type).strip("_")
        lines.append(_line([title + (f" ({variant})" if variant else ""), *cells, ", ".join(checks)]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def with_table(text: str, where: str) -> str:
    """Return a page with the table between its two marks.

    Raises:
        ValueError: the page does not have both marks.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"{where}: no lines {START!r} and {END!r}. Add them where the table belongs.")
    return before + start + "\n\n" + "\n".join(table_lines()) + "\n\n" + end + after


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m llava.integrations.table", description="Print which method runs on which host."
    )
    parser.add_argument(
        "--write", type=Path, metavar="PAGE", help="write the table between the marks of a page"
    )
    args = parser.parse_args(argv)
    if args.write is None:
        print("\n".join(table_lines()))
        return 0
    try:
        page = with_table(args.write.read_text(encoding="utf-8"), str(args.write))
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    args.write.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
