"""The repository as a whole: metadata, file sizes, paths, scripts and command lines."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llava

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
# Not part of the repository; needed for a copy without version control.
NOT_OURS = re.compile(
    r"(^|/)(\.git|\.venv[^/]*|__pycache__|\.[a-z]+_cache|\.hypothesis|[^/]*\.egg-info|build|results)(/|$)"
)
MAX_BYTES = 12 * 1000 * 1000


def tracked_files() -> list[Path]:
    """Return the files under version control; without git, all but environments, caches and results."""
    names: list[str] = []
    if (ROOT / ".git").exists() and shutil.which("git"):
        git = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
        names = [name for name in git.stdout.split("\0") if name]
    if not names:
        names = [p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*")]
        names = [name for name in names if not NOT_OURS.search(name)]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


FILES = tracked_files()
SCRIPTS = sorted(p for p in FILES if p.suffix == ".sh" or p == ROOT / ".ci" / "run")
COMMANDS = sorted(
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for p in FILES
    if p.suffix == ".py"
    and p.is_relative_to(ROOT / "llava")
    and "ArgumentParser" in (text := p.read_text(encoding="utf-8"))
    and ('__name__ == "__main__"' in text or p.name == "__main__.py")
)


def texts() -> dict[str, str]:
    """Return the tracked text files by relative name, without binary files."""
    found = {}
    for path in FILES:
        data = path.read_bytes()
        if b"\0" in data[:8192]:
            continue
        try:
            found[path.relative_to(ROOT).as_posix()] = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
    return found


def extras() -> dict[str, list[str]]:
    """Return the packages of every extra."""
    section = PYPROJECT.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    found = re.findall(r"^(\w+) = \[(.*?)\]", section, re.M | re.S)
    return {name: re.findall(r'"([\w-]+)', packages) for name, packages in found}


def test_the_version_is_the_same_everywhere() -> None:
    declared = re.search(r'^version = "([^"]+)"', PYPROJECT, re.M)
    assert declared is not None
    assert llava.__version__ == declared.group(1)
    assert f"\nversion: {llava.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{llava.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_installed_version_is_this_one() -> None:
    """An environment with metadata of an older checkout needs `bash scripts/_env.sh dev tiny`."""
    installed = [d for d in importlib.metadata.distributions() if d.metadata["Name"] == "vispruner"]
    assert all(d.version == llava.__version__ for d in installed)


def test_every_extra_is_used_by_the_package() -> None:
    code = "\n".join(text for name, text in texts().items() if re.fullmatch(r"llava/.*\.py", name))
    packages = [package for name, names in extras().items() if name != "dev" for package in names]
    assert [name for name in packages if not re.search(rf"\b{name.replace('-', '_')}\b", code)] == []


def test_torchvision_is_not_a_core_dependency() -> None:
    core = PYPROJECT.split("\ndependencies = [\n")[1].split("\n]")[0]
    assert "torchvision" not in re.findall(r'"([\w-]+)', core)


def test_constraints_pin_the_core_and_the_linter_inside_their_ranges() -> None:
    requirements = pytest.importorskip("packaging.requirements")
    core = PYPROJECT.split("\ndependencies = [\n")[1].split("\n]")[0]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = requirements.Requirement(line)
            pins[pin.name.lower()] = str(pin.specifier).removeprefix("==")
    for text in re.findall(r'"([^"]+)"', core):
        wanted = requirements.Requirement(text)
        assert wanted.specifier.contains(pins[wanted.name.lower()]), text
    assert f"rev: v{pins['ruff']} " in (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")


def test_named_extras_exist() -> None:
    """Every extra named by a message, a document or a script is one of pyproject.toml's."""
    named: dict[str, str] = {}
    for name, text in texts().items():
        for match in re.finditer(r"(?:vispruner|-e \.|'\.|\"\.)\[([a-z, ]+)\]", text):
            named.update(dict.fromkeys(re.split(r"[, ]+", match.group(1)), name))
        if name.endswith(".sh"):
            for match in re.finditer(r"^vispruner_env ([a-z ]+)$", text, re.M):
                named.update(dict.fromkeys(match.group(1).split(), name))
    assert {"dev", "tiny"} <= set(named)
    assert {k: v for k, v in named.items() if k not in extras()} == {}


def test_no_large_file() -> None:
    large = {p.relative_to(ROOT).as_posix(): p.stat().st_size for p in FILES if p.stat().st_size > MAX_BYTES}
    assert large == {}


def test_no_machine_path() -> None:
    # Assembled from pieces, so that this file does not match.
    machine = re.compile(r"(?<![\w.~>-])/(?:" + "|".join(["home", "root", "Users", "work"]) + r")/\w")
    hits = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in texts().items()
        for number, line in enumerate(text.splitlines(), 1)
        if machine.search(line)
    ]
    assert hits == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_script_syntax(script: Path) -> None:
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\r" not in text


def test_scripts_are_found() -> None:
    names = {p.relative_to(ROOT).as_posix() for p in SCRIPTS}
    assert {"scripts/_env.sh", "scripts/quickstart.sh", "scripts/test.sh", ".ci/run"} <= names
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize("module", COMMANDS)
def test_help_is_light(module: str) -> None:
    """`python -m module --help` does not load transformers, whose import takes seconds."""
    code = (
        "import runpy, sys\n"
        "sys.argv = ['command', '--help']\n"
        "status = None\n"
        "try:\n"
        f"    runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop:\n"
        "    status = stop.code\n"
        "print('heavy:', sorted({'transformers', 'accelerate', 'matplotlib'} & set(sys.modules)))\n"
        "sys.exit(status if status is not None else 0)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
    assert result.stdout.strip().endswith("heavy: []"), result.stdout[-300:]
