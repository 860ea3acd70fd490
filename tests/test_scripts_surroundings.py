"""The scripts where users run them: other shells, exported settings, foreign modules, read-only folders."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from helpers.script_sandbox import ROOT, Sandbox, failure
from llava import paths

SCRIPTS = [*sorted((ROOT / "scripts").rglob("*.sh")), ROOT / ".ci" / "run"]
NAMES = [path.relative_to(ROOT).as_posix() for path in SCRIPTS]


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    made = Sandbox(tmp_path)
    shutil.copytree(ROOT / "scripts", made.repo / "scripts", dirs_exist_ok=True)
    return made


# ---- bash 3.2 and other shells ----------------------------------------------------------------------

NEWER_THAN_BASH_3_2 = {
    "associative array, name reference": r"\b(declare|local|typeset)\s+-\w*[Agn]",
    "change of case": r"\$\{\w+(\[[^]]*\])?(\^|,)",
    "transformation": r"\$\{\w+(\[[^]]*\])?@[A-Za-z]",
    "array or coprocess builtin": r"\b(mapfile|readarray|coproc)\b",
    "pipe with stderr": r"\|&",
    "append with stderr": r"&>>",
    "fall through": r";;?&",
    "negative length": r"\$\{\w+:[^}]*:\s*-\s*\w",
    "negative index": r"\$\{\w+\[-\d",
    "time format": r"printf\s.*%\(",
    "variable": r"\b(BASHPID|EPOCHSECONDS|EPOCHREALTIME|SRANDOM|BASH_ARGV0)\b",
    "read -i, -N, fraction": r"\bread\s+(-\w+\s+)*-\w*([iN]\b|t\s*\d*\.)",
    "wait -n": r"\bwait\s+-[np]",
    "test of a variable": r"(\[\[?|\btest)\s+(!\s+)?-[vR]\s",
    "shopt": r"\b(globstar|lastpipe|inherit_errexit|localvar_inherit|autocd|dirspell)\b",
    "file descriptor variable": r"\{\w+\}[<>]",
    "brace step": r"\{\w+\.\.\w+\.\.",
    "unicode escape": r"\$'[^']*\\[uU]",
    "source of a process substitution": r"(\bsource|^\s*\.)\s+<\(",
    "array that may be empty, under set -u": r"(?<!\+)\"\$\{\w+\[[@*]\]\}\"",
}
EXAMPLES = [
    "declare -A x",
    "local -n y=x",
    "echo ${x,,}",
    "echo ${x[0]^}",
    "echo ${x@Q}",
    "mapfile -t x",
    "a |& b",
    "a &>>b",
    "a) b ;;&",
    "echo ${x:0:-1}",
    "echo ${x[-1]}",
    "printf '%(%s)T'",
    "kill $BASHPID",
    "read -N 1 x",
    "read -t 0.5 x",
    "wait -n",
    "[[ -v x ]]",
    "shopt -s globstar",
    "exec {fd}>x",
    "echo {1..9..2}",
    "x=$'\\u00e9'",
    "source <(a)",
    'a "${x[@]}"',
    "x=$(case $1 in a) b ;; esac)",
    "x=$(a |",
    "x=$(a # it's",
    ". <(a)",
]
HARMLESS = [
    'a ${x[@]+"${x[@]}"}',
    "echo ${x//,/ } ${x:1:2} ${#x[@]} $((1 + (2)))",
    "a) b ;;",
    'x=$(a "$(b)") # it\'s',
    "read -r -a x <<<$y",
    'local x=() y="${@:2}"',
    "exec 9>&-",
    "x=$((a > 1 ? a : 1))",
    "a && b >/dev/null 2>&1",
]


def newer(line: str) -> list[str]:
    """Name the constructs in a line that bash 3.2 does not have or cannot parse."""
    code = re.sub(r"(^|\s)#.*", "", line)
    found = [name for name, pattern in NEWER_THAN_BASH_3_2.items() if re.search(pattern, code)]
    # bash 3.2 ends a command substitution at the first unpaired parenthesis, as in a pattern of `case`, and
    # reads quotes in comments. Both are seen at once if a substitution stays on its line.
    for match in re.finditer(r"\$\((?!\()", code):
        depth, end = 1, match.end()
        while depth and end < len(code):
            depth += {"(": 1, ")": -1}.get(code[end], 0)
            end += 1
        if depth or re.search(r"\bcase\b", code[match.end() : end]):
            found.append("command substitution over several lines or with case")
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_bash_3_2_has_every_construct(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert {f"{path.name}:{n}": newer(line) for n, line in enumerate(lines, 1) if newer(line)} == {}


@pytest.mark.parametrize("line", EXAMPLES)
def test_a_newer_construct_is_found(line: str) -> None:
    assert newer(line)


@pytest.mark.parametrize("line", HARMLESS)
def test_an_older_construct_is_allowed(line: str) -> None:
    assert newer(line) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_another_shell_gets_one_line(path: Path) -> None:
    for shell in (["dash"], ["busybox", "sh"], ["zsh"], ["ksh"]):
        if shutil.which(shell[0]) is None:
            continue
        done = subprocess.run([*shell, str(path), "64"], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"error: {path}: this shell is not bash. Run: bash {path}\n"


def test_bash_as_sh_works(sandbox: Sandbox) -> None:
    """macOS and Red Hat: `sh` is bash in POSIX mode, where a failed `exec 9>file` ends the script."""
    (sandbox.bin / "sh").symlink_to(shutil.which("bash"))
    done = subprocess.run(
        [str(sandbox.bin / "sh"), "scripts/_env.sh", "dev"],
        cwd=sandbox.repo, env=sandbox.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"{sandbox.repo}/.venv/bin/python\n"), done.stderr


# ---- exported settings ------------------------------------------------------------------------------

EXPORTED = [
    {"CDPATH": ".:/tmp"},
    {"CDPATH": "@elsewhere"},
    {"POSIXLY_CORRECT": "1"},
    {"SHELLOPTS": "noclobber:noglob:posix"},
    {"BASHOPTS": "failglob:nullglob:nocasematch:xpg_echo:expand_aliases"},
    {"BASH_ENV": "@setup"},
    {
        "BASH_FUNC_cd%%": '() {  builtin cd "$@" && echo "now in $PWD"; }',
        "BASH_FUNC_ls%%": "() {  echo ls; }",
    },
    {"GREP_OPTIONS": "--color=always", "IFS": "/", "LC_ALL": "C", "LANG": "C"},
    {"PIP_TARGET": "/nowhere", "PIP_PREFIX": "/nowhere", "PYTHONHOME": "/nowhere", "PYTHONPATH": "/nowhere"},
    {"SECONDS": "text", "ROOT": "/nowhere", "PY": "/nowhere", "BASE": "/nowhere", "HOME": "/nowhere"},
]


@pytest.mark.parametrize("variables", EXPORTED, ids=lambda v: " ".join(v))
@pytest.mark.parametrize("script", ["scripts/_env.sh", "../a clone/scripts/_env.sh"])
def test_exported_settings_change_nothing(sandbox: Sandbox, variables: dict[str, str], script: str) -> None:
    (sandbox.repo.parent / "elsewhere" / "scripts").mkdir(parents=True)
    (sandbox.repo.parent / "elsewhere" / "a clone" / "scripts").mkdir(parents=True)
    setup = sandbox.repo.parent / "setup"
    setup.write_text(
        "shopt -s expand_aliases\nalias cd='cd -P' printf=false\nset -C\nCDPATH=/tmp\nIFS=/\n"
        'mkdir() { echo "made $*"; command mkdir "$@"; }\n'
    )
    for name, value in variables.items():
        if value.startswith("@"):
            variables = {**variables, name: str(sandbox.repo.parent / value[1:])}
    (sandbox.repo / ".venv.lock").write_text("")  # exists already, which matters with noclobber
    done = subprocess.run(
        ["bash", script, "dev"],
        cwd=sandbox.repo, env=sandbox.environment(**variables), stdin=subprocess.DEVNULL,
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"{sandbox.repo}/.venv/bin/python\n"), done.stderr
    assert f"-e {sandbox.repo}[dev]" in sandbox.calls("pip")[0]
    assert sorted(p.name for p in sandbox.repo.parent.iterdir()) == [
        "a clone", "bin", "calls.log", "elsewhere", "setup"
    ]  # fmt: skip


def test_ci_with_exported_settings(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    (tmp_path / "scripts").mkdir()
    (tmp_path / "other" / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "scripts" / "test.sh").write_text("echo $#\necho '3 passed in 0.10s'\n")
    environment = {
        **os.environ,
        "CDPATH": str(tmp_path / "other"),
        "GREP_OPTIONS": "--color=always",
        "POSIXLY_CORRECT": "1",
    }
    done = subprocess.run(
        ["bash", ".ci/run", "a b"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("1\n3 passed in 0.10s\n3 passed in 0.10s\n", "")


# ---- the code that runs is this repository's --------------------------------------------------------

PROBE = """\
import os, sys
import json, random, subprocess, multiprocessing, torch, llava, transformers, helpers
if __name__ == "__main__":
    files = [m.__file__ for m in (json, random, torch, llava, transformers)]
    child = [sys.executable, "-c", "import llava; print(llava.__file__)"]
    print(*files, subprocess.run(child, capture_output=True, text=True).stdout.strip(), sep="\\n")
