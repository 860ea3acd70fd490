"""MMBench: circular scores of every golden case in both languages, letters, prompts, images, the xlsx."""

from __future__ import annotations

import base64
import json
import multiprocessing
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from openpyxl import load_workbook
from PIL import Image

from llava.eval.benchmarks import DataError, get_benchmark
from llava.eval.benchmarks.base import check_questions
from llava.eval.benchmarks.mmbench import infer_letter
from llava.eval.score import main as score_main

GOLDEN = Path(__file__).parents[2] / "data" / "benchmarks" / "mmbench"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
BENCHMARKS = {"en": get_benchmark("mmbench"), "cn": get_benchmark("mmbench_cn")}
CASES = [
    (language, case)
    for language in BENCHMARKS
    for case, value in EXPECTED[language].items()
    if isinstance(value, dict)
]


def file_of(language: str, case: str) -> Path:
    return GOLDEN / BENCHMARKS[language].marker.removesuffix(".tsv") / f"{case}.jsonl"


def answers(language: str, case: str) -> list[dict]:
    return BENCHMARKS[language].read_answers(file_of(language, case))


@pytest.mark.parametrize("language, case", CASES)
def test_golden_scores(language, case, capsys):
    benchmark, expected = BENCHMARKS[language], EXPECTED[language][case]
    assert (
        score_main(
            ["--benchmark", benchmark.name, "--data", str(GOLDEN), "--answers", str(file_of(language, case))]
        )
        == 0
    )
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    details, circular = document["details"], expected["vlmeval_circular"]
    assert document["score"] == pytest.approx(100 * circular["overall"], abs=1e-6)
    assert details["report"] == pytest.approx(circular["report"], abs=1e-9)
    assert (details["rows"], details["questions"]) == (
        EXPECTED[language]["n_rows"],
        EXPECTED[language]["n_base"],
    )
    assert details["vanilla"] == pytest.approx(100 * expected["vlmeval_vanilla_circ0"])
    assert details["vanilla_all_rows"] == pytest.approx(100 * expected["vlmeval_vanilla_all"])
    rows = answers(language, case)
    hits = {mark.key: mark.value for mark in benchmark.question_scores(GOLDEN, rows)}
    assert hits == circular["hits"]
    if expected["prefetch"] is not None:
        letters = {
            str(key): benchmark.letter(entry, row) or False
            for key, entry, row in benchmark.matched(GOLDEN, rows)
        }
        assert letters == expected["prefetch"]
    total = benchmark.per_image_counts(GOLDEN, rows).counts.sum(0)
    assert benchmark.score_counts(total) == pytest.approx(document["score"])


def test_golden_letters():
    table = EXPECTED["can_infer_table"]
    wrong = [
        (row["in"], infer_letter(row["in"], table["choices"]), row["vlmeval"])
        for row in table["cases"]
        if (infer_letter(row["in"], table["choices"]) or False) != row["vlmeval"]
    ]
    assert wrong == []


@pytest.mark.parametrize("language", BENCHMARKS)
def test_upload_is_llavas_cell_by_cell(language):
    benchmark, rows = BENCHMARKS[language], answers(language, "letters_95")
    made = benchmark.submission(GOLDEN, rows)
    (content,) = made.files.values()
    theirs = load_workbook(file_of(language, "letters_95").with_name("letters_95_upload.xlsx")).active
    ours = load_workbook(BytesIO(content)).active
    assert list(ours.iter_rows(values_only=True)) == list(theirs.iter_rows(values_only=True))
    assert ours.title == theirs.title
    columns = [cell.value for cell in next(ours.iter_rows())]
    assert columns == EXPECTED[language]["letters_95"]["upload_columns"]


def test_an_upload_can_be_scored_again(tmp_path):
    path = tmp_path / "upload.xlsx"
    path.write_bytes(next(iter(BENCHMARKS["en"].submission(GOLDEN, answers("en", "all_A")).files.values())))
    rows = BENCHMARKS["en"].read_answers(path)
    assert BENCHMARKS["en"].score(GOLDEN, rows).details["vanilla"] == pytest.approx(
        100 * EXPECTED["en"]["all_A"]["vlmeval_vanilla_circ0"]
    )


@pytest.mark.parametrize(
    "language, ending",
    [
        ("en", "\nAnswer with the option's letter from the given choices directly."),
        ("cn", "\n请直接回答选项字母。"),
    ],
)
def test_prompts_are_llavas(language, ending):
    benchmark, problems = BENCHMARKS[language], []
    questions = list(benchmark.questions(GOLDEN, problems))
    theirs = answers(language, "letters_95")
    assert problems == [] and benchmark.max_new_tokens == 1024
    assert [one.question_id for one in questions] == [row["question_id"] for row in theirs]
    for question, row in zip(questions, theirs, strict=True):
        assert question.text == row["prompt"] + ending
        for key in ("prompt", "round_id", "options", "option_char"):
            assert question.extra[key] == row[key]
    assert benchmark.check(GOLDEN, questions) == []


