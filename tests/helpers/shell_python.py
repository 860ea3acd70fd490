"""Shell scripts whose `python` is this test process: no interpreter and no torch is started per command.

    with ShellPython(folder) as shell:
        done = shell.run("for i in 0 1; do python -m llava.eval.score ... & done; wait")

`python` on the script's PATH is a few lines that send arguments and folder through a socket; the
command runs here, one at a time, and its output and exit code go back.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

_CLIENT = """\
#!{python} -SIE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as link:
    link.connect({address!r})
    link.sendall(json.dumps([sys.argv[1:], os.getcwd()]).encode() + b"\\n")
    code, out, err = json.loads(link.makefile().read())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


def run_python(arguments: list[str], folder: str) -> tuple[int, str, str]:
    """Run `python ARGUMENTS` (a module or a file) in this process; return exit code and output."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before, path, argv = os.getcwd(), [*sys.path], sys.argv
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                if arguments[0] == "-m":
                    code = importlib.import_module(arguments[1]).main(arguments[2:])
                elif arguments[0] == "-c":
                    exec(arguments[1], {"__name__": "__main__"})
                else:
                    sys.argv = arguments
                    runpy.run_path(arguments[0], run_name="__main__")
            except SystemExit as stop:
                code = stop.code
            except BaseException:  # what a process would print before it ends
                traceback.print_exc()
                code = 1
    finally:
        os.chdir(before)
        sys.path[:], sys.argv = path, argv
    return int(code or 0), out.getvalue(), err.getvalue()


class ShellPython:
    """Runs shell scripts in a folder; use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bin = folder / ".bin"
        self._bin.mkdir()
        self._place = tempfile.TemporaryDirectory()  # a short name: addresses have about 100 characters
        self._address = os.path.join(self._place.name, "s")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self._address)
        self._listener.listen(64)
        client = _CLIENT.format(python=sys.executable, address=self._address)
        for name in ("python", "python3"):
            (self._bin / name).write_text(client, encoding="utf-8")
            (self._bin / name).chmod(0o755)

    def __enter__(self) -> ShellPython:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._place.cleanup()

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a bash script in the folder."""
        path = self._bin / "script.sh"
        path.write_text(script, encoding="utf-8")
        environment = {**os.environ, **variables, "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}"}
        found: list[subprocess.CompletedProcess[str]] = []

        def start() -> None:
            command = ["bash", str(path), *arguments]
            try:
                found.append(
                    subprocess.run(
                        command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300
                    )
                )
            finally:
                with socket.socket(socket.AF_UNIX) as link:  # ends the loop below
                    link.connect(self._address)

        thread = threading.Thread(target=start)
        thread.start()
        while True:  # commands run on the main thread, which redirects the output
            link, _ = self._listener.accept()
            with link, link.makefile("rw", encoding="utf-8") as stream:
                line = stream.readline()
                if not line:
                    break
                stream.write(json.dumps(run_python(*json.loads(line))))
        thread.join()
        return found[0]
