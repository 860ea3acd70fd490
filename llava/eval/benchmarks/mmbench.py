"""MMBench and MMBench-CN (dev): multiple choice, asked once per rotation of the options.

Rotations are rows of the TSV (index + k x 10^6). Score: accuracy of CircularEval, where a question counts
only if every rotation is answered right, computed with exact matching: LLaVA answers in bare letters, so no
judge is needed. The server takes the xlsx that `python -m llava.eval.submit` writes. The table is streamed
(see `tsv`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from io import BytesIO
from itertools import takewhile
from pathlib import Path
from typing import Any

from .base import LETTER_ANSWER, Benchmark, DataFile, QuestionScore, Score, Submission, grouped, mean
from .files import DataError, DataIssue, Question, Row
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
    constant_answers = tuple(OPTIONS)  # with rotations, each of them scores 0
    instruction = LETTER_ANSWER

    def find(self, data: Path, *names: str) -> Path:
        return data if data.is_file() else super().find(data, *names)  # `data` may be the TSV itself

    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        path, images = self.find(data, self.marker), {}
        for index, (number, image, row) in enumerate(rows_of(path, problems)):
            if isinstance(image, str):  # some releases refer to the image of another row
                if image not in images:
                    what = f"refers to the image of row {image}, which is not above it"
                    problems.append(DataIssue(str(path), number, what))
                    continue
                image = images[image]
            images[row["index"]] = image
            texts = list(takewhile(lambda text: not is_missing(text), (row.get(one, "") for one in OPTIONS)))
            letters = list(OPTIONS[: len(texts)])
            prompt = "\n".join([row["question"], *map("{}. {}".format, letters, texts)])
            if not is_missing(row.get("hint", "")):
                prompt = f"{row['hint']}\n{prompt}"
            extra = {"prompt": prompt, "round_id": 0, "options": texts, "option_char": letters}
            text, category = prompt + self.instruction, row.get("category", "default")
            yield Question(index, int(row["index"]), image, text, category, str(path), number, extra)

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
        """Return {"rows": {index: row without image}, "issues": malformed lines}."""
        issues: list[DataIssue] = []
        rows = {int(row["index"]): row for _, _, row in rows_of(path, issues)}
        return {"rows": rows, "issues": [str(issue) for issue in issues]}

    def truth(self, data: Path) -> Mapping[int, Mapping[str, str]]:
        return self.parsed(data)["rows"]

    def read_answers(self, path: str | Path) -> list[Row]:
        """Return the answers of LLaVA's jsonl, or of an xlsx made for the server."""
        if Path(path).suffix != ".xlsx":
            return super().read_answers(path)
        from openpyxl import load_workbook

        rows = list(load_workbook(path, read_only=True).active.iter_rows(values_only=True))
        if not rows or not {"index", "prediction"} <= set(rows[0]):
            raise DataError(f"{path}: missing columns index and prediction in the first sheet")
        table = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
        return [{"question_id": row["index"], "text": str(row["prediction"] or "")} for row in table]

    def letter(self, entry: Mapping[str, str], row: Row) -> str | None:
        """Return the option that an answer means (see `infer_letter`)."""
        choices = {one: entry[one] for one in OPTIONS if entry.get(one, "") not in MISSING_CELLS}
        return infer_letter(str(row["text"]), choices)

    def credit(self, entry: Mapping[str, str], row: Row) -> float:
        return float(self.letter(entry, row) == entry["answer"])

    def score(self, data: Path, answers: list[Row], fixed: bool = False) -> Score:
        truth, (rows, warnings, missing) = self.truth(data), self.join(data, answers)
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
