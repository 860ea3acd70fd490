"""Run a module of this repository, whatever the caller's folder and PYTHONPATH contain.

    python scripts/_launch.py llava.eval.run --benchmark pope ...
    python scripts/_launch.py scripts/_requirements.py check REPOSITORY

`python -m` searches the working directory first and then PYTHONPATH, so that another clone, LLaVA itself or a
file named json.py there would be imported. Python 3.11 has PYTHONSAFEPATH for this, Python 3.10 has nothing.
The search path is therefore set here, before anything is imported: this repository, the standard library,
folders of PYTHONPATH with installed packages (`pip install --target`, modules of a cluster), site-packages,
the rest of PYTHONPATH. The scripts pass the caller's PYTHONPATH as _VP_PYTHONPATH.
"""

import sys

os = sys.modules["os"]  # imported when Python starts; an import statement would search the old path


def search_path(current: list[str], root: str, callers: list[str]) -> tuple[list[str], list[str]]:
    """Order the search path.

    Args:
        current: `sys.path` when Python started, without the folder of this file.
        root: The repository.
        callers: Entries of PYTHONPATH.

    Returns:
        The new `sys.path`, and the PYTHONPATH for child processes.
    """
    callers = [folder for folder in map(os.path.abspath, filter(None, callers)) if folder != root]
    packages = [folder for folder in callers if _has_packages(folder)]
    ours = [folder for folder in current if folder and os.path.abspath(folder) not in (*callers, root)]
    sites = [i for i, folder in enumerate(ours) if folder.endswith(("site-packages", "dist-packages"))]
    first = sites[0] if sites else len(ours)
    path = [root, *ours[:first], *packages, *ours[first:], *callers]
    return list(dict.fromkeys(path)), [root, *packages]


def _has_packages(folder: str) -> bool:
    try:
        return any(name.endswith((".dist-info", ".egg-info")) for name in os.listdir(folder))
    except OSError:
        return False


def main() -> None:
    """Run the module or file named by the first argument with the remaining arguments."""
    scripts = os.path.dirname(os.path.abspath(__file__))
    current = [folder for folder in sys.path if os.path.abspath(folder or ".") != scripts]
    callers = [os.environ.pop("_VP_PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]
    sys.path[:], children = search_path(
        current, os.path.dirname(scripts), os.pathsep.join(callers).split(os.pathsep)
    )
    os.environ["PYTHONPATH"] = os.pathsep.join(children)
    del sys.argv[0]
    name = sys.argv[0]
    if name.startswith("llava."):
        os.environ["PYTHONSAFEPATH"] = "1"  # for child processes, from Python 3.11 on

    import runpy

    if name.endswith(".py"):
        runpy.run_path(name, run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
