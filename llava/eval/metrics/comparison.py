"""Paired comparison of two answer files to the same questions.

    found = compare(get_benchmark("pope"), folder, rows_a, rows_b)
    found.difference.ci_low, found.p_value

The interval is a paired bootstrap over images. The exact test is McNemar's, or the sign test where question
scores are graded; it takes questions as independent.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.eval.benchmarks import Benchmark, DataError, QuestionScore
from llava.eval.metrics.statistics import Difference, paired_bootstrap


@dataclass(frozen=True)
class Comparison:
    """Two answer files to the same questions; scores in the benchmark's unit, question scores in [0, 1]."""

    score_a: float
    score_b: float
    difference: Difference
    pairs: list[tuple[QuestionScore, QuestionScore]]  # of every question

    @property
    def better_a(self) -> list[tuple[QuestionScore, QuestionScore]]:
        return [pair for pair in self.pairs if pair[0].value > pair[1].value]

    @property
    def better_b(self) -> list[tuple[QuestionScore, QuestionScore]]:
        return [pair for pair in self.pairs if pair[1].value > pair[0].value]

    @property
    def ties(self) -> int:
        """Return the number of questions that both answer equally well."""
        return len(self.pairs) - len(self.better_a) - len(self.better_b)

    @property
    def binary(self) -> bool:
        """Return True if every answer is right or wrong; the test is then McNemar's."""
        return all(mark.value in (0, 1) for pair in self.pairs for mark in pair)

    @property
    def p_value(self) -> float:
        """Return the two-sided exact p-value."""
        return exact_test(len(self.better_a), len(self.better_b))


def exact_test(a: int, b: int) -> float:
    """Return the two-sided exact binomial p-value of `a` against `b` discordant pairs.

    2 x P(X <= min(a, b)), X ~ Binomial(a + b, 1/2), at most 1; 1.0 without discordant pairs. Computed in
    integers until one division, so that no number of pairs is too large.

    Raises:
        ValueError: A count is negative.
    """
    if a < 0 or b < 0:
        raise ValueError(f"counts of pairs must not be negative: {a}, {b}")
    number, tail, term = a + b, 0, 1
    for successes in range(min(a, b) + 1):  # term = comb(number, successes), each from the one before
        tail += term
        term = term * (number - successes) // (successes + 1)
    return min(1.0, 2 * tail / 2**number)


def compare(
    benchmark: Benchmark,
    data: Path,
    a: list[dict[str, Any]],
    b: list[dict[str, Any]],
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare answers `a` and `b` (rows of `Benchmark.read_answers`) question by question.

    Raises:
        DataError: They are not about the same questions and images.
    """
    _same(
        {str(row["question_id"]) for row in a if "question_id" in row},  # 1 and "1" are one question
        {str(row["question_id"]) for row in b if "question_id" in row},
        "question_id",
    )
    scores_a, scores_b = (
        {mark.key: mark for mark in benchmark.question_scores(data, rows)} for rows in (a, b)
    )
    _same(set(scores_a), set(scores_b), "question")
    if not scores_a:
        raise DataError(f"{benchmark.title}: no answer matches the ground truth in {data}")
    counts_a, counts_b = benchmark.per_image_counts(data, a), benchmark.per_image_counts(data, b)
    try:
        difference = paired_bootstrap(counts_a, counts_b, benchmark.score_counts, resamples, seed)
    except ValueError as error:
        raise DataError(str(error)) from error
    whole_a, whole_b = (float(benchmark.score_counts(one.counts.sum(0))) for one in (counts_a, counts_b))
    return Comparison(whole_a, whole_b, difference, [(mark, scores_b[key]) for key, mark in scores_a.items()])


def _same(a: set[Any], b: set[Any], what: str) -> None:
    if a == b:
        return
    only_a, only_b = (sorted(rest, key=str) for rest in (a - b, b - a))
    example = (only_a or only_b)[0]
    raise DataError(
        f"A and B answer different questions: {len(only_a)} only in A, {len(only_b)} only in B, {len(a & b)} "
        f"in both, e.g. {what} {example!r} only in {'A' if only_a else 'B'}. A paired test needs answers to "
        "the same questions. Finish both runs, or run both with the same --limit"
    )


def other_prompts(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> int:
    """Count the (question_id, prompt) pairs of A that are not in B: another prompt, or another release."""
    pairs_a, pairs_b = (
        {(str(row.get("question_id")), row["prompt"]) for row in rows if "prompt" in row} for rows in (a, b)
    )
    return len(pairs_a - pairs_b) if pairs_a and pairs_b else 0
