"""VizWiz: questions of blind people about their own photos; many are unanswerable, and the prompt says so.

The test split is used if its question file exists and is scored by the server; the benchmark `vizwiz_val`
always uses the validation split. Score: the official accuracy of what LLaVA uploads (see `vqa`). Official
rules: only the prediction is normalized, never the reference answers, and the table of contractions has
typographic apostrophes, so "dont" never matches "don't". Answers are identified by image. Missing answers are
left out of the mean, with a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from .base import SHORT_ANSWER, DataFile
from .files import ANSWER, INSTRUCTIONS, DataError, Row, by_key, parse_once, read_json
from .joining import join_by_prompt, known_id, other_questions
from .normalize import soft_accuracy, vizwiz_official
from .shapes import TEXT, Shape
from .vqa import REFERENCES, UploadedVQA, references

LLAVA_TEST, LLAVA_VAL, TRUTH = "llava_test.jsonl", "llava_val.jsonl", "val.json"
MAY_REFUSE = f"\n{INSTRUCTIONS[0]}"
ENTRY: Shape = {
    "image": str,
    "answers": REFERENCES,
    "question?": str,
    "answer_type?": TEXT,
    "answerable?": (bool, int),
}
_PAGE = "VizWiz-VQA (vizwiz.org/tasks-and-datasets/vqa)"
_normalized = lru_cache(1 << 16)(vizwiz_official)
VAL_DATA = (
    DataFile(TRUTH, "validation questions and reference answers", _PAGE),
    DataFile("val", "validation images", _PAGE),
)


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


def _entry(path: Path, row: Row) -> Row:
    return {
        "question": row.get("question", ""),
        "answers": references(path, row["image"], row["answers"]),
        "type": row.get("answer_type", "unknown"),
        "unanswerable": not row.get("answerable", row.get("answer_type") != "unanswerable"),
    }


class VizWiz(UploadedVQA):
    name = "vizwiz"
    title = "VizWiz"
    folder = "vizwiz"
    marker = LLAVA_TEST
    markers = (TRUTH, LLAVA_VAL)
    question_files = (LLAVA_TEST, LLAVA_VAL, TRUTH)
    test_file, test_images, val_images = LLAVA_TEST, "test", "val"
    sizes = {8000: "test", 4319: "validation"}
    files = (
        DataFile(LLAVA_TEST, "test questions", also=(TRUTH,)),
        DataFile("test", "test images", _PAGE, also=("val",)),
    )
    optional_files = VAL_DATA
    truth_files = (TRUTH,)
    key_name = "image"
    answer_shape: Mapping[str, Shape] = {**ANSWER, "image?": str}
    list_shape: Mapping[str, Shape] = {"image": str, "answer": str}
    upload_files = (LLAVA_TEST, LLAVA_VAL)
    upload_all = True
    server = "EvalAI challenge 2185 (VizWiz VQA)"
    total = "accuracy"
    tables = {"perAnswerType": "type"}

    @staticmethod
    def official_questions(path: Path) -> Iterable[tuple[Any, str, str]]:
        for index, row in enumerate(read_json(path, list, {"image": str, "question": str})):
            yield index, row["image"], row["question"] + MAY_REFUSE + SHORT_ANSWER

    @staticmethod
    def accuracy(prediction: str, references: list[str] | tuple[str, ...]) -> float:
        """Return the official accuracy in [0, 1]: normalized prediction, unmodified reference answers."""
        return soft_accuracy(_normalized(prediction), references)

    @staticmethod
    def read_truth(path: Path) -> dict[str, Row]:
        """Return {image: question, type and reference answers}."""
        rows = read_json(path, list, ENTRY)
        return by_key(path, ((row["image"], _entry(path, row)) for row in rows))

    def is_test(self, data: Path, answers: list[Row]) -> bool:
        return all(image.startswith("VizWiz_test_") for image in self.keys(data, answers))

    def key(self, row: Row) -> str:
        return row["image"]

    def keys(self, data: Path, answers: Sequence[Row]) -> list[Hashable]:
        """Return the image of every answer: its own, or that of its id and prompt in a question file."""
        paths = [path for name in (LLAVA_VAL, LLAVA_TEST) if (path := data / name).is_file()]
        files = {path: parse_once(self.listed, path) for path in paths}
        if (data / TRUTH).is_file():  # numbered by position
            listed = ((key, one["question"].split("\n")[0]) for key, one in self.truth(data).items())
            files[data / TRUTH] = dict(enumerate(listed))
        images = {Path(image).stem: image for file in files.values() for image, _ in file.values()}
        if all("image" in row for row in answers):
            return [images.get(Path(row["image"]).stem, row["image"]) for row in answers]
        ids = [row["question_id"] for row in answers]
        named = [images.get(Path(str(one)).stem) for one in ids]
        if all(named):
            return named
        found = []
        for path, file in files.items():
            known = [known_id(one, file) for one in ids]
            if file.keys() >= set(known):
                texts = {images[Path(image).stem]: (text,) for image, text in file.values()}
                found.append(([images[Path(file[one][0]).stem] for one in known], texts, path))
        if not found:
            what = (
                f"no question file ({LLAVA_VAL}, {LLAVA_TEST} or {TRUTH}) has all ids of {len(ids)} answers"
            )
            raise DataError(f"{data}: {what}. Pass the --data of the same benchmark, split and release.")
        # The ids of both splits count from 0; prompts distinguish them.
        best = min(found, key=lambda one: other_questions(one[0], answers, one[1]))
        return join_by_prompt(best[0], answers, *best[1:])

    def summary(self, found: list[tuple[Row, Row]], text: Callable[[Row], str]) -> Row:
        predicted = [_normalized(text(row)) == "unanswerable" for _, row in found]
        true = [entry["unanswerable"] for entry, _ in found]
        return super().summary(found, text) | {
            "said_unanswerable": sum(predicted),
            "unanswerability_from_text": unanswerability(predicted, true),
        }


class VizWizVal(VizWiz):
    """The validation split, even if the test split exists."""

    name = "vizwiz_val"
    title = "VizWiz val"
    marker = TRUTH
    markers = (LLAVA_VAL,)
    question_files = (LLAVA_VAL, TRUTH)
    files = VAL_DATA
