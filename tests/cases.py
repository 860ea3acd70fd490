"""Run a folder of small cases against this checkout and report which outcomes are correct.

    python -m tests.cases FOLDER [--only NAME ...]

`FOLDER/checkpoints/NAME` contains `make.py OUT`, which writes checkpoints, and `check.py OUT`, which exits
with 0 if they are treated correctly. `FOLDER/files/NAME` contains input files; the correct outcome is stated
in this module, or checked by the case's own `check.py REPOSITORY`. Prints one line per case, then one JSON
line {"cases": n, "right": m, "wrong": [names]}; the exit code is 1 if a case is wrong.

Checkpoints are made from the folders in $GOLDEN, by default FOLDER/../golden/model or tests/data/model.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TIMEOUT = 600  # seconds per command

_files: dict[str, Callable[[Path, Path], str | None]] = {}


def case(function: Callable[[Path, Path], str | None]) -> Callable[[Path, Path], str | None]:
    """Register the check of `files/NAME` under the function's name, with - for _."""
    _files[function.__name__.replace("_", "-")] = function
    return function


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with this checkout first on the path."""
    given = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=given, capture_output=True, text=True, timeout=TIMEOUT
    )


def python(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, *arguments, cwd=cwd)


def fails_in_words(done: subprocess.CompletedProcess[str], *words: str) -> str | None:
    """Return what is wrong unless the command ended with 1 or 2, no traceback, and these words."""
    said = done.stdout + done.stderr
    if "Traceback" in said:
        return f"traceback: {said.strip().splitlines()[-1]}"
    if done.returncode not in (1, 2):
        return f"exit code {done.returncode}"
    missing = [word for word in words if word not in said]
    return f"{missing} not in {said[-300:]!r}" if missing else None


def last_json(done: subprocess.CompletedProcess[str]) -> dict:
    """Return the JSON document in the last line of standard output; {} if there is none."""
    lines = done.stdout.strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}


@case
def answer_text_not_a_string(folder: Path, _: Path) -> str | None:
    for kind in ("null", "number", "list"):
        name = f"answers_{kind}.jsonl"
        command = ("-m", "llava.eval.score", "--benchmark", "pope", "--data", "pope", "--answers", name)
        if wrong := fails_in_words(python(*command, cwd=folder), f"{name}:"):
            return f"{kind}: {wrong}"
    return None


@case
def gray16_low_range(folder: Path, _: Path) -> str | None:
    code = (
        "import sys, numpy; from llava.mm_utils import load_image\n"
        "for name in sys.argv[1:]: print(numpy.array(load_image(name)).mean())"
    )
    names = ["values_to_255.png", "values_to_255_32bit.tif", "values_to_1020.png", "values_to_65535.png"]
    done = python("-c", code, *names, cwd=folder)
    if done.returncode:
        return done.stderr[-300:]
    low, low32, middle, high = map(float, done.stdout.split())
    if abs(low - 112.5) > 0.01 or low != low32:
        return f"values to 255: {low} (16 bits), {low32} (32 bits), expected 112.5 for both"
    return None if middle > 20 and high > 20 else f"values to 1,020: {middle}, to 65,535: {high}"


@case
def heic_called_damaged(folder: Path, out: Path) -> str | None:
    model = REPOSITORY / "playground/tiny/llava-tiny"
    command = ["-m", "llava.eval.model_vqa_loader", "--model-path", model, "--question-file", "q.jsonl"]
    command += ["--image-folder", "img", "--answers-file", out / "answers.jsonl"]
    done = python(*command, cwd=folder)
    if wrong := fails_in_words(done, "HEIC", "text"):
        return wrong
    return "called damaged" if "damaged" in done.stderr else None


@case
def mme_please_answer(folder: Path, _: Path) -> str | None:
    for kind in ("llava", "please", "label_text"):
        command = ("-m", "llava.eval.score", "--benchmark", "mme", "--data", "MME", "--answers")
        done = python(*command, f"answers_{kind}.jsonl", cwd=folder)
        found = last_json(done)
        sums = [found.get("score"), *(found.get("details") or {}).values()]
        if done.returncode or 200 not in sums:
            return f"{kind}: {done.stderr[-200:] or found}"
    return None


@case
def next_row_of_other_anyres(folder: Path, out: Path) -> str | None:
    command = ("-m", "llava.eval.tables", "--table", "llava-next-7b", "--results", "results", "--output", out)
    done = python(*command, cwd=folder)
    said = done.stdout + done.stderr
    if "Traceback" in said or done.returncode not in (0, 1):
        return said[-300:]
    missing = [
        number for number in ("2,144", "112") if number not in said and number.replace(",", "") not in said
    ]
    return f"nothing is said about {missing} visual tokens" if missing else None


@case
def table_numbers_not_finite(folder: Path, out: Path) -> str | None:
    for kind in ("nan", "inf", "ratio_text"):
        command = ("-m", "llava.eval.tables", "--table", "llava-1.5-7b", "--results", kind, "--output", out)
        done = python(*command, cwd=folder)
        if "Traceback" in done.stderr or "score.json" not in done.stderr:
            return f"{kind}: {done.stderr[-300:]}"
        shown = [line for line in done.stdout.splitlines() if "score.json" not in line]
        if re.search(r"\b(nan|inf)\b", "\n".join(shown)) or re.search(r"\b(NaN|Infinity)\b", done.stdout):
            return f"{kind}: printed as a number"
    return None


@case
def vizwiz_ids_of_another_file(folder: Path, _: Path) -> str | None:
    for name in ("answers.jsonl", "answers_by_picture.jsonl"):
        command = (
            "-m",
            "llava.eval.score",
            "--benchmark",
            "vizwiz_val",
            "--data",
            "vizwiz",
            "--answers",
            name,
        )
        done = python(*command, cwd=folder)
        if done.returncode == 0 and last_json(done).get("score") != 100:
            return f"{name}: {last_json(done)}"
        if done.returncode and (wrong := fails_in_words(done, "prompt")):
            return f"{name}: {wrong}"
    return None


@case
def llava_in_the_working_directory(folder: Path, out: Path) -> str | None:
    command = ("bash", REPOSITORY / "scripts/v1_5/eval/pope.sh", "64", "0.5", "--limit", "2")
    for place in (folder / "elsewhere", _copy_of_the_code(out)):
        done = run(*command, cwd=place, OUT_DIR=str(out / f"results-{place.name}"), **_SYSTEM)
        if done.returncode:
            return f"from {place.name}: {(done.stdout + done.stderr)[-300:]}"
    return None


@case
def cdpath(_: Path, out: Path) -> str | None:
    (out / "x/scripts").mkdir(parents=True)
    for value, script in (
        (f".:{out}", ("scripts/v1_5/eval/pope.sh", "64", "0.5", "--limit", "2")),
        (f".:{out}", ("scripts/_env.sh",)),
        (str(out / "x"), ("scripts/_env.sh",)),
    ):
        done = run("bash", *script, cwd=REPOSITORY, CDPATH=value, OUT_DIR=str(out / "results"), **_SYSTEM)
        if done.returncode or "Traceback" in done.stderr:
            return f"CDPATH={value} {script[0]}: {(done.stdout + done.stderr)[-300:]}"
    return None


@case
def sh_dash(_: Path, out: Path) -> str | None:
    shell = shutil.which("dash")
    if shell is None:
        return "no dash on this machine"
    for script in (("scripts/v1_5/eval/pope.sh", "64", "0.5"), ("scripts/quickstart.sh",)):
        done = run(shell, *script, cwd=REPOSITORY, OUT_DIR=str(out))
        lines = done.stderr.strip().splitlines()
        if done.returncode == 0 or len(lines) != 1 or "bash" not in lines[0]:
            return f"{script[0]}: {done.stderr[-300:]!r}"
    return None


@case
def pip_has_no_wheel(folder: Path, out: Path) -> str | None:
    script = f'source "{REPOSITORY}/scripts/_env.sh"; VENV={out}/v; _vp_explain "$(cat pip_words.txt)"'
    done = run("bash", "-c", script, cwd=folder, **_SYSTEM)
    said = done.stdout + done.stderr
    return said[-300:] if "cannot be reached" in said or "Python" not in said else None


# The scripts run in the interpreter that runs this module.
_SYSTEM = {
    "VISPRUNER_SYSTEM_PYTHON": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
}


def _copy_of_the_code(out: Path) -> Path:
    """Return a folder with another `llava` that fails as soon as it is imported."""
    other = out / "other-clone"
    (other / "llava").mkdir(parents=True)
    (other / "llava/__init__.py").write_text('raise SystemExit("the code of another clone runs")\n')
    return other


def check_files(folder: Path, out: Path) -> str | None:
    """Return what is wrong with `files/NAME`; None if it comes out right."""
    if (folder / "check.py").is_file():
        done = python(folder / "check.py", REPOSITORY, cwd=folder)
        return None if done.returncode == 0 else (done.stdout + done.stderr)[-300:]
    if folder.name not in _files:
        return "the right outcome of this case is not known here"
    return _files[folder.name](folder, out)


def check_checkpoints(folder: Path, out: Path, golden: Path) -> str | None:
    """Return what is wrong with `checkpoints/NAME`; None if check.py passes."""
    for script in ("make.py", "check.py"):
        done = run(sys.executable, folder / script, out, cwd=folder, GOLDEN=str(golden))
        if done.returncode:
            failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
            return f"{script}: " + ("; ".join(failed) or done.stderr[-300:])
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cases",
        description=__doc__.split("\n\n", 1)[0],
    )
    parser.add_argument("folder", type=Path, help="folder with checkpoints/ and files/")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run these cases only")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    found = sorted(
        path.parent for kind in ("checkpoints", "files") for path in folder.glob(f"{kind}/*/case.md")
    )
    found = [path for path in found if not arguments.only or path.name in arguments.only]
    if not found:
        parser.error(f"{folder}: contains no checkpoints/NAME/case.md or files/NAME/case.md")
    usual = folder.parent / "golden/model"
    golden = Path(os.environ.get("GOLDEN") or (usual if usual.is_dir() else REPOSITORY / "tests/data/model"))
    wrong = []
    for path in found:
        with tempfile.TemporaryDirectory() as out:
            try:
                if path.parent.name == "checkpoints":
                    problem = check_checkpoints(path, Path(out), golden.resolve())
                else:
                    problem = check_files(path, Path(out))
            except subprocess.TimeoutExpired:
                problem = f"no end within {TIMEOUT} seconds"
        print(
            f"{'wrong' if problem else 'right'}  {path.parent.name}/{path.name}"
            + (f": {problem}" if problem else "")
        )
        sys.stdout.flush()
        if problem:
            wrong.append(f"{path.parent.name}/{path.name}")
    print(json.dumps({"cases": len(found), "right": len(found) - len(wrong), "wrong": wrong}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