"""


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder with modules of the names of ours and of others, each of which ends the process."""
    folder = tmp_path / "another clone"
    for name in ("llava", "transformers"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise SystemExit('foreign package')\n")
    for name in ("json", "random", "torch", "re", "socket", "pickle", "types", "pip", "venv", "runpy"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('foreign {name}')\n")
    return folder


@pytest.mark.parametrize("where", ["folder", "PYTHONPATH"])
def test_modules_of_the_caller_are_not_imported(foreign: Path, tmp_path: Path, where: str) -> None:
    """helpers exists only in the caller's PYTHONPATH: what hides nothing can be imported."""
    (foreign / "probe").mkdir()
    (foreign / "probe" / "helpers.py").write_text("")
    probe = foreign / "probe" / "probe.py"
    probe.write_text(PROBE)
    python_path = [str(foreign / "probe")] + [str(foreign)] * (where == "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VISPRUNER", "VENV"))}
    environment |= {
        "PYTHON": sys.executable, "VISPRUNER_SYSTEM_PYTHON": "1", "PYTHONPATH": os.pathsep.join(python_path)
    }  # fmt: skip
    command = f'. "{ROOT}/scripts/_env.sh"; vispruner_env tiny; vispruner_python "{probe}"'
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=foreign if where == "folder" else tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = done.stdout.splitlines()
    assert len(files) == 6 and not any(str(foreign) in file for file in files)
    assert files[3] == str(ROOT / "llava" / "__init__.py")
    if where == "PYTHONPATH":
        assert files[5] == files[3]


