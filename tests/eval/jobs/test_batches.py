"""Batch sizes: given, recorded or by the memory of a GPU; one for all processes; kept by a resumed run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from helpers.answers import without_ids
from helpers.loaded import share_models
from helpers.synthetic_pope import make_pope
from llava.eval import model_vqa_loader, run, sweep
from llava.eval.benchmarks import get_benchmark
from llava.eval.jobs import batches
from llava.eval.jobs.execute import SettingRun
from llava.eval.jobs.job import Job, read_task, resolve_job
from llava.eval.store.answer_file import AnswerFile
from llava.eval.store.run_record import RunRecord
from llava.model.checkpoint.config import stored_config
from llava.pruning import get_pruner

MODEL = Path(__file__).parents[2] / "data" / "model" / "ckpt_llava15s"
GB = 10**9


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_pope(tmp_path_factory.mktemp("data") / "pope", pictures=6, per_category=20)


@pytest.fixture(scope="module", autouse=True)
def shared():
    with pytest.MonkeyPatch.context() as patch:
        yield share_models(patch)


@pytest.fixture
def free(monkeypatch) -> dict[int, int]:
    """Pretend that there are GPUs with this much free memory; return it by number, to change it."""
    memory = {0: 1 * GB, 1: 2 * GB}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(memory))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (memory[torch.device(device).index or 0], 80 * GB)
    )
    return memory


def resolve(**given: object) -> Job:
    return resolve_job(MODEL, stored_config(MODEL), **{"device": "cuda", "max_new_tokens": 3, **given})


def size_of(job: Job, data: Path, *pruners: object) -> int:
    return batches.size_by_memory(job, read_task(get_benchmark("pope"), data), pruners)[0]


PRUNER = get_pruner("vispruner", 16)


def test_the_size_follows_from_memory_model_and_questions(data, free):
    free[0] = 80 * GB  # a small model: the bound
    assert size_of(resolve(), data, PRUNER) == 256
    free[0] = round(2.6 * GB)
    usual = size_of(resolve(), data, PRUNER)
    assert 1 < usual < 256
    assert size_of(resolve(max_new_tokens=4096), data, PRUNER) < usual
    assert size_of(resolve(), data, PRUNER, get_pruner("none")) <= size_of(
        resolve(), data, get_pruner("none")
    )
    free[0] = 0
    assert size_of(resolve(), data, PRUNER) == 1
    long = tmp_questions(data, "word " * 4000)
    free[0] = round(2.6 * GB)
    assert size_of(resolve(), long, PRUNER) < usual


def tmp_questions(data: Path, text: str) -> Path:
    folder = data.parent / "long" / "pope"
    shutil.copytree(data, folder, dirs_exist_ok=True)
    file = folder / "llava_pope_test.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "text": text + row["text"]}) + "\n" for row in rows))
    return folder


def test_processes_have_one_size_that_fits_all_of_them(free):
    free.update({0: 6 * GB, 1: 4 * GB})
    assert resolve().free_memory == 6 * GB
    assert resolve(device="cuda:1").free_memory == 4 * GB
    assert resolve(num_processes=2).free_memory == 4 * GB
    assert resolve(num_processes=4).free_memory == 2 * GB  # two on each
    free[2] = 1 * GB
    assert resolve(num_processes=2).free_memory == 4 * GB  # the third is not used


def test_what_the_process_itself_holds_is_free_for_it(free, monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GB)
    assert resolve().free_memory == 4 * GB


def test_resolving_a_job_does_not_look_at_the_gpu(free, monkeypatch):
    """A finished run, or one with --batch-size, needs no context on the GPU."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: pytest.fail("the GPU was asked"))
    assert resolve().batch_size is None and resolve(batch_size=8).batch_size == 8


def test_a_process_takes_the_size_that_another_one_recorded_first(data, free, tmp_path):
    """Processes of a launcher do not communicate, and shards depend on the size."""
    task, folder = read_task(get_benchmark("pope"), data), tmp_path / "run"
    free.update({0: 80 * GB, 1: round(2.6 * GB)})
    sizes = []
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        setting = SettingRun.open(resolve(device=device), task, PRUNER, folder, 2, command=["llava.eval.run"])
        sizes.append(setting.batch_size)
    assert len(set(sizes)) == 1 and 1 < sizes[0] < 256
    assert RunRecord.read(folder / "run.json").batch_size == sizes[0]


