"""LLaVA's question loops and scorers under their own names: defaults, formats, and what is wrong."""

from __future__ import annotations

import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.llava_clone import lines, make_clone, write_lines
from helpers.loaded import share_models
from llava.eval import (
    eval_pope,
    eval_science_qa,
    eval_textvqa,
    model_vqa,
    model_vqa_loader,
    model_vqa_mmbench,
    model_vqa_science,
)
from llava.eval.m4c_evaluator import (
    EvalAIAnswerProcessor,
    STVQAAccuracyEvaluator,
    STVQAANLSEvaluator,
    TextCapsBleu4Evaluator,
    TextVQAAccuracyEvaluator,
    edit_distance,
)

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "data" / "benchmarks"
MODEL = ROOT / "tests" / "data" / "model" / "ckpt_llava15s"
LOOPS = (model_vqa_loader, model_vqa, model_vqa_science, model_vqa_mmbench)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_clone(tmp_path_factory.mktemp("clone")) / "playground" / "data" / "eval"


@pytest.fixture(scope="module")
def jobs():
    with pytest.MonkeyPatch.context() as patch:
        yield share_models(patch)


@pytest.fixture
def unloaded(monkeypatch):
    monkeypatch.setattr("llava.eval.jobs.session.load_model", lambda *_: pytest.fail("the model was loaded"))


def expected(benchmark: str) -> dict:
    return json.loads((GOLDEN / benchmark / "expected.json").read_text(encoding="utf-8"))


def ask(module, questions: Path, answers: Path, *more: str | Path, images: Path | None = None) -> int:
    folder = ["--image-folder", images] if images else []
    files = ["--question-file", questions, "--answers-file", answers, *folder]
    return module.main(list(map(str, ["--model-path", MODEL, *files, *more])))


# -- asking ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module, kind, conversation, length",
    [
        (model_vqa_loader, "jsonl", "llava_v1", 128),
        (model_vqa, "jsonl", "llava_v1", 1024),
        (model_vqa_science, "json", "llava_v0", 1024),
        (model_vqa_mmbench, "tsv", "llava_v1", 1024),
    ],
)
def test_defaults_are_llavas(module, kind, conversation, length, data, tmp_path, capsys, monkeypatch):
    class Stop(Exception):
        pass

    found = []

    def stop(job):
        found.append(job)
        raise Stop

    monkeypatch.setattr("llava.eval.jobs.session.load_model", stop)
    files = {
        "jsonl": (data / "pope" / "llava_pope_test.jsonl", data / "pope" / "val2014"),
        "json": (data / "scienceqa" / "llava_test_CQM-A.json", data / "scienceqa" / "images" / "test"),
        "tsv": (data / "mmbench" / "mmbench_dev_20230712.tsv", None),
    }
    questions, images = files[kind]
    with pytest.raises(Stop):
        ask(module, questions, tmp_path / "a.jsonl", images=images)
    (job,) = found
    assert (job.conv_mode, job.temperature, job.num_beams, job.top_p) == (conversation, 0.2, 1, None)
    assert job.max_new_tokens == length
    said = capsys.readouterr().err
    assert "--temperature 0.2: answers are sampled. Published numbers use --temperature 0" in said
    assert f"--conv-mode {conversation}: ckpt_llava15s calls for vicuna_v1. Use --conv-mode vicuna_v1" in said


def test_science_without_the_instruction(jobs, data, tmp_path, capsys):
    questions, images = data / "scienceqa" / "llava_test_CQM-A.json", data / "scienceqa" / "images" / "test"
    more = ["--temperature", "0", "--max_new_tokens", "2", "--answer-prompter"]
    assert ask(model_vqa_science, questions, tmp_path / "a.jsonl", *more, images=images) == 0
    assert "--answer-prompter: no second question is asked" in capsys.readouterr().err
    rows, asked = lines(tmp_path / "a.jsonl"), json.loads(questions.read_text())
    for row, question in zip(rows, asked, strict=True):
        text = question["conversations"][0]["value"].replace("<image>", "").strip()
        assert row["prompt"] == ("<image>\n" if "image" in question else "") + text
        assert (row["metadata"]["visual_tokens"] > 0) == ("image" in question)


