"""POPE: object hallucination; yes/no questions in three categories: adversarial, popular and random.

Score: 100 x the unweighted mean of the three F1 scores ("yes" is positive), as LLaVA and VisPruner report it.

The official scorer has two known bugs. It joins answers and labels by position without checking, so another
release of the label files, or a lost or reordered answer, changes the score silently. It divides by zero if a
category has no true positive. The default reproduces its score and warns where a bug applies; `fixed` joins
by question_id modulo 10^7 (LLaVA numbers the categories in ranges of 10^7) and counts an undefined F1 as 0.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.benchmarks.base import Benchmark, DataFile, PerImageCounts, Score
from llava.eval.benchmarks.files import DataError, Question, Row, read_jsonl, read_rows

CATEGORIES = ("adversarial", "popular", "random")
QUESTIONS = "llava_pope_test.jsonl"
LABELS = tuple(f"coco/coco_pope_{category}.json" for category in CATEGORIES)
OUTCOMES = ("TP", "FP", "TN", "FN")
_PAGE = "POPE (github.com/RUCAIBox/POPE), the release with 2,910 random rows"
_LATER = (
    "3,000 random labels are a later release of POPE's file; LLaVA's questions belong to the one with 2,910"
)


def parse_answer(text: str) -> str:
    """Return "no" if a word before the first period is exactly `No`, `not` or `no`, else "yes"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "not", "no") for word in words) else "yes"


def outcome(row: Row, label: Row) -> str:
    """Return TP, FP, TN or FN of one answer."""
    predicted = parse_answer(row["text"])
    return ("T" if predicted == label["label"] else "F") + ("P" if predicted == "yes" else "N")


def category_metrics(pairs: list[tuple[Row, Row]], rows: list[Row], fixed: bool) -> Row:
    """Return counts, accuracy, precision, recall, F1 and yes ratio of one category."""
    counts = Counter(outcome(row, label) for row, label in pairs)
    tp, fp, tn, fn = (counts[name] for name in OUTCOMES)
    divide = (lambda a, b: a / b if b else 0.0) if fixed else operator.truediv
    found: Row = {"n": len(rows), **{name: counts[name] for name in OUTCOMES}}
    try:
        precision, recall = divide(tp, tp + fp), divide(tp, tp + fn)
        return found | {
            "accuracy": divide(tp + tn, tp + fp + tn + fn),
            "precision": precision,
            "recall": recall,
            "f1": divide(2 * precision * recall, precision + recall),
            "yes_ratio": divide(sum(parse_answer(row["text"]) == "yes" for row in rows), len(rows)),
        }
    except ZeroDivisionError as error:
        return found | {"f1": None, "raises": f"ZeroDivisionError: {error}"}


