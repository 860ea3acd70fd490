"""The HTML page around tables and charts: one file that loads nothing from elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from html import escape

from llava.eval.tables.plots import has_matplotlib

NO_PLOTS = "This page has no plots because matplotlib is not installed: pip install 'vispruner[plot]'"

_STYLE = """
body { font: 14px/1.45 sans-serif; color: #222; background: #fff; margin: 1.5em auto; max-width: 1380px;
       padding: 0 1em; }
h2 { margin-top: 2em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
th, td { padding: 2px 8px; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #444; vertical-align: bottom; }
.left { text-align: left; }
.strong { font-weight: bold; }
tr.group td { border-top: 1px solid #bbb; }
tr.measured td, tr.difference td, .mean { background: #eef5fb; }
tr.difference td, tr.constant td { color: #555; }
tr.constant td { font-style: italic; }
th.muted, td.muted { color: #888; font-weight: normal; }
td small { display: block; color: #666; font-weight: normal; font-size: 11px; line-height: 1.1; }
.charts { display: flex; flex-wrap: wrap; gap: 14px; }
.charts svg { max-width: 100%; height: auto; }
.legend span { display: inline-block; margin-right: 1.3em; }
.side { display: flex; flex-wrap: wrap; gap: 0 2.5em; align-items: flex-start; }
.side h3 { margin: 1em 0 0; }
.notes { color: #444; max-width: 60em; margin: 0.5em 0; }
"""


def html_page(title: str, parts: Sequence[str]) -> str:
    """Return a page with this heading over HTML parts; without matplotlib, warn and name the extra."""
    missing = []
    if not has_matplotlib():
        print(f"warning: {NO_PLOTS}", file=sys.stderr)
        missing.append(f'<p class="notes">{escape(NO_PLOTS)}</p>')
    body = "\n".join([f"<h1>{escape(title)}</h1>", *missing, *parts])
    head = f'<meta charset="utf-8">\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