def test_a_record_of_another_run_decides_nothing(data, free, tmp_path):
    task, folder = read_task(get_benchmark("pope"), data), tmp_path / "run"
    free[0] = 80 * GB
    opened = {"size": 2, "command": ["llava.eval.run"]}
    first = SettingRun.open(resolve(max_new_tokens=4), task, PRUNER, folder, **opened)
    free[0] = round(2.6 * GB)
    second = SettingRun.open(resolve(max_new_tokens=5), task, PRUNER, folder, **opened)
    assert second.batch_size < first.batch_size == 256
    assert RunRecord.read(folder / "run.json").config == second.configuration.hash()


# --- commands, on a CPU ---------------------------------------------------------------------------


def command(data: Path, output: Path, *more: str) -> list[str]:
    given = ["--benchmark", "pope", "--model", str(MODEL), "--data", str(data), "--output", str(output)]
    return [*given, "--tokens", "16", "--max-new-tokens", "3", "--device", "cpu", *more]


def sizes(answers: Path) -> list[int]:
    return [row["metadata"]["batch_size"] for row in without_ids(answers)]


def test_a_run_is_resumed_with_the_size_it_began_with(data, tmp_path, capsys):
    assert run.main(command(data, tmp_path, "--batch-size", "8", "--limit", "20")) == 0
    capsys.readouterr()
    assert run.main(command(data, tmp_path, "--limit", "30")) == 0
    assert "batches of 8 questions, as recorded" in capsys.readouterr().out
    assert sizes(tmp_path / "answers.jsonl") == [8] * 30
    assert run.main(command(data, tmp_path, "--batch-size", "5", "--limit", "40")) == 0
    assert run.main(command(data, tmp_path, "--batch-size", "auto")) == 0
    assert sizes(tmp_path / "answers.jsonl") == [8] * 30 + [5] * 30
    assert RunRecord.read(tmp_path / "run.json").batch_size == 5


def test_a_killed_run_keeps_its_size(data, tmp_path, monkeypatch):
    """Also one that was killed before its first answer."""
    for answered in (0, 2):
        write, calls = AnswerFile.write, []

        def stopped(self, answers, write=write, calls=calls, answered=answered):
            calls.append(1)
            if len(calls) > answered:
                raise KeyboardInterrupt
            write(self, answers)

        with monkeypatch.context() as patch:
            patch.setattr(AnswerFile, "write", stopped)
            assert run.main(command(data, tmp_path, *(["--batch-size", "8"] if not answered else []))) == 130
    assert run.main(command(data, tmp_path)) == 0
    assert sizes(tmp_path / "answers.jsonl") == [8] * 60


def test_without_run_json_the_answers_tell_the_size(data, tmp_path):
    assert run.main(command(data, tmp_path, "--batch-size", "8", "--limit", "20")) == 0
    for damage in (lambda path: path.write_text("{"), lambda path: path.unlink()):
        damage(tmp_path / "run.json")
        assert run.main(command(data, tmp_path, "--limit", "30")) == 0
    assert sizes(tmp_path / "answers.jsonl") == [8] * 30


def test_a_sampled_run_is_resumed_without_its_batch_size_being_named(data, tmp_path, capsys):
    sampled = ["--temperature", "1", "--limit", "20"]
    assert run.main(command(data, tmp_path, *sampled, "--batch-size", "8")) == 0
    assert run.main(command(data, tmp_path, *sampled[:2], "--limit", "30")) == 0
    assert sizes(tmp_path / "answers.jsonl") == [8] * 30
    assert run.main(command(data, tmp_path, *sampled, "--batch-size", "4")) == 1
    assert "batch_size is 8 in the file, 4 in this run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "device", "size"), [([], "cpu", 64), ([], "cuda", 16), (["4"], "cuda", 4)]
)
def test_runs_of_versions_that_did_not_record_the_size(options, device, size, tmp_path):
    given = ["--batch-size", *options] if options else []
    flat = {"device": device, "temperature": 0.0}
    record = RunRecord(["llava.eval.run", *given], {}, "pope", 60, 0, "hash", flat, "2026")
    record.write(tmp_path / "run.json")
    assert RunRecord.read(tmp_path / "run.json").batch_size == size
    for wrong in (0, -1, True, "8", 2.0, None):
        changed = RunRecord(
            ["llava.eval.run"], {}, "pope", 60, 0, "hash", {**flat, "batch_size": wrong}, "2026"
        )
        assert changed.batch_size is None


