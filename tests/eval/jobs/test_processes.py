"""Several processes for one run: dealt out by picture, killed and started again, equal to one process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from helpers.answers import without_ids
from helpers.synthetic_pope import make_pope
from llava.eval import run
from llava.eval.benchmarks.base import Question
from llava.eval.jobs import processes as workers
from llava.eval.jobs.job import resolve_job
from llava.eval.jobs.processes import RankInfo
from llava.model.checkpoint.config import stored_config

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "tests" / "data" / "model" / "ckpt_llava15s"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_pope(tmp_path_factory.mktemp("data") / "pope", pictures=12, per_category=60)


def arguments(data: Path, output: Path, *more: str) -> list[str]:
    return [
        "--benchmark",
        "pope",
        "--model",
        str(MODEL),
        "--data",
        str(data),
        "--output",
        str(output),
        "--tokens",
        "16",
        "--max-new-tokens",
        "4",
        "--batch-size",
        "4",
        *more,
    ]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> list[dict]:
    output = tmp_path_factory.mktemp("whole")
    assert run.main(arguments(data, output)) == 0
    return without_ids(output / "answers.jsonl")


# ---- who am I, what is mine -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, RankInfo()),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, RankInfo(3, 4, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, RankInfo()),
        ({"WORLD_SIZE": "4"}, RankInfo()),  # some clusters set it everywhere
        ({"RANK": "1", "WORLD_SIZE": "2"}, RankInfo(1, 2, 1)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}, RankInfo(5, 8, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, RankInfo()),  # a batch script, not one of its steps
        (
            {"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "9"},
            RankInfo(1, 2, 1),
        ),
    ],
)
def test_the_place_is_what_the_launcher_says(environment, place):
    assert workers.rank_info(environment) == place


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "one", "WORLD_SIZE": "2"}, {"RANK": "-1", "WORLD_SIZE": "2"}],
)
def test_a_place_that_cannot_be_is_an_error(environment):
    with pytest.raises(ValueError, match="RANK=.* WORLD_SIZE=2 .*not a valid rank"):
        workers.rank_info(environment)


def scattered(images: int, questions: int) -> list[Question]:
    return [Question(index, index, Path(f"{index * 7 % images}.png"), "?") for index in range(questions)]


@pytest.mark.parametrize(
    ("images", "count", "size", "batch"),
    [(40, 400, 3, 16), (7, 50, 2, 64), (3, 10, 8, 4), (500, 1500, 4, 16), (1, 9, 2, 4)],
)
def test_every_question_is_dealt_once_and_pictures_stay_together(images, count, size, batch):
    questions = scattered(images, count)
    shares, whole_batches = workers.shard(questions, batch, size)
    assert sorted(index for share in shares for index in share) == list(range(count))
    holders = {}
    for rank, share in enumerate(shares):
        for index in share:
            assert holders.setdefault(questions[index].image, rank) == rank
    largest = max(Counter(question.image for question in questions).values())
    if whole_batches:
        largest = max(largest, batch)
    assert max(map(len, shares)) - min(map(len, shares)) <= largest
    assert workers.shard(list(questions), batch, size) == (shares, whole_batches)


def test_batches_of_a_lone_process_stay_together():
    from llava.eval.inference.engine import plan

    questions = scattered(100, 300)
    shares, whole_batches = workers.shard(questions, 16, 4)
    assert whole_batches
    for wave in plan(questions, 16):
        asked = {place for batch in wave.batches for place in batch}
        assert sum(asked <= share for share in shares) == 1


def test_questions_without_picture_are_shared_out():
    questions = [
        Question(index, index, None if index % 2 else Path(f"{index}.png"), "?") for index in range(80)
    ]
    for batch in (4, 64):
        shares, _ = workers.shard(questions, batch, 2)
        assert [len(share) for share in shares] == [40, 40]


@pytest.mark.parametrize(
    ("given", "local_rank", "visible", "device"),
    [
        (None, 5, 4, "cuda:1"),
        ("cuda", 3, 4, "cuda:3"),
        (None, 3, 1, "cuda"),
        (None, None, 4, "cuda"),
        ("cuda:2", 1, 4, "cuda:2"),
        ("cpu", 1, 4, "cpu"),
    ],
)
def test_every_process_takes_a_gpu_of_its_own(monkeypatch, given, local_rank, visible, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: visible)
    assert (
        resolve_job(MODEL, stored_config(MODEL), given, "float32", "float32", local_rank=local_rank).device
        == device
    )


# ---- processes ------------------------------------------------------------------------------------


def start(arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "llava.eval.run", *arguments]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.kill()
        process.communicate()


def lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*_*.jsonl"))


def children(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def test_torchrun_on_two_nodes_gives_what_one_process_gives(data, whole, tmp_path):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    nodes = []
    for rank in "01":
        place = ["--nnodes", "2", "--node_rank", rank, "--nproc_per_node", "1"]
        place += ["--master_addr", "127.0.0.1", "--master_port", port, "-m", "llava.eval.run"]
        command = [sys.executable, "-m", "torch.distributed.run", *place, *arguments(data, tmp_path)]
        nodes.append(
            subprocess.Popen(
                command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    said = [node.communicate() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert without_ids(tmp_path / "answers.jsonl") == whole
    counts = [(tmp_path / f"2_{rank}.jsonl").read_bytes().count(b"\n") for rank in range(2)]
    assert sum(counts) == 180 and min(counts) > 60
    assert not list(tmp_path.glob("*.report.json"))
    documents = [json.loads(out.splitlines()[-1]) for out, _ in said]
    (scored,) = [document for document in documents if document["score"] is not None]
    assert scored["asked"] == 180  # by both together
    assert "".join(out for out, _ in said).count("POPE: 180 questions") == 1


def killed_in_the_middle(data, folder):
    """Start two processes, kill the second one after some answers; exit code, stdout, stderr of the start."""
    process = start(arguments(data, folder, "--processes", "2"))
    try:
        while process.poll() is None and not (folder / "2_1.jsonl").exists():
            time.sleep(0.01)
        second = next(
            (pid for pid in children(process) if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()),
            None,
        )
        while process.poll() is None and (folder / "2_1.jsonl").read_bytes().count(b"\n") < 10:
            time.sleep(0.001)
        if second is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(second, signal.SIGKILL)
        out, err = process.communicate(timeout=300)
    finally:
        end(process)
    return process.returncode, out, err


def test_killed_worker_and_the_same_again(data, whole, tmp_path, capsys):
    for attempt in range(3):  # a busy machine may let the run finish before we look
        folder = tmp_path / str(attempt)
        folder.mkdir()
        code, out, err = killed_in_the_middle(data, folder)
        if code:
            break
    tmp_path = folder
    assert code == 1, err
    assert "process 1 of 2 was killed by signal 9" in err and "of 180 questions have no answer" in err
    assert "process 0 of 2: asked 90 questions" in out and '"score"' not in out
    assert not (tmp_path / "answers.jsonl").exists()
    left = lines(tmp_path)
    assert 90 < left < 180
    for rank in "01":
        assert run.main(arguments(data, tmp_path, "--num-chunks", "2", "--chunk-idx", rank)) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["answered"] == 180 and 180 - left <= document["asked"] <= 181 - left  # one was incomplete
    assert document["llm_gflops"] > 0 and document["ci_low"] <= document["score"] <= document["ci_high"]
    assert without_ids(tmp_path / "answers.jsonl") == whole


@pytest.mark.parametrize("size", [1, 3])
def test_another_number_of_processes_goes_on(data, whole, tmp_path, size, capsys):
    left = [row for row in whole if row["metadata"]["index"] % 3]
    for rank in range(2):
        mine = [{**row, "answer_id": "x"} for row in left if row["question_id"] % 2 == rank]
        (tmp_path / f"2_{rank}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mine))
    asked = 0
    for rank in range(size):
        assert run.main(arguments(data, tmp_path, "--num-chunks", str(size), "--chunk-idx", str(rank))) == 0
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        asked = document["asked"]
    assert document["answered"] == 180 and asked == 60
    assert without_ids(tmp_path / "answers.jsonl") == whole


def test_interrupted_by_hand_takes_all_along(data, tmp_path):
    process = start(arguments(data, tmp_path, "--processes", "2"))
    try:
        while process.poll() is None and len(pids := children(process)) < 2:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    finally:
        end(process)
    assert process.returncode == 130 and "stopped; run the same command to resume" in err
    patience = time.monotonic() + 120  # one that was only just started sees that its parent is gone
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < patience:
        time.sleep(0.01)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_part_ends_when_the_one_that_started_it_is_gone(tmp_path):
    code = (
        "import os, time\nfrom llava.eval.jobs.processes import end_with_parent\n"
        "end_with_parent()\nprint('on', flush=True)\ntime.sleep(600)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout.readline() == b"on\n"
        child.stdin.close()  # as when the other is killed
        assert child.wait(timeout=120) == 143
    finally:
        child.kill()
        child.stdout.close()


def test_a_bad_picture_costs_its_questions_only(data, whole, tmp_path, capsys):
    copy = shutil.copytree(data, tmp_path / "pope")
    first = json.loads((copy / "llava_pope_test.jsonl").read_text().splitlines()[0])
    broken = copy / "val2014" / first["image"]
    content = broken.read_bytes()
    broken.write_bytes(b"no picture")
    out = tmp_path / "out"
    for rank in (0, 1):
        code = run.main(arguments(copy, out, "--num-chunks", "2", "--chunk-idx", str(rank)))
        assert code == rank  # the one that merges tells
    captured = capsys.readouterr()
    document = json.loads(captured.out.splitlines()[-1])
    assert document["answered"] == 180 - len(document["failures"]) < 180
    assert "questions were not answered" in captured.err
    failed = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert [f"{row['file']}:{row['line']}: {row['reason']}" for row in failed] == document["failures"]
    broken.write_bytes(content)
    assert run.main(arguments(copy, out)) == 0  # alone this time
    rows = without_ids(out / "answers.jsonl")
    retried = [row["metadata"]["index"] for row in rows if row["metadata"].pop("retried", False)]
    assert retried == [row["index"] for row in failed] and not (out / "failures.jsonl").exists()
    assert rows == whole


def test_processes_and_a_place_among_others_exclude_each_other(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        run.main(arguments(data, tmp_path, "--processes", "2"))
    assert "this is one of 2 processes already" in capsys.readouterr().err


def test_a_finished_run_starts_nobody(data, whole, tmp_path, capsys, monkeypatch):
    rows = [{**row, "answer_id": "x"} for row in whole]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("llava.eval.jobs.processes.start", lambda *_: pytest.fail("a process was started"))
    assert run.main(arguments(data, tmp_path, "--processes", "2")) == 0
    captured = capsys.readouterr().out
    assert "all questions are already answered" in captured and '"answered": 180' in captured
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(
            "llava.eval.jobs.session.load_model", lambda *_: pytest.fail("the model was loaded")
        )
        assert run.main(arguments(data, tmp_path)) == 0
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (document["score"] is None) == (rank == "1")


def test_a_finished_but_unordered_file_is_ordered_by_the_first_process(data, whole, tmp_path, monkeypatch):
    """A run of one process was killed between its last answer and the reordering."""
    rows = [{**row, "answer_id": "x"} for row in reversed(whole)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run.main(arguments(data, tmp_path)) == 0
    assert without_ids(tmp_path / "answers.jsonl") == whole


def test_gpus_are_dealt_out_in_turn(monkeypatch, tmp_path):
    seen = tmp_path / "seen"
    code = (
        "import os, sys\nopen(sys.argv[1], 'a').write(' '.join([os.environ['RANK'], "
        "os.environ['WORLD_SIZE'], os.environ['LOCAL_WORLD_SIZE'], os.environ['CUDA_VISIBLE_DEVICES']]) "
        "+ chr(10))\n"
        "sys.exit(3 if os.environ['RANK'] == '1' else 0)"
    )
    popen = subprocess.Popen

    def instead(command, **more):
        return popen([sys.executable, "-c", code, str(seen)], **more)

    monkeypatch.setattr(workers.subprocess, "Popen", instead)
    assert workers.start("llava.eval.run", [], 3, ["0", "GPU-4f"]) == ["process 1 of 3 failed (exit code 3)"]
    assert sorted(seen.read_text().splitlines()) == ["0 3 3 0", "1 3 3 GPU-4f", "2 3 3 0"]
