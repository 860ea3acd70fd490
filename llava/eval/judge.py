"""Let a language model judge open answers, through any OpenAI-compatible endpoint.

    python -m llava.eval.judge --benchmark mmvet --data playground/data/eval/mm-vet --answers answers.jsonl \\
        --model gpt-4-0613 --base-url http://localhost:8000/v1

For MM-Vet and the video sets. Every reply is on the disk before the next question is asked: stopped at any
instant, the same command goes on and asks nothing twice. The result lands beside the answers under the name
that `python -m llava.eval.score` looks for, and the score is printed when nothing is missing. The key is read
from the environment (OPENAI_API_KEY), the endpoint too (OPENAI_BASE_URL); local servers need no key. Judges
differ: numbers of two judges, or of two prompts, are not comparable.
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
from llava.eval.benchmarks import DataError, benchmark_name, get_benchmark
from llava.eval.cli import guarded
from llava.eval.score import print_score

JUDGED = ("mmvet", "tgif", "msvd", "msrvtt", "activitynet")
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}


class EndpointError(DataError):
    """The endpoint refuses, or does not answer."""


@dataclass
class Endpoint:
    """A chat endpoint. `seconds` is the wait after the first failure; it doubles with every further one."""

    base_url: str
    model: str
    key: str | None = None
    attempts: int = 6
    seconds: float = 1.0
    timeout: float = 120.0

    def ask(
        self, messages: list[dict[str, str]], temperature: float | None, max_tokens: int | None
    ) -> tuple[str, str]:
        """(reply, model that gave it). None leaves a setting to the endpoint. Raises EndpointError."""
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
                if error.code not in _PASSING:
                    raise EndpointError(f"{address} refuses ({reason})") from error
            except (OSError, http.client.HTTPException) as error:
                reason = str(error)
            except (ValueError, LookupError, TypeError) as error:
                raise EndpointError(f"{address}: the reply is no OpenAI chat completion ({error})") from error
            if attempt + 1 < self.attempts:
                time.sleep(self.seconds * 2**attempt)
        raise EndpointError(
            f"{address} does not answer ({reason}); what was judged so far is kept, start again to go on"
        )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.judge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--benchmark", required=True, type=benchmark_name, choices=JUDGED)
    parser.add_argument("--data", required=True, type=Path, help="the benchmark's own folder")
    parser.add_argument("--answers", required=True, type=Path, help="answer file")
    parser.add_argument("--model", help="default gpt-4-0613 for MM-Vet, gpt-3.5-turbo for the video sets")
    parser.add_argument("--base-url", default=os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1"))
    parser.add_argument("--runs", type=at_least(1), default=1, help="grades per answer (MM-Vet)")
    parser.add_argument("--prompt", type=Path, help="file with another instruction to the judge")
    parser.add_argument("--output", type=Path, help="default: beside the answers")
    parser.add_argument("--limit", type=at_least(1), help="only the first so many answers")
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    benchmark: Any = get_benchmark(args.benchmark)
    data, answers = benchmark.locate(args.data.expanduser()), benchmark.read_answers(args.answers)
    lacking = [row for row in answers if "text" not in row]
    if lacking:
        raise DataError(f"{args.answers}: holds no answers but grades; give the answers")
    model = args.model or ("gpt-4-0613" if args.benchmark == "mmvet" else "gpt-3.5-turbo")
    stem = args.answers.stem
    if args.benchmark == "mmvet":
        name = f"{stem}_{model.replace('/', '-').replace('_', '-')}-grade-{args.runs}runs.json"
    else:
        name = f"{stem}_judged"
    output = args.output or args.answers.with_name(name)
    prompt = args.prompt.read_text(encoding="utf-8") if args.prompt else None
    asked = answers[: args.limit]
    endpoint = Endpoint(args.base_url, model, os.environ.get("OPENAI_API_KEY"))
    done = 0
    print(f"{benchmark.title}: {len(asked)} answers, judged by {model} at {args.base_url}", flush=True)
    for done, _ in enumerate(benchmark.grade(data, asked, endpoint.ask, output, args.runs, prompt), 1):
        if done % 50 == 0:
            print(f"{done} of {len(asked)}", flush=True)
    missing = len(asked) - done
    if missing:
        print(
            f"{missing} answers could not be judged: the replies cannot be read; start again to ask anew",
            file=sys.stderr,
        )
    judged = benchmark.read_answers(args.answers if args.output is None else output)
    score = benchmark.score(data, judged)
    print_score(score)
    print(json.dumps({**score.document(), "judge": model, "replies": str(output), "missing": missing}))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
