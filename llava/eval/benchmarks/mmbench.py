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
from pathlib import Path
from typing import Any

from llava.eval.benchmarks.base import Benchmark, DataFile, QuestionScore, Score, Submission, grouped, mean
from llava.eval.benchmarks.files import DataError, DataIssue, Question, Row
from llava.eval.benchmarks.tsv import MISSING_CELLS, TableImage, is_missing, rows_of

OPTIONS = "ABCD"
ROTATION = 1_000_000
SERVER = "MMBench's server (mmbench.opencompass.org.cn), dev"
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
    source = "MMBench dev, release 20230712 (github.com/open-compass/MMBench)"
    files = (DataFile(marker, "questions, images and answers", source, also=markers),)
    constant_answers = tuple(OPTIONS)  # with rotations, each of them scores 0
    instruction = "\nAnswer with the option's letter from the given choices directly."

    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        return self._questions(self.table(data), problems)

    def _questions(self, path: Path, problems: list[DataIssue]) -> Iterator[Question]:
        images: dict[str, TableImage] = {}
        for index, (number, image, row) in enumerate(rows_of(path, problems)):
            if isinstance(image, str):  # some releases refer to the image of another row
                if image not in images:
                    message = f"refers to the image of row {image}, which is not above it"
                    problems.append(DataIssue(str(path), number, message))
                    continue
                image = images[image]
            images[row["index"]] = image
            letters = _options(row)
            prompt = row["question"] + "".join(f"\n{letter}. {text}" for letter, text in letters.items())
            if not is_missing(row.get("hint", "")):
                prompt = f"{row['hint']}\n{prompt}"
            extra = {
                "prompt": prompt,
                "round_id": 0,
                "options": list(letters.values()),
                "option_char": list(letters),
            }
            text, category = prompt + self.instruction, row.get("category", "default")
            yield Question(index, int(row["index"]), image, text, category, str(path), number, extra)

    def load_image(self, image: TableImage) -> Any:
        return image.load()

    def check_truth(self, data: Path, questions: list[Question]) -> list[str]:
        path, warnings = self.table(data), []
        if path.name != self.marker:
            warnings.append(f"{path.name} is another release than {self.marker}, which papers use")
        known = {question.question_id for question in questions}
        orphans = sum(key >= ROTATION and key % ROTATION not in known for key in known)
        if orphans:
            warnings.append(f"{orphans} of {len(known)} rows are rotations of missing questions")
        if not any(key >= ROTATION for key in known) and len(known) > 1:
            warnings.append(
                "no row is a rotation (index >= 1,000,000): a release without circular rows, or only the "
                "first questions; the accuracy is then the vanilla one"
            )
        return warnings

    @staticmethod
    def read_truth(path: Path) -> Row:
        """Return {"rows": {index: row without image}, "issues": malformed lines}."""
        issues: list[DataIssue] = []
        rows = {int(row["index"]): row for _, _, row in rows_of(path, issues)}
        return {"rows": rows, "issues": [str(issue) for issue in issues]}

    def truth(self, data: Path) -> Mapping[int, Mapping[str, str]]:
        return self.parsed(data)["rows"]

    def table(self, data: Path) -> Path:
        """Return the TSV, by default of the release that papers use; `data` may be the TSV itself."""
        return data if data.is_file() else self.find(data, self.marker)

    def truth_paths(self, data: Path) -> list[Path]:
        return [self.table(data)]

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

    def letters(self, data: Path, answers: list[Row]) -> dict[int, str | None]:
        """Return the letter inferred from every answer, by index."""
        truth, found = self.truth(data), {}
        for key, answer in self.join(data, answers).rows.items():
            row = truth[key]
            choices = {letter: row[letter] for letter in OPTIONS if row.get(letter, "") not in MISSING_CELLS}
            found[key] = infer_letter(str(answer["text"]), choices)
        return found

    def score(self, data: Path, answers: list[Row], fixed: bool = False) -> Score:
        truth, letters = self.truth(data), self.letters(data, answers)
        warnings = [*self.parsed(data)["issues"], *self.join(data, answers).warnings]
        if len(letters) < len(truth) and not fixed:
            warnings[-1] += "; they count as wrong. --fixed leaves them out"
        unresolved = sum(letter is None for letter in letters.values())
        if unresolved:
            warnings.append(
                f"{unresolved} answers name no option; exact matching counts them as wrong, the server would "
                "ask a judge"
            )
        right = {
            key: float(letters.get(key) == row["answer"])
            for key, row in truth.items()
            if key in letters or not fixed
        }
        circular = _circular(right)
        first = [(truth[key], circular[key]) for key in right if key < ROTATION]
        levels = (
            (
                (_ABBREVIATIONS.get(row.get("l2-category"), row.get("l2-category")), value)
                for row, value in first
            ),
            ((row.get("category"), value) for row, value in first),
        )
        report = {"Overall": mean(value for _, value in first)}
        for level in levels:
            groups = grouped((name, value) for name, value in level if name)
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
        truth, letters = self.truth(data), self.letters(data, answers)
        right = {key: float(letters[key] == truth[key]["answer"]) for key in truth if key in letters}
        return [QuestionScore(str(key), str(key), value) for key, value in _circular(right).items()]

    def submission(self, data: Path | None, answers: list[Row], questions: Path | None = None) -> Submission:
        """Return the server's xlsx: the table without images, with a column of predictions."""
        from openpyxl import Workbook

        data = questions or self.needed(data, "--questions with the TSV")
        rows, warnings, _ = self.join(data, answers, repeats="only the last one is submitted")
        book = Workbook()
        sheet = book.active
        sheet.title = "Sheet1"
        columns: list[str] = []
        for key, row in self.truth(data).items():
            if not columns:
                columns = [name for name in row if name not in _NOT_UPLOADED]
                sheet.append([*columns[:6], "prediction", *columns[6:]])
            cells = [key if name == "index" else _cell(row[name]) for name in columns]
            text = _ILLEGAL.sub("", rows[key]["text"]) if key in rows else None
            sheet.append([*cells[:6], text, *cells[6:]])
        content = BytesIO()
        book.save(content)
        files = {f"{self.name}_submission.xlsx": content.getvalue()}
        warnings = [*self.parsed(data)["issues"], *warnings]
        return Submission(files, len(self.truth(data)), SERVER, warnings)


class MMBenchCN(MMBench):
    """MMBench in Chinese."""

    name = "mmbench_cn"
    title = "MMBench-CN"
    folder = "mmbench_cn"
    other_folders = ("mmbench",)
    marker = "mmbench_dev_cn_20231003.tsv"
    markers = ("mmbench_dev_cn*.tsv",)
    sizes = {4329: "dev 20231003"}
    source = "MMBench-CN dev, release 20231003 (github.com/open-compass/MMBench)"
    files = (DataFile(marker, "questions, images and answers", source, also=markers),)
    instruction = "\n请直接回答选项字母。"


def _circular(right: dict[int, float]) -> dict[int, float]:
    """Return {index of the question: 1.0 if every rotation is right}."""
    groups = grouped((key % ROTATION, value) for key, value in right.items())
    return {int(key): min(values) for key, values in groups.items()}


def _options(row: Mapping[str, str]) -> dict[str, str]:
    """Return the options before the first missing one."""
    found = {}
    for letter in OPTIONS:
        if is_missing(row.get(letter, "")):
            break
        found[letter] = row[letter]
    return found


def _cell(text: str) -> str | None:
    return None if text in MISSING_CELLS else _ILLEGAL.sub("", text)