def test_processes_of_a_run_import_what_the_run_imports(foreign: Path) -> None:
    code = (
        f"import sys; sys.path[0] = {str(ROOT)!r}\n"
        "from llava.eval.jobs.processes import start\n"
        "print(start('llava.eval.run', ['--help'], 1, []))\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=foreign, env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "usage: " in done.stdout


def test_the_set_up_imports_no_module_of_the_caller(sandbox: Sandbox, foreign: Path) -> None:
    """The stand-in passes what is not known to a real Python, with the options of the script."""
    done = sandbox.run("dev", cwd=foreign, PYTHONPATH=str(foreign))
    assert done.returncode == 0, done.stderr
    script = (ROOT / "scripts" / "_env.sh").read_text()
    calls = re.findall(r'"\$(?:base|PY|VENV/bin/python|1)" +(-\S+ .{0,40})', script)
    assert len(calls) > 6
    alone = [
        c for c in calls if not c.startswith("-I ") and not re.match(r"-c 'import sys; |-m virtualenv", c)
    ]
    assert alone == []  # virtualenv runs in the repository


def test_search_path_keeps_packages_of_the_caller_and_nothing_else_in_front(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from _launch import search_path
    finally:
        sys.path.pop(0)
    target, scripts = tmp_path / "target", tmp_path / "scripts"
    (target / "torch-2.9.dist-info").mkdir(parents=True)
    scripts.mkdir()
    current = ["", str(scripts), str(target), "/lib/python311.zip", "/lib/python3.11", "/env/site-packages"]
    path, children = search_path(current, "/clone", [str(scripts), "", str(target), "/clone"])
    assert path == ["/clone", *current[3:5], str(target), current[5], str(scripts)]
    assert children == ["/clone", str(target)]


def test_an_environment_of_ours_ignores_the_callers_path(sandbox: Sandbox) -> None:
    command = f'. "{sandbox.repo}/scripts/_env.sh"; vispruner_env; vispruner_env; '
    command += 'echo "$PYTHONPATH:${_VP_PYTHONPATH-}"'
    for system, expected in (("", ""), ("1", "/modules")):
        environment = sandbox.environment(PYTHONPATH="/modules", VISPRUNER_SYSTEM_PYTHON=system)
        done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
        assert done.stdout == f"{sandbox.repo}:{expected}\n", done.stderr


# ---- folders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["quickstart.sh", "tiny/train.sh", "tables/tiny.sh", "v1_5/eval/pope.sh"])
def test_the_command_runs_in_the_callers_folder(sandbox: Sandbox, tmp_path: Path, script: str) -> None:
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    for folder in ("llava-tiny/model.safetensors", "eval/SHA256SUMS"):
        (sandbox.repo / "playground" / "tiny" / folder).parent.mkdir(parents=True)
        (sandbox.repo / "playground" / "tiny" / folder).write_text("")
    (sandbox.bin / "cksum").symlink_to(shutil.which("cksum"))
    done = sandbox.run("--data", "rel/ative", script=script, cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert set(sandbox.calls("cwd")) == {f"cwd {elsewhere}"}
    assert sandbox.calls("module")[-1].endswith("--data rel/ative")


def test_a_link_to_a_script_runs_it_and_a_copy_names_the_fix(sandbox: Sandbox, tmp_path: Path) -> None:
    """Slurm runs a copy of a batch script; `ln -s` of one into a folder of PATH is common."""
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    script = sandbox.repo / "scripts" / "v1_5" / "eval" / "pope.sh"
    (elsewhere / "link.sh").symlink_to(script)
    shutil.copy(script, elsewhere / "copy.sh")
    shutil.copy(sandbox.repo / "scripts" / "status.sh", elsewhere)

    def run(name: str) -> subprocess.CompletedProcess[str]:
        environment = sandbox.environment()
        command = ["bash", name, "64"]
        return subprocess.run(command, env=environment, cwd=elsewhere, capture_output=True, text=True)

    done = run("link.sh")
    assert done.returncode == 0, done.stderr
    assert "--benchmark pope --tokens 64" in sandbox.calls("module")[-1]
    for name, original in (("copy.sh", "v1_5/eval/pope.sh"), ("status.sh", "status.sh")):
        done = run(name)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"error: {name} is a copy. Run the script in its repository" in done.stderr
        assert done.stderr.endswith(f"bash REPOSITORY/scripts/{original}\n")


def test_a_path_with_a_leading_dash_is_not_an_option(sandbox: Sandbox, tmp_path: Path) -> None:
    variables = {"CKPT_DIR": "-c k", "CKPT": "x", "DATA_DIR": "-d", "OUT_DIR": "-o"}
    sandbox.run(script="v1_5/eval/pope.sh", **variables)
    call = sandbox.calls("module")[-1]
    assert "--model ./-c k/x " in call and "--data ./-d " in call and call.endswith("--output-dir ./-o")
    sandbox.run(script="tables/llava_1_5_7b.sh", OUT_DIR="-o")
    assert f"--results {tmp_path}/-o --output {tmp_path}/-o/tables" in sandbox.calls("module")[-1]
    assert (tmp_path / "-o").is_dir()


def test_paths_of_tests_are_the_callers_or_the_repositorys(tmp_path: Path) -> None:
    """The part of scripts/test.sh that reads arguments, alone."""
    text = (ROOT / "scripts" / "test.sh").read_text(encoding="utf-8")
    code = text[text.index("arguments=()") : text.index("cd -- ")] + "\nprintf '%s\\n' \"${arguments[@]}\"\n"
    (tmp_path / "pruning").mkdir()
    (tmp_path / "golden").write_text("")
    arguments = [
        "pruning",
        "pruning::test_a",
        "tests/model",
        "-k",
        "golden",
        "--junitxml=out.xml",
        "/x",
        "-q",
    ]
    done = subprocess.run(
        ["bash", "-euc", code, "_", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [
        f"{tmp_path}/pruning", f"{tmp_path}/pruning::test_a", "tests/model", "-k", "golden",
        f"--junitxml={tmp_path}/out.xml", "/x", "-q",
    ]  # fmt: skip


@pytest.fixture
def read_only(sandbox: Sandbox):
    """Run a command in bash as if the checkout were read-only, which root cannot arrange by permissions."""

    def run(command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        code = (
            f'. "{sandbox.repo}/scripts/_env.sh"\n'
            '_vp_writable() { case $1 in "$ROOT" | "$ROOT"/*) return 1 ;; *) return 0 ;; esac; }\n'
        )
        return subprocess.run(
            ["bash", "-c", code + command],
            env=sandbox.environment(**variables), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip

    return run


def test_a_read_only_checkout_needs_another_folder_for_the_environment(sandbox: Sandbox, read_only) -> None:
    message = failure(read_only("vispruner_env dev"))
    assert message.startswith(f"{sandbox.repo}/.venv: cannot be created or written: this folder is read-only")
    assert "export VENV=" in message and "space" not in message


def test_a_read_only_checkout_is_not_written_by_pip(sandbox: Sandbox, read_only, tmp_path: Path) -> None:
    """pip writes metadata into a checkout that it installs; here only the dependencies are installed."""
    site = tmp_path / "venv" / "lib" / "python3.11" / "site-packages"
    site.mkdir(parents=True)
    (tmp_path / "venv" / "pyvenv.cfg").write_text("")
    done = read_only("vispruner_env tiny; echo $PY", VENV=str(tmp_path / "venv"))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/venv/bin/python\n"), done.stderr
    (call,) = sandbox.calls("pip")
    assert f"-e {sandbox.repo}" not in call
    assert "torch>=2.6" in call and "onnx>=1.16" in call and "ruff" not in call
    assert (site / "vispruner-checkout.pth").read_text() == f"{sandbox.repo}\n"


@pytest.mark.skipif(os.getuid() != 0, reason="changing the user needs root")
def test_results_in_a_folder_of_another_user() -> None:
    folder = Path(tempfile.mkdtemp())  # tmp_path is closed to other users
    try:
        folder.chmod(0o755)
        code = f'. "{folder}/scripts/_env.sh"\n_vp_folder "$ROOT/outputs" OUT_DIR'
        (folder / "scripts").mkdir()
        shutil.copy(ROOT / "scripts" / "_env.sh", folder / "scripts" / "_env.sh")
        (folder / "scripts").chmod(0o755)
        (folder / "scripts" / "_env.sh").chmod(0o644)
        done = subprocess.run(
            ["bash", "-c", code], user=12345, group=12345, extra_groups=[], env={"PATH": os.defpath}, cwd="/",
            capture_output=True, text=True,
        )  # fmt: skip
        assert failure(done).startswith(f"{folder}/outputs: cannot be written.")
        assert "Set OUT_DIR to" in done.stderr
    finally:
        shutil.rmtree(folder)


def test_no_home_and_an_unknown_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("VISPRUNER_CACHE", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["unknown"])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert paths.cache_folder() == tmp_path / f"vispruner-{os.getuid()}"
    monkeypatch.setenv("VISPRUNER_CACHE", "given")
    assert paths.cache_folder() == Path("given")


def test_the_scripts_need_no_home(sandbox: Sandbox) -> None:
    environment = sandbox.environment()
    environment.pop("HOME", None)
    command = ["bash", str(sandbox.repo / "scripts" / "_env.sh"), "dev"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- check_versions.sh ------------------------------------------------------------------------------


def test_versions_without_any_python(sandbox: Sandbox, tmp_path: Path) -> None:
    for tool in ("sed", "cksum", "head"):
        (sandbox.bin / tool).unlink(missing_ok=True)
        (sandbox.bin / tool).symlink_to(shutil.which(tool))
    variables = {
        "HOME": str(tmp_path / "nobody"),
        "VERSIONS_DIR": str(tmp_path / "versions"),
        "PYENV_ROOT": "",
    }
    done = sandbox.run("--only", "pinned-3.12,pillow-10", script="check_versions.sh", **variables)
    assert done.returncode == 1
    header, *rows = done.stdout.splitlines()
    assert header.split()[:3] == ["combination", "Python", "torch"]
    assert [row.split()[0] for row in rows] == ["pinned-3.12", "pillow-10"]
    assert rows[0].endswith("not available: no Python 3.12")
    done = sandbox.run("--only", "pillow-9", script="check_versions.sh", **variables)
    assert failure(done).startswith("--only pillow-9: unknown combination.")


@pytest.mark.parametrize(
    "which, expected, absent",
    [
        ("pinned", "torch==2.", "torch==2.6.*"),
        ("oldest", "torch==2.6.* transformers==5.2.* pillow==10.* numpy==1.26.*", "pytest==8.*"),
        ("newest", "torch>=2.6 pillow>=10", "=="),
        ("transformers=oldest", "transformers==5.2.* pillow==1", "transformers==5.2."),
        ("pillow==12.*", "pillow==12.* transformers==5", "pillow==13"),
    ],
)
def test_requirements_of_a_combination(which: str, expected: str, absent: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "_requirements.py"), "versions", str(ROOT), which]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert all(any(line.startswith(word) for line in lines) for word in expected.split())
    if which != "transformers=oldest":
        assert not any(absent in line for line in lines)
