"""A wheel, unpacked outside the repository: imports, data files, commands and messages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")
ROOT = Path(__file__).resolve().parents[1]
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, offline, and unpack it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "llava", source / "llava", ignore=IGNORED)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(source),
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    done = subprocess.run(
        [*command, "--quiet", "--wheel-dir", str(folder)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def python(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the unpacked wheel, in a folder outside the repository."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VISPRUNER")}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**environment, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_wheel_contains_every_file_of_the_package(site: Path) -> None:
    """Code reads data files through Path(__file__), so every file of the package must be there."""
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "llava").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {path.relative_to(site).as_posix() for path in (site / "llava").rglob("*") if path.is_file()}
    assert found == expected
    assert "llava/py.typed" in found and "llava/tiny/world/sprites/atlas.png" in found
    (info,) = site.glob("*.dist-info")
    assert {path.name for path in (info / "licenses").iterdir()} == {"LICENSE", "NOTICE"}


def test_every_module_imports_and_reads_its_data(site: Path, tmp_path: Path) -> None:
    code = (
        "import importlib, pkgutil, llava\n"
        "from llava.eval.tables.published import load_published\n"
        "from llava.tiny import world\n"
        "for module in pkgutil.walk_packages(llava.__path__, 'llava.'):\n"
        "    if module.name.endswith('.__main__'):\n"
        "        continue\n"
        "    try:\n"
        "        importlib.import_module(module.name)\n"
        "    except ModuleNotFoundError as error:\n"
        "        assert error.name in ('triton', 'lmms_eval'), error  # with torch for CUDA; an extra\n"
        "assert load_published() and world.draw(3)[1].names()\n"
        "print(llava.__file__)\n"
    )
    done = python(site, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(site / "llava" / "__init__.py")


def test_commands_that_need_no_bundled_files_work(site: Path, tmp_path: Path) -> None:
    done = python(site, tmp_path, "-m", "llava.eval.tables", "--table", "llava-1.5-7b")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["tables"][0]["table"] == "llava-1.5-7b"
    done = python(site, tmp_path, "-m", "llava.eval.score", "--help")
    assert done.returncode == 0 and "usage:" in done.stdout


@pytest.mark.parametrize(
    "command, option",
    [
        (["llava.tiny.build"], "--output"),
        (["llava.tiny.build", "--check"], "--output"),
        (["llava.eval.run", "--benchmark", "pope", "--output-dir", "out"], "--model"),
        (["llava.eval.data", "check", "all"], "--data"),
        (["llava.analysis.overlay", "--image", __file__, "--tokens", "64"], "--model"),
        (["llava.analysis.efficiency", "--device", "cpu"], "--model"),
        (["llava.analysis.efficiency", "engine", "--device", "cpu"], "--model"),
        (["llava.eval.compare", "a.jsonl", "b.jsonl", "--benchmark", "pope"], "--data"),
    ],
)
def test_a_missing_bundled_file_is_one_clear_line(
    site: Path, tmp_path: Path, command: list[str], option: str
) -> None:
    done = python(site, tmp_path, "-m", *command)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: ") and option in line
    assert list((site / "llava").parent.glob("playground")) == []
    assert "repository clone" in line


def test_the_command_vispruner_needs_no_clone(site: Path, tmp_path: Path) -> None:
    (wheel,) = site.parent.glob("*.whl")
    options = ["--no-deps", "--no-index", "--quiet", "--target", str(tmp_path / "here")]
    done = python(site, tmp_path, "-m", "pip", "install", *options, str(wheel))
    assert done.returncode == 0, done.stderr
    command = tmp_path / "here" / "bin" / "vispruner"
    done = python(tmp_path / "here", tmp_path, str(command), "--help")
    assert done.returncode == 0 and "usage: vispruner" in done.stdout, done.stderr
    done = python(tmp_path / "here", tmp_path, str(command), "tables", "--table", "llava-1.5-7b")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["tables"][0]["table"] == "llava-1.5-7b"
    done = python(tmp_path / "here", tmp_path, str(command), "run", "--benchmark", "pope")
    assert done.returncode == 1 and "repository clone" in done.stderr
