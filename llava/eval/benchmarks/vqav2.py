"""VQAv2: test-dev is scored by the server; the validation split is scored here by the official rules.

Test-dev is used if its question file exists; the benchmark `vqav2_val` always uses the validation split.
Score: the official overall accuracy of what LLaVA uploads (see `vqa`). Official rule: if all ten reference
answers are identical, nothing is normalized, so "t-shirt", uploaded as "t shirt", is wrong. A missing answer
makes the official program stop; `fixed` averages over the answered questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from .base import SHORT_ANSWER, DataFile
from .files import Row, by_key, parse_once, read_json
from .joining import known_id
from .normalize import one_line, soft_accuracy, vqa_official
from .shapes import ID, TEXT, Shape
from .vqa import REFERENCES, UploadedVQA, asked, references

TEST_DEV, ALL_TEST = "llava_vqav2_mscoco_test-dev2015.jsonl", "llava_vqav2_mscoco_test2015.jsonl"
LLAVA_VAL = ("llava_vqav2_val.jsonl", "llava_vqav2_mscoco_val2014.jsonl")
VAL_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
_PAGE = "VQA v2 (visualqa.org/download.html)"
_ABOUT = ("image_id", "question_type", "answer_type")  # keys of an annotation
_normalized = lru_cache(1 << 18)(vqa_official)
VAL_DATA = (
    DataFile(VAL_QUESTIONS, "validation questions", _PAGE, also=LLAVA_VAL),
    DataFile(ANNOTATIONS, "validation annotations", _PAGE, "score"),
    DataFile("val2014", "COCO val2014 images", "COCO (cocodataset.org, val2014)"),
)


def _entry(path: Path, row: Row) -> Row:
    answers = references(path, row["question_id"], row["answers"])
    return {**{key: row.get(key) for key in _ABOUT}, "answers": answers}


class VQAv2(UploadedVQA):
    name = "vqav2"
    title = "VQAv2"
    folder = "vqav2"
    marker = TEST_DEV
    markers = (ANNOTATIONS, *LLAVA_VAL, VAL_QUESTIONS)
    question_files = (TEST_DEV, *LLAVA_VAL, VAL_QUESTIONS)
    test_file, test_images, val_images = TEST_DEV, "test2015", "val2014"
    test_split = "test-dev"
    sizes = {107394: "test-dev", 447793: "test", 214354: "validation"}
    files = (
        DataFile(TEST_DEV, "test-dev questions", also=(VAL_QUESTIONS, *LLAVA_VAL)),
        DataFile("test2015", "images", "COCO (cocodataset.org, test2015)", also=("val2014",)),
        DataFile(ALL_TEST, "list of all test ids", purpose="submit", also=(ANNOTATIONS,)),
    )
    optional_files = VAL_DATA
    image_key = "image_id"
    truth_files = (ANNOTATIONS,)
    list_shape: Mapping[str, Shape] = {"question_id": ID, "answer": str}
    upload_files = (ALL_TEST, *LLAVA_VAL)
    server = "EvalAI challenge 830 (VQA), phase test-dev"
    total = "overall"
    tables = {"perAnswerType": "answer_type", "perQuestionType": "question_type"}
    needs_all = True

    @staticmethod
    def official_questions(path: Path) -> Iterable[tuple[Any, str, str]]:
        entry = {"question_id": ID, "image_id": int, "question": str}
        for row in read_json(path, dict, {"questions": [entry]})["questions"]:
            image = f"COCO_val2014_{row['image_id']:012d}.jpg"
            yield row["question_id"], image, row["question"] + SHORT_ANSWER

    @staticmethod
    def accuracy(prediction: str, references: list[str] | tuple[str, ...]) -> float:
        """Return the official accuracy in [0, 1]; identical reference answers switch normalization off."""
        references, prediction = [one_line(answer) for answer in references], one_line(prediction)
        if len(set(references)) > 1:
            references, prediction = [_normalized(answer) for answer in references], _normalized(prediction)
        return soft_accuracy(prediction, references)

    @staticmethod
    def read_truth(path: Path) -> dict[Any, Row]:
        """Return {question_id: image, types and reference answers}."""
        entry = {"question_id": ID, "answers": REFERENCES, **{f"{key}?": TEXT for key in _ABOUT}}
        rows = read_json(path, dict, {"annotations": [entry]})["annotations"]
        return by_key(path, ((row["question_id"], _entry(path, row)) for row in rows))

    def is_test(self, data: Path, answers: list[Row]) -> bool:
        path = data / TEST_DEV
        if not path.is_file():
            return False
        listed = parse_once(asked, path)
        return any(known_id(row["question_id"], listed) in listed for row in answers)


class VQAv2Val(VQAv2):
    """The validation split, even if the test split exists."""

    name = "vqav2_val"
    title = "VQAv2 val"
    marker = ANNOTATIONS
    markers = question_files = (*LLAVA_VAL, VAL_QUESTIONS)
    files = VAL_DATA
