"""Zero-shot video questions (TGIF-QA, MSVD-QA, MSRVTT-QA, ActivityNet-QA), judged by a language model.

Files of a set, in LLaVA-style folders `GPT_Zero_Shot_QA/<Set>_Zero_Shot_QA/`: `test_q_1k.json` and
`test_a_1k.json` (the first 1,000; without them `test_q.json`, `test_a.json`), and the videos. The number is
the judge's accuracy, yes / (yes + no); `average_score` is from 0 to 5. Replies come from a stored file
({id: [reply, {"q", "a", "pred"}]}) or folder (<id>.json each): give it as the answers, or let it stand
beside them as `judge_replies.json` or `<answers>_judged/`. `python -m llava.eval.judge` makes one through
any OpenAI-compatible endpoint and goes on where it was stopped.

Without a judge there are `offline_exact_match` and `offline_normalised_match` in the details: hard lower
bounds, *not* the number that papers print. Tallying quirks are kept: scores are cut to whole numbers, a
score that is no whole number's text counts 0, "maybe" is neither yes nor no. The instruction to the judge
is in our own words; `--prompt FILE` replaces it. No model that takes videos is here yet.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llava.eval.benchmarks.base import (
    DataError,
    DataFile,
    DataIssue,
    Question,
    QuestionScore,
    Score,
    read_jsonl,
)
from llava.eval.benchmarks.common import MeanBenchmark, check_known, mean, read_json, require
from llava.eval.benchmarks.normalize import vqa_official

FRAMES = 8
EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv")
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
{{'pred': 'yes', 'score': 4}}."""


def frame_indices(frames: int, count: int = FRAMES) -> list[int]:
    """`count` frames spread evenly over a video of `frames`, first and last included, cut to whole numbers.

    Raises ValueError for a video without frames. Short videos repeat frames.
    """
    if frames < 1 or count < 1:
        raise ValueError(f"{count} frames of a video of {frames}: both must be at least 1")
    return [int(place) for place in np.linspace(0, frames - 1, count)]


def tally(replies: list[dict[str, Any]]) -> dict[str, Any]:
    """Official counts over judge replies ({"pred", "score"}, either may be missing or odd)."""
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


