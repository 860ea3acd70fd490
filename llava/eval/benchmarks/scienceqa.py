"""ScienceQA: multiple choice from school books; `scienceqa` asks the questions with an image (SQA-IMG).

`scienceqa_full` asks all 4,241 test questions. Score: IMG-Accuracy by LLaVA's rule: the answer is a letter
alone, a letter before ". ", or "The answer is X."; anything else is wrong. Accuracy counts every question of
the split, answered or not. IMG-Accuracy counts the questions whose *answer* has `<image>` in its prompt, so
missing answers shrink its denominator silently; a warning counts them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .base import LETTER_ANSWER, Benchmark, DataFile, Score, mean
from .files import DataError, DataIssue, Question, Row, make_question, read_json

ALL, WITH_IMAGE = "llava_test_CQM-A.json", "llava_test_CQM-I.json"
SPLITS, PROBLEMS = "pid_splits.json", "problems.json"
OPTIONS = "ABCDE"
FAILED = "FAILED"
_SENTENCE = re.compile(r"The answer is ([A-Z]).")  # the last dot is any character, as in the original
_PAGE = "ScienceQA (scienceqa.github.io)"


def parse_answer(text: str) -> str:
    """Return the letter of an answer by LLaVA's rule, or FAILED."""
    if text[:1] and text[0] in OPTIONS and (len(text) == 1 or text[1:3] == ". "):
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else FAILED


def choice_index(letter: str, choices: list[str]) -> int:
    """Return the index of a letter among the choices; -1 for letters after the last one and for FAILED."""
    return OPTIONS.index(letter) if letter in tuple(OPTIONS[: len(choices)]) else -1


def right(entry: Row, row: Row) -> float:
    """Return 1 for a right answer, else 0."""
    return float(choice_index(parse_answer(row["text"]), entry["choices"]) == entry["answer"])


class ScienceQA(Benchmark):
    name = "scienceqa"
    title = "ScienceQA-IMG"
    folder = "scienceqa"
    other_folders = ("sqa",)
    metric = "accuracy"
    max_new_tokens = 1024
    marker = ALL
    markers = (WITH_IMAGE, PROBLEMS)
    sizes = {4241: "test", 2017: "test, questions with an image"}
    files = (
        DataFile(ALL, "questions", also=(WITH_IMAGE,)),
        DataFile(PROBLEMS, "choices and answers", _PAGE, "score"),
        DataFile(SPLITS, "ids of the test split", _PAGE, "score"),
        DataFile("images/test", "images", _PAGE),
    )
    truth_files = (SPLITS, PROBLEMS)
    constant_answers = tuple(OPTIONS)
    only_images = True

    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        path, index = self.find(data, ALL), 0
        if path.name != ALL and not self.only_images:
            raise DataError(f"{data / ALL}: not found. {path.name} contains only questions with an image.")
        for number, row in enumerate(read_json(path, list, ("id", "conversations")), 1):
            image = row.get("image")
            try:
                value = row["conversations"][0]["value"]
                text = value.replace("<image>", "").strip() + LETTER_ANSWER
                if image is None and self.only_images:
                    continue
                if (image is None) == ("<image>" in value):
                    raise ValueError(f"entry {row['id']} has only one of <image> and an image file")
                # the scorer recognizes questions with an image by their prompt
                extra = {"prompt": text if image is None else "<image>\n" + text}
                values = row["id"], image, text, path.parent / "images" / "test", self.allow_outside
                question = make_question(index, *values, file=str(path), line=number, extra=extra)
            except (LookupError, TypeError, AttributeError):
                problems.append(DataIssue(str(path), number, "entry without a human turn"))
                continue
            except ValueError as error:
                problems.append(DataIssue(str(path), number, str(error)))
                continue
            yield question
            index += 1

    @staticmethod
    def read_truth(splits: Path, path: Path) -> dict[str, Row]:
        """Return {id: problem} of the test split."""
        split = [str(key) for key in read_json(splits, dict, ("test",))["test"]]
        problems = read_json(path, dict)
        missing = [key for key in split if key not in problems]
        if missing or not split:
            what = f"{len(missing)} of {len(split)} questions of {splits.name} are missing"
            raise DataError(f"{path}: {what}. Use the files of one release.")
        return {key: problems[key] for key in split}

    def wanted(self, data: Path) -> tuple[()]:
        return ()  # `score` distinguishes questions with and without image

    def key(self, row: Row) -> str:
        return str(row["question_id"])

    def credit(self, entry: Row, row: Row) -> float | None:
        return right(entry, row) if "<image>" in str(row.get("prompt", "")) else None

    def score(self, data: Path, answers: list[Row], fixed: bool = False) -> Score:
        truth = self.truth(data)
        rows, warnings, _ = self.join(data, answers)
        correct = int(sum(right(truth[key], row) for key, row in rows.items()))
        images = [one.value for one in self.question_scores(data, answers)]
        details: dict[str, Any] = {
            "count": len(truth),
            "correct": correct,
            "accuracy": 100 * correct / (len(rows) if fixed and rows else len(truth)),
            "img_count": len(images),
            "img_correct": int(sum(images)),
            "img_accuracy": 100 * mean(images) if images else None,
            "unparsed": sum(parse_answer(row["text"]) == FAILED for row in rows.values()),
        }
        if not images:
            warnings.append(
                "no answer has <image> in its prompt, so that the official IMG-Accuracy is undefined"
            )
        with_image = [key for key, entry in truth.items() if entry.get("image")]
        if missing := sum(key not in rows for key in with_image):
            what = f"{missing} of {len(with_image)} questions with an image have no answer"
            warnings.append(f"{what}; IMG-Accuracy is that of the others")
        if missing := len(truth) - len(rows) - missing:
            effect = "" if fixed else "; the overall accuracy counts them as wrong and is not meaningful"
            warnings.append(f"{missing} questions without an image have no answer{effect}")
        return Score(self.name, details["img_accuracy"], details, warnings)


class ScienceQAFull(ScienceQA):
    """All test questions, with and without an image."""

    name = "scienceqa_full"
    title = "ScienceQA"
    asks_without_image = True
    only_images = False
