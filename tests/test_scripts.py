"""The shared set-up of the scripts (scripts/_env.sh) and .ci/run, without network and without installing.

A copy of the scripts stands in a folder with spaces in its name; PATH holds the shell tools they need and
stand-ins for Python, pip and df, which fail in the ways that strangers' machines fail. The stand-in Python
hands everything but `-m venv`, `-m pip` and the import probes over to the real one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = "awk bash cat chmod cut df dirname env find flock grep ls mkdir mktemp rm sleep tail tee".split()

FAKE_PYTHON = """\
#!/usr/bin/env bash
# version probe
if [ -n "${FAKE_VERSION:-}" ] && [ "$1" = -c ]; then
    case $2 in
        *version_info*print* | *print*version_info*) echo "$FAKE_VERSION"; exit 0 ;;
        *sys.exit*version_info*) exit 1 ;;
        *) exit 1 ;;
    esac
fi
case "$*" in
    *"import venv, ensurepip"*) [ -z "${FAKE_NO_VENV:-}" ] || exit 1; exit 0 ;;
    "-m virtualenv --version") exit 1 ;;
    "-m venv "*)
        folder=${!#}
        mkdir -p "$folder/bin" "$folder/lib"
        echo "home = here" >"$folder/pyvenv.cfg"
        cat "$0" >"$folder/bin/python"
        chmod +x "$folder/bin/python"
        echo venv >>"$FAKE_LOG"
        exit 0 ;;
    "-m llava."*)
        echo "module $*" >>"$FAKE_LOG"
        [ "$2" != "${FAKE_FAILS:-}" ] || { echo "Traceback" >&2; exit 4; }
        echo "words of $2"
        [ "$2" != llava.eval.sweep ] || echo '{"cells": []}'
        exit 0 ;;
    *"-m pip --version"*) exit 0 ;;
    *"import torch"*)
        [ -z "${FAKE_BROKEN:-}" ] || { echo "operator torchvision::nms does not exist" >&2; exit 1; }
        exit 0 ;;
    *"-m pip install"*)
        echo "pip $*" >>"$FAKE_LOG"
        [ -z "${FAKE_PIP_SECONDS:-}" ] || sleep "$FAKE_PIP_SECONDS"
        [ -z "${FAKE_PIP_OUTPUT:-}" ] || { printf '%s\\n' "$FAKE_PIP_OUTPUT"; exit 1; }
        echo "Successfully installed vispruner"
        exit 0 ;;
esac
# The stamp's code asks where its environment lies and what can be imported: answer for the stand-in's folder.
if [ "$1" = -I ] && [ "$2" = -c ]; then
    prefix=$(cd "$(dirname "$0")/.." && pwd)
    code="import sys, importlib.util; sys.prefix = '$prefix'
importlib.util.find_spec = lambda name: None if name == '${FAKE_LOST:-}' else name
$3"
    exec "@REAL@" -I -c "$code" "${@:4}"
