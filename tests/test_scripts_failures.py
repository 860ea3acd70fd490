"""The set-up of the scripts (scripts/_env.sh) where something fails: messages name cause and fix."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from helpers.script_sandbox import FAKE_PYTHON, Sandbox, failure


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def test_python_too_old(sandbox: Sandbox) -> None:
    message = failure(sandbox.run("dev", FAKE_VERSION="3.8.18"))
    assert message.startswith("expected Python 3.10 or newer, found: python3 is 3.8.18.")
    assert "PYTHON=" in message
    assert not (sandbox.repo / ".venv").exists()


def test_an_old_python_that_the_user_chose_is_not_replaced(sandbox: Sandbox) -> None:
    old = sandbox.repo.parent / "old python"
    text = FAKE_PYTHON.replace("${FAKE_VERSION:-}", "3.9.1").replace('"$FAKE_VERSION"', "3.9.1")
    old.write_text(text, encoding="utf-8")
    old.chmod(0o755)
    message = failure(sandbox.run("dev", PYTHON=str(old)))
    assert message.startswith(f"PYTHON={old}: expected Python 3.10 or newer, got 3.9.1.")


def test_an_invalid_switch_is_refused(sandbox: Sandbox) -> None:
    message = failure(sandbox.run("dev", VISPRUNER_SYSTEM_PYTHON="yes"))
    assert message.startswith("VISPRUNER_SYSTEM_PYTHON=yes: expected 0 or 1.")
    assert sandbox.calls("") == []


def test_no_python(sandbox: Sandbox) -> None:
    (sandbox.bin / "python3").unlink()
    assert failure(sandbox.run("dev")).startswith("no Python found on PATH")


def test_no_venv_module(sandbox: Sandbox) -> None:
    message = failure(sandbox.run("dev", FAKE_NO_VENV="1"))
    assert "has no venv module" in message
    assert f"apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv" in message


NETWORK = [
    "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError(<...>: Failed to "
    "establish a new connection: [Errno -3] Temporary failure in name resolution')': /simple/setuptools/\n"
    "ERROR: Could not find a version that satisfies the requirement setuptools>=69 (from versions: none)\n"
    "ERROR: No matching distribution found for setuptools>=69",
    "ERROR: Could not install packages due to an OSError: HTTPSConnectionPool(): Max retries exceeded",
    "pip._vendor.urllib3.exceptions.ReadTimeoutError: HTTPSConnectionPool(host='x'): Read timed out.",
]


@pytest.mark.parametrize("output", NETWORK)
def test_the_registry_is_unreachable(sandbox: Sandbox, output: str) -> None:
    result = sandbox.run("dev", FAKE_PIP_OUTPUT=output)
    message = failure(result)
    assert message.startswith("the package registry cannot be reached")
    assert "PIP_INDEX_URL" in message
    assert output.splitlines()[-1] in result.stderr  # the output of pip is shown, too
    assert sandbox.run("dev").returncode == 0  # the next call succeeds


def test_the_disk_is_full_while_pip_writes(sandbox: Sandbox) -> None:
    output = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    message = failure(sandbox.run("dev", FAKE_PIP_OUTPUT=output))
    assert "the disk is full" in message
    assert "VENV=" in message


def test_too_little_space_is_reported_before_installing(sandbox: Sandbox) -> None:
    header = "Filesystem 1024-blocks Used Available Capacity Mounted on"
    line = "/dev/x 9999999 9900000 204800 99% /"
    sandbox.command("df", f"#!/usr/bin/env bash\necho '{header}'\necho '{line}'\n")
    message = failure(sandbox.run("dev"))
    assert "not enough disk space for the environment: about 3000 MB needed, 200 MB free." in message
    assert sandbox.calls("venv") == sandbox.calls("pip") == []


def test_a_failing_df_is_ignored(sandbox: Sandbox) -> None:
    sandbox.command("df", "#!/usr/bin/env bash\nexit 1\n")
    assert sandbox.run("dev").returncode == 0


NO_BUILD = [
    "ERROR: No matching distribution found for torch==2.13.0",
    # A registry that answers and has no wheel for this machine at all.
    "Looking in indexes: https://registry\n"
    "ERROR: Could not find a version that satisfies the requirement torch>=2.6 (from versions: none)\n"
    "ERROR: No matching distribution found for torch>=2.6",
    # A request that was repeated, and an answer.
    "WARNING: Retrying (Retry(total=4)) after connection broken by 'Read timed out.'\n"
    "ERROR: Could not find a version that satisfies the requirement torch>=2.6 (from versions: 1.13, 2.2)\n"
    "ERROR: No matching distribution found for torch>=2.6",
    "ERROR: torch-2.6.0-cp311-cp311-macosx_11_0_arm64.whl is not a supported wheel on this platform.",
    "  ERROR: Failed building wheel for numpy\nERROR: Failed to build installable wheels for numpy",
    "metadata-generation-failed",
    "ERROR: Package 'numpy' requires a different Python: 3.10.1 not in '>=3.11'",
]


@pytest.mark.parametrize("output", NO_BUILD)
def test_no_build_for_this_machine(sandbox: Sandbox, output: str) -> None:
    message = failure(sandbox.run("dev", FAKE_PIP_OUTPUT=output))
    assert message.startswith(f"a package has no build for Python {sys.version.split()[0]} on ")
    assert "Try another Python" in message and "network" not in message


@pytest.mark.parametrize(
    "output, start",
    [
        (
            "ERROR: Could not install packages due to an OSError: [Errno 30] Read-only file system: '/x'",
            "@: a folder",
        ),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: '/x'",
            "@: a folder",
        ),
        (
            "ERROR: ResolutionImpossible: for help visit https://pip",
            "the versions asked for contradict each other",
        ),
    ],
)
def test_other_causes_are_not_the_network_or_the_disk(sandbox: Sandbox, output: str, start: str) -> None:
    message = failure(sandbox.run("dev", FAKE_PIP_OUTPUT=output))
    assert message.startswith(start.replace("@", f"{sandbox.repo}/.venv"))
    assert "space" not in message and "network" not in message


def test_another_failure_of_pip_names_the_log(sandbox: Sandbox) -> None:
    message = failure(sandbox.run("dev", FAKE_PIP_OUTPUT="error: subprocess-exited-with-error"))
    assert "install.log" in message
    assert "subprocess-exited" in (sandbox.repo / ".venv" / "install.log").read_text(encoding="utf-8")


def test_packages_that_cannot_be_imported_are_installed_again(sandbox: Sandbox) -> None:
    result = sandbox.run("dev", FAKE_BROKEN="1")
    assert "cannot be imported" in failure(result)
    assert "torchvision::nms" in result.stderr
    assert sandbox.run("dev").returncode == 0
    assert len(sandbox.calls("pip")) == 2


def test_a_folder_that_is_not_an_environment_is_not_cleared(sandbox: Sandbox, tmp_path: Path) -> None:
    precious = tmp_path / "documents" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("text", encoding="utf-8")
    message = failure(sandbox.run("dev", VENV=str(precious.parent)))
    assert "not a virtual environment" in message
    assert precious.read_text(encoding="utf-8") == "text"
