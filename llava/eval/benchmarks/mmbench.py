"""MMBench and MMBench-CN (dev): multiple choice, asked once per rotation of the options.

Rotations are rows of the TSV (index + k x 10^6). Score: accuracy of CircularEval, where a question counts
only if every rotation is answered right, computed with exact matching: LLaVA answers in bare letters, so no
judge is needed. The server takes the xlsx that `python -m llava.eval.submit` writes. The table is streamed
(see `tsv`).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import takewhile
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from .base import LETTER_ANSWER, Benchmark, DataFile, QuestionScore, Score, Submission, grouped, mean
from .files import ANSWER, DataError, DataIssue, Question, Row
from .joining import check_not_empty
from .normalize import cleaned
from .shapes import ID, Shape, mismatch
from .tsv import MISSING_CELLS, TableImage, is_missing, rows_of

OPTIONS = "ABCD"
ROTATION = 1_000_000
SERVER = "MMBench's server (mmbench.opencompass.org.cn), dev"
_WHAT, _PAGE = "questions, images and answers", "github.com/open-compass/MMBench"
_NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")
_ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_IS = re.compile(r"answer is\s*\**([A-Z])\b", re.I)
_LETTER = re.compile(r"(?:option\s*)?\(?([A-Da-d])\)?[.:)]*", re.I)  # a letter as a person may write it
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")  # not allowed in a cell


def infer_letter(text: str, choices: Mapping[str, str]) -> str | None:
    """Return the option that an answer means by exact matching; Z for a refusal, None if unresolved."""
    if "Failed to obtain answer via API" in text:
        return None
    if any(phrase in text for phrase in _REFUSALS):
        return "Z"
    words = text.translate(_MARKS).split()
    named = [letter for letter in choices if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    found = _IS.search(text)
    if found and found.group(1).upper() in choices:
        return found.group(1).upper()
    lower = {letter: str(option).lower() for letter, option in choices.items()}
    if len(text) > 2 * sum(len(option) for option in lower.values()):
        return None
    inside = [letter for letter, option in lower.items() if option in text.lower()]
    return inside[0] if len(inside) == 1 else None


def choices_of(entry: Mapping[str, str] | None) -> dict[str, str]:
    """Return the options of a row by their letters."""
    return {one: entry[one] for one in OPTIONS if entry.get(one, "") not in MISSING_CELLS} if entry else {}


def options_of(row: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the options of a row, which end at the first missing one, and their letters."""
    texts = list(takewhile(lambda text: not is_missing(text), (row.get(one, "") for one in OPTIONS)))
    return texts, list(OPTIONS[: len(texts)])


def prompt_of(row: Mapping[str, str]) -> str:
    """Return LLaVA's prompt of a row, without the instruction."""
    texts, letters = options_of(row)
    prompt = "\n".join([row["question"], *map("{}. {}".format, letters, texts)])
    return prompt if is_missing(row.get("hint", "")) else f"{row['hint']}\n{prompt}"


