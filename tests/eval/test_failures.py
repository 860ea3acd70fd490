"""Questions that fail are listed beside the answers, asked again and marked; too many of them stop a run."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.answers import without_ids
from helpers.synthetic_pope import make_pope
from llava.eval import cli, model_vqa_loader, run, status, sweep
from llava.eval.store.answer_file import AnswerFile

MODEL = Path(__file__).parents[1] / "data" / "model" / "ckpt_llava15s"
FAST = ["--max-new-tokens", "2", "--batch-size", "4"]


@pytest.fixture
def data(tmp_path) -> Path:
    return make_pope(tmp_path / "pope", pictures=4, per_category=8)


def command(data: Path, output: Path, *more: str) -> list[str]:
    given = ["--benchmark", "pope", "--model", str(MODEL), "--data", str(data), "--output", str(output)]
    return [*given, "--tokens", "16", *FAST, *more]


def loader(data: Path, answers: Path, *more: str) -> list[str]:
    given = ["--model-path", str(MODEL), "--question-file", str(data / "llava_pope_test.jsonl")]
    given += ["--image-folder", str(data / "val2014"), "--answers-file", str(answers)]
    given += ["--visual_token_num", "16", "--temperature", "0", "--conv-mode", "vicuna_v1"]
    return [*given, *FAST, *more]


def damage(data: Path) -> dict[int, bytes]:
    """Make lines 2 and 4 of the question file impossible, and return the original lines by index."""
    path = data / "llava_pope_test.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    wrong = {1: "x" * 5000, 3: "../../etc/passwd"}
    for index, name in wrong.items():
        lines[index] = json.dumps({**json.loads(lines[index]), "image": name}).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    return wrong


def hide(data: Path) -> tuple[Path, set[int]]:
    """Move the first image away; return where it is and the indices of its questions."""
    rows = [json.loads(line) for line in (data / "llava_pope_test.jsonl").read_text().splitlines()]
    image = data / "val2014" / rows[0]["image"]
    image.rename(data / "hidden.png")
    return image, {index for index, row in enumerate(rows) if row["image"] == image.name}


def failures(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def states(folder: Path, capsys) -> list[dict]:
    capsys.readouterr()
    assert status.main([str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["runs"]


def test_failures_are_listed_asked_again_and_marked(data, tmp_path, capsys):
    image, lost = hide(data)
    out = tmp_path / "out"
    assert run.main(command(data, out)) == 1
    rows = failures(out / "failures.jsonl")
    assert {row["index"] for row in rows} == lost and list(rows[0]) == [
        *("question_id", "index", "file", "line", "image", "reason")
    ]
    assert all(row["image"] == str(image) and row["line"] == row["index"] + 1 for row in rows)
    assert "no such image" in rows[0]["reason"]
    (state,) = states(out, capsys)
    assert (state["state"], state["answered"], state["asked"]) == ("failed questions", 24 - len(lost), 24)
    assert state["failed"] == len(lost) and state["benchmark"] == "pope" and state["score"] > 0

    assert run.main(command(data, out)) == 1  # still missing: nothing is lost, nothing is repeated
    assert failures(out / "failures.jsonl") == rows
    (data / "hidden.png").rename(image)
    elsewhere = tmp_path / "elsewhere"  # with a package of the same name
    (elsewhere / "llava" / "eval").mkdir(parents=True)
    (elsewhere / "llava" / "eval" / "run.py").write_text("raise SystemExit(5)")
    done = subprocess.run(state["command"], shell=True, cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (out / "failures.jsonl").exists()
    answers = without_ids(out / "answers.jsonl")
    assert {row["metadata"]["index"] for row in answers if row["metadata"].get("retried")} == lost
    (state,) = states(out, capsys)
    assert (state["state"], state["answered"], state["failed"]) == ("finished", 24, 0)
    assert state["command"] is None


def test_failures_are_on_disk_during_the_run(data, tmp_path, monkeypatch):
    """A run that is killed cannot write them at its end."""
    hide(data)
    seen, write = set(), AnswerFile.write

    def look(self, answers):
        seen.update(path.name for path in tmp_path.glob("o*/*failures.jsonl") if failures(path))
        write(self, answers)

    monkeypatch.setattr(AnswerFile, "write", look)
    assert run.main(command(data, tmp_path / "o1")) == 1
    assert model_vqa_loader.main(loader(data, tmp_path / "o2" / "a.jsonl")) == 1
    assert seen == {"failures.jsonl", "a.failures.jsonl"}


def test_impossible_lines_cost_their_questions_only(data, tmp_path, capsys):
    damage(data)
    out = tmp_path / "out"
    assert run.main(command(data, out)) == 1
    said = capsys.readouterr().err
    assert "llava_pope_test.jsonl:2: image is 'xxx" in said and "outside the image folder" in said
    rows = failures(out / "failures.jsonl")
    assert [(row["line"], row["index"], row["question_id"]) for row in rows] == [
        (2, None, None),
        (4, None, None),
    ]
    (state,) = states(out, capsys)
    assert (state["state"], state["answered"], state["asked"], state["failed"]) == (
        "failed questions",
        22,
        24,
        2,
    )


def test_a_smaller_limit_keeps_the_other_failures(data, tmp_path):
    image, lost = hide(data)
    out = tmp_path / "out"
    assert run.main(command(data, out)) == 1
    (data / "hidden.png").rename(image)
    first = min(lost) + 1
    assert run.main(command(data, out, "--limit", str(first))) == 0
    assert {row["index"] for row in failures(out / "failures.jsonl")} == lost - {min(lost)}


def test_a_run_that_goes_wrong_is_stopped(data, tmp_path, capsys):
    rows = [json.loads(line) for line in (data / "llava_pope_test.jsonl").read_text().splitlines()]
    last = list(dict.fromkeys(row["image"] for row in rows))[2:]
    for name in last:  # the first two images are answered
        (data / "val2014" / name).write_bytes(b"")
    out = tmp_path / "out"
    assert run.main(command(data, out, "--max-failures", "3")) == 1
    captured = capsys.readouterr()
    assert "stopped, as 6 of 24 questions failed, and --max-failures is 3" in captured.err
    assert captured.err.count("llava_pope_test.jsonl:") == 3 and captured.out.count("{") == 0
    assert (out / "answers.jsonl").read_bytes().count(b"\n") == 12 and not (out / "score.json").exists()
    assert len(failures(out / "failures.jsonl")) == 6
    (state,) = states(out, capsys)
    assert (state["state"], state["answered"], state["failed"]) == ("interrupted", 12, 6)
    assert "--max-failures 3" in state["command"]
    assert run.main(command(data, out, "--max-failures", "0.4")) == 1
    assert "12 of 24 questions failed" in capsys.readouterr().err
    assert run.main(command(data, out, "--max-failures", "0.5")) == 1  # not more than half
    assert "stopped" not in capsys.readouterr().err and (out / "score.json").is_file()


def test_too_many_impossible_lines_stop_before_the_model_is_loaded(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llava.eval.jobs.session.load_model", lambda *_: pytest.fail("the model was loaded"))
    damage(data)
    for main, given in (
        (run.main, command(data, tmp_path / "run")),
        (model_vqa_loader.main, loader(data, tmp_path / "a.jsonl")),
    ):
        assert main([*given, "--max-failures", "1"]) == 1
        assert "2 of 24 questions failed" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["-1", "1.5", "nan", "many", "5%", ""])
def test_what_is_no_number_of_failures(data, tmp_path, text, capsys):
    with pytest.raises(SystemExit):
        run.main(command(data, tmp_path, f"--max-failures={text}"))
    assert "expected an integer >= 0, or a share" in capsys.readouterr().err


def test_a_sweep_is_stopped_and_lists_failures_per_setting(data, tmp_path, capsys):
    image, lost = hide(data)
    given = [
        "--benchmarks",
        "pope",
        "--model",
        str(MODEL),
        "--data",
        str(data),
        "--output",
        str(tmp_path / "s"),
    ]
    given += ["--methods", "none,random", "--tokens", "8", *FAST]
    assert sweep.main([*given, "--max-failures", "2"]) == 1
    assert f"{len(lost)} of 24 questions failed" in capsys.readouterr().err
    assert sweep.main(given) == 1
    for name in ("none", "random-8"):
        assert {row["index"] for row in failures(tmp_path / "s" / "pope" / name / "failures.jsonl")} == lost
    found = states(tmp_path, capsys)
    assert [Path(one["path"]).name for one in found] == ["none", "random-8"]
    assert {one["state"] for one in found} == {"failed questions"} and not any(
        one["differs"] for one in found
    )
    (data / "hidden.png").rename(image)
    assert sweep.main(given) == 0
    assert {one["state"] for one in states(tmp_path, capsys)} == {"finished"}


def test_several_processes_stop_together(data, tmp_path, capfd):
    rows = [json.loads(line) for line in (data / "llava_pope_test.jsonl").read_text().splitlines()]
    for name in list(dict.fromkeys(row["image"] for row in rows))[1:]:
        (data / "val2014" / name).write_bytes(b"")
    out = tmp_path / "out"
    assert run.main(command(data, out, "--num-processes", "2", "--max-failures", "0")) == 1
    assert "too many questions failed" in capfd.readouterr().err
    assert failures(out / "failures.jsonl") and not (out / "answers.jsonl").exists()
    (state,) = states(out, capfd)
    assert state["state"] == "interrupted" and "--num-processes 2" in state["command"]
    assert "--part" not in state["command"]


def test_llavas_loop_lists_its_failures_under_a_name_of_their_own(data, tmp_path, capsys):
    image, lost = hide(data)
    answers = tmp_path / "answers" / "4_0.jsonl"
    assert model_vqa_loader.main(loader(data, answers)) == 1
    assert {row["index"] for row in failures(answers.with_name("4_0.failures.jsonl"))} == lost
    (state,) = states(tmp_path / "answers", capsys)
    assert (state["path"], state["state"]) == (str(answers), "failed questions")
    (data / "hidden.png").rename(image)
    module, *again = shlex.split(state["command"].partition(" -m ")[2].rstrip(")"))
    assert module == "llava.eval.model_vqa_loader" and model_vqa_loader.main(again) == 0
    assert not answers.with_name("4_0.failures.jsonl").exists()
    marked = {row["metadata"]["index"] for row in without_ids(answers) if row["metadata"].get("retried")}
    assert marked == lost
    assert states(tmp_path / "answers", capsys)[0]["state"] == "finished"


def test_outside_images_are_answered_on_request(data, tmp_path):
    path = data / "llava_pope_test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    shutil.move(data / "val2014", tmp_path / "elsewhere")
    (data / "val2014").mkdir()
    (data / "val2014" / "other.png").write_bytes(b"")
    path.write_text(
        "".join(
            json.dumps({**row, "image": str(tmp_path / "elsewhere" / row["image"])}) + "\n" for row in rows
        )
    )
    assert run.main(command(data, tmp_path / "no")) == 1
    assert run.main(command(data, tmp_path / "yes", "--allow-outside-images")) == 0


def test_the_recorded_command_names_what_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt").mkdir()
    parser = run.build_parser()
    given = "--benchmark pope --model ckpt --data d --tokens none --seed -3 --fixed"
    args = parser.parse_args([*given.split(), "--num-chunks", "4", "--chunk-idx", "1"])
    said = cli.command_of(parser, args, ("num_chunks", "chunk_idx"))
    expected = f"llava.eval.run --benchmark pope --model {tmp_path}/ckpt --data {tmp_path}/d --tokens none "
    assert " ".join(said) == expected + f"--output-dir {tmp_path}/outputs --fixed --seed=-3"
    assert vars(parser.parse_args(said[1:])) | {"num_chunks": 4, "chunk_idx": 1} == {
        **vars(args),
        "model": f"{tmp_path}/ckpt",
        "data": tmp_path / "d",
        "output_dir": tmp_path / "outputs",
    }
    parser = sweep.build_parser()
    args = parser.parse_args(["--methods", "none,random", "--tokens", "8,none", "--model", "a/b"])
    said = cli.command_of(parser, args)
    assert vars(parser.parse_args(said[1:])) == {**vars(args), "output": tmp_path / "outputs" / "sweep"}


def test_status_needs_no_torch():
    code = "import sys, llava.eval.status\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
