"""Read the dependencies in pyproject.toml; used by _env.sh, _train.sh and check_versions.sh.

python _requirements.py check REPOSITORY          # fails if this Python lacks a core dependency
python _requirements.py list REPOSITORY [EXTRA]   # one requirement per line
python _requirements.py versions REPOSITORY WHICH [NAME]   # these at chosen versions, see `at_versions`
python _requirements.py installed REPOSITORY NAME...       # versions of Python and of these packages
python _requirements.py has NAME                           # fails if this Python cannot import it
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pathlib
import platform
import re
import sys


def requirements(root: str, extras: list[str]) -> list[str]:
    """Return the core dependencies and those of the extras; without tomllib, which needs Python 3.11."""
    text = pathlib.Path(root, "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r"\ndependencies = \[\n(.*?)\n\]", text, re.S).group(1)
    for extra in extras:
        found += re.search(rf"\n{extra} = \[(.*?)\]", text, re.S).group(1)
    return list(dict.fromkeys(re.findall(r"\"([^\"]+)\"", found)))


def missing(root: str) -> str:
    """Name the core dependencies that this Python does not have in an allowed version."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return "packaging"
    bad = []
    for requirement in map(Requirement, requirements(root, [])):
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            bad.append(f"{requirement} (missing)")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            bad.append(f"{requirement} (found {found})")
    return "; ".join(bad)


def at_versions(root: str, which: str) -> list[str]:
    """Return all dependencies, with tests, at chosen versions.

    Args:
        which: pinned (constraints.txt), oldest (the lower bounds), newest (the ranges), or a change of the
            pinned versions: NAME=oldest or NAME==VERSION. Dependencies of dependencies are free.
    """
    pins = pathlib.Path(root, "constraints.txt").read_text(encoding="utf-8").splitlines()
    changed = re.match(r"[\w-]*", which).group() if "=" in which else ""
    lines = []
    for requirement in requirements(root, ["tiny", "plot", "dev"]):
        name = re.match(r"[\w-]+", requirement).group()
        oldest = re.sub(r"[>]=([\d.]+).*", r"==\1.*", requirement)
        lines.append(requirement)
        if which == "oldest" and requirement in requirements(root, []) or which == f"{name}=oldest":
            lines.append(oldest)
        elif name == changed:
            lines.append(which)
        elif which != "newest":
            lines += [pin for pin in pins if pin.startswith(f"{name}==")]
    return lines


if __name__ == "__main__":
    action, repository, *extras = sys.argv[1:]
    if action == "has":
        sys.exit(importlib.util.find_spec(repository) is None)
    if action == "check":
        sys.exit(missing(repository) or 0)
    if action == "list":
        print("\n".join(requirements(repository, extras)))
    if action == "installed":
        print(platform.python_version(), *map(importlib.metadata.version, extras))
    if action == "versions":
        which, *names = extras
        chosen = at_versions(repository, which)
        print("\n".join(line for line in chosen if not names or re.match(rf"{names[0]}\b", line)))
