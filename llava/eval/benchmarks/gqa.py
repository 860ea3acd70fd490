"""GQA (testdev balanced): compositional questions about scene graphs; exact match with one answer.

Score: accuracy of the evaluation script in LLaVA's version, the exact match of `text.rstrip(".").lower()`
over the balanced questions; nothing else is normalized. Validity and plausibility are 0 there because it has
no scene graphs; they are reported as they are. A balanced question without a prediction makes the script
stop; `fixed` averages over the answered ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .base import Benchmark, DataFile, Score, Submission, grouped, mean, most_common, to_json
from .files import DataError, Row, read_json
from .joining import repeated_answers
from .normalize import cleaned
from .normalize import gqa as converted
from .shapes import ID, Shape

QUESTIONS, TRUTH = "llava_gqa_testdev_balanced.jsonl", "testdev_balanced_questions.json"
ENTRY: Shape = {
    "question": str,
    "answer": str,
    "imageId": ID,
    "isBalanced": bool,
    "types": {"structural": (str, type(None)), "semantic": (str, type(None))},
    "groups": {"global": (str, type(None))},
    "semantic": [{"operation": str, "argument": str}],
}
_NOT_A_STEP = ("exist", "query: name", "choose name")
_PAGE = "GQA (cs.stanford.edu/people/dorarad/gqa)"


def prediction(row: Row) -> str:
    """Return the converted prediction; rows of a prediction file already contain it."""
    return converted(row["text"]) if "text" in row else row["prediction"]


def steps(question: Row) -> int:
    """Count reasoning steps: operations that do more than ask for a name or existence."""
    operations = (f"{part['operation']}: {part['argument']}" for part in question["semantic"])
    return sum(not any(word in operation for word in _NOT_A_STEP) for operation in operations)


TABLES = {
    "accuracyPerStructuralType": lambda question: question["types"]["structural"],
    "accuracyPerSemanticType": lambda question: question["types"]["semantic"],
    "accuracyPerSteps": steps,
    "accuracyPerLength": lambda question: len(question["question"].split()),
}


def distribution(pairs: list[tuple[str, str, str]]) -> float:
    """Return the distance of predicted from true answers over (group, true, predicted); 0 is best.

    It is chi-squared per group, weighted by the size of the group, divided by 100.
    """
    total = 0.0
    for inside in grouped((group, (answer, text)) for group, answer, text in pairs).values():
        true, predicted = (Counter(texts) for texts in zip(*inside, strict=True))
        total += len(inside) * sum((predicted[text] - count) ** 2 / count for text, count in true.items())
    return total / len(pairs) / 100 if pairs else 0.0


class GQA(Benchmark):
    name = "gqa"
    title = "GQA"
    folder = "gqa"
    metric = "accuracy"
    marker = QUESTIONS
    markers = (TRUTH, f"data/{TRUTH}")
    image_folder = "data/images"
    sizes = {12578: "testdev balanced"}
    files = (
        DataFile(QUESTIONS, "questions"),
        DataFile(f"data/{TRUTH}", "answers", f"{_PAGE}, questions 1.2", "score", (TRUTH,)),
        DataFile("data/images", "images", f"{_PAGE}, images", also=("images",)),
    )
    image_key = "imageId"
    truth_files = (f"data/{TRUTH}",)
    list_shape: Mapping[str, Shape] = {"questionId": ID, "prediction": str}

    @staticmethod
    def read_truth(path: Path) -> dict[str, Row]:
        truth = read_json(path, dict, {str: ENTRY})
        if not any(entry["isBalanced"] for entry in truth.values()):
            raise DataError(f"{path}: no question is balanced. Use the questions of testdev_balanced.")
        return truth

    def key(self, row: Row) -> str:
        return str(row.get("questionId", row.get("question_id")))

    def asked_texts(self, data: Path) -> Mapping[Hashable, Sequence[str]]:
        return {key: (entry["question"],) for key, entry in self.truth(data).items()}

    def reading(self, entry: Any, text: str) -> str:
        return converted(text)

    def careful(self, entry: Any, text: str) -> str:
        """Also drop an article, parentheses and final marks, which no reference answer has."""
        text = " ".join(cleaned(text).split()).strip("().!?,:; ")
        return re.sub(r"^(?:an?|the)\s+", "", text, flags=re.I)

    def wanted(self, data: Path) -> set[str]:
        return {key for key, entry in self.truth(data).items() if entry["isBalanced"]}

    def credit(self, entry: Row, row: Row) -> float | None:
        return float(entry["answer"] == prediction(row)) if entry["isBalanced"] else None

    def official_score(self, data: Path, answers: list[Row], fixed: bool) -> Score:
        _, warnings, missing = self.join(data, answers)
        questions = len(self.wanted(data))
        details: dict[str, Any] = {"questions": questions, "answered": questions - missing}
        if missing and not fixed:
            return self.stopped(details, warnings, "missing predictions")
        found = [(entry, row) for _, entry, row in self.matched(data, answers) if entry["isBalanced"]]
        values = [(entry, self.credit(entry, row)) for entry, row in found]
        is_open = grouped((entry["types"]["structural"] == "query", value) for entry, value in values)
        groups = [(entry["groups"]["global"], entry["answer"], prediction(row)) for entry, row in found]
        details |= {
            "accuracy": 100 * mean(value for _, value in values),
            "binary": 100 * mean(is_open.get("False", [])),
            "open": 100 * mean(is_open.get("True", [])),
            "validity": 0.0,
            "plausibility": 0.0,
            "distribution": distribution([group for group in groups if group[0] is not None]),
        }
        for name, group in TABLES.items():
            groups = grouped((group(entry), value) for entry, value in values)
            details[name] = {kind: [100 * mean(inside), len(inside)] for kind, inside in groups.items()}
        return Score(self.name, details["accuracy"], details, warnings)

    def constants(self, data: Path) -> list[str]:
        return most_common(entry["answer"] for entry in self.truth(data).values() if entry["isBalanced"])

    def submission(self, data: Path | None, answers: list[Row], questions: Path | None = None) -> Submission:
        """Return [{"questionId", "prediction"}], which the evaluation script reads, in the answers' order."""
        keys = [self.key(row) for row in answers]
        if data is not None and DataFile(f"data/{TRUTH}", also=(TRUTH,)).find(data):
            keys, warnings = self.keys(data, answers), self.join(data, answers).warnings
        else:
            warnings = repeated_answers(keys, answers, self.key_name)
        document = [
            {"questionId": key, "prediction": prediction(row)} for key, row in zip(keys, answers, strict=True)
        ]
        files = {"testdev_balanced_predictions.json": to_json(document)}
        return Submission(files, len(document), "GQA's eval.py --tier testdev_balanced", warnings)