@pytest.mark.parametrize("table, right", [("mmbench_dev_20230712", "en"), ("mmbench_dev_cn_20231003", "cn")])
def test_the_instruction_in_another_language_is_a_warning(table, right, jobs, data, tmp_path, capsys):
    questions = data / ("mmbench_cn" if right == "cn" else "mmbench") / f"{table}.tsv"
    for lang in ("en", "cn"):
        more = ["--temperature", "0", "--max_new_tokens", "2", "--single-pred-prompt", "--lang", lang]
        assert ask(model_vqa_mmbench, questions, tmp_path / f"{lang}.jsonl", *more) == 0
        assert (f"Use --lang {right}" in capsys.readouterr().err) == (lang != right)


def test_all_rounds_rotate_the_options(jobs, data, tmp_path):
    table = data / "mmbench" / "mmbench_dev_20230712.tsv"
    more = ["--temperature", "0", "--max_new_tokens", "2", "--all-rounds", "--single-pred-prompt"]
    parts = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    for index, part in enumerate(parts):
        chunk = ["--num-chunks", "2", "--chunk-idx", str(index)]
        assert ask(model_vqa_mmbench, table, part, *more, *chunk) == 0
    rows = [row for part in parts for row in lines(part)]
    with table.open(encoding="utf-8", newline="") as file:
        csv.field_size_limit(2**31 - 1)
        source = list(csv.DictReader(file, delimiter="\t"))
    place = 0
    for entry in source:
        texts = [entry[letter] for letter in "ABCD" if entry[letter]]
        for number in range(len(texts)):
            row = rows[place]
            place += 1
            assert (row["question_id"], row["round_id"]) == (int(entry["index"]), number)
            assert row["options"] == texts[number:] + texts[:number]
            original = [texts["ABCD".index(letter)] for letter in row["option_char"]]
            assert original == row["options"]  # the letters in the file of what stands at A, B, ...
            listed = "\n".join(
                f"{letter}. {text}" for letter, text in zip("ABCD", row["options"], strict=False)
            )
            assert row["prompt"].endswith(listed) and row["prompt"].count("A. ") == 1
    assert place == len(rows)


@pytest.mark.parametrize("module", LOOPS)
def test_a_missing_file_or_folder_is_told_before_loading(module, data, tmp_path, capsys, unloaded):
    answers = tmp_path / "a.jsonl"
    assert ask(module, tmp_path / "gone", answers) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'gone'}: no such question file\n"
    assert ask(module, tmp_path, answers) == 1  # a folder
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: ")
    name = {model_vqa_science: "scienceqa/llava_test_CQM-A.json"}.get(module, "pope/llava_pope_test.jsonl")
    if module is model_vqa_mmbench:
        name = "mmbench/mmbench_dev_20230712.tsv"
    else:
        assert ask(module, data / name, answers, images=tmp_path / "lost") == 1
        said = capsys.readouterr().err
        fix = "Set --image-folder to the folder of the images."
        assert said == f"error: {tmp_path / 'lost'}: no such folder. {fix}\n"
    images = data / Path(name).parent / {"scienceqa": "images/test"}.get(Path(name).parts[0], "val2014")
    for more, says in (
        (["--model-path", "nowhere/at/all"], "--model-path nowhere/at/all: no such folder"),
        (["--conv-mode", "v9"], "--conv-mode v9: no such template"),
        (["--num-chunks", "2", "--chunk-idx", "2"], "numbered 0 to 1"),
        (["--answers-file", str(tmp_path)], "a folder. Give the name of a file"),
        (["--temperature", "-1"], "expected a number >= 0"),
        (["--visual_token_num", "many"], "expected an integer >= 0"),
    ):
        with pytest.raises(SystemExit) as caught:
            ask(module, data / name, answers, *more, images=images)
        assert caught.value.code == 2 and says in capsys.readouterr().err
    assert not answers.exists()