def tsv(path: Path, rows: list[list[str]]) -> Path:
    header = "index question hint A B C D answer category image source l2-category comment split".split()
    path.write_text("".join("\t".join(row) + "\n" for row in [header, *rows]), encoding="utf-8")
    return path


def image(color: str) -> str:
    content = BytesIO()
    Image.new("RGB", (3, 2), color).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def test_images_are_read_from_their_row_and_shared(tmp_path):
    def row(index, cell, question="Wer\u00e4?", b="y"):
        return [str(index), question, "", "x", b, "", "", "A", "c", cell, "s", "l", "", "dev"]

    tsv(
        tmp_path / "mmbench_dev_20230712.tsv",
        [
            row(1, image("red"), '"two\nlines ""quoted"""'),
            row(2, image("blue")),
            ["broken"],
            row(1000001, image("red")),
            row(1000002, "2", b="None"),
            row(1000003, "77"),
        ],
    )
    mmbench, problems = BENCHMARKS["en"], []
    questions = list(mmbench.questions(tmp_path, problems))
    assert [str(problem).split(": ", 1)[1][:20] for problem in problems] == [
        "1 cells for 14 colum",
        "refers to the image ",
    ]
    assert questions[0].text.startswith('two\nlines "quoted"\nA. x\nB. y\n')
    assert questions[0].image == questions[2].image and questions[1].image == questions[3].image
    assert questions[3].extra["options"] == ["x"]  # as pandas reads it
    colors = [mmbench.load_image(question.image).getpixel((0, 0)) for question in questions]
    assert colors == [(255, 0, 0), (0, 0, 255), (255, 0, 0), (0, 0, 255)]
    assert check_questions("MMBench", questions) == []
    with pytest.raises(ValueError, match=r"mmbench_dev_20230712.tsv \(row at byte"):
        mmbench.load_image(next(mmbench.questions(GOLDEN, [])).image)