class VideoQA(MeanBenchmark):
    """One of the sets; they differ in names alone."""

    media = "video"
    metric = "accuracy"
    max_new_tokens = 1024
    sizes = {1000: "first 1,000"}
    marker = "test_q_1k.json"
    markers = ("test_q.json",)
    videos: str  # folder of the videos
    prefix = ""  # of their file names

    def questions(self, data: Path, problems: list[DataIssue]) -> Iterator[Question]:
        """Questions in file order; raises DataError where the question file is missing or another."""
        path = require(data, (self.marker, *self.markers), f"the questions of {_PAGE}")
        rows = read_json(path, list, ("video_name", "question_id", "question"))
        for index, row in enumerate(rows):
            stem = data / self.videos / f"{self.prefix}{row['video_name']}"
            there = [path for end in EXTENSIONS if (path := Path(f"{stem}{end}")).is_file()]
            yield Question(
                index,
                row["question_id"],
                there[0] if there else Path(f"{stem}{EXTENSIONS[0]}"),
                row["question"],
                file=str(path),
                line=index + 1,
            )

    def check_truth(self, data: Path, questions: list[Question]) -> list[str]:
        try:
            truth = self._truth(data)
        except DataError as error:
            return [f"cannot be scored: {error}"]
        lost = [question for question in questions if question.question_id not in truth]
        return [f"{len(lost)} of {len(questions)} questions are not in the answer file"] if lost else []

    def read_answers(self, path: str | Path) -> list[dict[str, Any]]:
        """merge.jsonl ({"id", "question", "answer", "pred"}), LLaVA's jsonl, or judge replies."""
        path = Path(path)
        if path.is_dir() or path.suffix == ".json":
            replies = _read_replies(path)
            return [
                {
                    "question_id": key,
                    "text": str(asked.get("pred", "")),
                    "truth": asked.get("a"),
                    "reply": reply,
                }
                for key, (reply, asked) in replies.items()
            ]
        if not path.is_file():
            raise DataError(f"{path}: no such answer file")
        problems: list[DataIssue] = []
        rows = []
        for number, row in read_jsonl(path, problems):
            if "id" in row and "pred" in row:
                rows.append({"question_id": row["id"], "text": row["pred"], "truth": row.get("answer")})
            elif "question_id" in row and "text" in row:
                rows.append(row)
            else:
                problems.append(DataIssue(str(path), number, "neither id and pred nor question_id and text"))
        if problems:
            raise DataError(f"{problems[0]}; mend or delete such lines before scoring")
        for beside in (
            path.with_name(f"{path.stem}_judged"),
            path.with_name(f"{path.stem}_{REPLIES}"),
            path.with_name(REPLIES),
        ):
            if beside.exists():
                replies = _read_replies(beside)
                return [
                    {**row, "reply": replies[row["question_id"]][0]} if row["question_id"] in replies else row
                    for row in rows
                ]
        return rows

    def score(self, data: Path, answers: list[dict[str, Any]], fixed: bool = False) -> Score:
        data = Path(data)
        truth = self._truth(data)
        warnings = check_known(self.title, [row["question_id"] for row in answers], truth, data)
        rows = {row["question_id"]: row for row in answers}
        wrong = [
            key
            for key, row in rows.items()
            if row.get("truth") is not None and row["truth"] != truth[key]["answer"]
        ]
        if wrong:
            warnings.append(
                f"{len(wrong)} of {len(rows)} answers stand beside another correct answer than "
                f"the ground truth has (e.g. {wrong[0]}): made in chunks by a program that deals "
                "out questions and not their answers? What a judge said about these is worthless"
            )
        replies = [row["reply"] for row in rows.values() if "reply" in row]
        pairs = [(row["text"], str(truth[key]["answer"])) for key, row in rows.items()]
        details: dict[str, Any] = {
            "answered": len(rows),
            "judged": len(replies),
            "offline_exact_match": 100 * mean(float(a.strip() == b.strip()) for a, b in pairs),
            "offline_normalised_match": 100
            * mean(float(vqa_official(a) == vqa_official(b)) for a, b in pairs),
        }
        if not replies:
            warnings.append(
                "not judged yet: python -m llava.eval.judge asks a judge; the offline matches "
                "are not the number that papers print"
            )
            return Score(self.name, None, details, warnings)
        details |= tally(replies)
        if len(replies) < len(rows):
            warnings.append(
                f"{len(rows) - len(replies)} of {len(rows)} answers are not judged; start the "
                "judge again to go on"
            )
        odd = len(replies) - details["yes_count"] - details["no_count"]
        if odd:
            warnings.append(
                f"{odd} replies are neither yes nor no, or have no whole score; the official "
                "tally leaves them out of the accuracy"
            )
        accuracy = details["accuracy"]
        return Score(self.name, None if accuracy is None else 100 * accuracy, details, warnings)

    def question_scores(self, data: Path, answers: list[dict[str, Any]]) -> list[QuestionScore]:
        """1 for the judge's yes, 0 for its no; other replies are left out."""
        rows, found = {row["question_id"]: row for row in answers if "reply" in row}, []
        for question in self.questions(Path(data), []):
            if question.question_id in rows:
                counts = tally([rows[question.question_id]["reply"]])
                if counts["accuracy"] is not None:
                    found.append(
                        QuestionScore(str(question.question_id), question.image.stem, counts["accuracy"])
                    )
        return found

    def grade(
        self,
        data: Path,
        answers: list[dict[str, Any]],
        ask: Callable[..., tuple[str, str]],
        output: Path,
        runs: int = 1,
        prompt: str | None = None,
    ) -> Iterator[str]:
        """Fill the folder `output` with <id>.json; yields each id done. Replies there already are kept.

        ask(messages, temperature, max_tokens) -> (reply, model). An answer whose replies cannot be parsed
        stays without file, to be judged by the next start.
        """
        from llava.eval.store.atomic import write_atomically

        truth = self._truth(Path(data))
        questions = {one.question_id: one.text for one in self.questions(Path(data), [])}
        output.mkdir(parents=True, exist_ok=True)
        check_known(self.title, [row["question_id"] for row in answers], truth, Path(data))
        for row in answers:
            key = row["question_id"]
            path = output / f"{key}.json"
            asked = {"q": questions[key], "a": str(truth[key]["answer"]), "pred": row["text"]}
            if not path.exists():
                text = (prompt or PROMPT).format(
                    question=asked["q"], answer=asked["a"], prediction=asked["pred"]
                )
                messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
                reply = next(
                    (
                        found
                        for _ in range(_TRIES)
                        if (found := parse_reply(ask(messages, None, None)[0])) is not None
                    ),
                    None,
                )
                if reply is None:
                    continue
                write_atomically(path, json.dumps([reply, asked]))
            yield str(key)

    def _truth(self, data: Path) -> dict[str, dict[str, Any]]:
        """Answers that go with the question file in use."""
        asked = require(data, (self.marker, *self.markers), f"the questions of {_PAGE}")
        path = require(data, asked.name.replace("test_q", "test_a"), f"the answers of {_PAGE}")
        return {row["question_id"]: row for row in read_json(path, list, ("question_id", "answer"))}


def parse_reply(text: str) -> dict[str, Any] | None:
    """The Python dictionary that a judge wrote, or None."""
    try:
        reply = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return reply if isinstance(reply, dict) else None


def _read_replies(path: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    if path.is_dir():
        document = {one.stem: read_json(one, list) for one in sorted(path.glob("*.json"))}
    else:
        document = read_json(path, dict)
    odd = [
        key
        for key, pair in document.items()
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], dict))
    ]
    if odd or not document:
        what = f"entry {odd[0]!r} is" if odd else "it is empty,"
        raise DataError(f"{path}: {what} no judge reply: [{{'pred', 'score'}}, {{'q', 'a', 'pred'}}]")
    return {key: (pair[0], pair[1]) for key, pair in document.items()}


def _set(name: str, title: str, folder: str, videos: str, prefix: str = "") -> type[VideoQA]:
    place = f"{folder}_Zero_Shot_QA"
    return type(
        title.replace("-", ""),
        (VideoQA,),
        {
            "__module__": __name__,
            "name": name,
            "title": title,
            "videos": videos,
            "prefix": prefix,
            "folder": f"GPT_Zero_Shot_QA/{place}",
            "other_folders": (place, f"video/{place}"),
            "files": (
                DataFile("test_q_1k.json", "questions", _PAGE, also=("test_q.json",)),
                DataFile("test_a_1k.json", "answers", _PAGE, "score", ("test_a.json",)),
                DataFile(videos, "videos", f"{title}'s own release"),
            ),
        },
    )


TGIF = _set("tgif", "TGIF-QA", "TGIF", "mp4")
MSVD = _set("msvd", "MSVD-QA", "MSVD", "videos")
MSRVTT = _set("msrvtt", "MSRVTT-QA", "MSRVTT", "videos/all")
ActivityNet = _set("activitynet", "ActivityNet-QA", "Activitynet", "all_test", "v_")