@pytest.mark.parametrize(
    "module, kind", [(model_vqa_science, "jsonl"), (model_vqa_mmbench, "jsonl"), (model_vqa, "tsv")]
)
def test_a_question_file_of_another_kind_is_an_error(module, kind, data, tmp_path, capsys, unloaded):
    files = {
        "jsonl": data / "pope" / "llava_pope_test.jsonl",
        "tsv": data / "mmbench" / "mmbench_dev_20230712.tsv",
    }
    assert ask(module, files[kind], tmp_path / "a.jsonl", images=data) == 1
    assert files[kind].name in capsys.readouterr().err


# -- scoring --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clean", "phrases", "all_yes"])
def test_pope_prints_the_official_numbers(name, capsys):
    folder, theirs = GOLDEN / "pope", expected("pope")[name]
    command = ["--annotation-dir", folder / "coco", "--question-file", folder / "llava_pope_test.jsonl"]
    command += ["--result-file", folder / f"llava_answers_{name}.jsonl"]
    assert eval_pope.main(list(map(str, command))) == 0
    said = capsys.readouterr().out.splitlines()
    at = said.index(f"Category: random, # samples: {theirs['random']['n']}")
    found = theirs["random"]
    assert said[at + 1 : at + 10] == [
        "TP\tFP\tTN\tFN",
        "\t".join(str(found[key]) for key in ("TP", "FP", "TN", "FN")),
        f"Accuracy: {found['accuracy']}",
        f"Precision: {found['precision']}",
        f"Recall: {found['recall']}",
        f"F1 score: {found['f1']}",
        f"Yes ratio: {found['yes_ratio']}",
        ", ".join(f"{found[key]:.3f}" for key in ("f1", "accuracy", "precision", "recall", "yes_ratio")),
        "====================================",
    ]
    mean = float(said[-1].removeprefix("Average F1 score: "))
    assert mean == pytest.approx(theirs["mean_f1"], abs=1e-12)


def test_pope_where_the_official_scorer_divides_by_zero(capsys):
    folder = GOLDEN / "pope"
    command = ["--annotation-dir", folder / "coco", "--question-file", folder / "llava_pope_test.jsonl"]
    command += ["--result-file", folder / "llava_answers_all_no.jsonl"]
    assert eval_pope.main(list(map(str, command))) == 1
    out, err = capsys.readouterr()
    assert "Average" not in out and out.count("Category: ") == 3
    assert "divides by zero" in err and "error: the average F1 score is undefined" in err


