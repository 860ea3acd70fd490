"""A sweep over several benchmarks: one model, one encoding per picture; what fails stops nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava.eval import sweep
from llava.eval.benchmarks import EmptyAnswersError
from llava.tiny import build

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "data" / "model" / "ckpt_llava15s"
SETS = "pope,gqa,vizwiz,mmbench,mmvet"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    assert build.main(["--pictures", "5", "--output", str(root), "--benchmarks", SETS]) == 0
    return root


def command(data: Path, output: Path, *more: str, sets: str = SETS) -> list[str]:
    return [
        "--benchmarks",
        sets,
        "--model",
        str(MODEL),
        "--data",
        str(data),
        "--output",
        str(output),
        "--methods",
        "none,random,vispruner",
        "--tokens",
        "8",
        "--ratios",
        "0.5",
        "--max-new-tokens",
        "2",
        "--batch-size",
        "16",
        *more,
    ]


def last(capsys) -> tuple[dict, str]:
    captured = capsys.readouterr()
    return json.loads(captured.out.splitlines()[-1]), captured.out + captured.err


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.fixture
def encoded(monkeypatch) -> list:
    """Sizes of the pictures that the tower has seen."""
    from llava.model.llava_arch import LlavaMetaForCausalLM

    encode, seen = LlavaMetaForCausalLM.encode_vision, []
    monkeypatch.setattr(
        LlavaMetaForCausalLM,
        "encode_vision",
        lambda self, images, sizes=None: seen.extend(sizes) or encode(self, images, sizes),
    )
    return seen


def test_benchmarks_share_the_model_and_the_pictures(data, tmp_path, capsys, monkeypatch, encoded):
    assert sweep.main(command(data, tmp_path / "out")) == 0
    document, said = last(capsys)
    assert [table["benchmark"] for table in document["tables"]] == ["pope", "gqa", "vizwiz", "mmbench"]
    assert document["unscored"] == ["mmvet"] and document["failures"] == []
    inside = len(
        set(
            row.split("\t")[9]
            for row in (data / "mmbench" / "mmbench_dev_20230712.tsv").read_text().splitlines()[1:]
            if len(row.split("\t")[9]) > 100
        )
    )
    assert len(encoded) == 5 + inside  # MMBench's pictures are in its table
    assert [table["vision"]["images"] for table in document["tables"]] == [5, 0, 0, inside]
    assert document["tables"][1]["vision"]["reused"] > 0 and "were encoded before" in said
    speeds = [cell["speed"] for table in document["tables"] for cell in table["cells"]]
    assert all(speed["vision_seconds"] > 0 for speed in speeds)  # a cell alone would have had to encode
    assert len(texts(tmp_path / "out" / "mmvet" / "none" / "answers.jsonl")) == 1

    encoded.clear()
    assert sweep.main(command(data, tmp_path / "alone", "--vision-cache", "0")) == 0
    last(capsys)
    assert len(encoded) > 5 + inside
    for path in sorted((tmp_path / "out").rglob("answers.jsonl")):
        assert texts(path) == texts(tmp_path / "alone" / path.relative_to(tmp_path / "out"))

    monkeypatch.setattr("llava.eval.jobs.session.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert sweep.main(command(data, tmp_path / "out")) == 0
    again, said = last(capsys)
    assert said.count("3 settings, 3 already finished") == 5
    assert [table["cells"] for table in again["tables"]] == [table["cells"] for table in document["tables"]]


def test_a_report_over_all_sets(data, tmp_path, capsys):
    arguments = command(data, tmp_path / "out", "--report", str(tmp_path / "page"), sets="pope,vizwiz,mmvet")
    assert sweep.main(arguments) == 0
    document, said = last(capsys)
    files = [tmp_path / "page" / f"grid.{suffix}" for suffix in ("html", "md", "csv", "tex")]
    assert document["files"] == [str(path) for path in files] and "Constant answer" in said
    assert document["majority"].keys() == {"pope", "vizwiz"}
    assert set(document["counted"]) <= {"pope", "vizwiz"} and "MM-Vet" in files[1].read_text()
    assert [row["cell"] for row in document["sums"]] == ["none", "random-8", "vispruner-r0.5-8"]
    before = [path.read_bytes() for path in files]
    assert sweep.main(arguments) == 0
    assert [path.read_bytes() for path in files] == before


def test_what_fails_stops_nothing_else(data, tmp_path, capsys):
    broken, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data, broken, symlinks=True)
    (broken / "gqa" / "llava_gqa_testdev_balanced.jsonl").unlink()
    foreign = out / "pope" / "random-8" / "answers.jsonl"
    foreign.parent.mkdir(parents=True)
    foreign.write_text('{"question_id": 1, "prompt": "?", "text": "no"}\n')
    assert sweep.main(command(broken, out, sets="gqa,pope,vizwiz")) == 1
    document, said = last(capsys)
    cells = {table["benchmark"]: [cell["cell"] for cell in table["cells"]] for table in document["tables"]}
    assert cells == {"pope": ["none", "vispruner-r0.5-8"], "vizwiz": ["none", "random-8", "vispruner-r0.5-8"]}
    assert len(document["failures"]) == 2
    assert document["failures"][0].startswith("GQA:") and "llava_gqa_testdev" in document["failures"][0]
    assert document["failures"][1].startswith("POPE, random-8:") and "not made by" in document["failures"][1]
    assert "2 failures:" in said and foreign.read_text().count("\n") == 1

    foreign.unlink()
    shutil.copy(data / "gqa" / "llava_gqa_testdev_balanced.jsonl", broken / "gqa")
    assert sweep.main(command(broken, out, sets="gqa,pope,vizwiz")) == 0
    document, said = last(capsys)
    assert all(len(table["cells"]) == 3 for table in document["tables"])
    assert "POPE: 90 questions, 3 settings, 2 already finished" in said


def test_a_method_that_raises_costs_its_own_cells_only(data, tmp_path, capsys, monkeypatch, encoded):
    from llava.pruning.random import Random

    def choose(self, *_, **__):
        raise RuntimeError("this method has a bug")

    monkeypatch.setattr(Random, "choose", choose)
    assert sweep.main(command(data, tmp_path, sets="pope,vizwiz")) == 1
    document, said = last(capsys)
    assert [[cell["cell"] for cell in table["cells"]] for table in document["tables"]] == 2 * [
        ["none", "vispruner-r0.5-8"]
    ]
    assert document["failures"] == [
        "POPE, random-8: this method has a bug",
        "VizWiz, random-8: this method has a bug",
    ]
    assert "answering the settings one by one" in said and "in choose" in said and len(encoded) == 5
    assert not (tmp_path / "pope" / "random-8" / "score.json").exists()

    monkeypatch.undo()
    assert sweep.main(command(data, tmp_path, sets="pope,vizwiz")) == 0
    assert "POPE: 90 questions, 3 settings, 2 already finished" in last(capsys)[1]


def test_a_scorer_that_raises_costs_its_own_benchmark_only(data, tmp_path, capsys, monkeypatch):
    from llava.eval.benchmarks.gqa import GQA

    def score(*_, **__):
        raise KeyError("types")

    monkeypatch.setattr(GQA, "score", score)
    assert sweep.main(command(data, tmp_path, sets="gqa,vizwiz")) == 1
    document, _ = last(capsys)
    assert [len(table["cells"]) for table in document["tables"]] == [0, 3]
    assert len(document["failures"]) == 3 and document["failures"][0].startswith("GQA, none:")


def test_unreadable_pictures_are_failures_of_their_questions(data, tmp_path, capsys):
    broken = tmp_path / "data"
    shutil.copytree(data, broken, symlinks=True)
    (broken / "pope" / "val2014" / "TINY_val_000000000003.webp").write_bytes(b"no picture")
    assert sweep.main(command(broken, tmp_path / "out", sets="pope,vizwiz")) == 1
    document, _ = last(capsys)
    assert len(document["failures"]) == 18 + 1  # of POPE, of VizWiz, each once for all cells
    assert [cell["answers"] for cell in document["tables"][1]["cells"]] == [4, 4, 4]


def test_processes_answer_what_one_answers(data, tmp_path, capsys, monkeypatch):
    broken = shutil.copytree(data, tmp_path / "data", symlinks=True)
    picture = broken / "pope" / "val2014" / "TINY_val_000000000003.webp"
    content = picture.read_bytes()
    picture.write_bytes(b"not an image")
    given = {"sets": "pope,vizwiz"}
    assert sweep.main(command(broken, tmp_path / "one", **given)) == 1
    alone, _ = last(capsys)
    assert sweep.main(command(broken, tmp_path / "two", "--num-processes", "2", **given)) == 1
    shared, said = last(capsys)
    assert "2 processes" in said
    lines = sorted((tmp_path / "one").rglob("answers.jsonl"))
    assert len(lines) == 6
    for path in lines:
        assert texts(path) == texts(tmp_path / "two" / path.relative_to(tmp_path / "one"))
    left = {path.name for path in (tmp_path / "two").rglob("*") if path.is_file()}
    assert [one["tables"][0]["vision"]["images"] for one in (alone, shared)] == [4, 4]
    shards = {"2_0.jsonl", "2_1.jsonl"}
    assert left == {"answers.jsonl", "failures.jsonl", "run.json", "score.json"} | shards
    assert shared["failures"] == alone["failures"]
    for a, b in zip(alone["tables"], shared["tables"], strict=True):
        assert [cell["score"] for cell in a["cells"]] == [cell["score"] for cell in b["cells"]]
        assert all(cell["speed"]["questions_per_second"] > 0 for cell in b["cells"])
        assert [cell["llm_gflops"] for cell in a["cells"]] == [cell["llm_gflops"] for cell in b["cells"]]

    monkeypatch.setattr("llava.eval.jobs.processes.start", lambda *_: pytest.fail("a process was started"))
    picture.write_bytes(content)
    assert sweep.main(command(broken, tmp_path / "one", **given)) == 0  # of one process: the rest
    last(capsys)
    assert sweep.main(command(broken, tmp_path / "one", "--num-processes", "2", **given)) == 0


def test_without_a_model_nothing_is_asked(data, tmp_path, capsys):
    broken = tmp_path / "model"
    shutil.copytree(MODEL, broken)
    for path in broken.glob("*.safetensors"):
        path.write_bytes(b"")
    arguments = command(data, tmp_path / "out", sets="pope,vizwiz")
    arguments[arguments.index(str(MODEL))] = str(broken)
    assert sweep.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.count("error:") == 1 and "VizWiz: 5 questions" not in captured.out


def test_arguments(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sweep.main(["--benchmarks", "pope,nonsense"])
    assert "unknown benchmark 'nonsense'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sweep.main(["--benchmarks", "pope", "--methods", "all,nonsense", "--output", str(tmp_path / "out")])
    assert "unknown pruning method 'nonsense'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sweep.main(["--benchmarks", "pope,gqa", "--data", str(data / "pope")])
    assert "give the folder above" in capsys.readouterr().err
    aliases = sweep.build_parser().parse_args(["--benchmarks", "SQA,mm-vet"])
    assert aliases.benchmarks == ["scienceqa", "mmvet"]
    assert sweep.main(command(tmp_path, tmp_path / "out", sets="gqa,vizwiz")) == 1
    assert "none of the benchmarks can be evaluated" in capsys.readouterr().err


def test_a_setting_with_only_empty_answers_does_not_hide_the_others(monkeypatch, tmp_path, capsys):
    (tmp_path / "answers.jsonl").write_text("{}\n")
    runs = [SimpleNamespace(name=name, answers=tmp_path / "answers.jsonl") for name in ("none", "random-64")]
    card = SimpleNamespace(details={"warnings": []})

    def score(task, run, *_):
        if run.name == "none":
            raise EmptyAnswersError("answers.jsonl: all 5 answers are empty")
        return SimpleNamespace(name=run.name, card=card, counts=1)

    monkeypatch.setattr(sweep.execute, "score", score)
    args = SimpleNamespace(fixed=False, bootstrap_iters=100, seed=0)
    failures = sweep.Failures()
    found = sweep.score_task(args, SimpleNamespace(title="POPE", partial=False), runs, failures)
    assert [one.name for one in found] == ["random-64"]
    assert failures == ["POPE, none: answers.jsonl: all 5 answers are empty"]
