"""The set-up of the scripts (scripts/_env.sh) with a stand-in for Python and pip: nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.script_sandbox import Sandbox, failure


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def test_the_second_call_skips_pip_and_prints_the_same_python(sandbox: Sandbox) -> None:
    first = sandbox.run("dev", "tiny")
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{sandbox.repo}/.venv/bin/python\n"
    assert len(sandbox.calls("pip")) == 1
    second = sandbox.run("tiny")
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
    assert len(sandbox.calls("pip")) == 1
    assert len(sandbox.calls("venv")) == 1


def test_a_new_extra_is_added_to_the_earlier_ones(sandbox: Sandbox) -> None:
    sandbox.run("plot", "tiny")
    assert sandbox.run("dev").returncode == 0
    assert "[dev,plot,tiny]" in sandbox.calls("pip")[1]
    assert len(sandbox.calls("venv")) == 1
    assert sandbox.run("plot", "dev").returncode == 0
    assert len(sandbox.calls("pip")) == 2


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(sandbox: Sandbox, name: str) -> None:
    sandbox.run("dev")
    path = sandbox.repo / name
    path.write_text("# changed\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert sandbox.run("dev").returncode == 0
    assert len(sandbox.calls("pip")) == 2


def test_changed_tool_settings_are_not_installed(sandbox: Sandbox) -> None:
    sandbox.run("dev")
    path = sandbox.repo / "pyproject.toml"
    path.write_text(path.read_text(encoding="utf-8") + "\n[tool.other]\nkey = 1\n", encoding="utf-8")
    assert sandbox.run("dev").returncode == 0
    assert len(sandbox.calls("pip")) == 1


def test_a_missing_package_is_noticed(sandbox: Sandbox) -> None:
    sandbox.run("dev")
    result = sandbox.run("dev", FAKE_LOST="torch")
    assert len(sandbox.calls("pip")) == 2
    assert "incomplete" in failure(result)
    assert "torch" in result.stderr


def test_interrupted_installation_is_completed(sandbox: Sandbox) -> None:
    """Without a stamp, the next call completes the installation in the same environment."""
    process = subprocess.Popen(
        ["bash", str(sandbox.repo / "scripts" / "_env.sh"), "dev"],
        env=sandbox.environment(FAKE_PIP_SECONDS="30"), stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "installing" in line:
            break
    while not sandbox.calls("pip"):
        assert process.poll() is None
    os.killpg(process.pid, 9)
    process.wait()
    process.stderr.close()
    partial = sandbox.repo / ".venv/lib/python3.11/site-packages/torch-2.13.0.dist-info"
    partial.mkdir(parents=True)
    whole = partial.with_name("tqdm-4.70.1.dist-info")
    whole.mkdir()
    (whole / "RECORD").write_text("", encoding="utf-8")

    assert sandbox.run("dev").returncode == 0
    assert len(sandbox.calls("pip")) == 2
    assert len(sandbox.calls("venv")) == 1
    assert not partial.exists()  # pip would treat it as installed
    assert whole.exists()
    assert sandbox.run("dev").stderr == ""


def test_an_environment_without_python_is_created_again(sandbox: Sandbox) -> None:
    (sandbox.repo / ".venv" / "bin").mkdir(parents=True)
    assert sandbox.run("dev").returncode == 0
    assert len(sandbox.calls("venv")) == 1


def test_concurrent_calls_install_once(sandbox: Sandbox) -> None:
    command = ["bash", str(sandbox.repo / "scripts" / "_env.sh"), "dev"]
    environment = sandbox.environment(FAKE_PIP_SECONDS="1")
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    both = [subprocess.Popen(command, env=environment, **quiet) for _ in range(2)]
    assert [process.wait(timeout=600) for process in both] == [0, 0]
    expected = 1 if shutil.which("flock") else 2  # concurrent calls need flock
    assert len(sandbox.calls("pip")) == expected


def test_a_relative_venv_is_relative_to_the_working_directory(sandbox: Sandbox, tmp_path: Path) -> None:
    result = sandbox.run("dev", cwd=tmp_path, VENV="else where/venv")
    assert result.stdout == f"{tmp_path}/else where/venv/bin/python\n"
    assert not (sandbox.repo / ".venv").exists()


def test_a_python_that_does_not_run_is_skipped(sandbox: Sandbox) -> None:
    """pyenv has a stub on PATH for every version, including inactive ones."""
    (sandbox.bin / "python3").rename(sandbox.bin / "python3.11")
    for name in ("python3", "python3.12"):
        sandbox.command(name, "#!/usr/bin/env bash\necho 'not active' >&2\nexit 127\n")
    result = sandbox.run("dev")
    assert result.returncode == 0, result.stderr
    assert f"({sandbox.bin}/python3.11)" in result.stderr


def test_the_system_python_is_used_without_an_environment(sandbox: Sandbox) -> None:
    result = sandbox.run("dev", VISPRUNER_SYSTEM_PYTHON="1")
    assert result.returncode == 0, result.stderr  # the Python of the tests has the core dependencies
    assert result.stdout == f"{sandbox.bin}/python3\n"
    assert sandbox.calls("venv") == sandbox.calls("pip") == []
    assert not (sandbox.repo / ".venv").exists()


def test_missing_packages_of_the_system_python_are_listed(sandbox: Sandbox) -> None:
    path = sandbox.repo / "pyproject.toml"
    text = path.read_text(encoding="utf-8")
    text = text.replace('"torch>=2.6"', '"torch>=99"').replace('"numpy>=1.26"', '"no-such-package>=1"')
    path.write_text(text, encoding="utf-8")
    message = failure(sandbox.run("dev", VISPRUNER_SYSTEM_PYTHON="1"))
    assert "torch>=99 (found " in message
    assert "no-such-package>=1 (missing)" in message