class MMBench(Benchmark):
    name = "mmbench"
    title = "MMBench"
    folder = "mmbench"
    metric = "accuracy"
    max_new_tokens = 1024
    marker = "mmbench_dev_20230712.tsv"
    markers = ("mmbench_dev_[e2]*.tsv",)  # other releases, of which the latest is used
    sizes = {4377: "dev 20230712", 4329: "dev 20231003"}
    files = (DataFile(marker, _WHAT, f"MMBench dev, release 20230712 ({_PAGE})", also=markers),)
    truth_files = (marker,)
    answer_shape: Mapping[str, Shape] = {**ANSWER, "round_id?": int}
    constant_answers = tuple(OPTIONS)  # with rotations, each of them scores 0
    instruction = LETTER_ANSWER

    def find(self, data: Path, *names: str) -> Path:
        return data if data.is_file() else super().find(data, *names)  # `data` may be the TSV itself

    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        path = self.find(data, self.marker)
        rows = list(rows_of(path, problems))
        images = {row["index"]: image for _, image, row in reversed(rows)}  # of equal ones the first
        index = 0
        for number, image, row in rows:
            seen = set()
            while isinstance(image, str) and image not in seen:  # some releases refer to another row's image
                seen.add(image)
                image = images.get(image, image)
            if isinstance(image, str):
                what = f"refers to the image of row {image}, which has none"
                problems.append(DataIssue(str(path), number, what))
                continue
            texts, letters = options_of(row)
            prompt = prompt_of(row)
            extra = {"prompt": prompt, "round_id": 0, "options": texts, "option_char": letters}
            text, category = prompt + self.instruction, row.get("category", "default")
            yield Question(index, int(row["index"]), image, text, category, str(path), number, extra)
            index += 1

    def load_image(self, image: TableImage) -> Any:
        return image.load()

    def check_truth(self, data: Path, questions: list[Question]) -> list[str]:
        path, warnings = self.find(data, self.marker), []
        known = {question.question_id for question in questions}
        rotations = [key for key in known if key >= ROTATION]
        if path.name != self.marker:
            warnings.append(f"{path.name} is another release than {self.marker}, which papers use")
        if orphans := sum(key % ROTATION not in known for key in rotations):
            warnings.append(f"{orphans} of {len(known)} rows are rotations of missing questions")
        if not rotations and len(known) > 1:
            warnings.append("no row is a rotation (index >= 1,000,000); the accuracy is then the vanilla one")
        return warnings

    @staticmethod
    def read_truth(path: Path) -> Row:
        """Return {"rows": {index: row without image}, "issues": malformed lines, "unlabeled": lines}."""
        issues: list[DataIssue] = []
        rows, unlabeled = {}, []
        for line, _, row in rows_of(path, issues):
            if (index := int(row["index"])) in rows:
                issues.append(DataIssue(str(path), line, f"repeats index {index}; the first row is used"))
                continue
            rows[index] = row
            if row["answer"] not in choices_of(row):
                unlabeled.append((line, row["answer"]))
        if not rows:
            found = f" ({issues[0]})" if issues else ""
            raise DataError(f"{path}: no row can be used{found}. Use the official file.")
        return {"rows": rows, "issues": [str(issue) for issue in issues], "unlabeled": unlabeled}

    def check_labels(self, data: Path) -> None:
        """Raise DataError if the answer of a row is not the letter of one of its options."""
        if unlabeled := self.parsed(data)["unlabeled"]:
            line, answer = unlabeled[0]
            what = f"answer is {answer!r}, expected the letter of an option ({len(unlabeled)} such rows)"
            raise DataError(
                f"{self.find(data, self.marker)}:{line}: {what}. Use a dev file, not a test file."
            )

    def truth(self, data: Path) -> Mapping[int, Mapping[str, str]]:
        return self.parsed(data)["rows"]

    def asked_texts(self, data: Path) -> Mapping[Hashable, Sequence[str]]:
        return {
            key: (row["question"], *map("{1}. {0}".format, *options_of(row)))
            for key, row in self.truth(data).items()
        }

    def keys(self, data: Path, answers: Sequence[Row]) -> list[Hashable]:
        if rounds := sum(row.get("round_id", 0) != 0 for row in answers):
            raise DataError(
                f"{self.title}: {rounds} of {len(answers)} answers are of further rounds (round_id > 0, from "
                "LLaVA's --all-rounds), whose letters name other options than the table. The table has the "
                'rotations as rows already. Keep the lines with "round_id": 0.'
            )
        return super().keys(data, answers)

    def read_answers(self, path: str | Path, problems: list[DataIssue] | None = None) -> list[Row]:
        """Return the answers of LLaVA's jsonl, or of an xlsx made for the server."""
        if Path(path).suffix != ".xlsx":
            return super().read_answers(path, problems)
        from openpyxl import load_workbook
        from openpyxl.utils.exceptions import InvalidFileException

        if not Path(path).is_file():
            raise DataError(f"{path}: no such answer file")
        try:
            rows = list(load_workbook(path, read_only=True).active.iter_rows(values_only=True))
        except (
            BadZipFile,
            InvalidFileException,
            AttributeError,
            LookupError,
            SyntaxError,
            ValueError,
        ) as error:
            raise DataError(f"{path}: not an xlsx file ({error}). Write it again.") from error
        if not rows or not {"index", "prediction"} <= set(rows[0]):
            raise DataError(f"{path}: missing columns index and prediction in the first sheet")
        found = []
        for number, cells in enumerate(rows[1:], 2):
            row = dict(zip(rows[0], cells, strict=False))
            index, text = row["index"], row["prediction"]
            if isinstance(index, float) and index.is_integer():
                index = int(index)
            if wrong := mismatch(index, ID):
                raise DataError(f"{path}:{number}: index{wrong}. Fix the row.")
            found.append({"question_id": index, "text": "" if text is None else str(text)})
        check_not_empty(path, found)
        return found

    def entries(self, data: Path, answers: Sequence[Row]) -> list[Any]:
        return [self.truth(data).get(key) for key in self.keys(data, answers)]

    def reading(self, entry: Any, text: str) -> str | None:
        return infer_letter(text, choices_of(entry))

    def careful(self, entry: Any, text: str) -> str | None:
        text, choices = cleaned(text), choices_of(entry)
        found = _LETTER.fullmatch(text)
        if found and found[1].upper() in choices:
            return found[1].upper()
        return infer_letter(text, choices)

    def letter(self, entry: Mapping[str, str], row: Row) -> str | None:
        """Return the option that an answer means (see `infer_letter`)."""
        return infer_letter(row["text"], choices_of(entry))

    def credit(self, entry: Mapping[str, str], row: Row) -> float:
        return float(self.letter(entry, row) == entry["answer"])

    def official_score(self, data: Path, answers: list[Row], fixed: bool) -> Score:
        truth, (rows, warnings, missing) = self.truth(data), self.join(data, answers)
        self.check_labels(data)
        if missing and not fixed:
            warnings[-1] += "; they count as wrong. --fixed leaves them out"
        warnings = [*self.parsed(data)["issues"], *warnings]
        unresolved = sum(self.letter(truth[key], row) is None for key, row in rows.items())
        if unresolved:
            what = f"{unresolved} answers name no option"
            warnings.append(f"{what}; exact matching counts them as wrong, the server would ask a judge")
        counted = [key for key in truth if key in rows or not fixed]
        right = {key: self.credit(truth[key], rows[key]) if key in rows else 0.0 for key in counted}
        circular = _circular(right)
        first = [(truth[key], circular[key]) for key in right if key < ROTATION]
        report = {"Overall": mean(value for _, value in first)}
        for level in ("l2-category", "category"):
            pairs = ((_ABBREVIATIONS.get(row.get(level), row.get(level)), value) for row, value in first)
            groups = grouped((name, value) for name, value in pairs if name)
            report |= {name: mean(values) for name, values in sorted(groups.items())}
        details = {
            "rule": "circular, exact matching",
            "rows": len(right),
            "questions": len(first),
            "vanilla": 100 * mean(value for key, value in right.items() if key < ROTATION),
            "vanilla_all_rows": 100 * mean(right.values()),
            "unresolved": unresolved,
            "report": report,
        }
        return Score(self.name, 100 * report["Overall"] if first else None, details, warnings)

    def question_scores(self, data: Path, answers: list[Row]) -> list[QuestionScore]:
        """Return 1 for questions whose answered rotations are all right."""
        right = {key: self.credit(entry, row) for key, entry, row in self.matched(data, answers)}
        return [QuestionScore(str(key), str(key), value) for key, value in _circular(right).items()]

    def submission(self, data: Path | None, answers: list[Row], questions: Path | None = None) -> Submission:
        """Return the server's xlsx: the table without images, with a column of predictions."""
        from openpyxl import Workbook

        data = questions or self.needed(data, ", or --questions with the TSV")
        truth, (rows, warnings, _) = self.truth(data), self.join(data, answers)
        book = Workbook()
        sheet = book.active
        sheet.title = "Sheet1"
        columns = [name for name in next(iter(truth.values()), ()) if name not in _NOT_UPLOADED]
        sheet.append([*columns[:6], "prediction", *columns[6:]])
        for key, row in truth.items():
            cells = [key if name == "index" else _cell(row[name]) for name in columns]
            text = _ILLEGAL.sub("", rows[key]["text"]) if key in rows else None
            sheet.append([*cells[:6], text, *cells[6:]])
            for cell in sheet[sheet.max_row]:
                if cell.data_type == "f":  # an answer that begins with "=" is not a formula
                    cell.data_type = "s"
        content = BytesIO()
        book.save(content)
        files = {f"{self.name}_submission.xlsx": content.getvalue()}
        return Submission(files, len(truth), SERVER, [*self.parsed(data)["issues"], *warnings])


class MMBenchCN(MMBench):
    """MMBench in Chinese."""

    name = "mmbench_cn"
    title = "MMBench-CN"
    folder = "mmbench_cn"
    other_folders = ("mmbench",)
    marker = "mmbench_dev_cn_20231003.tsv"
    markers = ("mmbench_dev_cn*.tsv",)
    sizes = {4329: "dev 20231003"}
    files = (DataFile(marker, _WHAT, f"MMBench-CN dev, release 20231003 ({_PAGE})", also=markers),)
    truth_files = (marker,)
    instruction = "\n请直接回答选项字母。"


def _circular(right: dict[int, float]) -> dict[int, float]:
    """Return {index of the question: 1.0 if every rotation is right}."""
    groups = grouped((key % ROTATION, value) for key, value in right.items())
    return {int(key): min(values) for key, values in groups.items()}


def _cell(text: str) -> str | None:
    return None if text in MISSING_CELLS else _ILLEGAL.sub("", text)
