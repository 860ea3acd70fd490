"""The allowed imports between the packages of `llava`.

An import counts wherever it is written: at the top of a module, in a function or under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest

import llava

PACKAGE = Path(llava.__file__).parent
# A room is a package without the rooms inside it: "llava" has the modules directly in llava/, "llava.eval"
# the commands. Room -> rooms that it may import.
LOW = "llava llava.__init__ llava.model llava.pruning "
ALLOWED = {
    "llava": "",
    "llava.__init__": "llava.integrations llava.model llava.pruning",  # names of these, resolved lazily
    "llava.pruning": "",
    "llava.model": "llava llava.pruning",
    "llava.integrations": LOW + "llava.eval llava.eval.*",
    "llava.eval.benchmarks": "llava",
    "llava.eval.store": LOW + "llava.eval.benchmarks",
    "llava.eval.inference": LOW + "llava.integrations llava.eval.benchmarks",
    "llava.eval.metrics": LOW + "llava.eval.benchmarks llava.eval.store",
    "llava.eval.jobs": LOW
    + "llava.integrations llava.eval.benchmarks llava.eval.store llava.eval.inference llava.eval.metrics",
    "llava.eval.tables": LOW + "llava.eval.benchmarks llava.eval.metrics",
    "llava.eval": LOW + "llava.integrations llava.eval.*",
    "llava.analysis": LOW + "llava.eval llava.eval.* llava.train",
    "llava.tiny": "llava llava.model",
    "llava.train": "llava llava.model llava.pruning",
}
ROOM_OF = {
    "llava": "llava.__init__",
    "llava.eval.tables.__main__": "llava.eval",  # commands
    "llava.integrations.vllm_client": "llava.eval",
}

FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def room(module: str) -> str:
    """Return the innermost room that contains a module."""
    inside = [name for name in ALLOWED if module == name or module.startswith(name + ".")]
    return ROOM_OF.get(module) or max(inside, key=len)


def imports(module: str) -> dict[str, int]:
    """Return the modules of `llava` that a module imports, with the line of the first import of each."""
    found: dict[str, int] = {}
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            target = name if name in FILES else name.rpartition(".")[0]
            if target in FILES and target != module:
                found.setdefault(target, node.lineno)
    return found


GRAPH = {module: imports(module) for module in FILES}


def arrow(module: str, target: str) -> str:
    where = FILES[module].relative_to(PACKAGE.parent).as_posix()
    return f"{where}:{GRAPH[module][target]}: {module} imports {target}"


def is_allowed(module: str, target: str) -> bool:
    source, end = room(module), room(target)
    allowed = ALLOWED[source].split()
    return source == end or end in allowed or ("llava.eval.*" in allowed and end.startswith("llava.eval."))


def test_imports_between_packages_are_allowed() -> None:
    wrong = [
        arrow(module, target)
        for module, targets in GRAPH.items()
        for target in targets
        if not is_allowed(module, target)
    ]
    assert not wrong, "imports that ALLOWED does not list:\n" + "\n".join(wrong)


def test_modules_do_not_import_in_a_circle() -> None:
    try:
        graphlib.TopologicalSorter(GRAPH).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1][::-1]
        pytest.fail("\n".join(arrow(*pair) for pair in zip(circle, circle[1:], strict=False)), pytrace=False)


def test_class_names_are_unique() -> None:
    places: dict[str, list[str]] = {}
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                where = f"{path.relative_to(PACKAGE.parent).as_posix()}:{node.lineno}"
                places.setdefault(node.name, []).append(where)
    twice = [f"{name}: {', '.join(found)}" for name, found in places.items() if len(found) > 1]
    assert not twice, "classes of one name:\n" + "\n".join(twice)


def test_the_walker_sees_every_kind_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from llava.pruning import Pruner\n"
        "def late():\n    import llava.model.builder\n    from ..model import visual\n"
        "    from . import compare\n"
    )
    (tmp_path / "probe.py").write_text(source, encoding="utf-8")
    monkeypatch.setitem(FILES, "llava.eval.probe", tmp_path / "probe.py")
    found = {"llava.pruning": 3, "llava.model.builder": 5, "llava.model.visual": 6, "llava.eval.compare": 7}
    assert imports("llava.eval.probe") == found
    assert not is_allowed("llava.pruning.base", "llava.paths") and not is_allowed(
        "llava.paths", "llava.model"
    )
    assert not is_allowed("llava.eval.store.shards", "llava.eval.cli")
    assert not is_allowed("llava.eval.run", "llava.analysis.overlay")
    assert is_allowed("llava.eval.tables.__main__", "llava.eval.jobs.execute")


def test_the_page_names_every_package_and_only_modules_that_exist() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    packages = {path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*/__init__.py")}
    assert not [name for name in sorted(packages) if name not in text]
    for line in text.partition("## Modules")[2].partition("Every kind of file")[0].splitlines():
        folder = ""  # a name without a folder is in that of the name before
        for name in re.findall(r"`([\w/*]+\.py|[\w/]+/)`", line.partition(" | ")[0]):
            folder = name.rpartition("/")[0] if "/" in name else folder
            file = f"{folder}/{name.rpartition('/')[2] or '*.py'}"
            assert folder and any(list(root.glob(file)) for root in (PACKAGE, PACKAGE.parent)), name
