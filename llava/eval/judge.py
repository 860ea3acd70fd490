"""Grade open answers with a language model, through any OpenAI-compatible endpoint.

    python -m llava.eval.judge --benchmark mmvet --data playground/data/eval/mm-vet --answers answers.jsonl \\
        --model gpt-4-0613 --base-url http://localhost:8000/v1

For MM-Vet and the video sets. Each reply is stored, with the judge and the instruction, before the next
question is sent, so rerunning the command resumes it. `python -m llava.eval.score` finds the grades next to
the answers. Grades of two judges or two instructions are not comparable: stored grades of another judge are
refused, and need another --output. The key is read from OPENAI_API_KEY; local servers need none.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.argtypes import at_least
from llava.endpoint import EndpointError, JsonEndpoint
from llava.eval import cli
from llava.eval.benchmarks import DataError, get_benchmark
from llava.eval.benchmarks.files import read_text
from llava.eval.benchmarks.joining import check_not_empty
from llava.eval.benchmarks.judging import Judge
from llava.eval.score import print_score
from llava.eval.store.atomic import write_atomically

JUDGED = ("mmvet", "tgif", "msvd", "msrvtt", "activitynet")


@dataclass
class Endpoint:
    """A chat endpoint. `seconds` is the delay after the first failure; it doubles with each further one."""

    base_url: str
    model: str
    key: str | None = None
    attempts: int = 6
    seconds: float = 1.0

    def ask(
        self, messages: list[dict[str, str]], temperature: float | None, max_tokens: int | None
    ) -> tuple[str, str]:
        """Return (reply, model that replied). None keeps the endpoint's default. Raises DataError."""
        body = {"model": self.model, "messages": messages}
        options = {"temperature": temperature, "max_tokens": max_tokens}
        body |= {name: value for name, value in options.items() if value is not None}
        endpoint = JsonEndpoint(self.base_url, self.key, self.attempts, self.seconds)
        try:
            document = endpoint.request("/chat/completions", body)
        except EndpointError as error:
            kept = "" if error.status else " Finished grades are kept; run the same command again to resume."
            raise DataError(f"{error}{kept}") from error
        try:
            reply = document["choices"][0]["message"]["content"]
            if not isinstance(reply, str | None):
                raise TypeError(f"content is a {type(reply).__name__}")
            return reply or "", str(document.get("model", self.model))
        except (LookupError, TypeError, AttributeError) as error:
            raise DataError(f"{self.base_url}: reply is not an OpenAI chat completion ({error})") from error


def build_parser() -> argparse.ArgumentParser:
    parser = cli.answer_parser("judge", __doc__, JUDGED)
    add = parser.add_argument
    add("--model", help="judge model (default: gpt-4-0613 for mmvet, else gpt-3.5-turbo)")
    address = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1")
    note = "endpoint (default: OPENAI_BASE_URL, else https://api.openai.com/v1)"
    add("--base-url", default=address, help=note)
    add("--runs", type=at_least(1), default=1, help="grades per answer, mmvet only (default: 1)")
    note = (
        "file with another instruction to the judge; for the video sets it contains {question}, {answer} and "
        "{prediction}; other braces are sent unchanged (default: the built-in one)"
    )
    add("--prompt", type=Path, help=note)
    note = (
        "file (mmvet) or folder (video sets) of the grades; an existing one that does not record its judge "
        "is continued (default: next to the answers)"
    )
    add("--output", type=Path, help=note)
    add("--limit", type=at_least(1), help="grade only the first LIMIT answers (default: all)")
    return parser


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    benchmark: Any = get_benchmark(args.benchmark)
    data, (answers, _) = benchmark.locate(args.data), benchmark.read_ungraded(args.answers)
    if any("text" not in row for row in answers):
        raise DataError(f"{args.answers}: contains grades without answers. Pass the answer file.")
    check_not_empty(args.answers, answers)
    prompt = read_text(args.prompt) if args.prompt else None
    absent = [name for name in benchmark.placeholders if prompt is not None and name not in prompt]
    if absent:
        raise DataError(
            f"{args.prompt}: missing placeholder {', '.join(absent)}. The judge would not see that part. Add "
            "it to the instruction; other braces are sent unchanged."
        )
    model, asked = args.model or benchmark.judge_model, answers[: args.limit]
    judge = Judge(model, Endpoint(args.base_url, model, os.environ.get("OPENAI_API_KEY")).ask, prompt)
    name = benchmark.grades_name.format(answers=args.answers.stem, judge=judge.file_name(), runs=args.runs)
    output = args.output or args.answers.with_name(name)
    adopt = args.output is not None  # naming existing grades of an unknown judge means to continue them
    print(f"{benchmark.title}: {len(asked)} answers, judged by {model} at {args.base_url}", flush=True)
    steps = benchmark.grade(data, asked, judge, output, args.runs, adopt)
    for number, (path, content) in enumerate(steps, 1):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
        if number % 50 == 0:
            print(f"{number} new grades", flush=True)
    rows = benchmark.with_grades(answers, output) if output.exists() else answers
    missing = sum("grades" not in row for row in rows[: args.limit])
    if missing:
        print(f"{missing} answers have no readable reply; run the command again to retry", file=sys.stderr)
    score = benchmark.score(data, rows)
    print_score(score.document())
    document = {**score.document(), "judge": score.details.get("judge") or model}
    print(json.dumps({**document, "replies": str(output), "missing": missing}))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
