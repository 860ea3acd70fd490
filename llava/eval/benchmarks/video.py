"""Zero-shot video questions (TGIF-QA, MSVD-QA, MSRVTT-QA, ActivityNet-QA), judged by a language model.

Score: the judge's accuracy, yes / (yes + no); `average_score` is from 0 to 5. Replies are stored in a file
({id: [reply, {"q", "a", "pred"}]}) or a folder (<id>.json each), to which `python -m llava.eval.judge` adds
"judge" and "prompt" in the second part; replies without them are of an unknown judge. Pass them as the
answers, or keep them next to the answers as `<answers>_judged/`, `<answers>_judge_replies.json` or
`judge_replies.json`.

`offline_exact_match` and `offline_normalised_match` in the details need no judge: lower bounds, *not*
comparable with papers. Official rules: scores are truncated to integers, a score that is not an integer's
text counts 0, "maybe" is neither yes nor no. The instruction to the judge is in our own words; `--prompt
FILE` replaces it. No model of this package takes videos yet.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.benchmarks.base import DataFile, Score, mean
from llava.eval.benchmarks.files import DataError, DataIssue, Question, Row, read_json, read_rows
from llava.eval.benchmarks.judging import UNKNOWN, GradeStep, Judge, JudgedBenchmark
from llava.eval.benchmarks.normalize import vqa_official

FRAMES = 8
EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv")
QUESTION_KEYS = ("video_name", "question_id", "question")
REPLIES = "judge_replies.json"
_TRIES = 5
_PAGE = "Video-ChatGPT's zero-shot sets, as collected for Video-LLaVA's evaluation"

SYSTEM = (
    "You are an intelligent chatbot that judges answers to questions about videos. Compare the predicted "
    "answer with the correct answer and decide whether they match in meaning; synonyms and paraphrases are "
    "valid."
)
PROMPT = """\
Judge this answer to a question about a video.

Question: {question}
Correct Answer: {answer}
Predicted Answer: {prediction}

