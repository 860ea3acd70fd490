"""TextVQA (validation, 0.5.1): reading words in pictures, with OCR tokens in the prompt as LLaVA asks it.

Files: `llava_textvqa_val_v051_ocr.jsonl`, `TextVQA_0.5.1_val.json`, `train_images/`. The number is 100 x the
mean VQA accuracy after the "EvalAI" normaliser on both sides. question_id is the image's id and shared by its
questions: a question is known by image and lower-cased text, which the official scorer recovers from the
prompt. Its trap: it averages over the answers it is given, so that questions left out do not count against
anybody; `fixed` is the same number, and a warning names them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from llava.eval.benchmarks.base import (
    DataError,
    DataFile,
    DataIssue,
    Question,
    QuestionScore,
    Score,
    read_questions,
)
from llava.eval.benchmarks.common import (
    LLAVA_EVAL_ZIP,
    MeanBenchmark,
    check_known,
    check_pairing,
    commonest,
    mean,
    read_json,
    require,
)
from llava.eval.benchmarks.normalize import evalai, soft_accuracy

QUESTIONS, TRUTH = "llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json"
_OCR_LINE = "Reference OCR token: "
_OLD_PROMPT = re.compile(r"Question: (.*?) Short answer:", re.S)
_normalised = lru_cache(1 << 16)(evalai)


def question_of(prompt: str) -> str:
    """The question inside a prompt, lower-cased. Raises ValueError for a prompt of no known form."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = _OLD_PROMPT.search(prompt)
        if found:
            return found.group(1).lower()
    elif _OCR_LINE in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(_OCR_LINE) else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise ValueError("a question line, at most an OCR line and an instruction line are expected")


class TextVQA(MeanBenchmark):
    name = "textvqa"
    title = "TextVQA"
    folder = "textvqa"
    marker = QUESTIONS
    markers = (TRUTH,)
    metric = "accuracy"
    sizes = {5000: "validation 0.5.1"}
    files = (
        DataFile(QUESTIONS, "questions with OCR tokens", LLAVA_EVAL_ZIP),
        DataFile(TRUTH, "human answers", "TextVQA 0.5.1 (textvqa.org/dataset)", "score"),
        DataFile("train_images", "pictures", "TextVQA training and validation images (textvqa.org/dataset)"),
    )

    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        """Questions in file order; raises DataError where the question file is missing."""
        path = require(data, QUESTIONS, f"LLaVA's question file, from {LLAVA_EVAL_ZIP},")
        return read_questions(path, data / "train_images", problems)

    def check_truth(self, data: Path, questions: list[Question]) -> list[str]:
        try:
            truth = self._truth(data)
        except DataError as error:
            return [f"cannot be scored: {error}"]
        keys = []
        for question in questions:
            try:
                keys.append((str(question.question_id), question_of(question.text)))
            except ValueError:
                keys.append((str(question.question_id), None))
        return check_pairing(questions, keys, truth, data / TRUTH)

    def score(self, data: Path, answers: list[dict[str, Any]], fixed: bool = False) -> Score:
        data = Path(data)
        keys = [self._key(row) for row in answers]
        truth = self._truth(data)
        warnings = check_known(self.title, keys, truth, data / TRUTH, "image and question")
        if len(set(keys)) < len(keys) and not fixed:
            warnings[0] = warnings[0].replace("the last one counts", "the official scorer counts each")
        if len(set(keys)) < len(truth):
            warnings[-1] += "; the official scorer averages over the answers there are"
        accuracy = 100 * mean(mark.value for mark in self._marks(data, answers, each=not fixed))
        details = {
            "rule": "fixed: each question once" if fixed else "official: mean over the answers",
            "accuracy": accuracy,
            "samples": len(set(keys)) if fixed else len(keys),
        }
        return Score(self.name, accuracy, details, warnings)

    def question_scores(self, data: Path, answers: list[dict[str, Any]]) -> list[QuestionScore]:
        """VQA accuracy of every answered question."""
        return self._marks(Path(data), answers, each=False)

    def constants(self, data: Path) -> list[str]:
        """The most common human answers."""
        return commonest(human for humans in self._truth(Path(data)).values() for human in humans)

    def _marks(self, data: Path, answers: list[dict[str, Any]], each: bool) -> list[QuestionScore]:
        truth, found = self._truth(data), []
        rows = [(self._key(row), row) for row in answers]
        for key, row in rows if each else dict(rows).items():
            if key in truth:
                humans = [_normalised(human) for human in truth[key]]
                value = soft_accuracy(_normalised(row["text"]), humans)
                found.append(QuestionScore(f"{key[0]}/{key[1]}", key[0], value))
        return found

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[str, str]:
        try:
            return str(row["question_id"]), question_of(row["prompt"])
        except (KeyError, ValueError) as error:
            reason = "has no prompt" if isinstance(error, KeyError) else f"has another prompt ({error})"
            raise DataError(
                f"TextVQA: the answer to question_id {row['question_id']!r} {reason}; the "
                "official scorer finds the question in the prompt"
            ) from error

    @staticmethod
    def _truth(data: Path) -> dict[tuple[str, str], list[str]]:
        path = require(data, TRUTH, "the annotations of TextVQA 0.5.1")
        rows = read_json(path, dict, ("data",))["data"]
        truth = {(str(row["image_id"]), row["question"].lower()): row["answers"] for row in rows}
        odd = [key for key, humans in truth.items() if len(humans) != 10]
        if odd:
            raise DataError(
                f"{path}: {len(odd)} questions have other than 10 answers, e.g. of image "
                f"{odd[0][0]}: the test release, or a damaged file?"
            )
        return truth
