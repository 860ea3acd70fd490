"""VizWiz: questions of blind people about their own photos; many are unanswerable, and the prompt says so.

The test split is used if its question file exists and is scored by the server; the benchmark `vizwiz_val`
always uses the validation split. Score: the official accuracy of what LLaVA uploads (see `vqa`). Official
rules: only the prediction is normalized, never the reference answers, and the table of contractions has
typographic apostrophes, so "dont" never matches "don't". Answers are identified by image. Missing answers are
left out of the mean, with a warning.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from llava.eval.benchmarks.base import (
    SHORT_ANSWER,
    DataFile,
    Submission,
    check_foreign,
    group_percents,
    mean,
    to_json,
)
from llava.eval.benchmarks.files import DataError, Question, Row, parse_once, read_json, read_jsonl
from llava.eval.benchmarks.normalize import soft_accuracy, vizwiz_official
from llava.eval.benchmarks.vqa import UploadedVQA, uploaded

LLAVA_TEST, LLAVA_VAL, TRUTH = "llava_test.jsonl", "llava_val.jsonl", "val.json"
MAY_REFUSE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
_PAGE = "VizWiz-VQA (vizwiz.org/tasks-and-datasets/vqa)"
_normalized = lru_cache(1 << 16)(vizwiz_official)
VAL_DATA = (
    DataFile(TRUTH, "validation questions and reference answers", _PAGE),
    DataFile("val", "validation images", _PAGE),
)


def accuracy(prediction: str, references: list[str] | tuple[str, ...]) -> float:
    """Return the official accuracy in [0, 1]: normalized prediction, unmodified reference answers."""
    return soft_accuracy(_normalized(prediction), references)


def unanswerability(predicted: list[bool], true: list[bool]) -> dict[str, float]:
    """Return average precision and F1 (percent) of "unanswerable", derived from the answers' text alone.

    The server scores numbers between 0 and 1, which LLaVA does not submit; this is the usual substitute.
    """
    hits = sum(a and b for a, b in zip(predicted, true, strict=True))
    precision, recall = (hits / number if number else 0.0 for number in (sum(predicted), sum(true)))
    average = recall * precision + (1 - recall) * (sum(true) / len(true) if true else 0.0)
    positive = sum(predicted) + sum(true)
    f1 = 2 * hits / positive if positive else 0.0
    return {"average_precision": round(100 * average, 2), "f1_score": round(100 * f1, 2)}


class VizWiz(UploadedVQA):
    name = "vizwiz"
    title = "VizWiz"
    folder = "vizwiz"
    marker = LLAVA_TEST
    markers = (TRUTH, LLAVA_VAL)
    test_file, test_images, test_list = LLAVA_TEST, "test", LLAVA_TEST
    val_files, val_images = (LLAVA_VAL, TRUTH), "val"
    sizes = {8000: "test", 4319: "validation"}
    files = (
        DataFile(LLAVA_TEST, "test questions", also=(TRUTH,)),
        DataFile("test", "test images", _PAGE, also=("val",)),
    )
    optional_files = VAL_DATA
    truth_files = (TRUTH,)
    key_name = "image"
    list_keys = ("image", "answer")
    server = "EvalAI challenge 2185 (VizWiz VQA)"
    total = "accuracy"
    accuracy = staticmethod(accuracy)

    def official_questions(self, path: Path, images: Path) -> Iterator[Question]:
        for index, row in enumerate(read_json(path, list, ("image", "question"))):
            text = row["question"] + MAY_REFUSE + SHORT_ANSWER
            yield Question(index, index, images / row["image"], text, file=str(path), line=index + 1)

    @staticmethod
    def read_truth(path: Path) -> dict[str, Row]:
        """Return {image: question, type and reference answers}."""
        return {
            row["image"]: {
                "question": row.get("question", ""),
                "answers": tuple(one["answer"] for one in row["answers"]),
                "type": row.get("answer_type", "unknown"),
                "unanswerable": not row["answerable"]
                if "answerable" in row
                else row["answer_type"] == "unanswerable",
            }
            for row in read_json(path, list, ("image", "answers"))
        }

    def is_test(self, data: Path, answers: list[Row]) -> bool:
        return all(image.startswith("VizWiz_test_") for image in self.keys(data, answers))

    def key(self, row: Row) -> str:
        return row["image"]

    def keys(self, data: Path, answers: Sequence[Row]) -> list[str]:
        """Return the image of every answer, from the question file whose ids and prompts match best."""
        if all("image" in row for row in answers):
            return [self.key(row) for row in answers]
        best, found = -1, []
        for name in (LLAVA_VAL, LLAVA_TEST, TRUTH):
            if not (data / name).is_file():
                continue
            if name == TRUTH:  # numbered by position
                rows = enumerate(self.truth(data).items())
                asked = {number: (image, entry["question"]) for number, (image, entry) in rows}
            else:
                asked = parse_once(_asked, data / name)
            if any(row["question_id"] not in asked for row in answers):
                continue
            pairs = [(asked[row["question_id"]], str(row.get("prompt", ""))) for row in answers]
            agree = sum(prompt.startswith(text) for (_, text), prompt in pairs)
            if agree > best:  # the ids of both splits count from 0; prompts distinguish them
                best, found = agree, [image for (image, _), _ in pairs]
        if best < 0:
            raise DataError(
                f"{data}: no question file ({LLAVA_VAL}, {LLAVA_TEST} or {TRUTH}) has all ids of these "
                f"{len(answers)} answers. Pass the --data of the same benchmark, split and release."
            )
        return found

    def summary(self, found: list[tuple[Row, str, float]]) -> Row:
        predicted = [_normalized(text) == "unanswerable" for _, text, _ in found]
        return {
            "accuracy": round(100 * mean(value for _, _, value in found), 2),
            "perAnswerType": group_percents(((row["type"], value) for row, _, value in found), 2),
            "said_unanswerable": sum(predicted),
            "unanswerability_from_text": unanswerability(
                predicted, [row["unanswerable"] for row, _, _ in found]
            ),
        }

    def submission(self, data: Path | None, answers: list[Row], questions: Path | None = None) -> Submission:
        """Return [{"image", "answer"}] in the order of the question file; every question must be answered."""
        path, wanted = self.listed(data, questions, LLAVA_TEST, LLAVA_VAL, needs=("question_id", "image"))
        rows = {row["question_id"]: row for row in answers}
        check_foreign(list(rows), {row["question_id"] for row in wanted}, path)
        missing = [row["image"] for row in wanted if row["question_id"] not in rows]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(wanted)} images have no answer (first: {missing[0]}). The server "
                "requires all of them."
            )
        document = [{"image": row["image"], "answer": uploaded(rows[row["question_id"]])} for row in wanted]
        return Submission({"vizwiz_submission.json": to_json(document)}, len(document), self.server)


class VizWizVal(VizWiz):
    """The validation split, even if the test split exists."""

    name = "vizwiz_val"
    title = "VizWiz val"
    marker = TRUTH
    markers = (LLAVA_VAL,)
    val_only = True
    files = VAL_DATA


def _asked(path: Path) -> dict[Hashable, tuple[str, str]]:
    """Return {question_id: (image, prompt)} of LLaVA's question file."""
    rows = read_jsonl(path, [], ("question_id", "image", "text"))
    return {row["question_id"]: (row["image"], row["text"]) for _, row in rows}
