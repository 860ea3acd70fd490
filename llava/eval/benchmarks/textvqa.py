"""TextVQA (validation, 0.5.1): reading text in images, with OCR tokens in the prompt as in LLaVA.

Score: 100 x the mean VQA accuracy after the "EvalAI" normalization of both sides. question_id is the id of
the image and shared by its questions; a question is identified by image and lower-case text, which the
official scorer extracts from the prompt. It averages over the answers in the file, so missing answers do not
lower the score; a warning counts them. `fixed` scores each question once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from .base import Benchmark, DataFile, Score, mean, most_common
from .files import DataError, Row, read_json
from .normalize import evalai, soft_accuracy
from .shapes import ID

QUESTIONS, TRUTH = "llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json"
_OCR_LINE = "Reference OCR token: "
_OLD_PROMPT = re.compile(r"Question: (.*?) Short answer:", re.S)
_normalized = lru_cache(1 << 16)(evalai)


def question_of(prompt: str) -> str:
    """Return the lower-case question in a prompt. Raises ValueError for an unknown form of prompt."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        lines = _OLD_PROMPT.findall(prompt)[:1]
    elif _OCR_LINE in prompt and len(lines) == 3:
        lines = lines[1:] if prompt.startswith(_OCR_LINE) else lines
    elif len(lines) != 2:
        lines = []
    if not lines:
        raise ValueError("expected a question line, optionally an OCR line, and an instruction line")
    return lines[0].lower()


class TextVQA(Benchmark):
    name = "textvqa"
    title = "TextVQA"
    folder = "textvqa"
    metric = "accuracy"
    marker = QUESTIONS
    markers = (TRUTH,)
    image_folder = "train_images"
    sizes = {5000: "validation 0.5.1"}
    files = (
        DataFile(QUESTIONS, "questions with OCR tokens"),
        DataFile(TRUTH, "reference answers", "TextVQA 0.5.1 (textvqa.org/dataset)", "score"),
        DataFile("train_images", "images", "TextVQA training and validation images (textvqa.org/dataset)"),
    )
    truth_files = (TRUTH,)
    key_name = "image and question"
    repeats = "the official scorer counts each, --fixed only the last one"

    @staticmethod
    def read_truth(path: Path) -> Row:
        """Return {"answers": {(image, lower-case question): ten reference answers}, "repeated": number}.

        As in the official scorer, the last of several questions with one key counts.
        """
        entry = {"image_id": ID, "question": str, "answers": [str]}
        rows = read_json(path, dict, {"data": [entry]})["data"]
        truth = {(str(row["image_id"]), row["question"].lower()): row["answers"] for row in rows}
        for (image, _), answers in truth.items():
            if len(answers) != 10:
                what = f"image {image} has a question with {len(answers)} answers, expected 10"
                raise DataError(f"{path}: {what}. Use the validation file, not the test file.")
        repeated = sum(row["answers"] != truth[str(row["image_id"]), row["question"].lower()] for row in rows)
        return {"answers": truth, "repeated": repeated}

    def truth(self, data: Path) -> Mapping[tuple[str, str], Sequence[str]]:
        return self.parsed(data)["answers"]

    def key(self, row: Row) -> tuple[str, str]:
        try:
            return str(row["question_id"]), question_of(row["prompt"])
        except (KeyError, ValueError) as error:
            reason = "has no prompt" if isinstance(error, KeyError) else f"has an unknown prompt ({error})"
            raise DataError(
                f"{self.title}: the answer to question_id {row['question_id']!r} {reason}. The official "
                "scorer finds the question in it. Use LLaVA's prompts and keep the key 'prompt'."
            ) from error

    def credit(self, entry: tuple[str, ...], row: Row) -> float:
        return soft_accuracy(_normalized(row["text"]), [_normalized(answer) for answer in entry])

    def reading(self, entry: Any, text: str) -> str:
        return _normalized(text)

    def official_score(self, data: Path, answers: list[Row], fixed: bool) -> Score:
        _, warnings, missing = self.join(data, answers)
        if missing:
            warnings[-1] += "; the official scorer averages over the answers in the file"
        if repeated := self.parsed(data)["repeated"]:
            what = f"{repeated} questions of {TRUTH} occur again with other answers, of which the last count"
            warnings.append(f"{what}, as in the official scorer")
        truth = self.truth(data)
        credits = [self.credit(truth[key], row) for key, row in self.counted(data, answers, fixed)]
        details = {
            "rule": "fixed: each question once" if fixed else "official: mean over the answers",
            "accuracy": 100 * mean(credits),
            "samples": len(credits),
        }
        return Score(self.name, details["accuracy"], details, warnings)

    def constants(self, data: Path) -> list[str]:
        return most_common(answer for answers in self.truth(data).values() for answer in answers)
