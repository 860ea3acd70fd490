"""The driver on a golden checkpoint: merging, resuming, ordering, limits, conversation templates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.answers import without_ids
from helpers.synthetic_pope import make_pope
from llava.eval import run, sweep
from llava.eval.benchmarks import Answer, get_benchmark
from llava.eval.jobs import execute
from llava.eval.jobs.job import Task, common_anyres, read_task, resolve_job, resolve_pruner
from llava.eval.store.answer_file import AnswerFile
from llava.model.checkpoint.config import stored_config

MODEL = Path(__file__).parents[2] / "data" / "model" / "ckpt_llava15s"
FAST = ["--max-new-tokens", "3", "--batch-size", "8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_pope(tmp_path_factory.mktemp("data") / "pope", pictures=6, per_category=20)


def command(data: Path, output: Path, *more: str) -> list[str]:
    given = ["--benchmark", "pope", "--model", str(MODEL), "--data", str(data), "--output", str(output)]
    return [*given, "--tokens", "16", *FAST, *more]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    assert run.main(command(data, output)) == 0
    return output / "answers.jsonl"


def opened(data: Path, folder: Path) -> tuple[Task, execute.SettingRun]:
    pruner, anyres = resolve_pruner(stored_config(MODEL), "vispruner", 16, 0.5)
    job = resolve_job(MODEL, stored_config(MODEL), "cpu", batch_size=8, anyres=anyres, max_new_tokens=3)
    task = read_task(get_benchmark("pope"), data)
    return task, execute.SettingRun.open(job, task, pruner, folder, 2)


def test_a_process_that_finishes_during_the_merge_does_no_harm(data, tmp_path, monkeypatch):
    """Its shard is rewritten in question order: locations found before that are worthless."""
    task, setting = opened(data, tmp_path)
    shards, questions = setting.shards, task.questions
    answers = [Answer(question.index, f"text {question.index}", 16) for question in questions]
    files = [
        AnswerFile(shards.path(rank, 2), questions, setting.configuration, range(rank, 60, 2))
        for rank in range(2)
    ]
    for rank in range(2):
        files[rank].write([one for one in reversed(answers) if one.index % 2 == rank])
    files[0].finalize()
    shards.write_report(0, 2, execute.ShardReport(setting.configuration.hash()))
    scan = type(shards).scan

    def scan_and_let_the_other_finish(self):
        found = scan(self)
        if files[1] is not None:
            files[1].finalize()
            shards.write_report(1, 2, execute.ShardReport(setting.configuration.hash()))
            files[1] = None
        return found

    monkeypatch.setattr(type(shards), "scan", scan_and_let_the_other_finish)
    missing, merged = execute.merge(task, setting, 2, rank=0)
    if not merged:  # the other process has reported by now: it merges
        missing, merged = execute.merge(task, setting, 2, rank=1)
    assert (missing, merged) == (0, True)
    assert [row["text"] for row in without_ids(setting.answers)] == [one.text for one in answers]


def test_a_sweep_killed_before_the_reordering_is_ordered_by_the_next_start(data, whole, tmp_path, capsys):
    folder = tmp_path / "pope" / "vispruner-r0.5-16"
    folder.mkdir(parents=True)
    lines = whole.read_text().splitlines()
    (folder / "answers.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    given = ["--benchmarks", "pope", "--model", str(MODEL), "--data", str(data), "--output", str(tmp_path)]
    assert sweep.main([*given, "--methods", "vispruner", "--tokens", "16", "--ratios", "0.5", *FAST]) == 0
    assert (folder / "answers.jsonl").read_text().splitlines() == lines
    score = json.loads((folder / "score.json").read_text())["score"]
    assert score == json.loads(whole.with_name("score.json").read_text())["score"]


def test_a_limited_run_is_continued_without_the_limit(data, whole, tmp_path, capsys):
    assert run.main(command(data, tmp_path, "--limit", "20")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["answered"] == 20
    assert run.main(command(data, tmp_path)) == 0
    said = capsys.readouterr().out
    document = json.loads(said.splitlines()[-1])
    assert "resuming: 20 of 60" in said
    assert (document["answered"], document["generated"]) == (60, 40)
    assert without_ids(tmp_path / "answers.jsonl") == without_ids(whole)


def test_a_limit_on_a_finished_run_scores_a_part_and_keeps_the_rest(data, whole, tmp_path, capsys):
    shutil.copytree(whole.parent, tmp_path / "run")
    before = (tmp_path / "run" / "score.json").read_bytes()
    assert run.main(command(data, tmp_path / "run", "--limit", "20")) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["answered"], document["generated"], document["questions"]) == (20, 0, 20)
    assert len(without_ids(tmp_path / "run" / "answers.jsonl")) == 60
    assert (tmp_path / "run" / "score.json").read_bytes() == before


def test_score_files_of_run_and_sweep_have_one_schema(data, whole, tmp_path):
    given = ["--benchmarks", "pope", "--model", str(MODEL), "--data", str(data), "--output", str(tmp_path)]
    assert sweep.main([*given, "--methods", "vispruner", "--tokens", "16", "--ratios", "0.5", *FAST]) == 0
    of_run = json.loads(whole.with_name("score.json").read_text())
    of_sweep = json.loads((tmp_path / "pope" / "vispruner-r0.5-16" / "score.json").read_text())
    assert set(of_run) == set(of_sweep)
    for key in ("score", "ci_low", "ci_high", "llm_gflops", "answered", "questions", "setting", "config"):
        assert of_run[key] == of_sweep[key], key
    assert "answers" not in of_run and of_run["answers_file"] == str(whole)


def test_the_conversation_is_the_checkpoints(tmp_path, capsys):
    config = json.loads((MODEL / "config.json").read_text())
    folder = tmp_path / "llava-v1.6-mistral-7b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llava_mistral"}))
    job = resolve_job(folder, stored_config(folder), "cpu")
    assert (job.conv_mode, job.warnings) == ("mistral_instruct", ())
    other = resolve_job(folder, stored_config(folder), "cpu", conv_mode="vicuna_v1")
    assert other.conv_mode == "vicuna_v1" and "calls for mistral_instruct" in other.warnings[0]
    assert resolve_job(MODEL, stored_config(MODEL), "cpu").conv_mode == "vicuna_v1"
    with pytest.raises(ValueError, match="--conv-mode v9: no such template. Choose from"):
        resolve_job(MODEL, stored_config(MODEL), "cpu", conv_mode="v9")


def test_a_checkpoint_on_the_hub_decides_dtype_and_crops(tmp_path, monkeypatch):
    """Its config.json is read before the defaults are chosen."""
    (tmp_path / "config.json").write_text('{"torch_dtype": "bfloat16", "image_aspect_ratio": "anyres"}')
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "config.json"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config = stored_config("owner/llava-next")
    assert resolve_job("owner/llava-next", config, "cuda").dtype == "bfloat16"
    assert common_anyres(config, None) == "paper" and common_anyres(config, "llava") == "llava"


# --- what decides answers -----------------------------------------------------------------------


def with_files(folder: Path, config: dict | None = None, generation: dict | None = None) -> Path:
    """Copy the checkpoint with other entries in config.json and generation_config.json."""
    model = folder / "model"
    shutil.copytree(MODEL, model)
    shutil.copytree(MODEL.parent / "ckpt_clip336p42", folder / "ckpt_clip336p42")
    for name, entries in (("config.json", config), ("generation_config.json", generation)):
        stored = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**stored, **(entries or {})}))
    return model


def test_published_is_recorded_and_another_configuration(data, whole, tmp_path, capsys):
    shutil.copytree(whole.parent, tmp_path / "run")
    assert run.main(command(data, tmp_path / "run", "--preset", "published")) == 1
    assert "preset is 'exact' in the file, 'published' in this run" in capsys.readouterr().err
    assert run.main(command(data, tmp_path / "new", "--preset", "published")) == 0
    captured = capsys.readouterr()
    assert "preset published" in captured.out and "float32 on a CPU" in captured.err
    assert json.loads((tmp_path / "new" / "score.json").read_text())["preset"] == "published"
    assert json.loads(whole.with_name("score.json").read_text())["preset"] == "exact"
    made = without_ids(tmp_path / "new" / "answers.jsonl")[0]["metadata"]
    assert (made["preset"], made["tower_dtype"], made["anyres"]) == ("published", "float32", "paper")


def test_what_contradicts_the_preset_is_refused_before_loading(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llava.eval.jobs.session.load_model", lambda *_: pytest.fail("the model was loaded"))
    for option in (["--tower-dtype", "float16"], ["--anyres", "llava"], ["--dtype", "bfloat16"]):
        with pytest.raises(SystemExit) as ended:
            run.main(command(data, tmp_path, "--preset", "published", "--device", "cpu", *option))
        assert ended.value.code == 2
        assert f"{option[1]!r} contradicts preset 'published'" in capsys.readouterr().err


def test_a_sampled_run_is_resumed_with_its_batch_size_only(data, tmp_path, capsys):
    sampled = ["--temperature", "1", "--limit", "20"]
    assert run.main(command(data, tmp_path, *sampled)) == 0
    made = without_ids(tmp_path / "answers.jsonl")[0]["metadata"]
    assert (made["batch_size"], made["top_k"], made["top_p"]) == (8, 50, None)
    capsys.readouterr()
    assert run.main(command(data, tmp_path, *sampled, "--batch-size", "4")) == 1
    assert "batch_size is 8 in the file, 4 in this run (sampled answers" in capsys.readouterr().err
    assert run.main(command(data, tmp_path, *sampled)) == 0


def test_a_greedy_run_is_resumed_with_any_batch_size(data, tmp_path, whole):
    assert run.main(command(data, tmp_path, "--limit", "20")) == 0
    assert run.main(command(data, tmp_path, "--batch-size", "5")) == 0
    made, expected = without_ids(tmp_path / "answers.jsonl"), without_ids(whole)
    assert [row["metadata"].pop("batch_size") for row in made] == [8] * 20 + [
        5
    ] * 40  # recorded, not compared
    assert {row["metadata"].pop("batch_size") for row in expected} == {8}
    assert made == expected


def test_sampled_answers_do_not_depend_on_the_number_of_processes(data, tmp_path):
    sampled = ["--temperature", "1", "--batch-size", "16"]  # too few batches to deal them out whole
    assert run.main(command(data, tmp_path / "one", *sampled)) == 0
    for index in "01":
        shard = ["--num-chunks", "2", "--chunk-idx", index]
        assert run.main(command(data, tmp_path / "two", *sampled, *shard)) == 0
    one, two = (without_ids(tmp_path / name / "answers.jsonl") for name in ("one", "two"))
    assert one == two and len({row["text"] for row in one}) > 20


def test_settings_of_the_checkpoint_are_named_and_not_used(data, tmp_path, capsys):
    texts = {}
    for name, generation in (("plain", {}), ("vicuna", {"temperature": 0.9, "top_p": 0.01, "top_k": 1})):
        model = with_files(tmp_path / name, generation=generation)
        given = command(data, tmp_path / name / "out", "--temperature", "1", "--limit", "20")
        assert run.main([*given, "--model", str(model)]) == 0
        rows = without_ids(tmp_path / name / "out" / "answers.jsonl")
        texts[name] = [row["text"] for row in rows]
    assert texts["plain"] == texts["vicuna"]
    assert "generation_config.json: top_k=1, top_p=0.01 not used" in capsys.readouterr().err
    assert rows[0]["metadata"]["unused_settings"] == {"top_p": 0.01, "top_k": 1}


def test_prompts_that_do_not_fit_are_failures_of_their_setting(data, tmp_path, capsys):
    """The unpruned baseline does not fit, the pruned setting does."""
    model = with_files(tmp_path, {"tokenizer_model_max_length": 130})
    given = ["--benchmarks", "pope", "--model", str(model), "--data", str(data), "--output", str(tmp_path)]
    grid = ["--methods", "none,vispruner", "--tokens", "4", "--ratios", "0.5", "--limit", "20", *FAST]
    assert sweep.main([*given, *grid]) == 1
    said = capsys.readouterr().err
    assert "tokenizer_model_max_length in config.json is 130" in said and "llava_pope_test.jsonl:" in said
    score = json.loads((tmp_path / "pope" / "vispruner-r0.5-4" / "score.json").read_text())
    assert (score["answered"], score["failures"]) == (20, [])
    assert not (tmp_path / "pope" / "none" / "score.json").exists()


@pytest.mark.parametrize("entry", ["tokenizer_model_max_length", "max_position_embeddings"])
def test_a_run_with_prompts_that_do_not_fit_ends_with_1(data, tmp_path, capsys, entry):
    model = with_files(tmp_path, {entry: 64})
    assert run.main([*command(data, tmp_path / "out"), "--model", str(model), "--limit", "20"]) == 1
    said = capsys.readouterr().err
    assert said.count(f"{entry} in config.json is 64") == 20 and "20 questions were not answered" in said
    assert "llava_pope_test.jsonl:1: " in said


def test_a_limit_that_is_no_number_is_refused(data, tmp_path, capsys):
    model = with_files(tmp_path, {"tokenizer_model_max_length": "2048"})
    with pytest.raises(SystemExit) as ended:
        run.main([*command(data, tmp_path / "out"), "--model", str(model)])
    assert ended.value.code == 2
    assert "config.json: tokenizer_model_max_length is '2048'" in capsys.readouterr().err
