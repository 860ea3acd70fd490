"""Grade open answers with a language model, through any OpenAI-compatible endpoint.

    python -m llava.eval.judge --benchmark mmvet --data playground/data/eval/mm-vet --answers answers.jsonl \\
        --model gpt-4-0613 --base-url http://localhost:8000/v1

For MM-Vet and the video sets. Each reply is written before the next question is sent, so rerunning the
command resumes it and asks nothing twice. Results are stored next to the answers under the name that `python
-m llava.eval.score` looks for, together with the judge and the instruction. Grades of two judges or two
instructions are not comparable: stored grades of another judge are refused, and need another --output.

The key is read from OPENAI_API_KEY, the endpoint from OPENAI_BASE_URL; local servers need no key. One POST
request with retries is all that is needed of the API, so it is sent with urllib instead of adding the
`openai` package to the dependencies.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.argtypes import at_least
from llava.eval.benchmarks import DataError, get_benchmark
from llava.eval.benchmarks.judging import Judge
from llava.eval.cli import guarded
from llava.eval.score import answer_parser, print_score
from llava.eval.store.atomic import write_atomically

JUDGED = ("mmvet", "tgif", "msvd", "msrvtt", "activitynet")
_TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}


class EndpointError(DataError):
    """The endpoint rejects a request, or does not answer."""


@dataclass
class Endpoint:
    """A chat endpoint. `seconds` is the delay after the first failure; it doubles with each further one."""

    base_url: str
    model: str
    key: str | None = None
    attempts: int = 6
    seconds: float = 1.0
    timeout: float = 120.0

    def ask(
        self, messages: list[dict[str, str]], temperature: float | None, max_tokens: int | None
    ) -> tuple[str, str]:
        """Return (reply, model that replied). None keeps the endpoint's default. Raises EndpointError."""
        body: dict[str, Any] = {"model": self.model, "messages": messages}
        if temperature is not None:
            body["temperature"] = temperature
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        address = self.base_url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        for attempt in range(self.attempts):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    document = json.loads(response.read())
                reply = document["choices"][0]["message"]["content"]
                return reply or "", str(document.get("model", self.model))
            except urllib.error.HTTPError as error:
                reason = f"{error.code}: {error.read(500).decode(errors='replace')}"
                if error.code not in _TRANSIENT:
                    raise EndpointError(f"{address}: request rejected ({reason})") from error
            except (OSError, http.client.HTTPException) as error:
                reason = str(error)
            except (ValueError, LookupError, TypeError) as error:
                raise EndpointError(f"{address}: reply is not an OpenAI chat completion ({error})") from error
            if attempt + 1 < self.attempts:
                time.sleep(self.seconds * 2**attempt)
        raise EndpointError(
            f"{address}: no answer after {self.attempts} attempts ({reason}). Finished grades are kept; run "
            "the same command again to resume."
        )


def build_parser() -> argparse.ArgumentParser:
    parser = answer_parser("judge", __doc__, JUDGED)
    add = parser.add_argument
    add("--data", required=True, type=Path, help="folder of the benchmark")
    add("--model", help="judge model (default: gpt-4-0613 for mmvet, else gpt-3.5-turbo)")
    add(
        "--base-url",
        default=os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1"),
        help="endpoint (default: OPENAI_BASE_URL, else https://api.openai.com/v1)",
    )
    add("--runs", type=at_least(1), default=1, help="grades per answer, mmvet only (default: 1)")
    add(
        "--prompt",
        type=Path,
        help="file with another instruction to the judge; for the video sets it contains {question}, "
        "{answer} and {prediction}; other braces are sent unchanged (default: the built-in one)",
    )
    add(
        "--output",
        type=Path,
        help="file (mmvet) or folder (video sets) of the grades; an existing one that does not record its "
        "judge is continued (default: next to the answers)",
    )
    add("--limit", type=at_least(1), help="grade only the first LIMIT answers (default: all)")
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    benchmark: Any = get_benchmark(args.benchmark)
    data, answers = benchmark.locate(args.data.expanduser()), benchmark.read_ungraded(args.answers)
    if any("text" not in row for row in answers):
        raise DataError(f"{args.answers}: contains grades without answers. Pass the answer file.")
    prompt = args.prompt.read_text(encoding="utf-8") if args.prompt else None
    if prompt is not None:
        benchmark.check_prompt(args.prompt, prompt)
    model = args.model or benchmark.judge_model
    endpoint = Endpoint(args.base_url, model, os.environ.get("OPENAI_API_KEY"))
    judge = Judge(model, endpoint.ask, prompt)
    output = args.output or benchmark.grades_path(args.answers, model, args.runs)
    adopt = args.output is not None  # naming existing grades of an unknown judge means to continue them
    asked = answers[: args.limit]
    print(f"{benchmark.title}: {len(asked)} answers, judged by {model} at {args.base_url}", flush=True)
    graded: set[str] = set()
    for step in benchmark.grade(data, asked, judge, output, args.runs, adopt):
        if step.content is not None:
            step.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(step.path, step.content)
        if step.answer not in graded and (len(graded) + 1) % 50 == 0:
            print(f"{len(graded) + 1} of {len(asked)}", flush=True)
        graded.add(step.answer)
    missing = len({benchmark.key(row) for row in asked}) - len(graded)
    if missing:
        print(f"{missing} answers have no readable reply; run the command again to retry", file=sys.stderr)
    score = benchmark.score(data, benchmark.with_grades(answers, output) if graded else answers)
    print_score(score)
    judged_by = score.details.get("judge") or model
    print(json.dumps({**score.document(), "judge": judged_by, "replies": str(output), "missing": missing}))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