class Pope(Benchmark):
    name = "pope"
    title = "POPE"
    folder = "pope"
    metric = "F1"
    marker = QUESTIONS
    image_folder = "val2014"
    sizes = {8910: "full release"}
    files = (
        DataFile(QUESTIONS, "questions"),
        *(DataFile(name, "labels", _PAGE, "score") for name in LABELS),
        DataFile("val2014", "images", "COCO (cocodataset.org, val2014)"),
    )
    truth_files = (QUESTIONS, *LABELS)
    constant_answers = ("Yes", "No")

    @staticmethod
    def read_truth(questions: Path, *paths: Path) -> Row:
        """Return {"labels": {category: rows}, "categories": {question_id: category}, "issues"}."""
        issues: list[Any] = []
        rows = [row for _, row in read_jsonl(questions, issues, ("question_id", "category"))]
        labels = {}
        for category, path in zip(CATEGORIES, paths, strict=True):
            labels[category] = read_rows(path, ("question_id", "label", "image"), "Replace the label file")
            for row in labels[category]:
                if row["label"] not in ("yes", "no"):
                    raise DataError(
                        f"{path}: label is {row['label']!r}, expected 'yes' or 'no' (question_id "
                        f"{row['question_id']!r}). Replace the label file."
                    )
        categories = {row["question_id"]: row["category"] for row in rows}
        return {"labels": labels, "categories": categories, "issues": [str(issue) for issue in issues]}

    def truth(self, data: Path) -> dict[tuple[str, Any], Row]:
        labels = self.parsed(data)["labels"]
        return {(category, row["question_id"]): row for category in labels for row in labels[category]}

    def keys(self, data: Path, answers: Sequence[Row]) -> list[Hashable]:
        categories = self.parsed(data)["categories"]
        ids = [row["question_id"] for row in answers]
        return [(categories[one], _number(one)) if one in categories else one for one in ids]

    def known(self, data: Path) -> Collection[Hashable]:
        return {(category, _number(one)) for one, category in self.parsed(data)["categories"].items()}

    def image_of(self, key: Hashable, entry: Row) -> str:
        return str(entry["image"])

    def credit(self, entry: Row, row: Row) -> float:
        return float(parse_answer(row["text"]) == entry["label"])

    def score(self, data: Path, answers: list[Row], fixed: bool = False) -> Score:
        repeats = "only the last one is scored" if fixed else "the official scorer counts each"
        rows, warnings, _ = self.join(data, answers, repeats=repeats)
        keyed = list(zip(self.keys(data, answers), answers, strict=True))
        unknown = sorted({str(category) for category, _ in rows} - set(CATEGORIES))
        if unknown:
            warnings.append(f"answers of unknown categories are not scored: {', '.join(unknown)}")
        warnings += self.parsed(data)["issues"]
        details: dict[str, Any] = {"rule": "fixed: joined by id" if fixed else "official: joined by position"}
        for category, labels in self.parsed(data)["labels"].items():
            if fixed:
                ids = [(category, label["question_id"]) for label in labels]
                pairs = [(rows[key], label) for key, label in zip(ids, labels, strict=True) if key in rows]
                inside = [row for row, _ in pairs]
                warnings += _mismatched(category, pairs)
            else:
                inside = [row for key, row in keyed if key[0] == category]
                pairs = list(zip(inside, labels, strict=False))
                warnings += _misplaced(category, inside, labels)
            if fixed and not inside:
                continue  # a category without answers has no F1
            details[category] = category_metrics(pairs, inside, fixed)
            if details[category]["f1"] is None:
                some_yes = any(outcome(*pair) == "FP" for pair in pairs)
                why = "no yes is right" if some_yes else "no answer is a yes"
                warnings.append(
                    f"{category}: the official scorer divides by zero here ({why}) and reports no score; "
                    "--fixed counts such an F1 as 0"
                )
        scores = [details[category]["f1"] for category in CATEGORIES if category in details]
        details["mean_f1"] = None if None in scores or not scores else sum(scores) / len(scores)
        total = None if details["mean_f1"] is None else 100 * details["mean_f1"]
        return Score(self.name, total, details, warnings)

    def per_image_counts(self, data: Path, answers: list[Row]) -> PerImageCounts:
        """Return counts (images, categories, 4) of TP, FP, TN and FN, joined by id."""
        rows, table = self.join(data, answers).rows, {}
        for key, label in self.truth(data).items():
            if key in rows:
                counts = table.setdefault(str(label["image"]), np.zeros((len(CATEGORIES), len(OUTCOMES))))
                counts[CATEGORIES.index(key[0]), OUTCOMES.index(outcome(rows[key], label))] += 1
        return self._per_image(table)

    def score_counts(self, counts: np.ndarray) -> np.ndarray:
        """Return 100 x mean F1 (...) of counts (..., categories, 4); F1 = 2 TP / (2 TP + FP + FN)."""
        tp, fp, fn = counts[..., 0], counts[..., 1], counts[..., 3]
        total = 2 * tp + fp + fn
        f1 = np.divide(2 * tp, total, out=np.zeros_like(total), where=total > 0)
        answered = counts.sum(-1) > 0  # categories without any answer are left out of the mean
        return 100 * f1.sum(-1) / np.maximum(answered.sum(-1), 1)

    def question_key(self, question: Question) -> tuple[str, Any]:
        return question.category, _number(question.question_id)

    def check_truth(self, data: Path, questions: list[Question]) -> list[str]:
        warnings = super().check_truth(data, questions)
        asked = sum(question.category == "random" for question in questions)
        if warnings and warnings[0].startswith("cannot be scored"):
            return warnings
        later = len(self.parsed(data)["labels"]["random"]) == 3000 and asked <= 2910
        return [*warnings, _LATER] if later else warnings


def _number(question_id: Any) -> Any:
    """Return the id in the label file: LLaVA adds 10^7 to random and 2 x 10^7 to popular ids."""
    return question_id % 10_000_000 if isinstance(question_id, int) else question_id


def _misplaced(category: str, rows: list[Row], labels: Sequence[Row]) -> list[str]:
    """Return the warning that joining by position pairs answers with labels of other questions."""
    wrong = [
        place
        for place, (row, label) in enumerate(zip(rows, labels, strict=False))
        if _number(row["question_id"]) != label["question_id"]
    ]
    if len(rows) == len(labels) and not wrong:
        return []
    what = f"{category}: {len(rows)} answers, {len(labels)} labels"
    if wrong:
        ids = rows[wrong[0]]["question_id"], labels[wrong[0]]["question_id"]
        what += (
            f"; {len(wrong)} answers, from position {wrong[0] + 1} on, are joined with the label of another "
            f"question (question_id {ids[0]} with {ids[1]})"
        )
    later = f"{_LATER}. " if category == "random" and len(labels) == 3000 else ""
    return [
        f"{what}. The official scorer joins by position without checking, so this score is not valid. "
        f"{later}--fixed joins by id"
    ]


def _mismatched(category: str, pairs: list[tuple[Row, Row]]) -> list[str]:
    """Return the warning that labels and answers of the same id belong to different questions."""
    wrong = [
        (label["question_id"], label["text"], str(row["prompt"]))
        for row, label in pairs
        if "prompt" in row and label.get("text") and label["text"] not in str(row["prompt"])
    ]
    if not wrong:
        return []
    identity, text, prompt = wrong[0]
    return [
        f"{category}: {len(wrong)} labels belong to another question than the answer of the same id (first: "
        f"question_id {identity}, {text!r} in the label file, {prompt!r} in the answer). Use the label files "
        "of the release that LLaVA's questions belong to"
    ]
