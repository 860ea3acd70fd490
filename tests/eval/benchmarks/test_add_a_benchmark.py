"""The example in docs/add_a_benchmark.md works as it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from llava.eval.benchmarks import DataError

GUIDE = Path(__file__).parents[3] / "docs" / "add_a_benchmark.md"
ANSWERS = [{"question_id": 1, "text": "Red"}, {"question_id": 2, "text": "green"}]


@pytest.fixture
def colors():
    example = re.search(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL).group(1)
    names = {"__name__": "guide"}
    exec(example.replace("from .", "from llava.eval.benchmarks."), names)
    return names["Colors"]()


@pytest.fixture
def data(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    rows, truth = [], []
    for number, color in ((1, "red"), (2, "blue")):
        Image.new("RGB", (4, 4), color).save(tmp_path / "images" / f"{color}.png")
        rows.append({"question_id": number, "image": f"{color}.png", "text": "Which color?"})
        truth.append({"id": number, "image": f"{color}.png", "answer": color})
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "answers.json").write_text(json.dumps(truth))
    return tmp_path


def test_the_example_reads_scores_and_submits(colors, data):
    assert colors.locate(data) == data and all(file.find(data) for file in colors.files)
    questions = list(colors.questions(data, []))
    assert [one.text for one in questions] == ["Which color?"] * 2 and colors.check(data, questions) == []
    assert colors.load_image(questions[0].image).getpixel((0, 0)) == (255, 0, 0)
    score = colors.score(data, ANSWERS)
    assert score.score == 50 and score.warnings == []
    counts = colors.per_image_counts(data, ANSWERS)
    assert counts.images == ("red.png", "blue.png") and colors.score_counts(counts.counts.sum(0)) == 50
    assert colors.constants(data) == ["red", "blue"]
    (content,) = colors.submission(data, ANSWERS).files.values()
    assert json.loads(content) == [{"id": 1, "answer": "Red"}, {"id": 2, "answer": "green"}]


def test_the_example_checks_ids(colors, data):
    score = colors.score(data, ANSWERS[:1])
    assert score.score is None and score.details["raises"] == "missing answers"
    assert score.warnings[0] == "1 of 2 questions have no answer" and "--fixed" in score.warnings[1]
    assert colors.score(data, ANSWERS[:1], fixed=True).score == 100
    with pytest.raises(DataError, match="1 of 1 answers match no question in .*answers.json"):
        colors.score(data, [{"question_id": 3, "text": "red"}])
    (data / "answers.json").unlink()
    with pytest.raises(DataError, match="answers.json: not found. Add the answers from Colors"):
        colors.score(data, ANSWERS)
