"""ScienceQA: multiple choice from school books; the number is that of the questions with a picture (SQA-IMG).

Files: `llava_test_CQM-A.json` (all 4,241 test questions) or `llava_test_CQM-I.json` (the 2,017 with a
picture), `pid_splits.json`, `problems.json`, `images/test/<id>/image.png`. `scienceqa` asks the questions
with a picture, `scienceqa_full` all of the first file.

Scored as LLaVA does: a letter must stand alone, or before ". ", or in "The answer is X."; anything else is
wrong. Accuracy counts every question of the split, answered or not; IMG-Accuracy counts those whose
*answer's* prompt holds `<image>`, so that pictures left out shrink its denominator unnoticed: a warning
says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava.eval.benchmarks.base import DataError, DataFile, DataIssue, Question, QuestionScore, Score
from llava.eval.benchmarks.common import (
    LLAVA_EVAL_ZIP,
    MeanBenchmark,
    check_known,
    check_pairing,
    mean,
    read_json,
    require,
)

ALL, WITH_IMAGE = "llava_test_CQM-A.json", "llava_test_CQM-I.json"
SPLITS, PROBLEMS = "pid_splits.json", "problems.json"
LETTER = "\nAnswer with the option's letter from the given choices directly."
OPTIONS = "ABCDE"
FAILED = "FAILED"
_SENTENCE = re.compile(r"The answer is ([A-Z]).")  # the last dot is any character, as in the original
_PAGE = "ScienceQA (scienceqa.github.io)"


def parse_answer(text: str) -> str:
    """The letter that an answer gives by LLaVA's rule, or FAILED."""
    if text in OPTIONS and len(text) == 1:
        return text
    if len(text) >= 3 and text[0] in OPTIONS and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else FAILED


def choice_index(letter: str, choices: list[str]) -> int:
    """Place of a letter among the choices; -1 for letters beyond them and for FAILED."""
    return OPTIONS.index(letter) if letter in OPTIONS[: len(choices)] and len(letter) == 1 else -1


