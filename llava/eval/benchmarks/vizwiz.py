"""VizWiz: questions of blind people about their own pictures; many have no answer, and the prompt says so.

Files of the test set: `llava_test.jsonl`, `test/`. Of the validation set: `val.json` (and, if there,
`llava_val.jsonl`), `val/`. The test set is asked if its question file is there and goes to the server; the
benchmark `vizwiz_val` asks the validation set in any case.

The number is the official accuracy of what LLaVA uploads (answers after the "EvalAI" normaliser); `raw_text`
holds that of the answers as they are. Official quirks, kept: only the prediction is normalised, never the
human answers, and the table of contractions has typographic apostrophes: "dont" never matches "don't".
Results are known by picture. Answers missing are left out of the mean, with a warning.
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
    mean,
    read_json,
    read_json_answers,
    require,
    to_json,
)
from llava.eval.benchmarks.normalize import evalai, soft_accuracy, vizwiz_official

LLAVA_TEST, LLAVA_VAL, TRUTH = "llava_test.jsonl", "llava_val.jsonl", "val.json"
SERVER = "EvalAI challenge 2185 (VizWiz VQA)"
MAY_REFUSE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
_PAGE = "VizWiz-VQA (vizwiz.org/tasks-and-datasets/vqa)"
_normalised = lru_cache(1 << 16)(vizwiz_official)


def uploaded(row: dict[str, Any]) -> str:
    """The answer as LLaVA uploads it; rows that are an upload already have it."""
    return evalai(row["text"]) if "text" in row else row["answer"]


def accuracy(prediction: str, humans: list[str]) -> float:
    """Official accuracy in [0, 1]: the prediction normalised, the humans' answers as they are."""
    return soft_accuracy(_normalised(prediction), humans)