fi
exec "@REAL@" "$@"
"""


class Sandbox:
    """A copy of the scripts, and a PATH of stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.repo = folder / "a clone"
        self.bin = folder / "bin"
        self.log = folder / "calls.log"
        (self.repo / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("scripts/_env.sh", "scripts/quickstart.sh", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.repo / name)
        for tool in TOOLS:
            path = shutil.which(tool)
            if path is not None:  # flock is not everywhere; _env.sh goes without
                (self.bin / tool).symlink_to(path)
        self.command("python3", FAKE_PYTHON.replace("@REAL@", sys.executable))

    def command(self, name: str, text: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("VISPRUNER", "PYTHON", "VENV", "FAKE"))
        }
        return {
            **kept,
            "PATH": str(self.bin),
            "FAKE_LOG": str(self.log),
            "CI": "true",
            "LC_ALL": "C",
            **variables,
        }

    def run(
        self, *arguments: str, script: str = "_env.sh", cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.repo / "scripts" / script), *arguments],
            env=self.environment(**variables),
            cwd=cwd or self.repo.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self, start: str) -> list[str]:
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        return [line for line in lines if line.startswith(start)]


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def failure(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode != 0, result.stderr
    assert result.stdout == ""
    assert "error: " in result.stderr
    return result.stderr.split("error: ", 1)[1]


# ---- what goes well -------------------------------------------------------------------------------


def test_second_call_asks_nothing_of_pip(sandbox: Sandbox) -> None:
    first = sandbox.run("dev", "tiny")
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{sandbox.repo}/.venv/bin/python\n"
    (install,) = sandbox.calls("pip")
    assert f"-e {sandbox.repo}[dev,tiny] -c {sandbox.repo}/constraints.txt" in install
    second = sandbox.run("tiny")
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
    assert len(sandbox.calls("pip")) == 1
    assert len(sandbox.calls("venv")) == 1


def test_new_extra_is_added_to_the_old_ones(sandbox: Sandbox) -> None:
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


def test_settings_of_tools_change_nothing_installed(sandbox: Sandbox) -> None:
    sandbox.run("dev")
    path = sandbox.repo / "pyproject.toml"
    path.write_text(path.read_text(encoding="utf-8") + "\n[tool.other]\nkey = 1\n", encoding="utf-8")
    assert sandbox.run("dev").returncode == 0
    assert len(sandbox.calls("pip")) == 1


def test_lost_package_is_noticed(sandbox: Sandbox) -> None:
    sandbox.run("dev")
    result = sandbox.run("dev", FAKE_LOST="torch")
    assert len(sandbox.calls("pip")) == 2
    assert "incomplete" in failure(result)
    assert "torch" in result.stderr


def test_interrupted_installation_is_completed(sandbox: Sandbox) -> None:
    """Stopped while pip runs: no stamp; the next call completes it in the same environment."""
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
    cut_short = sandbox.repo / ".venv/lib/python3.11/site-packages/torch-2.13.0.dist-info"
    cut_short.mkdir(parents=True)
    whole = cut_short.with_name("tqdm-4.70.1.dist-info")
    whole.mkdir()
    (whole / "RECORD").write_text("", encoding="utf-8")

    assert sandbox.run("dev").returncode == 0
    assert len(sandbox.calls("pip")) == 2
    assert len(sandbox.calls("venv")) == 1
    assert not cut_short.exists()  # pip would have taken it for installed
    assert whole.exists()
    assert sandbox.run("dev").stderr == ""


def test_environment_cut_short_before_pip_is_made_again(sandbox: Sandbox) -> None:
    (sandbox.repo / ".venv" / "bin").mkdir(parents=True)  # interrupted before anything else was written
    assert sandbox.run("dev").returncode == 0
    assert len(sandbox.calls("venv")) == 1


def test_calls_at_once_install_once(sandbox: Sandbox) -> None:
    command = ["bash", str(sandbox.repo / "scripts" / "_env.sh"), "dev"]
    environment = sandbox.environment(FAKE_PIP_SECONDS="1")
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    both = [subprocess.Popen(command, env=environment, **quiet) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    expected = 1 if shutil.which("flock") else 2  # without flock, calls at once are not kept apart
    assert len(sandbox.calls("pip")) == expected


def test_relative_venv_is_taken_from_where_the_caller_stands(sandbox: Sandbox, tmp_path: Path) -> None:
    result = sandbox.run("dev", cwd=tmp_path, VENV="else where/venv")
    assert result.stdout == f"{tmp_path}/else where/venv/bin/python\n"
    assert not (sandbox.repo / ".venv").exists()


def test_stub_that_does_not_run_is_passed_over(sandbox: Sandbox) -> None:
    """pyenv puts every version on PATH, also those that are not active."""
    (sandbox.bin / "python3").rename(sandbox.bin / "python3.11")
    for name in ("python3", "python3.12"):
        sandbox.command(name, "#!/usr/bin/env bash\necho 'not active' >&2\nexit 127\n")
    result = sandbox.run("dev")
    assert result.returncode == 0, result.stderr
    assert f"({sandbox.bin}/python3.11)" in result.stderr


# ---- what fails, in plain words -------------------------------------------------------------------


def test_python_too_old(sandbox: Sandbox) -> None:
    message = failure(sandbox.run("dev", FAKE_VERSION="3.8.18"))
    assert "Python 3.10 or newer is needed" in message
    assert "python3 is 3.8.18" in message
    assert "PYTHON=" in message
    assert not (sandbox.repo / ".venv").exists()


def test_named_python_too_old_is_not_replaced(sandbox: Sandbox) -> None:
    old = sandbox.repo.parent / "old python"
    text = FAKE_PYTHON.replace("${FAKE_VERSION:-}", "3.9.1").replace('"$FAKE_VERSION"', "3.9.1")
    old.write_text(text, encoding="utf-8")
    old.chmod(0o755)
    message = failure(sandbox.run("dev", PYTHON=str(old)))
    assert message.startswith(f"Python 3.10 or newer is needed; PYTHON={old} is 3.9.1.")


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
    "ERROR: Could not find a version that satisfies the requirement torch>=2.6 (from versions: none)",
]


@pytest.mark.parametrize("output", NETWORK)
def test_registry_out_of_reach(sandbox: Sandbox, output: str) -> None:
    result = sandbox.run("dev", FAKE_PIP_OUTPUT=output)
    message = failure(result)
    assert message.startswith("the package registry cannot be reached")
    assert "PIP_INDEX_URL" in message
    assert output.splitlines()[-1] in result.stderr  # pip's own words are shown, too
    assert sandbox.run("dev").returncode == 0  # nothing half-made stands in the way afterwards


def test_disk_full_while_pip_writes(sandbox: Sandbox) -> None:
    output = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    message = failure(sandbox.run("dev", FAKE_PIP_OUTPUT=output))
    assert message.startswith("the disk is full")
    assert "VENV=" in message


def test_too_little_space_is_said_beforehand(sandbox: Sandbox) -> None:
    header = "Filesystem 1024-blocks Used Available Capacity Mounted on"
    line = "/dev/x 9999999 9900000 204800 99% /"
    sandbox.command("df", f"#!/usr/bin/env bash\necho '{header}'\necho '{line}'\n")
    message = failure(sandbox.run("dev"))
    assert message.startswith("not enough disk space for the environment")
    assert "200 MB free, about 3000 MB are needed" in message
    assert sandbox.calls("venv") == sandbox.calls("pip") == []


def test_df_that_says_nothing_useful_stops_nobody(sandbox: Sandbox) -> None:
    sandbox.command("df", "#!/usr/bin/env bash\nexit 1\n")
    assert sandbox.run("dev").returncode == 0


def test_no_build_for_this_python(sandbox: Sandbox) -> None:
    output = "ERROR: No matching distribution found for torch==2.13.0"
    assert failure(sandbox.run("dev", FAKE_PIP_OUTPUT=output)).startswith(
        "a package has no version for Python"
    )


def test_other_failure_of_pip_names_the_log(sandbox: Sandbox) -> None:
    message = failure(sandbox.run("dev", FAKE_PIP_OUTPUT="error: subprocess-exited-with-error"))
    assert "install.log" in message
    assert "subprocess-exited" in (sandbox.repo / ".venv" / "install.log").read_text(encoding="utf-8")


def test_packages_that_do_not_import_are_not_taken_for_installed(sandbox: Sandbox) -> None:
    result = sandbox.run("dev", FAKE_BROKEN="1")
    assert "do not import" in failure(result)
    assert "torchvision::nms" in result.stderr
    assert sandbox.run("dev").returncode == 0
    assert len(sandbox.calls("pip")) == 2


def test_folder_that_is_no_environment_is_not_cleared(sandbox: Sandbox, tmp_path: Path) -> None:
    precious = tmp_path / "documents" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("text", encoding="utf-8")
    message = failure(sandbox.run("dev", VENV=str(precious.parent)))
    assert "is not a virtual environment" in message
    assert precious.read_text(encoding="utf-8") == "text"


# ---- the current Python as it is ------------------------------------------------------------------


def test_system_python_is_used_as_it_is(sandbox: Sandbox) -> None:
    result = sandbox.run("dev", VISPRUNER_SYSTEM_PYTHON="1")
    assert result.returncode == 0, result.stderr  # the Python that runs the tests holds the core dependencies
    assert result.stdout == f"{sandbox.bin}/python3\n"
    assert sandbox.calls("venv") == sandbox.calls("pip") == []
    assert not (sandbox.repo / ".venv").exists()


def test_system_python_that_lacks_something(sandbox: Sandbox) -> None:
    path = sandbox.repo / "pyproject.toml"
    text = path.read_text(encoding="utf-8")
    text = text.replace('"torch>=2.6"', '"torch>=99"').replace('"numpy>=1.26"', '"no-such-package>=1"')
    path.write_text(text, encoding="utf-8")
    message = failure(sandbox.run("dev", VISPRUNER_SYSTEM_PYTHON="1"))
    assert "torch>=99 (found " in message
    assert "no-such-package>=1 (missing)" in message


# ---- quickstart.sh ----------------------------------------------------------------------------------


def test_quickstart_ends_in_json(sandbox: Sandbox, tmp_path: Path) -> None:
    picture = tmp_path / "my cat.jpg"
    picture.write_bytes(b"")
    result = sandbox.run(
        "--limit", "30", script="quickstart.sh", cwd=tmp_path, IMAGE="my cat.jpg", OUTPUT="out"
    )
    assert result.returncode == 0, result.stderr
    # Everything but the table goes to stderr, so that the last line of stdout is the document.
    assert result.stdout == "words of llava.eval.sweep\n" + '{"cells": []}\n'
    tower, overlay, sweep = sandbox.calls("module")
    assert tower == "module -m llava.tiny.tower"
    assert f"--image {picture} --tokens 64 --output {tmp_path}/out/overlay.png" in overlay
    assert "--methods none,random,fastervlm,vispruner --tokens 128,64,32 --ratios 0.5,0" in sweep
    assert sweep.endswith(f"--output {tmp_path}/out --limit 30")
    assert (tmp_path / "out").is_dir()


def test_quickstart_takes_an_embedded_picture(sandbox: Sandbox) -> None:
    picture = sandbox.repo / "playground/tiny/eval/pope/val2014/COCO_val2014_000000000001.jpg"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"")
    assert sandbox.run(script="quickstart.sh").returncode == 0
    assert f"--image {picture.relative_to(sandbox.repo)} " in sandbox.calls("module")[1]


