"""Run the cells of a notebook without Jupyter, and store what they print.

PYTHONPATH=.:tests python -m helpers.notebook docs/tour.ipynb     # run it, and write its outputs
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any


def run_cells(notebook: dict[str, Any]) -> list[str]:
    """Execute the code cells in order in one namespace; return what each prints, its last value included."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(tree, "cell", "exec"), namespace)
                if last is not None:
                    value = eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)
                    if value is not None:
                        print(repr(value), file=out)
        printed.append(out.getvalue())
    return printed


def with_outputs(notebook: dict[str, Any], printed: list[str]) -> dict[str, Any]:
    """Return the notebook with these outputs."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, text) in enumerate(zip(code, printed, strict=True), start=1):
        cell["execution_count"] = number
        lines = text.splitlines(keepends=True)
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    return notebook


def main(path: str) -> None:
    file = Path(path)
    notebook = json.loads(file.read_text(encoding="utf-8"))
    done = with_outputs(notebook, run_cells(notebook))
    file.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
