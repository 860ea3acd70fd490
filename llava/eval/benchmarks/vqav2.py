"""VQAv2: test-dev goes to the server; the validation set is scored here by the official rules.

Files of test-dev: `llava_vqav2_mscoco_test-dev2015.jsonl` (asked), `llava_vqav2_mscoco_test2015.jsonl` (all
ids the server wants), `test2015/`. Of the validation set: `v2_mscoco_val2014_annotations.json` and
`v2_OpenEnded_mscoco_val2014_questions.json` (or `llava_vqav2_val.jsonl`), `val2014/`. Test-dev is asked
if its question file is there; the benchmark `vqav2_val` asks the validation set in any case.

The number is the official overall accuracy of what LLaVA uploads, that is of answers after the "EvalAI"
normaliser; `raw_text` holds that of the answers as they are. Official quirk: where all ten humans agree to
the letter, nothing is normalised, so that "t-shirt", uploaded as "t shirt", is wrong. An id missing makes the
official program stop; `fixed` averages over what was answered.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
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
    read_jsonl,
    read_questions,
)
from llava.eval.benchmarks.common import (
    LLAVA_EVAL_ZIP,
    SHORT_ANSWER,
    MeanBenchmark,
    check_known,
    check_pairing,
    commonest,
    group_means,
    last_by,
    mean,
    read_json,
    read_json_answers,
    require,
    to_json,
)
from llava.eval.benchmarks.normalize import evalai, soft_accuracy, vqa_official

TEST_DEV, ALL_TEST = "llava_vqav2_mscoco_test-dev2015.jsonl", "llava_vqav2_mscoco_test2015.jsonl"
LLAVA_VAL = ("llava_vqav2_val.jsonl", "llava_vqav2_mscoco_val2014.jsonl")
VAL_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
SERVER = "EvalAI challenge 830 (VQA), phase test-dev"
_PAGE = "VQA v2 (visualqa.org/download.html)"
_normalised = lru_cache(1 << 18)(vqa_official)


def uploaded(row: dict[str, Any]) -> str:
    """The answer as LLaVA uploads it; rows that are a result file already have it."""
    return evalai(row["text"]) if "text" in row else row["answer"]


def accuracy(prediction: str, humans: list[str]) -> float:
    """Official accuracy in [0, 1]; human answers that are equal to the letter switch normalising off."""
    humans, prediction = [_bare(human) for human in humans], _bare(prediction)
    if len(set(humans)) > 1:
        humans, prediction = [_normalised(human) for human in humans], _normalised(prediction)
    return soft_accuracy(prediction, humans)


def _bare(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


class VQAv2(MeanBenchmark):
    name = "vqav2"
    title = "VQAv2"
    folder = "vqav2"
    marker = TEST_DEV
    markers = (ANNOTATIONS, *LLAVA_VAL, VAL_QUESTIONS)
    metric = "accuracy"
    sizes = {107394: "test-dev", 447793: "test", 214354: "validation"}
    files = (
        DataFile(TEST_DEV, "test-dev questions", LLAVA_EVAL_ZIP, also=(VAL_QUESTIONS, *LLAVA_VAL)),
        DataFile("test2015", "pictures", "COCO (cocodataset.org, test2015)", also=("val2014",)),
        DataFile(ALL_TEST, "all ids that the server wants", LLAVA_EVAL_ZIP, "submit", (ANNOTATIONS,)),
    )
    val_only = False

    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        """Questions in file order; raises DataError where there is no question file."""
        if not self.val_only and (data / TEST_DEV).is_file():
            return read_questions(data / TEST_DEV, data / "test2015", problems)
        for name in LLAVA_VAL:
            if (data / name).is_file():
                return read_questions(data / name, data / "val2014", problems)
        wanted = (VAL_QUESTIONS,) if self.val_only else (TEST_DEV, VAL_QUESTIONS)
        return self._official(require(data, wanted, "the questions"), data / "val2014")

    @staticmethod
    def _official(path: Path, pictures: Path) -> Iterator[Question]:
        """The official question file, asked as LLaVA asks."""
        rows = read_json(path, dict, ("questions",))["questions"]
        for index, row in enumerate(rows):
            picture = pictures / f"COCO_val2014_{row['image_id']:012d}.jpg"
            yield Question(
                index,
                row["question_id"],
                picture,
                row["question"] + SHORT_ANSWER,
                file=str(path),
                line=index + 1,
            )

    def check_truth(self, data: Path, questions: list[Question]) -> list[str]:
        if Path(questions[0].file).name == TEST_DEV:
            if (data / ALL_TEST).is_file():
                return []
            return [f"{data / ALL_TEST} is missing: the answers cannot be submitted without its ids"]
        try:
            truth = self._truth(data)
        except DataError as error:
            return [f"cannot be scored: {error}"]
        return check_pairing(questions, [one.question_id for one in questions], truth, data / ANNOTATIONS)

    def read_answers(self, path: str | Path) -> list[dict[str, Any]]:
        """LLaVA's jsonl, or a result file for the server: [{"question_id", "answer"}]."""
        return read_json_answers(Path(path), "question_id", "answer") or read_answers(path)

    def score(self, data: Path, answers: list[dict[str, Any]], fixed: bool = False) -> Score:
        data, asked = Path(data), [row["question_id"] for row in answers]
        if self._is_test(data, asked):
            return Score(
                self.name,
                None,
                {"split": "test-dev"},
                [
                    "test-dev has no public answers: write the server's file with python -m "
                    f"llava.eval.submit --benchmark {self.name} and submit it to {SERVER}"
                ],
            )
        truth = self._truth(data)
        warnings = check_known(self.title, asked, truth, data / ANNOTATIONS)
        details: dict[str, Any] = {"split": "validation", "answered": len(set(asked))}
        if len(set(asked)) < len(truth) and not fixed:
            warnings[-1] += (
                "; the official program stops here (AssertionError) and gives no number; "
                "--fixed averages over those answered"
            )
            return Score(self.name, None, {**details, "raises": "AssertionError"}, warnings)
        rows = last_by(answers, "question_id")
        details |= self._summary(truth, {key: uploaded(row) for key, row in rows.items()})
        if any("text" in row for row in answers):
            raw = {key: row.get("text", row.get("answer")) for key, row in rows.items()}
            details["raw_text"] = self._summary(truth, raw)
        return Score(self.name, details["overall"], details, warnings)

    @staticmethod
    def _summary(truth: dict[Any, dict], predictions: dict[Any, str]) -> dict[str, Any]:
        found = [(truth[key], accuracy(text, _humans(truth[key]))) for key, text in predictions.items()]
        return {
            "overall": round(100 * mean(value for _, value in found), 2),
            "perAnswerType": group_means(((row["answer_type"], value) for row, value in found), digits=2),
            "perQuestionType": group_means(((row["question_type"], value) for row, value in found), digits=2),
        }

    def question_scores(
        self, data: Path, answers: list[dict[str, Any]], raw: bool = False
    ) -> list[QuestionScore]:
        """Official accuracy of every answered question, of what LLaVA uploads (or of the raw text)."""
        truth, rows = self._truth(Path(data)), last_by(answers, "question_id")
        return [
            QuestionScore(
                str(key),
                str(row["image_id"]),
                accuracy(rows[key]["text"] if raw else uploaded(rows[key]), _humans(row)),
            )
            for key, row in truth.items()
            if key in rows
        ]

    def constants(self, data: Path) -> list[str]:
        """The most common human answers of the validation set."""
        return commonest(human for row in self._truth(Path(data)).values() for human in _humans(row))

    def submission(
        self, data: Path | None, answers: list[dict[str, Any]], questions: Path | None = None
    ) -> Submission:
        """[{"question_id", "answer"}] over all ids of the test split, in its order, '' where not answered."""
        if questions is None:
            if data is None:
                raise DataError("give --data, or with --questions the file that lists all test ids")
            questions = require(data, (ALL_TEST, *LLAVA_VAL), "LLaVA's list of all test ids")
        problems: list[DataIssue] = []
        ids = [row["question_id"] for _, row in read_jsonl(questions, problems, ("question_id",))]
        if problems:
            raise DataError(f"{problems[0]}; the list of ids cannot be used in part")
        rows = last_by(answers, "question_id")
        check_known(self.title, list(rows), ids, questions)
        document = [{"question_id": key, "answer": uploaded(rows[key]) if key in rows else ""} for key in ids]
        empty = len(ids) - len(rows)
        warnings = [f"{empty} of {len(ids)} questions are not answered and stand as ''"] if empty else []
        return Submission({"vqav2_submission.json": to_json(document)}, len(ids), SERVER, warnings)

    @staticmethod
    def _is_test(data: Path, asked: list[Any]) -> bool:
        """True if these are answers to test-dev, going by its question file or the lack of annotations."""
        if not (data / TEST_DEV).is_file():
            return False
        test = {row["question_id"] for _, row in read_jsonl(data / TEST_DEV, [], ("question_id",))}
        return any(key in test for key in asked)

    @staticmethod
    def _truth(data: Path) -> dict[Any, dict[str, Any]]:
        path = require(data, ANNOTATIONS, f"the validation annotations of {_PAGE}")
        rows = read_json(path, dict, ("annotations",))["annotations"]
        return {row["question_id"]: row for row in rows}


def _humans(row: dict[str, Any]) -> list[str]:
    return [human["answer"] for human in row["answers"]]


class VQAv2Val(VQAv2):
    """The validation set, also where test-dev is there."""

    name = "vqav2_val"
    title = "VQAv2 val"
    marker = ANNOTATIONS
    markers = (*LLAVA_VAL, VAL_QUESTIONS)
    val_only = True
    files = (
        DataFile(VAL_QUESTIONS, "validation questions", _PAGE, also=LLAVA_VAL),
        DataFile(ANNOTATIONS, "human answers", _PAGE, "score"),
        DataFile("val2014", "COCO val2014 pictures", "COCO (cocodataset.org, val2014)"),
    )