class VizWiz(MeanBenchmark):
    name = "vizwiz"
    title = "VizWiz"
    folder = "vizwiz"
    marker = LLAVA_TEST
    markers = (TRUTH, LLAVA_VAL)
    metric = "accuracy"
    sizes = {8000: "test", 4319: "validation"}
    files = (
        DataFile(LLAVA_TEST, "test questions", LLAVA_EVAL_ZIP, also=(TRUTH,)),
        DataFile("test", "test pictures", _PAGE, also=("val",)),
    )
    val_only = False

    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        """Questions in file order; raises DataError where there is no question file."""
        if not self.val_only and (data / LLAVA_TEST).is_file():
            return read_questions(data / LLAVA_TEST, data / "test", problems)
        if (data / LLAVA_VAL).is_file():
            return read_questions(data / LLAVA_VAL, data / "val", problems)
        wanted = TRUTH if self.val_only else (LLAVA_TEST, TRUTH)
        return self._official(require(data, wanted, "the questions"), data / "val")

    @staticmethod
    def _official(path: Path, pictures: Path) -> Iterator[Question]:
        """The official file, numbered by position and asked as LLaVA asks."""
        for index, row in enumerate(read_json(path, list, ("image", "question"))):
            text = row["question"] + MAY_REFUSE + SHORT_ANSWER
            yield Question(index, index, pictures / row["image"], text, file=str(path), line=index + 1)

    def check_truth(self, data: Path, questions: list[Question]) -> list[str]:
        if Path(questions[0].file).name == LLAVA_TEST:
            return []
        try:
            truth = self._truth(data)
        except DataError as error:
            return [f"cannot be scored: {error}"]
        keys = [question.image and question.image.name for question in questions]
        return check_pairing(questions, keys, truth, data / TRUTH)

    def read_answers(self, path: str | Path) -> list[dict[str, Any]]:
        """LLaVA's jsonl, or an upload: [{"image", "answer"}]."""
        return read_json_answers(Path(path), "image", "answer") or read_answers(path)

    def score(self, data: Path, answers: list[dict[str, Any]], fixed: bool = False) -> Score:
        data = Path(data)
        rows, split = self._by_image(data, answers)
        if split == "test":
            return Score(
                self.name,
                None,
                {"split": "test"},
                [
                    "the test set has no public answers: write the server's file with python -m "
                    f"llava.eval.submit --benchmark {self.name} and hand it in at {SERVER}"
                ],
            )
        truth = self._truth(data)
        warnings = check_known(self.title, [image for image, _ in rows], truth, data / TRUTH, "image")
        table = dict(rows)
        details: dict[str, Any] = {"split": "validation", "answered": len(table)}
        details |= self._summary(truth, {image: uploaded(row) for image, row in table.items()})
        if any("text" in row for row in answers):
            raw = {image: row.get("text", row.get("answer")) for image, row in table.items()}
            details["raw_text"] = self._summary(truth, raw)
        return Score(self.name, details["accuracy"], details, warnings)

    @staticmethod
    def _summary(truth: dict[str, dict], predictions: dict[str, str]) -> dict[str, Any]:
        found = [(truth[image], accuracy(text, _humans(truth[image]))) for image, text in predictions.items()]
        said = [_normalised(text) == "unanswerable" for text in predictions.values()]
        truly = [
            truth[image]["answer_type"] == "unanswerable"
            if "answerable" not in truth[image]
            else not truth[image]["answerable"]
            for image in predictions
        ]
        return {
            "accuracy": round(100 * mean(value for _, value in found), 2),
            "perAnswerType": group_means(
                ((row.get("answer_type", "unknown"), value) for row, value in found), digits=2
            ),
            "said_unanswerable": sum(said),
            "unanswerability_from_text": unanswerability(said, truly),
        }

    def question_scores(
        self, data: Path, answers: list[dict[str, Any]], raw: bool = False
    ) -> list[QuestionScore]:
        """Official accuracy of every answered picture, of what LLaVA uploads (or of the raw text)."""
        truth, table = self._truth(Path(data)), dict(self._by_image(Path(data), answers)[0])
        return [
            QuestionScore(
                image, image, accuracy(table[image]["text"] if raw else uploaded(table[image]), _humans(row))
            )
            for image, row in truth.items()
            if image in table
        ]

    def constants(self, data: Path) -> list[str]:
        """The most common human answers of the validation set."""
        return commonest(human for row in self._truth(Path(data)).values() for human in _humans(row))

    def submission(
        self, data: Path | None, answers: list[dict[str, Any]], questions: Path | None = None
    ) -> Submission:
        """[{"image", "answer"}] over the question file, in its order; every question must be answered."""
        if questions is None:
            if data is None:
                raise DataError("give --data, or with --questions the question file of the answers")
            questions = require(data, (LLAVA_TEST, LLAVA_VAL), "LLaVA's question file")
        problems: list[DataIssue] = []
        wanted = [row for _, row in read_jsonl(questions, problems, ("question_id", "image"))]
        if problems:
            raise DataError(f"{problems[0]}; the list of pictures cannot be used in part")
        by_id = {row["question_id"]: row for row in answers}
        check_known(self.title, list(by_id), [row["question_id"] for row in wanted], questions)
        missing = [row["image"] for row in wanted if row["question_id"] not in by_id]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(wanted)} pictures have no answer, e.g. {missing[0]}; "
                "the server wants all"
            )
        document = [{"image": row["image"], "answer": uploaded(by_id[row["question_id"]])} for row in wanted]
        return Submission({"vizwiz_submission.json": to_json(document)}, len(document), SERVER)

    def _by_image(
        self, data: Path, answers: list[dict[str, Any]]
    ) -> tuple[list[tuple[str, dict[str, Any]]], str]:
        """(picture, answer) pairs in answer order, and the split they belong to."""
        if all("image" in row for row in answers):
            images = [row["image"] for row in answers]
        else:
            images = self._images(data, answers)
        split = "test" if all(image.startswith("VizWiz_test_") for image in images) else "val"
        return list(zip(images, answers, strict=True)), split

    def _images(self, data: Path, answers: list[dict[str, Any]]) -> list[str]:
        """Pictures of answers by question_id, through the question file that has these ids and prompts."""
        best, found = -1, []
        for name in (LLAVA_VAL, LLAVA_TEST, TRUTH):
            if not (data / name).is_file():
                continue
            if name == TRUTH:
                asked = {
                    number: (row["image"], row["question"])
                    for number, row in enumerate(read_json(data / name, list, ("image", "question")))
                }
            else:
                asked = {
                    row["question_id"]: (row["image"], row["text"])
                    for _, row in read_jsonl(data / name, [], ("question_id", "image", "text"))
                }
            strange = [row["question_id"] for row in answers if row["question_id"] not in asked]
            agree = sum(
                1
                for row in answers
                if row["question_id"] in asked
                and str(row.get("prompt", "")).startswith(asked[row["question_id"]][1])
            )
            if not strange and agree > best:  # ids of both splits count from 0; prompts tell them apart
                best, found = agree, [asked[row["question_id"]][0] for row in answers]
        if best < 0:
            raise DataError(
                f"{data}: no question file there has all ids of these {len(answers)} answers "
                f"({LLAVA_VAL}, {LLAVA_TEST} or {TRUTH}): another benchmark, split or release?"
            )
        return found

    @staticmethod
    def _truth(data: Path) -> dict[str, dict[str, Any]]:
        path = require(data, TRUTH, f"the validation annotations of {_PAGE}")
        return {row["image"]: row for row in read_json(path, list, ("image", "answers"))}


def unanswerability(said: list[bool], truly: list[bool]) -> dict[str, float]:
    """Average precision and F1 (percent) of "unanswerable" as told by the answer's text alone.

    The server scores numbers between 0 and 1 that LLaVA does not submit; this is the usual stand-in.
    """
    hits, told, real = sum(a and b for a, b in zip(said, truly, strict=True)), sum(said), sum(truly)
    precision, recall = hits / told if told else 0.0, hits / real if real else 0.0
    average = recall * precision + (1 - recall) * (real / len(truly) if truly else 0.0)
    f1 = 2 * hits / (told + real) if told + real else 0.0
    return {"average_precision": round(100 * average, 2), "f1_score": round(100 * f1, 2)}


def _humans(row: dict[str, Any]) -> list[str]:
    return [human["answer"] for human in row["answers"]]


class VizWizVal(VizWiz):
    """The validation set, also where the test set is there."""

    name = "vizwiz_val"
    title = "VizWiz val"
    marker = TRUTH
    markers = (LLAVA_VAL,)
    val_only = True
    files = (
        DataFile(TRUTH, "validation questions and human answers", _PAGE),
        DataFile("val", "validation pictures", _PAGE),
    )
