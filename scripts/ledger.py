"""Where the numbers in the tables of README.md and docs/*.md come from: docs/results/ledger.json.

    python scripts/ledger.py check
    python scripts/ledger.py add docs/tiny.md Results --command "bash scripts/quickstart.sh" \\
        --machine "2 cores of an AMD EPYC" --raw docs/results/quickstart.json
    python scripts/ledger.py add docs/evaluation.md Output --table 2 --source configuration

`check` lists the numbers that the ledger does not have, and entries without a table. `add` writes the entry
of one table, which is named by its file, the heading above it and its place below this heading. A table that
was edited needs `add` again. Numbers in code (`x`) do not count. Exit code 1 if `check` finds something.

An entry has `source`: measured, published (numbers of others) or configuration (settings, sizes, limits); and
if measured, the `command`, the `commit`, the `machine` and `raw`, the output file that the numbers were taken
from, or null where it was not kept.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LEDGER = Path("docs", "results", "ledger.json")
SOURCES = ("measured", "published", "configuration")
_KEYS = ("file", "heading", "table", "source", "command", "commit", "machine", "raw", "rows")
_NUMBER = re.compile(r"(?<![\w.,-])[+−-]?\d+(?:,\d{3})*(?:\.\d+)?(?![\d-]|\.\d)")


class LedgerError(Exception):
    """The ledger, a table or an argument is not valid; the message is shown."""


@dataclass
class DocTable:
    """A Markdown table: where it is, and the numbers of every row that has any, as written."""

    file: str
    heading: str
    table: int  # its place below the heading, from 1
    line: int
    rows: list[str] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, int]:
        return self.file, self.heading, self.table

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: table {self.table} below {self.heading!r}"


def numbers_of(text: str) -> list[str]:
    """Return the numbers of a line as written, without those in code, links and names like LLaVA-1.5-7B."""
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text)
    return _NUMBER.findall(text)


def read_tables(root: Path = ROOT) -> list[DocTable]:
    """Return the tables with numbers of README.md and docs/*.md, without those in code blocks."""
    found: list[DocTable] = []
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        if not path.is_file():
            continue
        heading, counts, code, table = "", dict[str, int](), False, None
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            code ^= line.startswith("```")
            if not code and line.startswith("#"):
                heading = line.lstrip("#").strip()
            if code or not line.startswith("|"):
                table = None
                continue
            if table is None:
                counts[heading] = counts.get(heading, 0) + 1
                file = path.relative_to(root).as_posix()
                table = DocTable(file, heading, counts[heading], number)
                found.append(table)
            elif numbers := numbers_of(line):
                table.rows.append(" ".join(numbers))
                table.lines.append(number)
    return [table for table in found if table.rows]


def read_ledger(root: Path = ROOT) -> list[dict[str, Any]]:
    """Return the entries. Raises LedgerError for a file that is not a ledger."""
    path = root / LEDGER
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_bytes())
    except ValueError as error:
        raise LedgerError(f"{LEDGER}: not a JSON document ({error}). Restore it from git.") from error
    for place, entry in enumerate(entries if isinstance(entries, list) else [None]):
        if not isinstance(entry, dict) or set(entry) != set(_KEYS) or entry["source"] not in SOURCES:
            known = f"a list of objects with {', '.join(_KEYS)} and a source of {', '.join(SOURCES)}"
            raise LedgerError(f"{LEDGER}: entry {place} is not valid, expected {known}. Use `add`.")
    return entries


def problems(root: Path = ROOT) -> list[str]:
    """Return what is wrong: numbers without an entry, entries without a table, incomplete entries."""
    tables = {table.key: table for table in read_tables(root)}
    found, known = [], {}
    for entry in read_ledger(root):
        key = (entry["file"], entry["heading"], entry["table"])
        where = f"{LEDGER}: {entry['file']}, {entry['heading']!r}, table {entry['table']}"
        if key in known:
            found.append(f"{where}: two entries. Remove one.")
        if key not in tables:
            found.append(
                f"{where}: there is no such table with numbers. Remove the entry, or `add` its new place."
            )
        known[key] = set(entry["rows"])
        if entry["source"] == "measured" and not all(
            entry[name] for name in ("command", "commit", "machine")
        ):
            found.append(f"{where}: measured, but command, commit or machine is empty. `add` it again.")
        if entry["raw"] is not None and not (root / entry["raw"]).is_file():
            found.append(
                f"{where}: raw file {entry['raw']} does not exist. Add the file, or set raw to null."
            )
    for table in tables.values():
        for row, line in zip(table.rows, table.lines, strict=True):
            if row not in known.get(table.key, ()):
                command = f"python scripts/ledger.py add {table.file} {table.heading!r} --table {table.table}"
                found.append(f"{table.file}:{line}: not in the ledger: {row}. Run: {command} ...")
    return found


def not_in_raw(table: DocTable, raw: str) -> list[str]:
    """Return the numbers of a table that no number of its raw file rounds to, also in percent or ms."""
    values = [float(text) for text in re.findall(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", raw)]
    missing = []
    for text in " ".join(table.rows).split():
        digits = len(text.partition(".")[2])
        value = abs(float(text.replace(",", "").replace("−", "-")))
        half = 0.5 * 10**-digits * (1 + 1e-9)
        if not any(abs(abs(one) * scale - value) <= half for one in values for scale in (1, 100, 1000)):
            missing.append(text)
    return missing


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise LedgerError(f"git {arguments[0]}: {done.stderr.strip()}. Give --commit.")
    return done.stdout.strip()


def add(args: argparse.Namespace, root: Path = ROOT) -> dict[str, Any]:
    """Write the entry of one table. Raises LedgerError."""
    tables = {table.key: table for table in read_tables(root)}
    table = tables.get((args.file, args.heading, args.table))
    if table is None:
        known = [f"{one.heading!r} --table {one.table}" for one in tables.values() if one.file == args.file]
        listed = ", ".join(known) or "none in this file"
        raise LedgerError(f"{args.file}: no table {args.table} below {args.heading!r}. Choose from {listed}.")
    entry: dict[str, Any] = dict.fromkeys(_KEYS) | {"file": table.file, "heading": table.heading}
    entry |= {"table": table.table, "source": args.source, "rows": table.rows, "command": args.command}
    if args.raw is not None and not (root / args.raw).is_file():
        raise LedgerError(
            f"--raw {args.raw}: no such file below the repository. Copy the output to docs/results."
        )
    if args.source == "measured":
        if not (args.command and args.machine):
            raise LedgerError("measured numbers need --command and --machine.")
        commit = args.commit or _git(root, "rev-parse", "--short=12", "HEAD")
        entry |= {"commit": commit, "machine": args.machine, "raw": args.raw}
    others = [one for one in read_ledger(root) if (one["file"], one["heading"], one["table"]) != table.key]
    order = {key: place for place, key in enumerate(tables)}
    entries = sorted(
        [*others, entry], key=lambda one: order.get((one["file"], one["heading"], one["table"]), len(order))
    )
    (root / LEDGER).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(entries, indent=1, ensure_ascii=False) + "\n"
    temporary = (root / LEDGER).with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(root / LEDGER)
    return entry


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of this command."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python scripts/ledger.py", description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="action", required=True)
    commands.add_parser("check", help="list numbers that the ledger does not have")
    adding = commands.add_parser("add", help="write the entry of one table")
    adding.add_argument("file", help="README.md or docs/NAME.md")
    adding.add_argument("heading", help="the heading above the table, without #")
    adding.add_argument("--table", type=int, default=1, help="its place below the heading (default: 1)")
    adding.add_argument("--source", choices=SOURCES, default=SOURCES[0], help="(default: measured)")
    adding.add_argument("--command", help="the command whose output has the numbers")
    adding.add_argument("--commit", help="the commit that was measured (default: the one checked out)")
    adding.add_argument("--machine", help="processor or GPU, cores, versions, in words")
    adding.add_argument("--raw", help="output file, below the repository (default: none was kept)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = build_parser().parse_args(argv)
    try:
        if args.action == "check":
            found = problems()
            print("\n".join([*found, f"{len(found)} problems"]))
            return 1 if found else 0
        entry = add(args)
    except LedgerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{LEDGER}: {entry['file']}, {entry['heading']!r}, table {entry['table']}: {len(entry['rows'])} rows"
    )
    if entry["raw"]:
        table = DocTable(entry["file"], entry["heading"], entry["table"], 0, entry["rows"])
        missing = not_in_raw(table, (ROOT / entry["raw"]).read_text(encoding="utf-8"))
        print(f"numbers that do not follow from {entry['raw']} by rounding: {' '.join(missing) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