def test_pope_counts_empty_answers(tmp_path, capsys):
    folder, answers = GOLDEN / "pope", tmp_path / "answers.jsonl"
    rows = lines(folder / "llava_answers_clean.jsonl")
    write_lines(
        answers, [{**row, "text": "" if number < 3 else row["text"]} for number, row in enumerate(rows)]
    )
    files = ["--annotation-dir", folder / "coco", "--question-file", folder / "llava_pope_test.jsonl"]
    assert eval_pope.main([*map(str, files), "--result-file", str(answers)]) == 0
    assert "warning: 3 answers are empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"--annotation-dir": "gone"}, "gone: no such folder. Set --annotation-dir"),
        ({"--annotation-dir": "."}, "coco_pope_adversarial.json: no such file"),
        ({"--question-file": "gone.jsonl"}, "gone.jsonl: no such file"),
        ({"--result-file": "gone.jsonl"}, "gone.jsonl: no such answer file"),
    ],
)
def test_pope_without_files(changes, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = GOLDEN / "pope"
    usual = {
        "--annotation-dir": folder / "coco",
        "--question-file": folder / "llava_pope_test.jsonl",
        "--result-file": folder / "llava_answers_clean.jsonl",
    }
    command = [str(part) for pair in {**usual, **changes}.items() for part in pair]
    assert eval_pope.main(command) == 1
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def science(tmp_path: Path, name: str, *more: str) -> list[str]:
    folder = GOLDEN / "scienceqa"
    command = ["--base-dir", folder, "--result-file", folder / f"llava_answers_{name}.jsonl"]
    outputs = [
        "--output-file",
        tmp_path / "new" / "output.jsonl",
        "--output-result",
        tmp_path / "result.json",
    ]
    return [*map(str, [*command, *outputs]), *more]


def test_scienceqa_does_not_write_over_its_input(tmp_path, capsys):
    answers = tmp_path / "answers.jsonl"
    answers.write_bytes((GOLDEN / "scienceqa" / "llava_answers_letters_full.jsonl").read_bytes())
    before = answers.read_bytes()
    for option in ("--output-file", "--output-result"):
        command = science(tmp_path, "letters_full", "--result-file", str(answers), option, str(answers))
        assert eval_science_qa.main(command) == 1
        assert "answers.jsonl: is read by this command" in capsys.readouterr().err
    assert answers.read_bytes() == before
    command = science(tmp_path, "letters_full", "--output-file", str(tmp_path / "result.json"))
    with pytest.raises(SystemExit):
        eval_science_qa.main(command)
    assert "the same file" in capsys.readouterr().err


def test_scienceqa_of_a_split_without_questions(tmp_path, capsys):
    for name in ("problems.json", "pid_splits.json"):
        (tmp_path / name).write_bytes((GOLDEN / "scienceqa" / name).read_bytes())
    splits = json.loads((tmp_path / "pid_splits.json").read_text())
    (tmp_path / "pid_splits.json").write_text(json.dumps({**splits, "none": []}))
    command = science(tmp_path, "letters_full", "--base-dir", str(tmp_path), "--split", "none")
    assert eval_science_qa.main(command) == 1
    assert "pid_splits.json: none lists no questions" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["letters_full", "letters_img_only", "letters_missing", "letter_text_full"])
def test_scienceqa_prints_and_writes_the_official_result(name, tmp_path, capsys):
    theirs = expected("scienceqa")[name]
    assert eval_science_qa.main(science(tmp_path, name)) == 0
    assert capsys.readouterr().out.splitlines() == [theirs["stdout"]]
    result = json.loads((tmp_path / "result.json").read_text())
    assert [result[key] for key in ("correct", "count")] == [theirs[key] for key in ("correct", "count")]
    assert result["acc"] == pytest.approx(theirs["acc"])
    analysis = json.loads((tmp_path / "new" / "output.jsonl").read_text())
    assert [len(analysis[key]) for key in ("correct", "incorrect")] == [
        theirs["correct"],
        theirs["count"] - theirs["correct"],
    ]
    for row in [*analysis["correct"], *analysis["incorrect"]]:
        assert row["parsed_ans"] == theirs["parsed"][row["question_id"]]
        assert result["outputs"][row["question_id"]] == row["pred"]
        right = "ABCDE".find(row["ground_truth"]) == result["results"][row["question_id"]]
        assert right == (row in analysis["correct"])


def test_scienceqa_of_another_split(tmp_path, capsys):
    source = GOLDEN / "scienceqa"
    folder = tmp_path / "base"
    folder.mkdir()
    splits = json.loads((source / "pid_splits.json").read_text())
    (folder / "pid_splits.json").write_text(json.dumps({"minival": splits["test"][:10]}))
    (folder / "problems.json").write_bytes((source / "problems.json").read_bytes())
    answers = [
        row
        for row in lines(source / "llava_answers_letters_full.jsonl")
        if row["question_id"] in splits["test"][:10]
    ]
    write_lines(folder / "a.jsonl", answers)
    more = ["--base-dir", str(folder), "--result-file", str(folder / "a.jsonl"), "--split"]
    assert eval_science_qa.main(science(tmp_path, "letters_full", *more, "minival")) == 0
    assert capsys.readouterr().out.startswith("Total: 10, ")
    with pytest.raises(SystemExit):
        eval_science_qa.main(science(tmp_path, "letters_full", *more, "val"))
    assert "--split val: not in" in capsys.readouterr().err