@pytest.mark.parametrize("module", ["llava.tiny.tower", "llava.analysis.overlay", "llava.eval.sweep"])
def test_quickstart_fails_with_its_steps(sandbox: Sandbox, module: str) -> None:
    assert sandbox.run(script="quickstart.sh", FAKE_FAILS=module).returncode == 4


def test_quickstart_checks_the_picture_first(sandbox: Sandbox) -> None:
    assert (
        failure(sandbox.run(script="quickstart.sh", IMAGE="nowhere.jpg")) == "IMAGE=nowhere.jpg is no file.\n"
    )
    assert sandbox.calls("") == []


# ---- .ci/run --------------------------------------------------------------------------------------


def ci(tmp_path: Path, script: str) -> subprocess.CompletedProcess[str]:
    """.ci/run with a stand-in for scripts/test.sh."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "scripts" / "test.sh").write_text(textwrap.dedent(script), encoding="utf-8")
    command = ["bash", str(tmp_path / ".ci" / "run")]
    return subprocess.run(command, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True)


def test_ci_ends_in_the_closing_line(tmp_path: Path) -> None:
    closing = "12 passed, 2 warnings in 61.20s (0:01:01)"
    result = ci(tmp_path, f"echo '3 passed in 0.10s'\necho '{closing}'\necho later\n")
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == closing


def test_ci_fails_with_the_tests(tmp_path: Path) -> None:
    result = ci(tmp_path, "echo '1 failed, 3 passed in 0.10s'\nexit 1\n")
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "1 failed, 3 passed in 0.10s"


def test_ci_fails_with_the_lint_when_tests_pass(tmp_path: Path) -> None:
    assert ci(tmp_path, "echo '3 passed in 0.10s'\nexit 2\n").returncode == 2


NOTHING_RAN = ["no tests ran in 0.01s", "3 skipped in 0.01s", "5 deselected in 0.02s", "nothing"]


@pytest.mark.parametrize("closing", NOTHING_RAN)
def test_ci_fails_when_no_test_was_executed(tmp_path: Path, closing: str) -> None:
    result = ci(tmp_path, f"echo '{closing}'\n")
    assert result.returncode == 1
    assert "no test was executed" in result.stderr
