"""POPE: does the model see objects that are not there? Yes/no questions, adversarial, popular and random.

Files: `llava_pope_test.jsonl`, `coco/coco_pope_{adversarial,popular,random}.json` (one JSON per line; the
release with 2,910 random rows), `val2014/`. The number is 100 x the unweighted mean of the F1 of the three
categories ("yes" positive), the one that LLaVA and VisPruner report.

The official scorer has two traps. It joins answers and labels *by position*, unchecked: another release of
the label files, a lost or shuffled answer, and the number is silently wrong. And it divides by zero when a
category has no true positive. By default we give its number and a warning where a trap bites; `fixed=True`
joins by id (question_id modulo 10^7, as LLaVA's file numbers the categories) and counts an undefined F1 as 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.benchmarks.base import (
    Benchmark,
    DataError,
    DataFile,
    DataIssue,
    PerImageCounts,
    Question,
    QuestionScore,
    Score,
    read_jsonl,
    read_questions,
)

CATEGORIES = ("adversarial", "popular", "random")
QUESTIONS = "llava_pope_test.jsonl"
_ID_RANGE = 10_000_000  # LLaVA's ids: adversarial n, random 10^7 + n, popular 2 * 10^7 + n
_FIELDS = ("TP", "FP", "TN", "FN")


def parse_answer(text: str) -> str:
    """Official rule: "no" if a word before the first full stop is exactly `No`, `not` or `no`, else "yes"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "not", "no") for word in words) else "yes"


def confusion(predicted: list[str], labels: list[str]) -> dict[str, int]:
    """TP, FP, TN, FN with "yes" as the positive class; pairs by position, the longer list is cut."""
    counts = dict.fromkeys(_FIELDS, 0)
    for said, label in zip(predicted, labels, strict=False):
        counts[("T" if said == label else "F") + ("P" if said == "yes" else "N")] += 1
    return counts


def _metrics(counts: dict[str, int], predicted: list[str], fixed: bool) -> dict[str, Any]:
    tp, fp, tn, fn = (counts[key] for key in _FIELDS)
    safe = (lambda a, b: a / b if b else 0.0) if fixed else (lambda a, b: a / b)
    result: dict[str, Any] = {"n": len(predicted), **counts}
    try:
        precision, recall = safe(tp, tp + fp), safe(tp, tp + fn)
        result |= {
            "accuracy": safe(tp + tn, tp + fp + tn + fn),
            "precision": precision,
            "recall": recall,
            "f1": safe(2 * precision * recall, precision + recall),
            "yes_ratio": safe(predicted.count("yes"), len(predicted)),
        }
    except ZeroDivisionError as error:
        result |= {"f1": None, "raises": f"ZeroDivisionError: {error}"}
    return result


