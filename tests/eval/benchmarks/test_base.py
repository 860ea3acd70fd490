"""What all benchmarks share: checked answers, empty and unreadable ones, joins by id and prompt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llava.eval import compare, judge, score, submit
from llava.eval.benchmarks import DataError, EmptyAnswersError, get_benchmark
from llava.eval.benchmarks.joining import join_by_prompt

GOLDEN = Path(__file__).parents[2] / "data" / "benchmarks"
# benchmark -> (folder, answers that are read without warnings)
SETS = {
    "pope": ("pope", "llava_answers_clean.jsonl"),
    "gqa": ("gqa", "llava_answers_correct.jsonl"),
    "textvqa": ("textvqa", "llava_answers_majority.jsonl"),
    "vqav2_val": ("vqav2", "llava_answers_majority.jsonl"),
    "vizwiz_val": ("vizwiz", "llava_answers_majority.jsonl"),
    "scienceqa": ("scienceqa", "llava_answers_letters_full.jsonl"),
    "mme": ("mme", "answers/clean.jsonl"),
    "mmbench": ("mmbench", "mmbench_dev_20230712/letters_95.jsonl"),
    "mmvet": ("mmvet", "llava_answers_toy.jsonl"),
    "msvd": ("video/MSVD_Zero_Shot_QA", "merge.jsonl"),
}
SUBMITTED = ("vqav2_val", "vizwiz_val", "gqa", "mmbench", "mmvet", "mme")


def rows_of(name: str) -> tuple[Path, list[dict]]:
    folder, answers = SETS[name]
    text = (GOLDEN / folder / answers).read_text(encoding="utf-8")
    return GOLDEN / folder, [json.loads(line) for line in text.splitlines()]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_key(rows: list[dict]) -> str:
    return "text" if "text" in rows[0] else "pred"


@pytest.mark.parametrize("value", [None, 2, ["Yes"], True, {}], ids=repr)
@pytest.mark.parametrize("name", SETS)
def test_text_that_is_no_string_is_an_error_with_its_line(name, value, tmp_path, capsys):
    data, rows = rows_of(name)
    key = text_key(rows)
    rows[3] = {**rows[3], key: value}
    path = write(tmp_path / "answers.jsonl", rows)
    command = ["--benchmark", name, "--data", str(data), "--answers", str(path)]
    mains = [score.main, *([submit.main] if name in SUBMITTED else [])]
    if name in judge.JUDGED:
        mains.append(judge.main)
    for main in mains:
        assert main(command) == 1
        assert f"error: {path}:4: {key} is " in capsys.readouterr().err
    assert compare.main([str(path), str(path), "--benchmark", name, "--data", str(data)]) == 1
    assert f"error: {path}:4: {key} is " in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"question_id": [1]}, "question_id is"),
        ({"question_id": True}, "question_id is True"),
        ({"question_id": 1.5}, "question_id is 1.5, expected an integer or a string"),
        ({"question_id": None}, "question_id is None"),
        ({"prompt": None}, "prompt is None, expected a string"),
        ({"prompt": 5}, "prompt is 5"),
    ],
)
def test_ids_and_prompts_have_types(change, message, tmp_path):
    data, rows = rows_of("pope")
    rows[1] |= change
    with pytest.raises(DataError, match=rf"answers.jsonl:2: {message}".replace("[", r"\[")):
        get_benchmark("pope").read_answers(write(tmp_path / "answers.jsonl", rows))


def test_malformed_lines_can_be_left_out_of_a_submission(tmp_path, capsys):
    data, rows = rows_of("gqa")
    rows[2]["text"] = None
    path = write(tmp_path / "answers.jsonl", rows)
    command = ["--benchmark", "gqa", "--data", str(data), "--answers", str(path), "--skip-invalid"]
    assert submit.main(command) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["rows"] == len(rows) - 1 and ":3: text is None" in document["warnings"][0]


@pytest.mark.parametrize("name", SETS)
def test_answers_that_are_all_empty_have_no_score(name, tmp_path, capsys):
    data, rows = rows_of(name)
    key = text_key(rows)
    blanks = ("", " \n", "</s>", "\u200b", "<|im_end|> ")
    path = write(tmp_path / "answers.jsonl", [{**row, key: blanks[n % 5]} for n, row in enumerate(rows)])
    command = ["--benchmark", name, "--data", str(data), "--answers", str(path)]
    for main in (score.main, submit.main):
        assert main(command) == 1
        assert f"{path}: all {len(rows)} answers are empty" in capsys.readouterr().err
    with pytest.raises(EmptyAnswersError):
        get_benchmark(name).read_answers(path)


@pytest.mark.parametrize("name", SETS)
def test_empty_answers_are_counted(name, tmp_path):
    data, rows = rows_of(name)
    for row in rows[:2]:
        row[text_key(rows)] = ""
    benchmark = get_benchmark(name)
    found = benchmark.score(data, benchmark.read_answers(write(tmp_path / "a.jsonl", rows)))
    assert found.empty == found.document()["empty"] == 2


@pytest.mark.parametrize("name", SETS)
def test_special_tokens_are_unreadable_and_fixed_reads_them(name, tmp_path):
    data, rows = rows_of(name)
    benchmark, key = get_benchmark(name), text_key(rows)
    right = benchmark.score(data, benchmark.read_answers(GOLDEN.joinpath(*SETS[name])), fixed=True)
    form = "<s>{}" if name == "mme" else "{}</s>"  # MME reads the first four characters
    marked = [{**row, key: form.format(row[key])} for row in rows]
    answers = benchmark.read_answers(write(tmp_path / "a.jsonl", marked))
    official, fixed = benchmark.score(data, answers), benchmark.score(data, answers, fixed=True)
    assert official.unreadable > right.unreadable
    assert name in judge.JUDGED or fixed.score == right.score
    assert any("the official rule does not read" in warning for warning in official.warnings)


@pytest.mark.parametrize("name", SETS)
def test_ids_of_another_type_are_joined(name, tmp_path):
    data, rows = rows_of(name)
    key = "id" if "id" in rows[0] else "question_id"
    benchmark = get_benchmark(name)
    other = [
        {
            **row,
            key: int(row[key]) if str(row[key]).isdecimal() and isinstance(row[key], str) else str(row[key]),
        }
        for row in rows
    ]
    scores = [
        benchmark.score(data, benchmark.read_answers(write(tmp_path / "a.jsonl", one))).document()
        for one in (rows, other)
    ]
    for found in scores:
        del found["details"]["warnings"]
    assert scores[0] == scores[1]
    if str(rows[0][key]).isdecimal():
        texts = [{**row, key: f"{row[key]}.0"} for row in rows]
        found = benchmark.score(data, benchmark.read_answers(write(tmp_path / "a.jsonl", texts)))
        assert found.score == scores[0]["score"]
    if isinstance(rows[0][key], int):  # as pandas writes a column with an empty cell
        floats = [{**row, key: float(row[key])} for row in rows]
        found = benchmark.score(data, benchmark.read_answers(write(tmp_path / "a.jsonl", floats)))
        assert found.score == scores[0]["score"]


@pytest.mark.parametrize(
    "name", ["gqa", "vqav2_val", "vizwiz_val", "scienceqa", "mmbench", "mmvet", "msvd", "pope"]
)
def test_prompts_of_other_ids_are_joined_by_prompt_or_refused(name, tmp_path):
    data, rows = rows_of(name)
    benchmark = get_benchmark(name)
    key = "id" if "id" in rows[0] else "question_id"
    answers = benchmark.read_answers(write(tmp_path / "a.jsonl", rows))
    before = benchmark.score(data, answers)
    ids = [row[key] for row in rows]
    moved = [{**row, key: one} for row, one in zip(rows, ids[3:] + ids[:3], strict=True)]
    answers = benchmark.read_answers(write(tmp_path / "a.jsonl", moved))
    try:
        after = benchmark.score(data, answers)
    except DataError as error:
        assert "have the prompt of another question than their id" in str(error)
    else:
        assert after.score == before.score and after.details == before.details


def test_join_by_prompt():
    asked = {0: ("What is this?",), 1: ("Which color?",), 2: ("What  is this, here?",)}
    path = Path("q.jsonl")

    def rows(*prompts):
        return [{"prompt": prompt} if prompt else {} for prompt in prompts]

    same = rows("What is this?\nAnswer.", "Question: which Color", None)
    assert join_by_prompt([0, 1, 2], same, asked, path) == [0, 1, 2]
    other = rows("Which color?\nAnswer.", "What is this?\nAnswer.")
    assert join_by_prompt([0, 1], other, asked, path) == [1, 0]
    with pytest.raises(DataError, match="q.jsonl: 1 of 2 answers have the prompt of another question"):
        join_by_prompt([0, 1], rows("What is this?", "How many?"), asked, path)
    with pytest.raises(DataError, match="1 of 2 answers"):  # two questions have this text
        join_by_prompt([1, 0], rows("What is this?", "What is this?"), {**asked, 3: ("What is this?",)}, path)


@pytest.mark.parametrize(
    "name, file, change",
    [
        ("pope", "coco/coco_pope_random.json", {"label": True}),
        ("pope", "coco/coco_pope_random.json", {"question_id": [1]}),
        ("gqa", "testdev_balanced_questions.json", {"isBalanced": "yes"}),
        ("gqa", "testdev_balanced_questions.json", {"answer": 2}),
        ("gqa", "testdev_balanced_questions.json", {"semantic": "select"}),
        ("textvqa", "TextVQA_0.5.1_val.json", {"answers": "yes"}),
        ("textvqa", "TextVQA_0.5.1_val.json", {"question": None}),
        ("vqav2_val", "v2_mscoco_val2014_annotations.json", {"answers": [{"answer": 5}]}),
        ("vqav2_val", "v2_mscoco_val2014_annotations.json", {"question_id": {}}),
        ("vizwiz_val", "val.json", {"answers": {"answer": "x"}}),
        ("vizwiz_val", "val.json", {"image": 5}),
        ("scienceqa", "problems.json", {"answer": "1"}),
        ("scienceqa", "problems.json", {"answer": True}),
        ("scienceqa", "problems.json", {"answer": 7}),
        ("scienceqa", "problems.json", {"choices": "AB"}),
        ("mmvet", "mm-vet.json", {"answer": ["a"]}),
        ("mmvet", "mm-vet.json", {"capability": "ocr"}),
        ("msvd", "test_q_1k.json", {"question": 5}),
        ("msvd", "test_a_1k.json", {"answer": None}),
    ],
)
def test_annotations_of_another_type_are_named(name, file, change, tmp_path, capsys):
    folder, answers = SETS[name]
    data = shutil.copytree(GOLDEN / folder, tmp_path / "data")
    raw = (data / file).read_text(encoding="utf-8")
    try:
        document = json.loads(raw)
    except ValueError:
        document = [json.loads(line) for line in raw.splitlines()]
    entries = document
    if isinstance(document, dict):
        entries = document.get("data") or document.get("annotations") or list(document.values())
    entries[1].update(change)
    lines = "\n".join(map(json.dumps, document)) if raw[0] == "{" and "\n{" in raw else json.dumps(document)
    (data / file).write_text(lines)
    command = ["--benchmark", name, "--data", str(data), "--answers", str(data / answers)]
    assert score.main(command) == 1
    message = capsys.readouterr().err
    assert (
        message.startswith(f"error: {data / file}")
        and next(iter(change)) in message
        and "expected" in message
    )


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 3_000, b"\xff\xfe\x00", b'"\xe9"', b"5", b""])
@pytest.mark.parametrize(
    "name, file",
    [
        ("gqa", "testdev_balanced_questions.json"),
        ("vizwiz_val", "val.json"),
        ("scienceqa", "problems.json"),
        ("pope", "coco/coco_pope_random.json"),
        ("mmvet", "toy_gpt-4-0613-grade-5runs.json"),
        ("msvd", "judge_replies.json"),
        ("textvqa", "llava_answers_majority.jsonl"),
    ],
)
def test_broken_documents_are_one_line(name, file, content, tmp_path, capsys):
    folder, answers = SETS[name]
    data = shutil.copytree(GOLDEN / folder, tmp_path / "data")
    (data / file).write_bytes(content)
    command = ["--benchmark", name, "--data", str(data), "--answers", str(data / answers)]
    code = score.main(command)
    err = capsys.readouterr().err
    if content == b"" and file.startswith("coco"):  # no labels: reported by the rule, not by the reader
        assert "warning" in err
    else:
        assert code == 1 and err.startswith("error: ") and file in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "name, file, key",
    [
        ("vqav2_val", "v2_mscoco_val2014_annotations.json", "annotations"),
        ("vizwiz_val", "val.json", None),
    ],
)
def test_reference_answers_are_ten_for_every_question_once(name, file, key, tmp_path):
    folder, rows = rows_of(name)
    data = shutil.copytree(folder, tmp_path / name)
    document = json.loads((data / file).read_text())
    entries = document[key] if key else document
    for extra, message in ((dict(entries[0]), "occurs more than once"), (None, "has 9 reference answers")):
        changed = [*entries, extra] if extra else [{**entries[0], "answers": entries[0]["answers"][:9]}]
        (data / file).write_text(json.dumps({**document, key: changed} if key else changed))
        with pytest.raises(DataError, match=f"{file}: .* {message}"):
            get_benchmark(name).score(data, rows)


@pytest.mark.parametrize("name", sorted(SETS.keys() - {"mmvet", "msvd"}))
def test_answers_of_two_runs_in_one_file_are_named(name):
    data, rows = rows_of(name)
    warnings = get_benchmark(name).score(data, rows + [{**row, "text": "zebra"} for row in rows]).warnings
    assert any(f"({len(rows)} with another text, as of several runs)" in warning for warning in warnings)


def test_the_score_command_names_answers_of_several_settings(tmp_path, capsys):
    data, rows = rows_of("pope")
    setting = {"model": "x", "method": "vispruner", "important_ratio": 0.5}
    rows = [
        {**row, "metadata": {**setting, "tokens": 64 if place < 50 else 32}} for place, row in enumerate(rows)
    ]
    path = write(tmp_path / "answers.jsonl", rows)
    assert score.main(["--benchmark", "pope", "--data", str(data), "--answers", str(path)]) == 0
    assert "made with different tokens (64, 32)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gqa", "mmvet", "vqav2_val", "vizwiz_val"])
def test_submissions_name_answers_of_two_runs_and_refuse_other_questions(name):
    benchmark, (data, rows) = get_benchmark(name), rows_of(name)
    made = benchmark.submission(data, rows + [{**row, "text": "zebra"} for row in rows])
    assert any(f"({len(rows)} with another text, as of several runs)" in one for one in made.warnings)
    with pytest.raises(DataError, match="match no question in"):
        benchmark.submission(data, [{**row, "question_id": f"x{place}"} for place, row in enumerate(rows)])


def test_compare_names_answers_of_two_runs(tmp_path, capsys):
    data, rows = rows_of("pope")
    one, two = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows * 2)
    assert compare.main([str(one), str(two), "--benchmark", "pope", "--data", str(data)]) == 0
    assert f"B: {len(rows)} answers repeat the question_id of another" in capsys.readouterr().err
