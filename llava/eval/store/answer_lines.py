"""One line of an answer file: how it is written, and whether a line that is there belongs to this run.

A line is known by `metadata.index`, the question's place in its file: question ids are not unique. Knows no
file beyond its name in messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import shortuuid

from llava.eval.benchmarks.base import Question
from llava.eval.store.provenance import Configuration, differences

_HEAD = b'{"question_id"'  # every line begins so


class AnswerFileError(RuntimeError):
    """The answer file cannot be used or written; the message says why and what to do."""


class ForeignAnswerError(AnswerFileError):
    """A line of the right configuration that answers a question which is not among those to be asked."""


@dataclass(frozen=True)
class Answer:
    """What the model said to one question, and how many visual tokens it had seen."""

    index: int  # Question.index
    text: str
    visual_tokens: int


class Lines:
    """Writes and recognises the answer lines of one configuration to these questions."""

    def __init__(self, questions: Sequence[Question], configuration: Configuration, model_id: str) -> None:
        self.questions: Mapping[int, Question] = {question.index: question for question in questions}
        self._configuration = configuration
        self._model_id = model_id
        self._metadata = configuration.metadata()

    def write(self, answer: Answer) -> bytes:
        """The line, with its newline."""
        question = self.questions[answer.index]
        record = {
            "question_id": question.question_id,
            "prompt": _prompt(question),
            "text": answer.text,
            "answer_id": shortuuid.uuid(),
            "model_id": self._model_id,
            **{key: value for key, value in question.extra.items() if key != "prompt"},
            "metadata": {"index": answer.index, "visual_tokens": answer.visual_tokens, **self._metadata},
        }
        return (json.dumps(record) + "\n").encode()

    def read(self, raw: bytes, place: str) -> int | None:
        """Index of the question that a line answers; None for a torn line of ours.

        place: "file:line" for messages. Raises AnswerFileError for what we cannot have written and for
        another configuration, ForeignAnswerError for an answer to another question.
        """
        record = self._parse(raw, place)
        return None if record is None else self._accept(record, place)

    @staticmethod
    def _parse(raw: bytes, place: str) -> dict[str, Any] | None:
        try:
            record = json.loads(raw)
        except ValueError:
            if raw.startswith(_HEAD[: len(raw)]) or not raw.strip(b"\0\n"):  # zeros: a power cut
                return None
            record = None
        if isinstance(record, dict) and {"question_id", "prompt", "text"} <= record.keys():
            return record
        raise AnswerFileError(f"{place}: not an answer of this program; give another output")

    def _accept(self, record: dict[str, Any], place: str) -> int:
        metadata = record.get("metadata")
        if not isinstance(metadata, dict) or "config" not in metadata or "index" not in metadata:
            raise AnswerFileError(
                f"{place}: an answer that was not made by this program; give another "
                "output, or move the file away"
            )
        if metadata["config"] != self._metadata["config"]:
            apart = "; ".join(differences(metadata, self._configuration)) or "an unknown field differs"
            raise AnswerFileError(
                f"{place}: answers of another configuration: {apart}. Give another output, "
                "or the settings of that file, or move the file away"
            )
        question = self.questions.get(metadata["index"])
        if question is None:
            raise ForeignAnswerError(
                f"{place}: answers question number {metadata['index']}, which is not "
                "asked now (another --limit or chunk?); give another output"
            )
        if (record["question_id"], record["prompt"]) != (question.question_id, _prompt(question)):
            raise ForeignAnswerError(
                f"{place}: the question of this answer is not the one that stands at "
                "this place now: other questions; give another output"
            )
        return question.index


def _prompt(question: Question) -> str:
    return question.extra.get("prompt", question.text)
