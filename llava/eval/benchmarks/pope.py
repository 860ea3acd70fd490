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
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .base import Benchmark, DataFile, Score, mean, ratio
from .files import DataIssue, Question, Row, by_key, read_rows
from .joining import join_by_prompt, known_id
from .normalize import yes_or_no
from .shapes import ID, Shape

CATEGORIES, OUTCOMES = ("adversarial", "popular", "random"), ("TP", "FP", "TN", "FN")
QUESTIONS = "llava_pope_test.jsonl"
LABELS = tuple(f"coco/coco_pope_{category}.json" for category in CATEGORIES)
LABEL: Shape = {"question_id": ID, "label": frozenset(("yes", "no")), "image": ID, "text?": (str, type(None))}
QUESTION: Shape = {"question_id": ID, "category": str, "text?": str, "image?": str}
_BY_POSITION = "The official scorer joins by position without checking, so this score is not valid."
Keyed = list[tuple[tuple[str, Any], Row]]  # ((category, id in the label file), answer or label)
_PAGE = "POPE (github.com/RUCAIBox/POPE), the release with 2,910 random rows"
_LATER = (
    "3,000 random labels are a later release of POPE's file than the one of LLaVA's questions, with 2,910"
)


def parse_answer(text: str) -> str:
    """Return "no" if a word before the first period is exactly `No`, `not` or `no`, else "yes"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "not", "no") for word in words) else "yes"


def outcome(row: Row, label: Row) -> str:
    """Return TP, FP, TN or FN of one answer."""
    if row.get("unreadable"):  # with --fixed; an answer that is neither yes nor no is wrong
        return "FN" if label["label"] == "yes" else "FP"
    predicted = parse_answer(row["text"])
    return ("T" if predicted == label["label"] else "F") + ("P" if predicted == "yes" else "N")


def _says_yes(row: Row) -> bool:
    return not row.get("unreadable") and parse_answer(row["text"]) == "yes"


def category_metrics(pairs: list[tuple[Row, Row]], rows: list[Row], fixed: bool) -> Row:
    """Return counts, accuracy, precision, recall, F1 and yes ratio of one category."""
    counts = Counter(outcome(*pair) for pair in pairs)
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
            "yes_ratio": divide(sum(map(_says_yes, rows)), len(rows)),
        }
    except ZeroDivisionError as error:
        return found | {"f1": None, "raises": f"ZeroDivisionError: {error}"}


def foreign_labels(asked: Mapping[Hashable, Row], labels: Mapping[Hashable, Row]) -> dict[Hashable, str]:
    """Return {key: what differs} of the labels whose image or text is not that of their question."""
    found = {}
    for key, label in labels.items():
        row, text = asked.get(key, {}), (label.get("text") or "").replace("imange", "image")
        if "image" in row and Path(row["image"]).stem != Path(str(label["image"])).stem:
            found[key] = f"{row['image']!r} with {label['image']!r}"
        elif "text" in row and text not in row["text"].replace("imange", "image"):
            found[key] = f"{row['text'][:60]!r} with {text[:60]!r}"
    return found


def wrong_labels(inside: Keyed, labels: Keyed, foreign: Mapping[Hashable, str], fixed: bool) -> list[str]:
    """Return the warning that answers are joined with labels of other questions."""
    wrong = []
    for place, ((key, row), (other, label)) in enumerate(zip(inside, labels, strict=False), 1):
        if key != other or key in foreign:
            what = f"question_id {row['question_id']} with {label['question_id']}"
            what += f", {foreign[key]}" if key == other else ""
            wrong.append(f"from position {place} on, are joined with the label of another question ({what}")
    if not wrong and len(inside) == len(labels):
        return []
    what = f"{len(inside)} answers, {len(labels)} labels"
    what += f"; {len(wrong)} answers, {wrong[0]})" if wrong else ""
    if fixed:
        return [f"{what}. Use the labels of the release that LLaVA's questions belong to"]
    later = f"{_LATER}. " if len(labels) == 3000 and labels[0][0][0] == "random" else ""
    return [f"{what}. {_BY_POSITION} {later}--fixed joins by id"]


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
    image_key = "image"
    truth_files = (QUESTIONS, *LABELS)
    repeats = "the official scorer counts each, --fixed only the last one"
    constant_answers = ("Yes", "No")

    @staticmethod
    def read_truth(questions: Path, *paths: Path) -> Row:
        """Return labels, keys and texts of the questions, foreign labels, and issues of the question file.

        Keys are (category, id in the label file).
        """
        issues: list[DataIssue] = []
        rows = read_rows(questions, QUESTION, problems=issues)
        labels = {}
        for category, path in zip(CATEGORIES, paths, strict=True):
            found = read_rows(path, LABEL, "Replace the label file")
            labels |= by_key(path, (((category, _number(row["question_id"])), row) for row in found))
        keys = {row["question_id"]: (row["category"], _number(row["question_id"])) for row in rows}
        texts = {keys[row["question_id"]]: (row["text"].split("\n")[0],) for row in rows if "text" in row}
        foreign = foreign_labels({keys[row["question_id"]]: row for row in rows}, labels)
        return {
            "labels": labels,
            "keys": keys,
            "texts": texts,
            "foreign": foreign,
            "issues": list(map(str, issues)),
        }

    def truth(self, data: Path) -> Mapping[tuple[str, Any], Row]:
        return self.parsed(data)["labels"]

    def keys(self, data: Path, answers: Sequence[Row]) -> list[Hashable]:
        parsed = self.parsed(data)
        ids = [known_id(row["question_id"], parsed["keys"]) for row in answers]
        keys = [parsed["keys"].get(one, one) for one in ids]
        return join_by_prompt(keys, answers, parsed["texts"], self.truth_paths(data)[0])

    def wanted(self, data: Path) -> Collection[Hashable]:
        return set(self.parsed(data)["keys"].values())

    def question_key(self, question: Question) -> tuple[str, Any]:
        return question.category, _number(question.question_id)

    def check_truth(self, data: Path, questions: list[Question]) -> list[str]:
        warnings = super().check_truth(data, questions)
        if warnings and warnings[0].startswith("cannot be scored"):
            return warnings
        asked = sum(question.category == "random" for question in questions)
        later = sum(key[0] == "random" for key in self.truth(data)) == 3000 and asked <= 2910
        return [*warnings, _LATER] if later else warnings

    def credit(self, entry: Row, row: Row) -> float:
        return float(parse_answer(row["text"]) == entry["label"])

    def reading(self, entry: Any, text: str) -> str:
        return parse_answer(text)

    def careful(self, entry: Any, text: str) -> str | None:
        return yes_or_no(text)

    def official_score(self, data: Path, answers: list[Row], fixed: bool) -> Score:
        rows, warnings, _ = self.join(data, answers)
        if unknown := sorted({str(category) for category, _ in rows} - set(CATEGORIES)):
            warnings.append(f"answers of unknown categories are not scored: {', '.join(unknown)}")
        warnings += self.parsed(data)["issues"]
        details: dict[str, Any] = {"rule": "fixed: joined by id" if fixed else "official: joined by position"}
        truth, counted = self.truth(data), self.counted(data, answers, fixed)
        for category in CATEGORIES:
            inside = [one for one in counted if one[0][0] == category]
            labels = [one for one in truth.items() if one[0][0] == category]
            if fixed:
                inside = [one for one in inside if one[0] in truth]
                labels = [(key, truth[key]) for key, _ in inside]
                if not inside:
                    continue  # a category without answers has no F1
            doubt = wrong_labels(inside, labels, self.parsed(data)["foreign"], fixed)
            pairs = [(row, label) for (_, row), (_, label) in zip(inside, labels, strict=False)]
            details[category] = found = category_metrics(pairs, [row for _, row in inside], fixed)
            if found["f1"] is None:
                why = "no yes is right" if found["FP"] else "no answer is a yes"
                doubt.append(
                    f"the official scorer divides by zero here ({why}); --fixed counts such an F1 as 0"
                )
            warnings += [f"{category}: {text}" for text in doubt]
        scores = [details[category]["f1"] for category in CATEGORIES if category in details]
        details["mean_f1"] = mean_f1 = None if None in scores or not scores else mean(scores)
        return Score(self.name, None if mean_f1 is None else 100 * mean_f1, details, warnings)

    def image_counts(self, data: Path, answers: list[Row]) -> Iterable[tuple[str, np.ndarray]]:
        """Yield (image, counts (categories, 4) of TP, FP, TN and FN), joined by id."""
        for (category, _), label, row in self.matched(data, answers):
            counts = np.zeros((len(CATEGORIES), len(OUTCOMES)))
            counts[CATEGORIES.index(category), OUTCOMES.index(outcome(row, label))] = 1
            yield str(label["image"]), counts

    def score_counts(self, counts: np.ndarray) -> np.ndarray:
        """Return 100 x mean F1 (...) of counts (..., categories, 4); F1 = 2 TP / (2 TP + FP + FN)."""
        tp, fp, _, fn = np.moveaxis(counts, -1, 0)
        answered = (counts.sum(-1) > 0).sum(-1)  # categories without any answer are left out of the mean
        return 100 * ratio(2 * tp, 2 * tp + fp + fn).sum(-1) / np.maximum(answered, 1)


def _number(question_id: Any) -> Any:
    """Return the id in the label file: LLaVA adds 10^7 to random and 2 x 10^7 to popular ids."""
    text = str(question_id)
    return int(text) % 10_000_000 if text.isascii() and text.isdecimal() and len(text) < 19 else question_id
