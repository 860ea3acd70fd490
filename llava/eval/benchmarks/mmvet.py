"""MM-Vet: open questions that need several capabilities, graded from 0 to 1 by a language model.

Score: 100 x the mean grade, averaged over the runs of the judge. Grades are stored in MM-Vet's own format,
{id: {"model", "content", "score": [one per run]}}, plus "judge" and "prompt". Pass the file as the answers,
or keep it next to them under MM-Vet's name, `<answers>_<judge>-grade-<N>runs.json`. The instruction to the
judge keeps MM-Vet's layout in our own words; scores comparable with published ones need the benchmark's text
(`python -m llava.eval.judge --prompt FILE`).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.benchmarks.base import DataFile, Score, Submission, grouped, to_json
from llava.eval.benchmarks.files import DataError, DataIssue, Row, read_answers, read_json
from llava.eval.benchmarks.joining import repeated_answers
from llava.eval.benchmarks.judging import TRIES, UNKNOWN, Judge, JudgedBenchmark
from llava.eval.benchmarks.shapes import Shape, mismatch

QUESTIONS, TRUTH = "llava-mm-vet.jsonl", "mm-vet.json"
ENTRY: Shape = {"question": str, "answer": str, "imagename": str, "capability": [str]}
GRADE: Shape = {"model": [str], "content": [str], "score": [float], "judge?": str, "prompt?": str}
_GRADES = re.compile(r"^(?P<stem>.*)_(?P<judge>[^_]+)-grade-(?P<runs>\d+)runs?\.json$")
_PAGE = "MM-Vet, mm-vet.zip (github.com/yuweihao/MM-Vet)"
_AGAIN = "\nPredict the correctness of the answer (digit): "

PROMPT = """\
Grade how correct the prediction of an AI model is, given the ground truth. Parts of the ground truth that \
are joined by <AND> must all be in the prediction for it to be fully right; of parts joined by <OR> any \
one is enough. The correctness is one of 0.0 (entirely wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9 \
and 1.0 (entirely right). Complete the last cell of the table and write nothing else.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
Which two numbers solve the equation? | 2 <AND> -7 | The solution is 4. | 0.0
Which two numbers solve the equation? | 2 <AND> -7 | It is 2. | 0.5
Which two numbers solve the equation? | 2 <AND> -7 | The solutions are -7 and 3. | 0.5
Which two numbers solve the equation? | 2 <AND> -7 | x = -7 or x = 2 | 1.0
What is the share of red cars? | 1/4 <OR> 25% | A quarter of the cars are red, that is 25%. | 1.0
Why is this sign funny? | It forbids reading the sign, which one only learns by reading it, so that \
nobody can obey it. | The sign says something about reading. | 0.2
Why is this sign funny? | It forbids reading the sign, which one only learns by reading it, so that \
nobody can obey it. | One has to read it to learn that it must not be read; obeying it is impossible. | 1.0
"""


def parse_grade(reply: str) -> float | None:
    """Return the first word of a reply as a number from 0 to 1, else None."""
    try:
        value = float(reply.split(" ")[0])
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None


class MMVet(JudgedBenchmark):
    name = "mmvet"
    title = "MM-Vet"
    folder = "mm-vet"
    other_folders = ("mmvet",)
    max_new_tokens = 1024
    marker = QUESTIONS
    markers = (TRUTH,)
    image_folder = "images"
    sizes = {218: "full release"}
    files = (
        DataFile(QUESTIONS, "questions"),
        DataFile("images", "images", _PAGE),
        DataFile(TRUTH, "ground truth for the judge", _PAGE, "score"),
    )
    truth_files = (TRUTH,)
    judge_model = "gpt-4-0613"
    grades_name = "{answers}_{judge}-grade-{runs}runs.json"
    without_judge = ", or submit the file that python -m llava.eval.submit writes"

    @staticmethod
    def read_truth(path: Path) -> dict[str, Row]:
        return read_json(path, dict, {str: ENTRY})

    def asked_texts(self, data: Path) -> Mapping[Hashable, Sequence[str]]:
        return {key: (entry["question"],) for key, entry in self.truth(data).items()}

    def key(self, row: Row) -> str:
        name = str(row["id"] if "id" in row else row["question_id"])
        return name if "id" in row or name.startswith("v1_") else f"v1_{name}"

    def image_of(self, key: Hashable, entry: Row) -> str:
        return entry["imagename"]

    def credit(self, entry: Row, row: Row) -> float | None:
        return float(np.mean(row["grades"])) if row.get("grades") else None

    def rate(self, truth: Mapping[Hashable, Row], graded: dict[Hashable, Row], score: Score) -> None:
        runs = min(len(row["grades"]) for row in graded.values())
        # Sums depend on the order in the last bit, which rounding shows: take the order of the ground truth.
        order = [key for key in truth if key in graded]
        table = [(truth[key]["capability"], graded[key]["grades"][:runs]) for key in order]
        groups = {
            "capability": grouped((name, grades) for names, grades in table for name in names),
            "integration": grouped(("_".join(sorted(names)), grades) for names, grades in table),
        }
        per_run = _run_means([grades for _, grades in table])
        score.score = round(float(np.mean(per_run)), 1)
        score.details |= {
            "total": score.score,
            "std": round(float(np.std(per_run)), 1),
            "runs": [round(one, 1) for one in per_run],
        }
        for part, of_group in groups.items():
            score.details[part] = {
                name: round(float(np.mean(_run_means(grades))), 1) for name, grades in of_group.items()
            }

    def submission(self, data: Path | None, answers: list[Row], questions: Path | None = None) -> Submission:
        """Return {"v1_<question_id>": text}, MM-Vet's result file."""
        if any("text" not in row for row in answers):
            raise DataError(f"{self.title}: stored grades without answers. Pass the answer file.")
        keys: list[Any] = [self.key(row) for row in answers]
        if data is not None and DataFile(TRUTH).find(data):
            keys, warnings = self.keys(data, answers), self.join(data, answers).warnings
        else:
            warnings = repeated_answers(keys, answers, self.key_name)
        document = {key: row["text"] for key, row in zip(keys, answers, strict=True)}
        files = {"mmvet_submission.json": to_json(document, indent=2)}
        server = "MM-Vet's online evaluator (linked from its repository)"
        return Submission(files, len(document), server, warnings)

    def entry_mismatch(self, entry: Any) -> str | None:
        found = mismatch(entry, GRADE)
        if not found and not all(0 <= value <= 1 for value in entry["score"]):
            found = "score has a number that is not from 0 to 1"
        return found and found.lstrip(".: ")

    def read_ungraded(
        self, path: Path, problems: list[DataIssue] | None = None
    ) -> tuple[list[Row], list[Path]]:
        """Read LLaVA's jsonl, MM-Vet's results ({id: text}), or ids from grades; most runs come first."""
        if path.suffix == ".json":
            document = read_json(path, dict)
            if document and all(isinstance(value, dict) for value in document.values()):
                return [{"id": key} for key in document], [path]
            if found := mismatch(document, {str: str}):
                raise DataError(f"{path}: {found.lstrip('.: ')}. Fix or delete such entries before scoring.")
            rows = [
                {"id": key, "question_id": key.removeprefix("v1_"), "text": text}
                for key, text in document.items()
            ]
        else:
            rows = read_answers(path, problems=problems)
        stems = {path.stem, path.stem.removeprefix("llava_answers_"), path.stem.removeprefix("results_")}
        matches = filter(None, (_GRADES.match(one.name) for one in path.parent.glob("*.json")))
        found = sorted((int(one["runs"]), one[0], one["judge"]) for one in matches if one["stem"] in stems)
        stored = found[-1:] + [one for one in found if one[2] != found[-1][2]]
        return rows, [path.with_name(name) for _, name, _ in stored]

    def grades_of(self, entry: Row) -> Row:
        replied = next(iter(entry.get("model", [])), UNKNOWN)
        return {"grades": entry.get("score", []), "judge": entry.get("judge", replied)}

    def record_of(self, entry: Row, path: Path, judge: Judge) -> Row:
        """Return the record; without one, the judge in the file name, else the model that replied."""
        if "judge" in entry:
            return entry
        named = _GRADES.match(path.name)
        given = named["judge"] if named else next(iter(entry["model"]), UNKNOWN)
        return {"judge": judge.model if given == judge.file_name() else given, "prompt": "built-in"}

    def ask(self, judge: Judge, truth: Row, row: Row, entry: Row | None) -> Row:
        """Retry with a higher temperature until the reply is a number; after the last try, grade 0."""
        entry = entry or {"model": [], "content": [], "score": []}
        answer = truth["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        question = (judge.prompt or PROMPT) + " | ".join([truth["question"], answer, row["text"], ""])
        for attempt in range(TRIES):
            text = question + _AGAIN if attempt else question
            reply, model = judge.ask([{"role": "user", "content": text}], 0.5 * attempt, 3)
            value = parse_grade(reply)
            if value is not None:
                break
        new = {"model": model, "content": reply, "score": value or 0.0}
        return {**entry, **{name: [*entry[name], part] for name, part in new.items()}, **judge.record()}


def _run_means(table: list[list[float]]) -> list[float]:
    """Return 100 x the mean grade of every run, summed in order as by MM-Vet: the last bit rounds x.x5."""
    return [100 * (sum(grades) / len(table)) for grades in zip(*table, strict=True)]
