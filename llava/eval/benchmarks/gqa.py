"""GQA (testdev balanced): compositional questions about scene graphs; exact match with one answer.

Files: `llava_gqa_testdev_balanced.jsonl`, `data/testdev_balanced_questions.json`, `data/images/` (the last
two also without `data/`). The number is Accuracy of the evaluation script in LLaVA's version: exact match
of `text.rstrip(".").lower()` over the balanced questions, nothing else is normalised. Validity and
plausibility are 0 there, as it has no scene graphs; they are artefacts, and left so. A balanced question
without a prediction makes the script stop; `fixed` averages over those answered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava.eval.benchmarks.base import (
    DataError,
    DataFile,
    DataIssue,
    Question,
    QuestionScore,
    Score,
    Submission,
    read_answers,
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
    read_json_answers,
    require,
    to_json,
)
from llava.eval.benchmarks.normalize import gqa as converted

QUESTIONS, TRUTH = "llava_gqa_testdev_balanced.jsonl", "testdev_balanced_questions.json"
_NO_STEP = ("exist", "query: name", "choose name")
_PAGE = "GQA (cs.stanford.edu/people/dorarad/gqa)"


def steps(question: dict[str, Any]) -> int:
    """Reasoning steps by the official rule: operations that do not merely ask for a name or existence."""
    operations = (f"{part['operation']}: {part['argument']}" for part in question["semantic"])
    return sum(not any(word in operation for word in _NO_STEP) for operation in operations)


def distribution(pairs: list[tuple[str, str, str]]) -> float:
    """Distance of predicted from gold answers over (group, gold, predicted); 0 is best.

    Chi-squared per group, weighted by the group's size, over 100.
    """
    gold: dict[str, Counter] = {}
    said: dict[str, Counter] = {}
    for group, answer, prediction in pairs:
        gold.setdefault(group, Counter())[answer] += 1
        said.setdefault(group, Counter())[prediction] += 1
    total = sum(
        sum(counts.values())
        * sum((said[group][answer] - expected) ** 2 / expected for answer, expected in counts.items())
        for group, counts in gold.items()
    )
    return total / len(pairs) / 100 if pairs else 0.0


class GQA(MeanBenchmark):
    name = "gqa"
    title = "GQA"
    folder = "gqa"
    marker = QUESTIONS
    markers = (TRUTH, f"data/{TRUTH}")
    metric = "accuracy"
    sizes = {12578: "testdev balanced"}
    files = (
        DataFile(QUESTIONS, "questions", LLAVA_EVAL_ZIP),
        DataFile(f"data/{TRUTH}", "answers", f"{_PAGE}, questions 1.2", "score", (TRUTH,)),
        DataFile("data/images", "pictures", f"{_PAGE}, images", also=("images",)),
    )

    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        """Questions in file order; raises DataError where the question file is missing."""
        path = require(data, QUESTIONS, f"LLaVA's question file, from {LLAVA_EVAL_ZIP},")
        usual = data / "data" / "images"
        return read_questions(
            path, usual if usual.is_dir() or not (data / "images").is_dir() else data / "images", problems
        )

    def check_truth(self, data: Path, questions: list[Question]) -> list[str]:
        try:
            path, truth = self._truth(data)
        except DataError as error:
            return [f"cannot be scored: {error}"]
        return check_pairing(questions, [str(one.question_id) for one in questions], truth, path)

    def read_answers(self, path: str | Path) -> list[dict[str, Any]]:
        """LLaVA's jsonl, or converted predictions: [{"questionId", "prediction"}]."""
        return read_json_answers(Path(path), "questionId", "prediction") or read_answers(path)

    def score(self, data: Path, answers: list[dict[str, Any]], fixed: bool = False) -> Score:
        path, truth = self._truth(Path(data))
        said = self._predictions(answers)
        asked = [str(row.get("questionId", row.get("question_id"))) for row in answers]
        balanced = {key: row for key, row in truth.items() if row["isBalanced"]}
        warnings = [one for one in check_known(self.title, asked, truth, path) if "no answer" not in one]
        missing = len(balanced.keys() - said.keys())
        details: dict[str, Any] = {"questions": len(balanced), "answered": len(balanced) - missing}
        if missing:
            warnings.append(f"{missing} of {len(balanced)} balanced questions have no answer")
            if not fixed:
                warnings[-1] += (
                    "; the official script stops here and gives no number; --fixed averages "
                    "over those answered"
                )
                return Score(self.name, None, {**details, "raises": "missing predictions"}, warnings)
        found = [(row, said[key]) for key, row in balanced.items() if key in said]
        details |= self._summary(found)
        return Score(self.name, details["accuracy"], details, warnings)

    @staticmethod
    def _summary(found: list[tuple[dict[str, Any], str]]) -> dict[str, Any]:
        right = [(row, float(row["answer"] == text)) for row, text in found]
        groups: dict[str, dict[str, list[float]]] = {
            "accuracyPerStructuralType": {},
            "accuracyPerSemanticType": {},
            "accuracyPerSteps": {},
            "accuracyPerLength": {},
        }
        for row, value in right:
            kinds = (
                row["types"]["structural"],
                row["types"]["semantic"],
                steps(row),
                len(row["question"].split()),
            )
            for table, kind in zip(groups.values(), kinds, strict=True):
                table.setdefault(str(kind), []).append(value)
        is_open = [row["types"]["structural"] == "query" for row, _ in right]
        return {
            "accuracy": 100 * mean(value for _, value in right),
            "binary": 100 * mean(value for (_, value), one in zip(right, is_open, strict=True) if not one),
            "open": 100 * mean(value for (_, value), one in zip(right, is_open, strict=True) if one),
            "validity": 0.0,
            "plausibility": 0.0,
            "distribution": distribution(
                [
                    (row["groups"]["global"], row["answer"], text)
                    for row, text in found
                    if row["groups"]["global"] is not None
                ]
            ),
            **{
                name: {kind: [100 * mean(values), len(values)] for kind, values in table.items()}
                for name, table in groups.items()
            },
        }

    def question_scores(self, data: Path, answers: list[dict[str, Any]]) -> list[QuestionScore]:
        """1 where a balanced question's answer matches."""
        said = self._predictions(answers)
        return [
            QuestionScore(key, str(row["imageId"]), float(row["answer"] == said[key]))
            for key, row in self._truth(Path(data))[1].items()
            if row["isBalanced"] and key in said
        ]

    def constants(self, data: Path) -> list[str]:
        """The most common answers."""
        return commonest(row["answer"] for row in self._truth(Path(data))[1].values() if row["isBalanced"])

    def submission(
        self, data: Path | None, answers: list[dict[str, Any]], questions: Path | None = None
    ) -> Submission:
        """[{"questionId", "prediction"}], what the evaluation script reads; in the answers' order."""
        document = [
            {"questionId": row["question_id"], "prediction": converted(row["text"])} if "text" in row else row
            for row in answers
        ]
        return Submission(
            {"testdev_balanced_predictions.json": to_json(document)},
            len(document),
            "GQA's eval.py --tier testdev_balanced",
        )

    @staticmethod
    def _predictions(answers: list[dict[str, Any]]) -> dict[str, str]:
        return {
            str(row["question_id"] if "text" in row else row["questionId"]): converted(row["text"])
            if "text" in row
            else row["prediction"]
            for row in answers
        }

    @staticmethod
    def _truth(data: Path) -> tuple[Path, dict[str, dict[str, Any]]]:
        path = require(data, (f"data/{TRUTH}", TRUTH), f"the questions of {_PAGE}")
        return path, read_json(path, dict)
