"""The command lines on a golden checkpoint: stopped at any instant and started again, in parts, as a grid."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.answers import without_ids
from helpers.synthetic_pope import make_pope
from llava.eval import model_vqa_loader, run, score, sweep

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "data" / "model" / "ckpt_llava15s"
FAST = ["--max-new-tokens", "3", "--batch-size", "8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_pope(tmp_path_factory.mktemp("data") / "pope", pictures=6, per_category=20)


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
        *FAST,
        *more,
    ]


def last(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    assert run.main(arguments(data, output)) == 0
    return output / "answers.jsonl"


def test_answers_stand_in_question_order_and_are_scored(data, whole, capsys):
    questions = [json.loads(line) for line in (data / "llava_pope_test.jsonl").read_text().splitlines()]
    rows = without_ids(whole)
    assert [(row["question_id"], row["prompt"]) for row in rows] == [
        (row["question_id"], row["text"]) for row in questions
    ]
    assert {row["metadata"]["visual_tokens"] for row in rows} == {16}
    assert len({row["text"] for row in rows}) > 5
    assert score.main(["--benchmark", "pope", "--data", str(data), "--answers", str(whole)]) == 0
    document = json.loads((whole.parent / "score.json").read_text())
    assert last(capsys)["score"] == document["score"] and document["asked"] == 60


def test_a_finished_run_is_only_scored_again(data, whole, capsys, monkeypatch):
    before = whole.stat().st_mtime_ns
    monkeypatch.setattr("llava.eval.jobs.session.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert run.main(arguments(data, whole.parent)) == 0
    document = last(capsys)
    assert document["asked"] == 0 and document["answered"] == 60 and document["questions_per_second"] > 0
    assert whole.stat().st_mtime_ns == before


def test_killed_in_the_middle_and_started_again(tmp_path):
    data = make_pope(tmp_path / "pope", pictures=6, per_category=100)
    more = ["--max-new-tokens", "6", "--batch-size", "4"]
    command = [sys.executable, "-m", "llava.eval.run", *arguments(data, tmp_path / "cut", *more)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    answers = tmp_path / "cut" / "answers.jsonl"
    for _ in range(3):  # a busy machine may let the run finish before we look
        shutil.rmtree(answers.parent, ignore_errors=True)
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        try:
            while process.poll() is None:
                if answers.exists() and answers.read_bytes().count(b"\n") >= 20:
                    break
                time.sleep(0.002)
        finally:
            process.kill()
            process.wait()
        if process.returncode == -signal.SIGKILL:
            break
    left = answers.read_bytes().count(b"\n")
    assert process.returncode == -signal.SIGKILL and 20 <= left <= 300
    answers.write_bytes(answers.read_bytes()[:-25])  # as if it had been killed within a write
    assert run.main(arguments(data, tmp_path / "cut", *more)) == 0
    document = json.loads((tmp_path / "cut" / "score.json").read_text())
    assert 300 - left <= document["asked"] <= 300 - left + 1
    assert run.main(arguments(data, tmp_path / "straight", *more)) == 0
    assert without_ids(answers) == without_ids(tmp_path / "straight" / "answers.jsonl")


def test_interrupted_by_hand(data, tmp_path, capsys, monkeypatch):
    from llava.eval.inference.engine import Engine

    ask, calls = Engine._answer, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ask(self, *arguments)

    monkeypatch.setattr(Engine, "_answer", interrupted)
    assert run.main(arguments(data, tmp_path)) == 130
    assert "stopped; run the same command to resume" in capsys.readouterr().err
    assert 0 < len((tmp_path / "answers.jsonl").read_bytes().splitlines()) < 60
    monkeypatch.undo()
    assert run.main(arguments(data, tmp_path)) == 0
    captured = capsys.readouterr()
    assert "resuming:" in captured.out and json.loads(captured.out.splitlines()[-1])["asked"] < 60


@pytest.mark.parametrize(
    "more, says",
    [
        (["--tokens", "32"], "tokens is 16 in the file, 32 in this run"),
        (["--method", "random"], "method is 'vispruner' in the file, 'random' in this run"),
        (["--tokens", "none"], "method is 'vispruner' in the file, 'none' in this run"),
        (["--conv-mode", "llava_v0"], "conv_mode is 'vicuna_v1' in the file, 'llava_v0' in this run"),
    ],
)
def test_another_configuration_is_refused_before_loading(data, whole, capsys, monkeypatch, more, says):
    monkeypatch.setattr("llava.eval.jobs.session.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert run.main(arguments(data, whole.parent, *more)) == 1
    assert says in capsys.readouterr().err


def test_bad_pictures_and_lines_stop_only_themselves(data, whole, tmp_path, capsys):
    copy = shutil.copytree(data, tmp_path / "pope")
    path = copy / "llava_pope_test.jsonl"
    lines = path.read_text().splitlines()
    broken = json.loads(lines[0])["image"]
    (copy / "val2014" / broken).write_bytes(b"no picture")
    lines[1] = '{"question_id": 2, "image":'
    path.write_text("\n".join(lines) + "\n")
    assert run.main(arguments(copy, tmp_path / "out")) == 1
    captured = capsys.readouterr()
    assert f"{path}:1: " in captured.err and broken in captured.err
    assert f"{path}:2: not a JSON" in captured.err
    lost = {1} | {number for number, line in enumerate(lines) if f'"{broken}"' in line}
    document = json.loads(captured.out.splitlines()[-1])
    assert document["answered"] == 60 - len(lost) and len(document["failures"]) == len(lost)
    texts = {row["question_id"]: row["text"] for row in without_ids(whole)}
    rows = without_ids(tmp_path / "out" / "answers.jsonl")
    assert all(row["text"] == texts[row["question_id"]] for row in rows)
    assert "--fixed" in captured.err  # the official scorer would misalign silently


def test_an_overflow_in_the_language_model_is_no_answer(data, tmp_path, capsys, monkeypatch):
    """POPE counts an empty answer as yes: 66.67 with exit code 0, if nobody looks."""
    from llava.eval.jobs import session

    load = session.load_model

    def overflowing(job):
        model, *others = load(job)
        model.lm_head.weight.data.fill_(float("nan"))
        return model, *others

    monkeypatch.setattr(session, "load_model", overflowing)
    assert run.main(arguments(data, tmp_path)) == 1
    said = capsys.readouterr().err
    assert "60 questions were not answered" in said and "llava_pope_test.jsonl:1: the language model" in said
    assert "NaN or infinite logits. The weights of the checkpoint" in said  # float32 has no overflow to avoid
    assert "no question could be answered" in said
    assert not (tmp_path / "answers.jsonl").exists()


def test_chunks_are_merged_by_the_last(data, whole, tmp_path, capsys):
    for index in (2, 0, 1):
        assert run.main(arguments(data, tmp_path, "--num-chunks", "3", "--chunk-idx", str(index))) == 0
        document = last(capsys)
        assert (document["score"] is None) == (index != 1)
    assert without_ids(tmp_path / "answers.jsonl") == without_ids(whole)
    joined = [line for index in range(3) for line in (tmp_path / f"3_{index}.jsonl").read_text().splitlines()]
    assert sorted((tmp_path / "answers.jsonl").read_text().splitlines()) == sorted(joined)


def test_llavas_script_in_chunks_and_cat(data, whole, tmp_path):
    parts = []
    for index in range(7):  # 60 questions in parts of 9
        parts.append(tmp_path / "answers" / f"7_{index}.jsonl")
        code = model_vqa_loader.main(
            [
                "--model-path",
                str(MODEL),
                "--question-file",
                str(data / "llava_pope_test.jsonl"),
                "--image-folder",
                str(data / "val2014"),
                "--answers-file",
                str(parts[-1]),
                "--num-chunks",
                "7",
                "--chunk-idx",
                str(index),
                "--temperature",
                "0",
                "--conv-mode",
                "vicuna_v1",
                "--visual_token_num",
                "16",
                "--important_ratio",
                "0.5",
                "--max_new_tokens",
                "3",
                "--batch-size",
                "8",
            ]
        )
        assert code == 0
    joined = tmp_path / "merge.jsonl"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert without_ids(joined) == without_ids(whole)


def test_wrong_arguments_are_told_before_anything_loads(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llava.eval.jobs.session.load_model", lambda *_: pytest.fail("the model was loaded"))
    for more, says in (
        (["--ratio", "1.5"], "from 0 to 1"),
        (["--tokens", "-3"], "expected an integer >= 0"),
        (["--method", "vispruned"], "did you mean 'vispruner'"),
        (["--conv-mode", "v9"], "no such template"),
        (["--model", "/nowhere/at/all"], "no such folder"),
        (["--device", "tpu9"], "no such device"),
        (["--num-chunks", "2", "--chunk-idx", "2"], "numbered 0 to 1"),
    ):
        with pytest.raises(SystemExit) as caught:
            run.main(arguments(data, tmp_path, *more))
        assert caught.value.code == 2 and says in capsys.readouterr().err, more
    assert run.main(arguments(tmp_path / "nothing", tmp_path)) == 1
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, method, tokens",
    [
        (["--tokens", "none"], "none", 64.0),
        (["--tokens", "0"], "vispruner", 0.0),
        (["--tokens", "900"], "vispruner", 64.0),
        (["--tokens", "9", "--method", "fastervlm"], "fastervlm", 9.0),
    ],
)
def test_budgets(data, tmp_path, capsys, more, method, tokens):
    assert run.main(arguments(data, tmp_path, "--limit", "4", *more)) == 0
    document = last(capsys)
    assert (document["method"], document["visual_tokens"], document["answered"]) == (method, tokens, 4)


def test_settings_from_the_environment(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VISPRUNER_TOKENS", "7")
    monkeypatch.setenv("VISPRUNER_METHOD", "random")
    plain = [part for part in arguments(data, tmp_path, "--limit", "4") if part not in ("--tokens", "16")]
    assert run.main(plain) == 0
    document = last(capsys)
    assert (document["method"], document["tokens"], document["visual_tokens"]) == ("random", 7, 7.0)


def test_sweep_keeps_answers_that_have_no_local_number(data, tmp_path, capsys, monkeypatch):
    from llava.eval.benchmarks import DataError, get_benchmark

    def no_labels(*_, **__):
        raise DataError("the labels of this set are not public")

    monkeypatch.setattr(type(get_benchmark("pope")), "per_image_counts", no_labels)
    assert (
        sweep.main(
            [
                "--model",
                str(MODEL),
                "--data",
                str(data),
                "--output",
                str(tmp_path),
                "--tokens",
                "8",
                "--methods",
                "random",
                *FAST,
            ]
        )
        == 0
    )
    captured = capsys.readouterr()
    assert "labels of this set are not public" in captured.out
    assert json.loads(captured.out.splitlines()[-1])["tables"] == []
    assert len(without_ids(tmp_path / "pope" / "random-8" / "answers.jsonl")) == 60


def test_sweep_fills_a_grid_in_one_pass_and_goes_on(data, whole, tmp_path, capsys, monkeypatch):
    from llava.model.llava_arch import LlavaMetaForCausalLM

    encode, seen = LlavaMetaForCausalLM.encode_vision, []
    monkeypatch.setattr(
        LlavaMetaForCausalLM,
        "encode_vision",
        lambda self, images, sizes=None: seen.extend(sizes) or encode(self, images, sizes),
    )
    command = [
        "--model",
        str(MODEL),
        "--data",
        str(data),
        "--output",
        str(tmp_path),
        "--tokens",
        "16,8",
        "--methods",
        "none,random,vispruner",
        "--ratios",
        "0.5,0",
        *FAST,
    ]
    assert sweep.main(command) == 0
    assert len(seen) == 6  # pictures, for seven cells
    table = last(capsys)["tables"][0]
    names = [cell["cell"] for cell in table["cells"]]
    assert names == [
        "none",
        "random-16",
        "vispruner-r0.5-16",
        "vispruner-r0-16",
        "random-8",
        "vispruner-r0.5-8",
        "vispruner-r0-8",
    ]
    assert [cell["visual_tokens"] for cell in table["cells"]] == [64, 16, 16, 16, 8, 8, 8]
    assert all(cell["low"] <= cell["score"] <= cell["high"] for cell in table["cells"])
    gflops = [cell["llm_gflops"] for cell in table["cells"]]
    assert gflops[0] > gflops[1] == gflops[2] > gflops[4] > 0
    assert all(cell["speed"]["asked"] == 60 for cell in table["cells"])
    assert all(cell["speed"]["questions_per_second"] > 0 for cell in table["cells"])
    assert {(row["a"], row["b"]) for row in table["paired"]} >= {
        ("vispruner-r0.5-16", "none"),
        ("vispruner-r0.5-8", "random-8"),
        ("vispruner-r0.5-8", "vispruner-r0-8"),
    }
    cell = tmp_path / "pope" / "vispruner-r0.5-16" / "answers.jsonl"
    texts = [row["text"] for row in without_ids(cell)]
    assert texts == [row["text"] for row in without_ids(whole)]

    monkeypatch.setattr("llava.eval.jobs.session.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert sweep.main(command) == 0
    captured = capsys.readouterr()
    assert "7 settings, 7 already finished" in captured.out
    assert json.loads(captured.out.splitlines()[-1])["tables"][0]["cells"] == table["cells"]
    monkeypatch.undo()

    cell.write_bytes(b"".join(cell.read_bytes().splitlines(keepends=True)[:40]))
    assert sweep.main(command) == 0
    again = last(capsys)["tables"][0]["cells"]
    assert [row["text"] for row in without_ids(cell)] == texts
    assert again[2]["speed"]["asked"] == 20 and again[1] == table["cells"][1]


def test_bundled_ones_are_announced_first(tmp_path, capsys, monkeypatch, data):
    monkeypatch.setattr("llava.paths.BUNDLED_MODEL", MODEL)
    monkeypatch.setattr("llava.paths.BUNDLED_MODELS", (MODEL,))
    monkeypatch.setattr("llava.paths.BUNDLED_DATA", data.parent)
    short = ["--benchmark", "pope", "--tokens", "16", *FAST, "--output"]
    assert run.main([*short, str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("Using the bundled model and data")
    assert run.main([*short, str(tmp_path / "b"), "--data", str(data)]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("Using the bundled model of")
    assert run.main([*short, str(tmp_path / "b"), "--data", str(data), "--model", str(MODEL)]) == 0
    assert capsys.readouterr().out.startswith("Using the bundled model of")  # however it is named
    monkeypatch.setattr("llava.paths.BUNDLED_MODELS", (tmp_path,))
    assert run.main([*short, str(tmp_path / "b"), "--data", str(data), "--model", str(MODEL)]) == 0
    assert capsys.readouterr().out.startswith("POPE: 60 questions")


def test_the_script_takes_its_settings_from_the_environment(data, tmp_path):
    environment = {
        **os.environ,
        "VISPRUNER_SYSTEM_PYTHON": "1",
        "PYTHON": sys.executable,
        "CKPT_DIR": str(MODEL.parent),
        "CKPT": MODEL.name,
        "DATA_DIR": str(data.parent),
        "OUT_DIR": str(tmp_path / "out"),
        "METHOD": "fastervlm",
        "VISPRUNER_PROCESSES": "2",
    }
    script = ROOT / "scripts" / "v1_5" / "eval" / "pope.sh"
    done = subprocess.run(
        ["bash", str(script), "16", "0.5", *FAST],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert (document["method"], document["tokens"], document["answered"]) == ("fastervlm", 16, 60)
    assert document["asked"] == 60 and "process 1 of 2: asked 30 questions" in done.stdout
    assert Path(document["answers"]).parent == tmp_path / "out" / "pope" / MODEL.name / "fastervlm-16"


@pytest.mark.parametrize(
    ("given", "folder", "tokens"),
    [
        (["--tokens", "16"], "vispruner-r0.5-16", 16),
        (["--tokens", "16", "--ratio", "0.50"], "vispruner-r0.5-16", 16),
        (["--tokens", "16", "--ratio", "0.5", "--tokens", "8", "--ratio=0.25"], "vispruner-r0.25-8", 8),
        (["--tokens", "16", "--ratio", "0.5", "--method", "random"], "random-16", 16),
        (["--tokens", "FULL"], "none", None),
    ],
)
def test_the_folder_is_named_by_what_is_asked(data, tmp_path, capsys, given, folder, tokens):
    more = ["--data", str(data.parent), "--output-dir", str(tmp_path), "--limit", "2"]
    assert run.main(["--benchmark", "pope", "--model", str(MODEL), *FAST, *more, *given]) == 0
    document = last(capsys)
    assert (document["tokens"], document["method"]) == (tokens, folder.split("-")[0])
    assert Path(document["answers"]).parent == tmp_path / "pope" / MODEL.name / folder


@pytest.mark.parametrize(
    ("benchmark", "given", "says"),
    [
        (
            "mme",
            "{data}/..",
            "contains neither llava_mme.jsonl nor a folder MME with it. Run python -m "
            "llava.eval.data check mme to see",
        ),
        ("gqa", None, "GQA: no bundled data ("),
        ("msvd", None, "no bundled data ("),
    ],
)
def test_data_not_there_is_told_in_one_line(data, tmp_path, capsys, monkeypatch, benchmark, given, says):
    monkeypatch.setattr("llava.paths.BUNDLED_DATA", tmp_path)
    monkeypatch.setattr("llava.paths.BUNDLED_CLIPS", tmp_path)
    more = ["--data", given.format(data=data)] if given else []
    assert run.main(["--benchmark", benchmark, "--model", str(MODEL), *more]) == 1
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_a_file_without_any_question_says_why(data, tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps([{"id": 1, "conversations": []}]) + "\n")
    given = ["--model-path", str(MODEL), "--question-file", str(path), "--image-folder", str(tmp_path)]
    assert model_vqa_loader.main([*given, "--answers-file", str(tmp_path / "a.jsonl")]) == 1
    said = capsys.readouterr().err
    missing = "missing key 'question_id', 'text', found 'id', 'conversations'"
    assert f"q.jsonl:1: entry 1: {missing}" in said and "no readable question" in said


def test_the_base_of_a_partial_checkpoint_is_part_of_the_configuration():
    from llava.eval.jobs.job import _weights

    alone = _weights(MODEL, None)
    here, other = (_weights(MODEL, str(base)) for base in (MODEL, MODEL.with_name("ckpt_llava16s")))
    assert len({alone, here, other, _weights(MODEL, "lmsys/vicuna-7b")}) == 4


def test_a_checkpoint_that_cannot_be_loaded_is_one_clear_line(data, tmp_path, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(MODEL, folder)
    shutil.copytree(MODEL.with_name("ckpt_clip336p42"), folder / "ckpt_clip336p42")
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    given = arguments(data, tmp_path / "out", "--model", str(folder))
    assert run.main(given) == 1
    assert "error: " + str(folder) in capsys.readouterr().err
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(SystemExit):
        run.main(given)
    assert f"{folder}/config.json: not valid JSON" in capsys.readouterr().err
    assert not (tmp_path / "out" / "answers.jsonl").exists()


def test_what_an_argument_overrules_may_be_wrong(data, tmp_path, monkeypatch):
    monkeypatch.setenv("VISPRUNER_TOKENS", "many")
    monkeypatch.setenv("VISPRUNER_RATIO", "7")
    assert run.main(arguments(data, tmp_path, "--ratio", "0.5", "--limit", "2")) == 0
    zeros = ["--tokens", "0", "--ratio", "0"]  # given, although false
    assert run.main(arguments(data, tmp_path / "zero", *zeros, "--limit", "2")) == 0


@pytest.mark.parametrize("module", ["run", "sweep", "score", "model_vqa_loader"])
def test_help_needs_no_torch(module):
    code = (
        f"import sys, llava.eval.{module} as m\n"
        "try: m.main(['--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
