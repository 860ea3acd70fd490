"""Steps: what is skipped, what runs again, and what happens to failures and interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava.eval.benchmarks import DataError
from llava.eval.jobs import steps
from llava.eval.jobs.steps import Step, StepRunner


def make(tmp_path, shell='echo "a,b" > "$OUT/t.csv"; echo "$X" >> "$OUT/count"', **more):
    folder = tmp_path / "out" / more.get("name", "one")
    command = ("bash", "-c", f"OUT={folder}; {shell}")
    return Step(**{"name": "kind/one", "title": "One", "command": command, "folder": folder, **more})


@pytest.fixture
def runner(tmp_path):
    return StepRunner(tmp_path / "steps")


def count(step):
    return len((step.folder / "count").read_text().splitlines())


def run_if_needed(runner, step):
    if runner.state(step) != steps.DONE:
        runner.run(step)


def test_a_step_runs_once(tmp_path, runner):
    step = make(tmp_path)
    assert runner.state(step) == steps.TO_RUN and runner.record(step) is None
    record = runner.run(step)
    assert (record["state"], list(record["outputs"])) == ("done", ["t.csv"])
    assert record["commit"] and "Python 3" in record["machine"] and record["command"].startswith("bash -c")
    begin = time.perf_counter()
    run_if_needed(runner, step)
    assert time.perf_counter() - begin < 0.1 and count(step) == 1


def test_it_runs_again_where_something_changed(tmp_path, runner, monkeypatch):
    (tmp_path / "in.txt").write_text("1")
    (tmp_path / "folder").mkdir()
    inputs = (tmp_path / "in.txt", tmp_path / "folder", tmp_path / "none")
    step = make(tmp_path, inputs=inputs)
    changes = [
        lambda: None,
        lambda: (tmp_path / "in.txt").write_text("2"),
        lambda: (tmp_path / "folder" / "new").write_text(""),
        lambda: (tmp_path / "none").write_text(""),
        lambda: (step.folder / "t.csv").unlink(),
        lambda: (step.folder / "t.csv").write_text("cut"),
        lambda: (tmp_path / "steps" / "kind" / "one.json").write_text('{"state": "do'),
        lambda: (tmp_path / "steps" / "kind" / "one.json").write_text("[1]"),
        lambda: monkeypatch.setattr(steps, "code_hash", lambda: "new code"),
    ]
    for number, change in enumerate(changes, 1):
        change()
        assert runner.state(step) == steps.TO_RUN, number
        run_if_needed(runner, step)
        assert count(step) == number
    other = make(tmp_path, inputs=inputs, environment={"X": "1"})
    assert runner.state(step) == steps.DONE and runner.state(other) == steps.TO_RUN
    os.utime(tmp_path / "in.txt", (1, 1))  # small files count by content
    assert runner.state(step) == steps.DONE


@pytest.mark.parametrize(
    "shell, tail",
    [
        ("echo error: broke; exit 3", ["error: broke", "exit code 3"]),
        ("echo nothing", ["nothing", "wrote nothing below"]),
        ("touch $OUT/.hidden.csv", ["wrote nothing below"]),
    ],
)
def test_failures_keep_the_end_of_the_log_and_run_again(shell, tail, tmp_path, runner):
    step = make(tmp_path, shell)
    record = runner.run(step)
    assert record["state"] == "failed" and len(record["tail"]) == len(tail)
    assert all(found.startswith(want) for found, want in zip(record["tail"], tail, strict=True))
    assert runner.state(step) == steps.FAILED


def test_a_step_whose_needs_are_missing_is_not_started(tmp_path, runner):
    step = make(tmp_path, needs=(tmp_path / "scores",))
    assert "scores: not there" in runner.run(step)["tail"][0] and not step.folder.exists()
    (tmp_path / "scores").mkdir()
    assert runner.state(step) == steps.TO_RUN and runner.run(step)["state"] == "done"
    (tmp_path / "scores" / "score.json").write_text("{}")
    assert runner.state(step) == steps.TO_RUN
    assert runner.state(make(tmp_path, missing="no data")) == steps.MISSING


def test_the_document_is_the_last_line(tmp_path, runner):
    step = make(tmp_path, "touch $OUT/a.png; echo text; echo '{\"a\": 1}'")
    assert runner.document(step) == {}
    runner.run(step)
    assert runner.document(step) == {"a": 1}
    for text in ("", "not json", "[1]"):
        (tmp_path / "steps" / "kind" / "one.log").write_text(text)
        assert runner.document(step) == {}


def test_two_processes_do_not_share_a_folder(runner):
    with runner.alone(), pytest.raises(DataError, match="in use by another process"):
        with StepRunner(runner.folder).alone():
            pass
    with runner.alone():
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_stops_the_command_and_leaves_no_record(number, tmp_path):
    """The command gets the signal once and finishes what it writes; nothing outlives this process."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(steps.__file__).parents[3])!r})
from pathlib import Path
from llava.eval.jobs.steps import Step, StepRunner
out = {str(tmp_path / "out")!r}
shell = f"trap 'echo stopped > {{out}}/stopped; exit 1' INT; sleep 60 & echo $! > {{out}}/pid; wait"
step = Step("one", "One", ("bash", "-c", shell), Path({str(tmp_path)!r}) / "out")
try:
    StepRunner(Path({str(tmp_path)!r}) / "steps").run(step)
except KeyboardInterrupt:
    sys.exit(130)
"""
    child = subprocess.Popen([sys.executable, "-c", code])
    pid = tmp_path / "out" / "pid"
    for _ in range(300):
        if pid.is_file() and pid.read_text().strip():
            break
        time.sleep(0.1)
    child.send_signal(number)
    assert child.wait(30) == 130
    assert (tmp_path / "out" / "stopped").is_file() and not (tmp_path / "steps" / "one.json").exists()
    for _ in range(100):
        if not is_running(int(pid.read_text())):
            return
        time.sleep(0.05)
    pytest.fail("a command outlived the process that started it")


def is_running(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_commands_are_shown_as_one_types_them(tmp_path):
    launcher = str(steps.REPOSITORY / "scripts" / "_launch.py")
    words = (
        sys.executable,
        launcher,
        "llava.eval.run",
        "--data",
        str(steps.REPOSITORY / "playground"),
        "a b",
    )
    step = make(tmp_path, command=words, environment={"OUT_DIR": "x"})
    assert step.shown() == "OUT_DIR=x python -m llava.eval.run --data playground 'a b'"
    assert json.dumps(steps.fingerprint(tmp_path / "none")) == "null"