Say yes or no, and give a score, an integer between 0 and 5 where 5 is the best match. Reply with a Python \
dictionary string with the keys 'pred' ('yes' or 'no') and 'score' and with nothing else, for example \
{'pred': 'yes', 'score': 4}."""


def frame_indices(frames: int, count: int = FRAMES) -> list[int]:
    """Return `count` frame indices spread evenly over a video, first and last included, truncated.

    Raises:
        ValueError: The video has no frames. Short videos repeat frames.
    """
    if frames < 1 or count < 1:
        raise ValueError(f"{count} frames of a video of {frames}: both must be at least 1")
    return [int(place) for place in np.linspace(0, frames - 1, count)]


def tally(replies: list[Row]) -> Row:
    """Return the official counts over judge replies ({"pred", "score"}, either may be missing or invalid)."""
    yes = no = total = 0
    for reply in replies:
        try:
            total += int(reply["score"])
            said = reply["pred"].lower()
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            continue
        yes += "yes" in said
        no += "yes" not in said and "no" in said
    return {
        "yes_count": yes,
        "no_count": no,
        "accuracy": yes / (yes + no) if yes + no else None,
        "average_score": total / len(replies) if replies else None,
    }


def parse_reply(text: str) -> Row | None:
    """Return the Python dictionary that a judge wrote, or None."""
    try:
        reply = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return reply if isinstance(reply, dict) else None


def fill(prompt: str, **values: str) -> str:
    """Replace {question}, {answer} and {prediction}; other braces stay."""
    return re.sub(r"\{(question|answer|prediction)\}", lambda match: values[match[1]], prompt)


class VideoQA(JudgedBenchmark):
    """One of the sets; they differ only in names.

    Attributes:
        videos: Folder of the videos.
        prefix: Start of their file names.
    """

    media = "video"
    metric = "accuracy"
    max_new_tokens = 1024
    sizes = {1000: "first 1,000"}
    marker = "test_q_1k.json"
    markers = ("test_q.json",)
    judge_model = "gpt-3.5-turbo"
    placeholders = ("{question}", "{answer}", "{prediction}")
    videos: str
    prefix = ""

    def __init_subclass__(cls) -> None:
        place = cls.folder
        cls.folder, cls.other_folders = f"GPT_Zero_Shot_QA/{place}", (place, f"video/{place}")
        cls.files = (
            DataFile("test_q_1k.json", "questions", _PAGE, also=("test_q.json",)),
            DataFile("test_a_1k.json", "answers", _PAGE, "score", ("test_a.json",)),
            DataFile(cls.videos, "videos", f"{cls.title}'s own release"),
        )

    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        path = self.find(data, self.marker)
        for index, row in enumerate(read_json(path, list, QUESTION_KEYS)):
            stem = data / self.videos / f"{self.prefix}{row['video_name']}"
            paths = [Path(f"{stem}{extension}") for extension in EXTENSIONS]
            video = next((one for one in paths if one.is_file()), paths[0])
            identity, text = row["question_id"], row["question"]
            yield Question(index, identity, video, text, file=str(path), line=index + 1)

    @staticmethod
    def read_truth(answers: Path, questions: Path) -> dict[Hashable, Row]:
        """Return {question_id: correct answer, question and video}."""
        rows = [
            *read_json(answers, list, ("question_id", "answer")),
            *read_json(questions, list, QUESTION_KEYS),
        ]
        truth: dict[Hashable, dict[str, Any]] = {}
        for row in rows:
            truth.setdefault(row["question_id"], {}).update(row)
        return {key: entry for key, entry in truth.items() if "answer" in entry}

    def truth_paths(self, data: Path) -> list[Path]:
        """Return the answer file that belongs to the question file in use, and that one."""
        questions = self.find(data, self.marker)
        return [self.find(data, questions.name.replace("test_q", "test_a")), questions]

    def image_of(self, key: Hashable, entry: Row) -> str:
        return f"{self.prefix}{entry.get('video_name')}"

    def credit(self, entry: Row, row: Row) -> float | None:
        """Return 1 for the judge's yes, 0 for its no; other replies are left out."""
        return tally([row["reply"]])["accuracy"] if "reply" in row else None

    def read_ungraded(self, path: Path) -> list[Row]:
        """Return merge.jsonl ({"id", "question", "answer", "pred"}), LLaVA's jsonl, or answers in replies."""
        if path.is_dir() or path.suffix == ".json":
            return [
                {"question_id": key, "text": str(asked.get("pred", "")), "truth": asked.get("a")}
                for key, (_, asked) in _read_replies(path).items()
            ]
        rows = []
        for number, row in enumerate(read_rows(path, fix="Fix or delete such lines before scoring"), 1):
            if "id" in row and "pred" in row:
                row = {"question_id": row["id"], "text": row["pred"], "truth": row.get("answer")}
            elif not {"question_id", "text"} <= row.keys():
                raise DataError(
                    f"{path}: answer {number} has neither id and pred nor question_id and text. Fix or "
                    "delete such lines before scoring."
                )
            rows.append(row)
        return rows

    def stored_grades(self, path: Path) -> list[Path]:
        if path.is_dir() or path.suffix == ".json":
            return [path]
        names = (f"{path.stem}_judged", f"{path.stem}_{REPLIES}", REPLIES)
        return [path.with_name(name) for name in names if path.with_name(name).exists()]

    def with_grades(self, rows: list[Row], path: Path) -> list[Row]:
        replies, graded = _read_replies(path), []
        for row in rows:
            if row["question_id"] in replies:
                reply, asked = replies[row["question_id"]]
                judge = asked.get("judge", UNKNOWN)
                row = {**row, "reply": reply, "judge": judge, "grades_file": path.name}
            graded.append(row)
        return graded

    def score(self, data: Path, answers: list[Row], fixed: bool = False) -> Score:
        truth = self.truth(data)
        rows, warnings, _ = self.join(data, answers)
        wrong = [
            key
            for key, row in rows.items()
            if row.get("truth") is not None and row["truth"] != truth[key]["answer"]
        ]
        if wrong:
            warnings.append(
                f"{len(wrong)} of {len(rows)} answers are stored with another correct answer than the ground "
                f"truth has (first: {wrong[0]}). Programs that split only the questions into chunks cause "
                "this; the judge's replies to these answers are not valid"
            )
        replies = [row["reply"] for row in rows.values() if "reply" in row]
        pairs = [(row["text"], str(truth[key]["answer"])) for key, row in rows.items()]
        details: dict[str, Any] = {
            "answered": len(rows),
            "judged": len(replies),
            "offline_exact_match": 100 * mean(a.strip() == b.strip() for a, b in pairs),
            "offline_normalised_match": 100 * mean(vqa_official(a) == vqa_official(b) for a, b in pairs),
        }
        if not replies:
            warnings.append(
                "not judged yet: run python -m llava.eval.judge; the offline matches are not comparable with "
                "papers"
            )
            return Score(self.name, None, details, warnings)
        details |= tally(replies)
        details["judge"], notes = self.judged_by(list(rows.values()))
        warnings += notes
        if len(replies) < len(rows):
            warnings.append(
                f"{len(rows) - len(replies)} of {len(rows)} answers are not judged. Run the judge again to "
                "resume"
            )
        invalid = len(replies) - details["yes_count"] - details["no_count"]
        if invalid:
            warnings.append(
                f"{invalid} replies are neither yes nor no, or have no integer score; the official tally "
                "leaves them out of the accuracy"
            )
        accuracy = details["accuracy"]
        return Score(self.name, None if accuracy is None else 100 * accuracy, details, warnings)

    # -- judging ----------------------------------------------------------------------------------

    def grades_path(self, answers: Path, model: str, runs: int) -> Path:
        return answers.with_name(f"{answers.stem}_judged")

    def grade(
        self, data: Path, answers: list[Row], judge: Judge, output: Path, runs: int = 1, adopt: bool = False
    ) -> Iterator[GradeStep]:
        """Yield <id>.json of every answer; one whose replies cannot be parsed is left for the next start."""
        truth, rows = self.truth(data), self.join(data, answers).rows
        stored = _read_replies(output) if output.is_dir() and any(output.glob("*.json")) else {}
        self.check_judge(output, (asked for _, asked in stored.values()), judge, adopt)
        for key, row in rows.items():
            path, content = output / f"{key}.json", None
            if str(key) not in stored:
                asked = {"q": truth[key]["question"], "a": str(truth[key]["answer"]), "pred": row["text"]}
                text = fill(
                    judge.prompt or PROMPT, question=asked["q"], answer=asked["a"], prediction=asked["pred"]
                )
                messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
                replies = (parse_reply(judge.ask(messages, None, None)[0]) for _ in range(_TRIES))
                reply = next((one for one in replies if one is not None), None)
                if reply is None:
                    continue
                content = json.dumps([reply, {**asked, **judge.record()}])
            yield GradeStep(str(key), path, content)


def _read_replies(path: Path) -> dict[str, tuple[Row, Row]]:
    if path.is_dir():
        document = {one.stem: read_json(one, list) for one in sorted(path.glob("*.json"))}
    else:
        document = read_json(path, dict)
    for key, pair in document.items():
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], dict)):
            raise DataError(
                f"{path}: entry {key!r} is not a judge reply: expected [{{'pred', 'score'}}, {{'q', 'a', "
                "'pred'}]"
            )
    if not document:
        raise DataError(f"{path}: contains no judge replies")
    return {key: (pair[0], pair[1]) for key, pair in document.items()}


class TGIF(VideoQA):
    name, title, folder, videos = "tgif", "TGIF-QA", "TGIF_Zero_Shot_QA", "mp4"


class MSVD(VideoQA):
    name, title, folder, videos = "msvd", "MSVD-QA", "MSVD_Zero_Shot_QA", "videos"


class MSRVTT(VideoQA):
    name, title, folder, videos = "msrvtt", "MSRVTT-QA", "MSRVTT_Zero_Shot_QA", "videos/all"


class ActivityNet(VideoQA):
    name, title, folder, videos = "activitynet", "ActivityNet-QA", "Activitynet_Zero_Shot_QA", "all_test"
    prefix = "v_"
