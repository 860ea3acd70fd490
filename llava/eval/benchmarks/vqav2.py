"""VQAv2: test-dev is scored by the server; the validation split is scored here by the official rules.

Test-dev is used if its question file exists; the benchmark `vqav2_val` always uses the validation split.
Score: the official overall accuracy of what LLaVA uploads (see `vqa`). Official rule: if all ten reference
answers are identical, nothing is normalized, so "t-shirt", uploaded as "t shirt", is wrong. A missing answer
makes the official program stop; `fixed` averages over the answered questions.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from llava.eval.benchmarks.base import (
    SHORT_ANSWER,
    DataFile,
    Submission,
    check_foreign,
    group_percents,
    mean,
    to_json,
)
from llava.eval.benchmarks.files import Question, Row, parse_once, read_json, read_jsonl
from llava.eval.benchmarks.normalize import one_line, soft_accuracy, vqa_official
from llava.eval.benchmarks.vqa import UploadedVQA, uploaded

TEST_DEV, ALL_TEST = "llava_vqav2_mscoco_test-dev2015.jsonl", "llava_vqav2_mscoco_test2015.jsonl"
LLAVA_VAL = ("llava_vqav2_val.jsonl", "llava_vqav2_mscoco_val2014.jsonl")
VAL_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
_PAGE = "VQA v2 (visualqa.org/download.html)"
_normalized = lru_cache(1 << 18)(vqa_official)
VAL_DATA = (
    DataFile(VAL_QUESTIONS, "validation questions", _PAGE, also=LLAVA_VAL),
    DataFile(ANNOTATIONS, "validation annotations", _PAGE, "score"),
    DataFile("val2014", "COCO val2014 images", "COCO (cocodataset.org, val2014)"),
)


def accuracy(prediction: str, references: list[str] | tuple[str, ...]) -> float:
    """Return the official accuracy in [0, 1]; identical reference answers switch normalization off."""
    references, prediction = [one_line(answer) for answer in references], one_line(prediction)
    if len(set(references)) > 1:
        references, prediction = [_normalized(answer) for answer in references], _normalized(prediction)
    return soft_accuracy(prediction, references)


class VQAv2(UploadedVQA):
    name = "vqav2"
    title = "VQAv2"
    folder = "vqav2"
    marker = TEST_DEV
    markers = (ANNOTATIONS, *LLAVA_VAL, VAL_QUESTIONS)
    test_file, test_images, test_list = TEST_DEV, "test2015", ALL_TEST
    test_split = "test-dev"
    val_files, val_images = (*LLAVA_VAL, VAL_QUESTIONS), "val2014"
    sizes = {107394: "test-dev", 447793: "test", 214354: "validation"}
    files = (
        DataFile(TEST_DEV, "test-dev questions", also=(VAL_QUESTIONS, *LLAVA_VAL)),
        DataFile("test2015", "images", "COCO (cocodataset.org, test2015)", also=("val2014",)),
        DataFile(ALL_TEST, "list of all test ids", purpose="submit", also=(ANNOTATIONS,)),
    )
    optional_files = VAL_DATA
    truth_files = (ANNOTATIONS,)
    list_keys = ("question_id", "answer")
    server = "EvalAI challenge 830 (VQA), phase test-dev"
    total = "overall"
    needs_all = True
    accuracy = staticmethod(accuracy)

    def official_questions(self, path: Path, images: Path) -> Iterator[Question]:
        for index, row in enumerate(read_json(path, dict, ("questions",))["questions"]):
            image, text = images / f"COCO_val2014_{row['image_id']:012d}.jpg", row["question"] + SHORT_ANSWER
            yield Question(index, row["question_id"], image, text, file=str(path), line=index + 1)

    @staticmethod
    def read_truth(path: Path) -> dict[Any, Row]:
        """Return {question_id: image, types and reference answers}; interned, as few answers are distinct."""
        keys = ("image_id", "question_type", "answer_type")
        return {
            row["question_id"]: {
                **{key: row.get(key) for key in keys},
                "answers": tuple(sys.intern(one["answer"]) for one in row["answers"]),
            }
            for row in read_json(path, dict, ("annotations",))["annotations"]
        }

    def is_test(self, data: Path, answers: list[Row]) -> bool:
        path = data / TEST_DEV
        return path.is_file() and any(row["question_id"] in parse_once(_ids, path) for row in answers)

    def image_of(self, key: Hashable, entry: Row) -> str:
        return str(entry["image_id"])

    def summary(self, found: list[tuple[Row, str, float]]) -> Row:
        return {
            "overall": round(100 * mean(value for _, _, value in found), 2),
            "perAnswerType": group_percents(((row["answer_type"], value) for row, _, value in found), 2),
            "perQuestionType": group_percents(((row["question_type"], value) for row, _, value in found), 2),
        }

    def submission(self, data: Path | None, answers: list[Row], questions: Path | None = None) -> Submission:
        """Return [{"question_id", "answer"}] over all test ids, in their order, '' for unanswered ones."""
        path, listed = self.listed(data, questions, ALL_TEST, *LLAVA_VAL, needs=("question_id",))
        ids = [row["question_id"] for row in listed]
        rows = {row["question_id"]: row for row in answers}
        check_foreign(list(rows), set(ids), path)
        document = [{"question_id": key, "answer": uploaded(rows[key]) if key in rows else ""} for key in ids]
        empty = len(ids) - len(rows)
        warnings = (
            [f"{empty} of {len(ids)} questions are not answered; they are submitted as ''"] if empty else []
        )
        return Submission({"vqav2_submission.json": to_json(document)}, len(ids), self.server, warnings)


class VQAv2Val(VQAv2):
    """The validation split, even if the test split exists."""

    name = "vqav2_val"
    title = "VQAv2 val"
    marker = ANNOTATIONS
    markers = (*LLAVA_VAL, VAL_QUESTIONS)
    val_only = True
    files = VAL_DATA


def _ids(path: Path) -> frozenset[Any]:
    return frozenset(row["question_id"] for _, row in read_jsonl(path, [], ("question_id",)))