def test_scienceqa_without_files(tmp_path, capsys):
    for more, says in (
        (["--base-dir", str(tmp_path)], "pid_splits.json: no such file. Set --base-dir"),
        (["--result-file", str(tmp_path / "gone")], "gone: no such answer file"),
    ):
        assert eval_science_qa.main(science(tmp_path, "letters_full", *more)) == 1
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("name", ["majority", "noisy", "noocr_prompt"])
def test_textvqa_prints_the_official_lines(name, capsys):
    folder = GOLDEN / "textvqa"
    command = ["--annotation-file", folder / "TextVQA_0.5.1_val.json"]
    command += ["--result-file", folder / f"llava_answers_{name}.jsonl"]
    assert eval_textvqa.main(list(map(str, command))) == 0
    assert capsys.readouterr().out.strip() == expected("textvqa")[name]["stdout"]


def test_textvqa_of_a_folder_scores_what_it_can(tmp_path, capsys):
    folder, results = GOLDEN / "textvqa", tmp_path / "results"
    results.mkdir()
    truth = ["--annotation-file", str(folder / "TextVQA_0.5.1_val.json")]
    assert eval_textvqa.main([*truth, "--result-dir", str(results)]) == 1
    assert "contains no *.jsonl file" in capsys.readouterr().err
    assert eval_textvqa.main([*truth, "--result-dir", str(tmp_path / "gone")]) == 1
    assert "gone: no such folder" in capsys.readouterr().err
    assert eval_textvqa.main(["--annotation-file", str(tmp_path / "x"), "--result-dir", str(results)]) == 1
    assert "x: no such file. Set --annotation-file" in capsys.readouterr().err
    (results / "b.failures.jsonl").write_text('{"question_id": 1, "reason": "no such image"}\n')
    (results / "a.jsonl").write_text("{")
    (results / "b.jsonl").write_bytes((folder / "llava_answers_noisy.jsonl").read_bytes())
    assert eval_textvqa.main([*truth, "--result-dir", str(results)]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[:3] == ["b", "Samples: 60", "Accuracy: 63.00%"]
    assert "1 files were not scored" in err and "a.jsonl:1: not a JSON line" in err


# -- evaluators -----------------------------------------------------------------------------------


def test_the_processor_is_that_of_the_golden_cases():
    processor = EvalAIAnswerProcessor()
    for case in json.loads((GOLDEN / "normalize" / "cases.json").read_text(encoding="utf-8")):
        assert processor(case["in"]) == case["evalai"]


def test_textvqa_accuracy_of_evaluators():
    golden = expected("textvqa")["noisy"]
    truth = json.loads((GOLDEN / "textvqa" / "TextVQA_0.5.1_val.json").read_text())["data"]
    by_key = {(str(row["image_id"]), row["question"].lower()): row["answers"] for row in truth}
    pred_list = [
        {
            "pred_answer": row["text"],
            "gt_answers": by_key[str(row["question_id"]), row["prompt"].split("\n")[0].lower()],
        }
        for row in lines(GOLDEN / "textvqa" / "llava_answers_noisy.jsonl")
    ]
    score = TextVQAAccuracyEvaluator().eval_pred_list(pred_list)
    assert 100 * score == pytest.approx(golden["accuracy_pct"])
    with pytest.raises(ValueError, match=r"pred_list\[0\]: 3 gt_answers, expected 10"):
        TextVQAAccuracyEvaluator().eval_pred_list([{"pred_answer": "a", "gt_answers": ["b"] * 3}])


@pytest.mark.parametrize("evaluator", [TextVQAAccuracyEvaluator, STVQAAccuracyEvaluator, STVQAANLSEvaluator])
def test_entries_may_come_from_a_generator(evaluator):
    entries = [{"pred_answer": text, "gt_answers": ["bus"] * 10} for text in ("bus", "car")]
    assert (
        evaluator().eval_pred_list(entry for entry in entries) == evaluator().eval_pred_list(entries) == 0.5
    )
    for wrong, found in ((entries[0], "dict"), (None, "NoneType")):
        with pytest.raises(ValueError, match=f"pred_list: {found}, expected a list of dicts"):
            evaluator().eval_pred_list(wrong)


def test_stvqa_evaluators():
    pred_list = [
        {"pred_answer": "The Stop.", "gt_answers": ["stop", "halt"]},
        {"pred_answer": "stopp", "gt_answers": ["Stop ", "other"]},
        {"pred_answer": "nothing", "gt_answers": ["stop"]},
    ]
    assert STVQAAccuracyEvaluator().eval_pred_list(pred_list) == pytest.approx(1 / 3)
    anls = STVQAANLSEvaluator()
    assert anls.eval_pred_list(pred_list[1:]) == pytest.approx((1 - 1 / 5) / 2)
    assert (
        anls.get_anls("ab", "cd") == 0 and anls.get_anls("", "") == 1 and anls.get_anls("abcd", "abxy") == 0.5
    )
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("a", "a"))] == [3, 3, 0]