def test_an_earlier_answer_file_is_resumed(data, tmp_path):
    """Its lines and its record have no batch size."""
    assert run.main(command(data, tmp_path, "--limit", "20")) == 0
    answers, record = tmp_path / "answers.jsonl", tmp_path / "run.json"
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    for row in rows:
        del row["metadata"]["batch_size"]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = json.loads(record.read_text())
    del document["configuration"]["batch_size"]
    record.write_text(json.dumps(document))
    assert run.main(command(data, tmp_path)) == 0
    made = [row["metadata"] for row in without_ids(answers)]
    assert len({one["config"] for one in made}) == 1 and [one.get("batch_size") for one in made[::20]] == [
        None,
        64,
        64,
    ]


def test_settings_of_a_sweep_keep_their_own_sizes(data, tmp_path, capsys):
    given = ["--benchmarks", "pope", "--model", str(MODEL), "--data", str(data), "--output", str(tmp_path)]
    given += ["--methods", "vispruner", "--ratios", "0.5", "--max-new-tokens", "3", "--device", "cpu"]
    assert sweep.main([*given, "--tokens", "16", "--limit", "20", "--batch-size", "8"]) == 0
    capsys.readouterr()
    assert sweep.main([*given, "--tokens", "16,8", "--limit", "30"]) == 0
    said = capsys.readouterr().out
    assert said.count("batches of 8 questions, as recorded") == 1
    assert json.loads(said.splitlines()[-1])["tables"][0]["vision"]["images"] > 0
    folder = tmp_path / "pope"
    assert sizes(folder / "vispruner-r0.5-16" / "answers.jsonl") == [8] * 30
    assert sizes(folder / "vispruner-r0.5-8" / "answers.jsonl") == [64] * 30


def test_shards_started_by_hand_have_one_size(data, tmp_path):
    """Shards of different sizes would overlap, or leave questions out."""
    shard = ["--num-chunks", "2", "--chunk-idx"]
    assert run.main(command(data, tmp_path, "--batch-size", "4", *shard, "0")) == 0
    assert run.main(command(data, tmp_path, *shard, "1")) == 0
    assert sizes(tmp_path / "answers.jsonl") == [4] * 60


def test_a_question_loop_keeps_its_size(data, tmp_path, capsys):
    given = ["--model-path", str(MODEL), "--question-file", str(data / "llava_pope_test.jsonl")]
    given += ["--image-folder", str(data / "val2014"), "--answers-file", str(tmp_path / "a.jsonl")]
    given += ["--temperature", "0", "--max_new_tokens", "3", "--device", "cpu", "--conv-mode", "vicuna_v1"]
    assert model_vqa_loader.main([*given, "--batch-size", "8"]) == 0
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:20]) + "\n")
    assert model_vqa_loader.main(given) == 0
    assert sizes(tmp_path / "a.jsonl") == [8] * 60
    assert RunRecord.read(tmp_path / "a.run.json").batch_size == 8


def test_a_run_by_memory_says_so_and_shares_the_number(data, free, tmp_path, capsys, monkeypatch):
    """The parent of several processes decides and records; a child reads it."""
    free.update({0: 80 * GB, 1: round(2.6 * GB)})
    monkeypatch.setattr("llava.eval.jobs.execute.start_processes", lambda *_: ["stopped here"])
    given = [one for one in command(data, tmp_path) if one not in ("--device", "cpu")]
    assert run.main([*given, "--num-processes", "2"]) == 1
    said = capsys.readouterr().out
    assert "batches of" in said and "by memory: 2.6 GB are free" in said
    size = RunRecord.read(tmp_path / "run.json").batch_size
    assert size is not None and 1 < size < 256 and f"batches of {size} questions" in said


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "automatic"])
def test_wrong_sizes_are_refused(text, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run.main(command(data, tmp_path, f"--batch-size={text}"))
    assert ended.value.code == 2
    assert "--batch-size: " in (said := capsys.readouterr().err) and "or 'auto'" in said
