"""LLaVA's (MMF's) answer evaluators under their names, on the normalization of `benchmarks.normalize`.

    from llava.eval.m4c_evaluator import TextVQAAccuracyEvaluator
    TextVQAAccuracyEvaluator().eval_pred_list([{"pred_answer": "A red bus.", "gt_answers": ["red bus"] * 10}])

A list entry has the prediction `pred_answer` and the reference answers `gt_answers`. Scores are in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llava.eval.benchmarks.base import mean
from llava.eval.benchmarks.normalize import evalai, soft_accuracy

Entry = Mapping[str, Any]


class EvalAIAnswerProcessor:
    """Normalizes an answer: lower case, punctuation, numbers, articles, contractions."""

    def __call__(self, item: str) -> str:
        """Return the normalized answer. Raises ValueError if it is not a text."""
        if not isinstance(item, str):
            raise ValueError(f"answer: {item!r}, expected a text.")
        return evalai(item)


class TextVQAAccuracyEvaluator:
    """VQA accuracy with ten reference answers."""

    def __init__(self) -> None:
        self.answer_processor = EvalAIAnswerProcessor()

    def eval_pred_list(self, pred_list: Iterable[Entry]) -> float:
        """Return the mean accuracy. Raises ValueError for an entry without ten reference answers."""
        entries = _checked(pred_list)
        for number, entry in enumerate(entries):
            if len(entry["gt_answers"]) != 10:
                what = f"pred_list[{number}]: {len(entry['gt_answers'])} gt_answers, expected 10"
                raise ValueError(f"{what}. Use TextVQA's validation file.")
        return _mean(entries, soft_accuracy, self.answer_processor)


class STVQAAccuracyEvaluator:
    """Exact match with any reference answer, after normalization."""

    def __init__(self) -> None:
        self.answer_processor = EvalAIAnswerProcessor()

    def eval_pred_list(self, pred_list: Iterable[Entry]) -> float:
        """Return the mean accuracy."""
        return _mean(_checked(pred_list), lambda text, references: text in references, self.answer_processor)


class STVQAANLSEvaluator:
    """ANLS: normalized Levenshtein similarity with the nearest reference answer, 0 below one half."""

    def get_anls(self, s1: str, s2: str) -> float:
        """Return the similarity of two texts, which are compared in lower case and stripped."""
        first, second = s1.lower().strip(), s2.lower().strip()
        longest = max(len(first), len(second))
        similarity = 1 - edit_distance(first, second) / longest if longest else 1.0
        return similarity if similarity >= 0.5 else 0.0

    def eval_pred_list(self, pred_list: Iterable[Entry]) -> float:
        """Return the mean similarity."""
        return _mean(_checked(pred_list), lambda text, all_: max(self.get_anls(text, one) for one in all_))


class TextCapsBleu4Evaluator:
    """BLEU-4 of captions, by the package pycocoevalcap (which needs Java).

    Raises:
        ImportError: The package is not installed.
    """

    def __init__(self) -> None:
        try:
            from pycocoevalcap.bleu.bleu import Bleu
            from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
        except ImportError as error:
            fix = "Run `pip install pycocoevalcap` and install Java"
            raise ImportError(f"TextCapsBleu4Evaluator: needs the package pycocoevalcap. {fix}.") from error
        self.tokenizer = PTBTokenizer()
        self.scorer = Bleu(4)

    def eval_pred_list(self, pred_list: Iterable[Entry]) -> float:
        """Return BLEU-4 of all captions together."""
        references, captions = {}, {}
        for number, entry in enumerate(_checked(pred_list)):
            references[number] = [{"caption": text} for text in entry["gt_answers"]]
            captions[number] = [{"caption": entry["pred_answer"]}]
        scores, _ = self.scorer.compute_score(
            self.tokenizer.tokenize(references), self.tokenizer.tokenize(captions)
        )
        return scores[3]


def edit_distance(first: str, second: str) -> int:
    """Return the Levenshtein distance of two texts."""
    row = list(range(len(second) + 1))
    for number, one in enumerate(first, 1):
        before, row[0] = row[0], number
        for place, other in enumerate(second, 1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (one != other))
    return row[-1]


def _mean(
    pred_list: Sequence[Entry],
    score: Callable[[str, list[str]], float],
    processor: Callable[[str], str] = str,
) -> float:
    """Return the mean score of processed predictions and reference answers."""
    return mean(
        float(score(processor(entry["pred_answer"]), [processor(text) for text in entry["gt_answers"]]))
        for entry in pred_list
    )


def _checked(pred_list: Iterable[Entry]) -> list[Entry]:
    """Return the entries, which may come from a generator. Raises ValueError if one lacks texts, or none."""
    if isinstance(pred_list, Mapping) or not isinstance(pred_list, Iterable):
        raise ValueError(f"pred_list: {type(pred_list).__name__}, expected a list of dicts.")
    pred_list = list(pred_list)
    if not pred_list:
        raise ValueError("pred_list: empty. Pass at least one prediction.")
    for number, entry in enumerate(pred_list):
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"pred_list[{number}]: {entry!r}, expected pred_answer and gt_answers in a dict."
            )
        text, references = entry.get("pred_answer"), entry.get("gt_answers")
        if not isinstance(text, str):
            raise ValueError(f"pred_list[{number}]: pred_answer is {text!r}, expected a text.")
        if not isinstance(references, list | tuple) or not references:
            raise ValueError(f"pred_list[{number}]: gt_answers is {references!r}, expected a list of texts.")
        if wrong := [one for one in references if not isinstance(one, str)]:
            raise ValueError(f"pred_list[{number}]: gt_answers contains {wrong[0]!r}, expected texts.")
    return pred_list