def test_images_of_any_size_are_loaded_in_another_process(tmp_path):
    content = BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (220, 230, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    text = base64.b64encode(content.getvalue()).decode()
    assert len(text) > 131_072  # the default limit of the csv module for one cell
    row = ["1", "q", "", "x", "y", "", "", "A", "c", text, "s", "l", "", "dev"]
    tsv(tmp_path / "mmbench_dev_20230712.tsv", [row])
    (question,) = BENCHMARKS["en"].questions(tmp_path, [])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        loaded = pool.apply(BENCHMARKS["en"].load_image, (question.image,))
    assert np.array_equal(np.asarray(loaded), pixels)


def test_lost_rotations_and_other_questions():
    mmbench, rows = BENCHMARKS["en"], answers("en", "formats")
    score = mmbench.score(GOLDEN, rows[:-1])
    assert score.score == pytest.approx(100 * 23 / 24)
    assert "1 of 73 questions have no answer" in score.warnings[0]
    assert mmbench.score(GOLDEN, rows[:-1], fixed=True).score == 100
    with pytest.raises(DataError, match="1 of 1 answers match no question"):
        mmbench.score(GOLDEN, [{"question_id": 5, "text": "A"}])
    with pytest.raises(DataError, match="1 of 1 answers match no question"):
        mmbench.submission(GOLDEN, [{"question_id": 5, "text": "A"}])


def test_other_releases_are_found_and_named(tmp_path):
    (tmp_path / "mmbench_dev_en_20231003.tsv").write_bytes((GOLDEN / "mmbench_dev_20230712.tsv").read_bytes())
    mmbench = BENCHMARKS["en"]
    assert mmbench.locate(tmp_path) == tmp_path and not BENCHMARKS["cn"].owns(tmp_path)
    questions = list(mmbench.questions(tmp_path, []))
    assert "another release" in mmbench.check(tmp_path, questions)[0]
    assert any("vanilla" in warning for warning in mmbench.check(tmp_path, questions[:24]))
    (tmp_path / "mmbench_dev_en_20231003.tsv").write_text("index\tquestion\n")
    with pytest.raises(DataError, match="missing columns A, B, answer, image"):
        list(mmbench.questions(tmp_path, []))


def test_an_index_of_pandas_and_references_in_any_direction(tmp_path):
    def row(index, cell):
        return [index, f"q{cell[-9:]}{index}", "", "x", "y", "", "", "A", "c", cell, "s", "l", "", "dev"]

    rows = [
        row("1.0", "3.0"),
        row("2.0", "1"),
        row("3.0", image("red")),
        row("5", "6"),
        row("6", "5"),
        row("\u00b2", "1"),
    ]
    tsv(tmp_path / "mmbench_dev_20230712.tsv", rows)
    mmbench, problems = BENCHMARKS["en"], []
    questions = list(mmbench.questions(tmp_path, problems))
    assert [one.question_id for one in questions] == [1, 2, 3] and [one.index for one in questions] == [
        0,
        1,
        2,
    ]
    assert all(mmbench.load_image(one.image).getpixel((0, 0)) == (255, 0, 0) for one in questions)
    assert len({one.image for one in questions}) == 1
    assert ["refers to the image" in str(problem) for problem in problems] == [False, True, True]
    assert mmbench.score(tmp_path, [{"question_id": n, "text": "A"} for n in (1, 2, 3, 5, 6)]).score == 100


def test_answers_to_all_rounds_and_tables_of_another_release_are_refused(tmp_path):
    mmbench, rows = BENCHMARKS["en"], answers("en", "letters_95")
    further = [{**row, "round_id": number} for row in rows for number in (0, 1)]
    with pytest.raises(DataError, match=r"73 of 146 answers are of further rounds \(round_id > 0"):
        mmbench.score(GOLDEN, further)
    assert mmbench.score(GOLDEN, [row for row in further if not row["round_id"]]).score > 90
    bases = sorted({row["question_id"] for row in rows if row["question_id"] < 1_000_000})
    renumbered = dict(zip(bases, bases[1:] + bases[:1], strict=True))
    other = [
        {**row, "question_id": renumbered[row["question_id"]]} for row in rows if row["question_id"] in bases
    ]
    base = [row for row in rows if row["question_id"] in bases]
    assert mmbench.score(GOLDEN, other, fixed=True).score == mmbench.score(GOLDEN, base, fixed=True).score
    same = [{**row, "prompt": "What is in the image?\nA. kite"} for row in base]
    with pytest.raises(DataError, match="24 of 24 answers have the prompt of another question"):
        mmbench.score(GOLDEN, same)


def test_a_table_without_letters_or_in_another_encoding_is_refused(tmp_path):
    row = ["1", "q", "", "x", "y", "", "", "C", "c", image("red"), "s", "l", "", "dev"]
    path = tsv(tmp_path / "mmbench_dev_20230712.tsv", [row])
    mmbench, given = BENCHMARKS["en"], [{"question_id": 1, "text": "A"}]
    with pytest.raises(DataError, match=r"tsv:2: answer is 'C', expected the letter of an option"):
        mmbench.score(tmp_path, given)
    assert mmbench.submission(tmp_path, given).rows == 1
    raw = path.read_text()
    for content in (raw.encode("utf-16"), raw.replace("\tq\t", "\tcaf\u00e9\t").encode("latin-1")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"tsv:\d: not utf-8 text"):
            mmbench.score(tmp_path, given)
    path.write_bytes(raw.replace("\n", "\r").encode())
    with pytest.raises(DataError, match="mmbench_dev_20230712.tsv"):
        mmbench.score(tmp_path, given)


def test_an_answer_is_never_a_formula_in_the_upload(tmp_path):
    rows = [{**row, "text": "=HYPERLINK(1)"} for row in answers("en", "all_A")]
    (content,) = BENCHMARKS["en"].submission(GOLDEN, rows).files.values()
    (tmp_path / "upload.xlsx").write_bytes(content)
    cells = next(load_workbook(BytesIO(content)).active.iter_rows(min_row=2))
    assert [(cell.data_type, cell.value) for cell in cells if "=" in str(cell.value)] == [
        ("s", "=HYPERLINK(1)")
    ]
    assert BENCHMARKS["en"].read_answers(tmp_path / "upload.xlsx")[0]["text"] == "=HYPERLINK(1)"


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04" + bytes(50)])
def test_a_broken_upload_is_named(content, tmp_path):
    (tmp_path / "upload.xlsx").write_bytes(content)
    with pytest.raises(DataError, match="upload.xlsx: not an xlsx file"):
        BENCHMARKS["en"].read_answers(tmp_path / "upload.xlsx")


def test_a_table_without_a_usable_row_is_named(tmp_path):
    name = "mmbench_dev_20230712.tsv"
    header = "index\tquestion\thint\tA\tB\tC\tD\tanswer\timage"
    (tmp_path / name).write_text(f"{header}\n1e6\tWhat?\t\ta\tb\t\t\tA\tx\n")
    with pytest.raises(DataError, match=f"{name}: no row can be used .*{name}:2: "):
        get_benchmark("mmbench").score(tmp_path, [{"question_id": 1, "text": "A"}])