class Pope(Benchmark):
    name = "pope"
    title = "POPE"
    folder = "pope"
    marker = QUESTIONS
    metric = "F1"
    sizes = {8910: "full release"}
    files = (
        DataFile(QUESTIONS, "questions", "eval.zip of LLaVA (its docs/Evaluation.md)"),
        *(
            DataFile(
                f"coco/coco_pope_{name}.json",
                "labels",
                "POPE (github.com/RUCAIBox/POPE), the release with 2,910 random rows",
                "score",
            )
            for name in CATEGORIES
        ),
        DataFile("val2014", "pictures", "COCO (cocodataset.org, val2014)"),
    )

    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        """Questions in file order; raises DataError where a file that asking or scoring needs is missing."""
        self._require(data, QUESTIONS, "LLaVA's question file, from its eval.zip")
        if not (data / "val2014").is_dir():
            raise DataError(f"{data / 'val2014'}: no such folder; put the COCO val2014 images there")
        return read_questions(data / QUESTIONS, data / "val2014", problems)

    def score(self, data: Path, answers: list[dict[str, Any]], fixed: bool = False) -> Score:
        data, warnings = Path(data), []
        labels_of, groups = self._labels(data), self._by_category(data, answers, warnings)
        details: dict[str, Any] = {"rule": "fixed: joined by id" if fixed else "official: joined by position"}
        for category, labels in labels_of.items():
            rows = groups.get(category, [])
            if fixed:
                rows, labels = self._join(category, rows, labels, warnings)
                if not rows:
                    continue  # said above; a category nobody was asked about has no F1
            else:
                self._warn_of_position(category, rows, labels, warnings)
            said = [parse_answer(row["text"]) for row in rows]
            result = _metrics(confusion(said, [label["label"] for label in labels]), said, fixed)
            if result["f1"] is None:
                why = "no answer is a yes" if "yes" not in said else "no yes is right"
                warnings.append(
                    f"{category}: the official scorer divides by zero here ({why}) and gives no "
                    "number; --fixed counts such an F1 as 0"
                )
            details[category] = result
        scores = [details[category]["f1"] for category in CATEGORIES if category in details]
        mean = None if None in scores or not scores else sum(scores) / len(scores)
        details["mean_f1"] = mean
        return Score(self.name, None if mean is None else 100 * mean, details, warnings)

    def per_image_counts(self, data: Path, answers: list[dict[str, Any]]) -> PerImageCounts:
        """counts: (images, categories, 4) of TP, FP, TN, FN, joined by id."""
        data = Path(data)
        groups, table = self._by_category(data, answers, []), {}
        labels_of = self._labels(data)
        for place, (category, labels) in enumerate(labels_of.items()):
            rows, labels = self._join(category, groups.get(category, []), labels, [])
            for row, label in zip(rows, labels, strict=True):
                counts = table.setdefault(str(label["image"]), np.zeros((len(labels_of), 4)))
                found = confusion([parse_answer(row["text"])], [label["label"]])
                counts[place] += [found[key] for key in _FIELDS]
        if not table:
            raise DataError("no answer matches a label")
        return PerImageCounts(tuple(table), np.stack(list(table.values())))

    def constants(self, data: Path) -> list[str]:
        """Yes and no."""
        return ["Yes", "No"]

    def question_scores(self, data: Path, answers: list[dict[str, Any]]) -> list[QuestionScore]:
        """1 where yes or no is right."""
        data = Path(data)
        groups, found = self._by_category(data, answers, []), []
        for category, labels in self._labels(data).items():
            for row, label in zip(*self._join(category, groups.get(category, []), labels, []), strict=True):
                right = parse_answer(row["text"]) == label["label"]
                found.append(
                    QuestionScore(f"{category}/{label['question_id']}", str(label["image"]), float(right))
                )
        return found

    def check_truth(self, data: Path, questions: list[Question]) -> list[str]:
        """Label files of another release, told by their ids before anything is asked."""
        try:
            labels_of = self._labels(data)
        except DataError as error:
            return [f"cannot be scored: {error}"]
        warnings = []
        for category, labels in labels_of.items():
            asked = {_number(question.question_id) for question in questions if question.category == category}
            apart = asked - {label["question_id"] for label in labels}
            if apart:
                warnings.append(f"{category}: {len(apart)} of {len(asked)} questions have no label")
            if category == "random" and len(labels) == 3000 and len(asked) <= 2910:
                warnings.append(
                    "random: 3,000 labels are a later release of POPE's file; LLaVA's questions "
                    "go with the one of 2,910 (of the first commits of its repository)"
                )
        return warnings

    def score_counts(self, counts: np.ndarray) -> np.ndarray:
        """(..., categories, 4) -> (...): 100 x mean F1; F1 = 2 TP / (2 TP + FP + FN)."""
        tp, fp, fn = counts[..., 0], counts[..., 1], counts[..., 3]
        below = 2 * tp + fp + fn
        f1 = np.divide(2 * tp, below, out=np.zeros_like(below), where=below > 0)
        asked = counts.sum(-1) > 0  # categories without any answer are left out of the mean
        return 100 * f1.sum(-1) / np.maximum(asked.sum(-1), 1)

    @staticmethod
    def _require(data: Path, name: str, what: str) -> Path:
        if not (data / name).is_file():
            raise DataError(f"{data / name}: no such file; put {what} there")
        return data / name

    def _labels(self, data: Path) -> dict[str, list[dict[str, Any]]]:
        found = {}
        for category in CATEGORIES:
            path = self._require(data, f"coco/coco_pope_{category}.json", "POPE's labels (one JSON per line)")
            problems: list[DataIssue] = []
            rows = [row for _, row in read_jsonl(path, problems, ("question_id", "label", "image"))]
            if problems:
                raise DataError(f"{problems[0]}; a label file cannot be used in part")
            odd = [row for row in rows if row["label"] not in ("yes", "no")]
            if odd:
                raise DataError(
                    f"{path}: the label of question {odd[0]['question_id']} is "
                    f"{odd[0]['label']!r}, neither yes nor no"
                )
            found[category] = rows
        return found

    def _by_category(
        self, data: Path, answers: list[dict[str, Any]], warnings: list[str]
    ) -> dict[str, list[dict[str, Any]]]:
        """Answers per category in file order, as the question file assigns ids to categories."""
        path = self._require(data, QUESTIONS, "LLaVA's question file, from its eval.zip")
        problems: list[DataIssue] = []
        rows = [row for _, row in read_jsonl(path, problems, ("question_id", "category"))]
        category_of = {row["question_id"]: row["category"] for row in rows}
        warnings += [str(problem) for problem in problems]
        strange = [row["question_id"] for row in answers if row["question_id"] not in category_of]
        if strange:
            raise DataError(
                f"{len(strange)} of {len(answers)} answers are to questions that {path} does not "
                f"have, e.g. question_id {strange[0]!r}: another benchmark or release?"
            )
        groups: dict[str, list[dict]] = {}
        for row in answers:
            groups.setdefault(category_of[row["question_id"]], []).append(row)
        asked = {row["question_id"] for row in answers}
        if len(answers) > len(asked):
            warnings.append(f"{len(answers) - len(asked)} answers repeat a question_id")
        if len(category_of) > len(asked):
            warnings.append(f"{len(category_of) - len(asked)} of {len(category_of)} questions have no answer")
        unknown = sorted({str(category) for category in groups} - set(CATEGORIES))
        if unknown:
            warnings.append(f"answers of the categories {', '.join(unknown)} are not scored")
        return groups

    @staticmethod
    def _warn_of_position(category: str, rows: list[dict], labels: list[dict], warnings: list[str]) -> None:
        apart = [
            place
            for place, (row, label) in enumerate(zip(rows, labels, strict=False))
            if _number(row["question_id"]) != label["question_id"]
        ]
        if len(rows) == len(labels) and not apart:
            return
        what = f"{category}: {len(rows)} answers against {len(labels)} labels"
        if apart:
            said, beside = rows[apart[0]]["question_id"], labels[apart[0]]["question_id"]
            what += (
                f"; {len(apart)} answers, from place {apart[0] + 1} on, stand beside the label of "
                f"another question (question_id {said} beside {beside})"
            )
        what += ". The official scorer joins by position, unchecked: this number is not to be trusted. "
        if category == "random" and len(labels) == 3000:
            what += (
                "3,000 random labels are a later release of POPE's file; LLaVA's questions go with the "
                "one of 2,910. "
            )
        warnings.append(what + "--fixed joins by id")

    @staticmethod
    def _join(category: str, rows: list[dict], labels: list[dict], warnings: list[str]) -> tuple[list, list]:
        """Answers and labels of the same id (modulo 10^7), in label order; an id's first answer counts."""
        by_id: dict[Any, dict] = {}
        for row in rows:
            by_id.setdefault(_number(row["question_id"]), row)
        pairs = [(by_id[label["question_id"]], label) for label in labels if label["question_id"] in by_id]
        if len(pairs) < len(labels):
            warnings.append(
                f"{category}: {len(labels) - len(pairs)} of {len(labels)} labels have no answer "
                "and are left out"
            )
        if len(pairs) < len(by_id):
            warnings.append(f"{category}: {len(by_id) - len(pairs)} answers have no label and are left out")
        wrong = [
            (str(row["prompt"]), label)
            for row, label in pairs
            if "prompt" in row and label.get("text") and label["text"] not in str(row["prompt"])
        ]
        if wrong:
            warnings.append(
                f"{category}: {len(wrong)} labels ask something else than the answer of the same id "
                f"(question_id {wrong[0][1]['question_id']}: {wrong[0][1]['text']!r} against "
                f"{wrong[0][0]!r}): a label file of another release?"
            )
        return [row for row, _ in pairs], [label for _, label in pairs]


def _number(question_id: Any) -> Any:
    return question_id % _ID_RANGE if isinstance(question_id, int) else question_id