@pytest.mark.parametrize("evaluator", [TextVQAAccuracyEvaluator, STVQAAccuracyEvaluator, STVQAANLSEvaluator])
@pytest.mark.parametrize(
    "entry, says",
    [
        ({}, "pred_answer is None"),
        (["a"], "expected pred_answer and gt_answers in a dict"),
        ({"pred_answer": 3, "gt_answers": ["a"]}, "pred_answer is 3"),
        ({"pred_answer": "a", "gt_answers": "abc"}, "gt_answers is 'abc'"),
        ({"pred_answer": "a", "gt_answers": []}, "gt_answers is "),
        ({"pred_answer": "a", "gt_answers": ["a", None]}, "gt_answers contains None"),
    ],
)
def test_evaluators_refuse_other_entries(evaluator, entry, says):
    with pytest.raises(ValueError, match=r"pred_list\[0\]: ") as caught:
        evaluator().eval_pred_list([entry])
    assert says in str(caught.value)
    with pytest.raises(ValueError, match="pred_list: empty"):
        evaluator().eval_pred_list([])


def test_captions_name_the_package_that_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(ImportError, match="pip install pycocoevalcap"):
        TextCapsBleu4Evaluator()


# -- converters -----------------------------------------------------------------------------------


def convert(name: str, *arguments: str | Path) -> int:
    """Run scripts/<name>.py in this process; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        patch.setattr(sys, "path", [*sys.path])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    return caught.value.code


@pytest.mark.parametrize(
    "arguments",
    [
        ["--ckpt", "a"],
        ["--src", "a"],
        ["--src", "a", "--dst", "b", "--ckpt", "c"],
        ["--src", "a", "--split", "b"],
        [],
    ],
)
def test_vqav2_wants_one_of_both_forms(arguments, capsys):
    assert convert("convert_vqav2_for_submission", *arguments) == 2
    assert "either --ckpt and --split, or --src and --dst" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("convert_vqav2_for_submission", ["--dir", ".", "--src", "gone.jsonl", "--dst", "out"]),
        ("convert_gqa_for_eval", ["--src", "gone.jsonl", "--dst", "out"]),
        ("convert_mmvet_for_eval", ["--src", "gone.jsonl", "--dst", "out"]),
        (
            "convert_vizwiz_for_submission",
            ["--annotation-file", "q", "--result-file", "gone.jsonl", "--result-upload-file", "out"],
        ),
        (
            "convert_mmbench_for_submission",
            ["--annotation-file", "t", "--result-dir", ".", "--upload-dir", "out", "--experiment", "gone"],
        ),
        ("convert_answer_to_mme", ["--data_path", ".", "--experiment", "gone"]),
        (
            "convert_seed_for_submission",
            ["--annotation-file", "gone.jsonl", "--result-file", "r", "--result-upload-file", "out"],
        ),
    ],
)
def test_a_converter_without_its_file_is_one_line(name, arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert convert(name, *arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "gone.jsonl" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--src", "--dst"])
def test_an_empty_name_of_an_unset_variable_is_told(option, tmp_path, capsys):
    files = {"--src": GOLDEN / "gqa" / "llava_answers_mixed.jsonl", "--dst": tmp_path / "out", option: ""}
    assert convert("convert_gqa_for_eval", *(part for pair in files.items() for part in pair)) == 2
    assert "an empty path. Give the name of a file or folder" in capsys.readouterr().err


def test_seed_refuses_answers_to_other_questions(data, tmp_path, capsys):
    write_lines(tmp_path / "a.jsonl", [{"question_id": 999999, "text": "A"}])
    files = [
        "--annotation-file",
        data / "seed_bench" / "SEED-Bench.json",
        "--result-file",
        tmp_path / "a.jsonl",
    ]
    assert convert("convert_seed_for_submission", *files, "--result-upload-file", tmp_path / "out") == 1
    assert "1 of 1 answers match no question in" in capsys.readouterr().err
    numbers = {"questions": [{"question_id": 1, "answer": 2}]}
    for broken in (
        {},
        {"questions": None},
        {"questions": [{"question_id": 1}]},
        {"questions": [[]]},
        numbers,
    ):
        (tmp_path / "s.json").write_text(json.dumps(broken))
        more = ["--annotation-file", tmp_path / "s.json", "--result-upload-file", tmp_path / "out"]
        assert convert("convert_seed_for_submission", *files, *more) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: {tmp_path / 's.json'}: ") and said.count("\n") == 1


def test_seed_counts_answers_that_are_not_a_letter(data, tmp_path, capsys):
    asked = lines(data / "seed_bench" / "llava-seed-bench.jsonl")
    texts = ["A", "A.", "", "yes"]
    rows = [{"question_id": row["question_id"], "text": text} for row, text in zip(asked, texts, strict=True)]
    write_lines(tmp_path / "a.jsonl", rows)
    files = [
        "--annotation-file",
        data / "seed_bench" / "SEED-Bench.json",
        "--result-file",
        tmp_path / "a.jsonl",
    ]
    assert convert("convert_seed_for_submission", *files, "--result-upload-file", tmp_path / "up.jsonl") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "Total: 25.00% of 4" and "3 answers are not one of the letters" in err
    assert [row["prediction"] for row in lines(tmp_path / "up.jsonl")] == texts


def test_seed_with_repeated_and_with_empty_answers(data, tmp_path, capsys):
    asked = lines(data / "seed_bench" / "llava-seed-bench.jsonl")
    files = [
        "--annotation-file",
        data / "seed_bench" / "SEED-Bench.json",
        "--result-file",
        tmp_path / "a.jsonl",
    ]
    files += ["--result-upload-file", tmp_path / "up.jsonl"]
    rows = [{"question_id": row["question_id"], "text": "A"} for row in asked]
    write_lines(tmp_path / "a.jsonl", [{**rows[0], "text": "B"}, *rows])
    assert convert("convert_seed_for_submission", *files) == 0
    assert "1 answers are to a question answered before" in capsys.readouterr().err
    assert [row["prediction"] for row in lines(tmp_path / "up.jsonl")] == ["A"] * len(rows)
    write_lines(tmp_path / "a.jsonl", [{**row, "text": ""} for row in rows])
    assert convert("convert_seed_for_submission", *files) == 1
    assert "answers are empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["model_vqa_loader", "model_vqa", "model_vqa_science", "model_vqa_mmbench", "run_llava"]
    + ["eval_pope", "eval_textvqa", "eval_science_qa"],
)
def test_every_command_runs_by_its_path_without_an_installation(name, tmp_path):
    """Python puts the folder of the file first on sys.path, in which there is no `llava`."""
    command = [sys.executable, "-I", str(ROOT / "llava" / "eval" / f"{name}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and f"usage: python -m llava.eval.{name}" in done.stdout, done.stderr