class ScienceQA(MeanBenchmark):
    name = "scienceqa"
    title = "ScienceQA-IMG"
    folder = "scienceqa"
    marker = ALL
    markers = (WITH_IMAGE, PROBLEMS)
    other_folders = ("sqa",)
    metric = "accuracy"
    max_new_tokens = 1024
    sizes = {4241: "test", 2017: "test, questions with a picture"}
    files = (
        DataFile(ALL, "questions", LLAVA_EVAL_ZIP, also=(WITH_IMAGE,)),
        DataFile(PROBLEMS, "choices and answers", _PAGE, "score"),
        DataFile(SPLITS, "ids of the test split", _PAGE, "score"),
        DataFile("images/test", "pictures", _PAGE),
    )
    only_images = True

    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        """Questions in file order; raises DataError where the question file is missing or another one."""
        path = require(
            data,
            (WITH_IMAGE, ALL) if self.only_images and not (data / ALL).is_file() else ALL,
            f"LLaVA's question file, from {LLAVA_EVAL_ZIP},",
        )
        rows = read_json(path, list, ("id", "conversations"))
        return self._read(path, rows, data / "images" / "test", problems)

    def _read(
        self, path: Path, rows: list[dict], pictures: Path, problems: list[DataIssue]
    ) -> Iterator[Question]:
        index = 0
        for number, row in enumerate(rows, 1):
            try:
                text = row["conversations"][0]["value"].replace("<image>", "").strip() + LETTER
            except (LookupError, TypeError, AttributeError):
                problems.append(DataIssue(str(path), number, "entry without a human turn"))
                continue
            image = row.get("image")
            if image is None and self.only_images:
                continue
            if (image is None) == ("<image>" in row["conversations"][0]["value"]):
                what = "asks about a picture and names none" if image is None else "names an unused picture"
                problems.append(DataIssue(str(path), number, f"entry {row['id']} {what}"))
                continue
            # the scorer tells questions with a picture by their prompt
            prompt = text if image is None else "<image>\n" + text
            yield Question(
                index,
                row["id"],
                None if image is None else pictures / image,
                text,
                file=str(path),
                line=number,
                extra={"prompt": prompt},
            )
            index += 1

    def check_truth(self, data: Path, questions: list[Question]) -> list[str]:
        try:
            split, _ = self._truth(data)
        except DataError as error:
            return [f"cannot be scored: {error}"]
        return check_pairing(questions, [str(one.question_id) for one in questions], split, data / SPLITS)

    def score(self, data: Path, answers: list[dict[str, Any]], fixed: bool = False) -> Score:
        data = Path(data)
        split, problems = self._truth(data)
        rows = {str(row["question_id"]): row for row in answers}
        asked = [str(row["question_id"]) for row in answers]
        warnings = [
            one for one in check_known(self.title, asked, split, data / SPLITS) if "no answer" not in one
        ]
        right = self._right(split, problems, rows)
        pictured = [key for key in split if "<image>" in str(rows.get(key, {}).get("prompt", ""))]
        details: dict[str, Any] = {
            "count": len(split),
            "correct": sum(right.values()),
            "accuracy": 100 * sum(right.values()) / len(split),
            "img_count": len(pictured),
            "img_correct": sum(right[key] for key in pictured),
            "img_accuracy": 100 * mean(float(right[key]) for key in pictured) if pictured else None,
            "unparsed": sum(parse_answer(row["text"]) == FAILED for row in rows.values()),
        }
        self._warn(details, split, problems, rows, pictured, fixed, warnings)
        return Score(self.name, details["img_accuracy"], details, warnings)

    @staticmethod
    def _warn(
        details: dict[str, Any],
        split: list[str],
        problems: dict,
        rows: dict,
        pictured: list[str],
        fixed: bool,
        warnings: list[str],
    ) -> None:
        with_picture = [key for key in split if problems[key].get("image")]
        lost = [key for key in with_picture if key not in rows]
        texts = [key for key in split if key not in rows and not problems[key].get("image")]
        if not pictured:
            warnings.append(
                "no answer's prompt holds <image>, by which the official scorer tells questions "
                "with a picture; there is no IMG-Accuracy"
            )
        if lost:
            warnings.append(
                f"{len(lost)} of {len(with_picture)} questions with a picture have no answer; "
                "IMG-Accuracy is that of the others"
            )
        if texts:
            warnings.append(
                f"{len(texts)} questions without a picture have no answer; the overall accuracy "
                "counts them as wrong and means nothing"
                if not fixed
                else f"{len(texts)} questions without a picture have no answer"
            )
        if fixed and rows:
            details["accuracy"] = 100 * details["correct"] / sum(key in rows for key in split)

    @staticmethod
    def _right(split: list[str], problems: dict, rows: dict[str, dict]) -> dict[str, bool]:
        found = {}
        for key in split:
            letter = parse_answer(rows[key]["text"]) if key in rows else FAILED
            found[key] = choice_index(letter, problems[key]["choices"]) == problems[key]["answer"]
        return found

    def question_scores(self, data: Path, answers: list[dict[str, Any]]) -> list[QuestionScore]:
        """1 where a question with a picture is answered right."""
        split, problems = self._truth(Path(data))
        rows = {str(row["question_id"]): row for row in answers}
        right = self._right(split, problems, rows)
        return [
            QuestionScore(key, key, float(right[key]))
            for key in split
            if "<image>" in str(rows.get(key, {}).get("prompt", ""))
        ]

    def constants(self, data: Path) -> list[str]:
        """The letters."""
        return list(OPTIONS)

    @staticmethod
    def _truth(data: Path) -> tuple[list[str], dict[str, dict[str, Any]]]:
        """(ids of the test split, all problems)."""
        split_path = require(data, SPLITS, f"the splits of {_PAGE}")
        split = [str(key) for key in read_json(split_path, dict, ("test",))["test"]]
        path = require(data, PROBLEMS, f"the problems of {_PAGE}")
        problems = read_json(path, dict)
        lost = [key for key in split if key not in problems]
        if lost or not split:
            raise DataError(
                f"{path}: lacks {len(lost)} of the {len(split)} questions of {split_path.name}: "
                "files of different releases?"
            )
        return split, problems


class ScienceQAFull(ScienceQA):
    """All test questions, with and without a picture."""

    name = "scienceqa_full"
    title = "ScienceQA"
    asks_without_image = True
    only_images = False
