"""A copy of the scripts in a folder with a space in its name, and a PATH of stand-ins.

PATH contains the shell tools that the scripts need and stand-ins for Python, pip and df, which can be told to
fail in common ways. The stand-in Python handles `-m venv`, `-m pip`, the import probes and modules of this
package, and passes everything else to the real one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = (
    *"awk bash cat chmod cut df dirname env find flock grep ls mkdir mktemp".split(),
    *"readlink rm sleep tail tee uname".split(),
)

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
    "-I -m venv "*)
        folder=${!#}
        mkdir -p "$folder/bin" "$folder/lib"
        echo "home = here" >"$folder/pyvenv.cfg"
        cat "$0" >"$folder/bin/python"
        chmod +x "$folder/bin/python"
        echo venv >>"$FAKE_LOG"
        exit 0 ;;
    *"_requirements.py has deepspeed"*) [ -z "${FAKE_NO_DEEPSPEED:-}" ]; exit ;;
    *"/scripts/_launch.py llava."* | *"/scripts/_launch.py torch."* | *"/scripts/_launch.py deepspeed."*)
        shift
        echo "module -m $*" >>"$FAKE_LOG"
        echo "preset ${VISPRUNER_PRESET:-}" >>"$FAKE_LOG"
        echo "cwd $PWD" >>"$FAKE_LOG"
        set -- -m "$@"
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
# The stamp code looks up the environment folder and importable packages: answer for the stand-in's folder.
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
        for name in ("_env.sh", "_eval.sh", "_launch.py", "_requirements.py", "quickstart.sh"):
            shutil.copy(ROOT / "scripts" / name, self.repo / "scripts" / name)
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.repo / name)
        for tool in TOOLS:
            path = shutil.which(tool)
            if path is not None:  # flock is optional
                (self.bin / tool).symlink_to(path)
        self.command("python3", FAKE_PYTHON.replace("@REAL@", sys.executable))

    def command(self, name: str, text: str) -> None:
        """Put an executable script on PATH."""
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
            timeout=600,
        )

    def calls(self, start: str) -> list[str]:
        """Return the logged calls that start with a word: venv, pip or module."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        return [line for line in lines if line.startswith(start)]


def failure(result: subprocess.CompletedProcess[str]) -> str:
    """Return the error message of a failed script."""
    assert result.returncode != 0, result.stderr
    assert result.stdout == ""
    assert "error: " in result.stderr
    return result.stderr.split("error: ", 1)[1]
