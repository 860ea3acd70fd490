"""Evaluate a model of transformers at several budgets on ten benchmarks, with text-reading ones apart.

    python -m llava.eval.native --host qwen2_5_vl --model Qwen2.5-VL-7B-Instruct --data playground/data/eval

The settings are all tokens, 33, 20 and 10 % of each image's tokens, and 128, 64 and 32 tokens. Answers and
scores are those of `llava.eval.run`, in OUTPUT/BENCHMARK/SETTING, and the command is resumed by running it
again. It writes native.md, .csv and .html with the scores, and beside them the published ones of the same
family. Without --model, a tiny random model of the family is written and evaluated on 8 questions of each
bundled benchmark: a rehearsal of the command, whose scores mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava import argtypes
from llava.eval import cli
from llava.eval.jobs.host import HostPruning, host_class, host_pruning
from llava.eval.jobs.session import ModelError, Session, TooManyFailures
from llava.eval.store.atomic import write_atomically
from llava.eval.sweep import Failures, answer_task, find_benchmarks, read_tasks, score_task
from llava.eval.tables.native import native_tables
from llava.eval.tables.plots import html_page
from llava.table import csv_text

HOSTS = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
}
_NAMES = {
    "qwen2.5-vl": "qwen2_5_vl",
    "qwen3-vl": "qwen3_vl",
    "internvl3.5": "internvl",
    "internvl3_5": "internvl",
}
BENCHMARKS = "pope,vqav2_val,gqa,vizwiz_val,scienceqa,textvqa,mme,mmbench,mmbench_cn,mmvet"
SETTINGS = "all,33%,20%,10%,128,64,32"
_REHEARSAL, _SHORT = 8, 4  # questions per benchmark, tokens per answer
REHEARSED = "REHEARSAL with a tiny random model: these scores mean nothing"


def host(text: str) -> str:
    """Parse the name of a family, also as models are called: Qwen2.5-VL."""
    name = _NAMES.get(text.lower(), text.lower())
    if name not in HOSTS:
        raise argparse.ArgumentTypeError(f"{text!r}: unknown family. Choose from {', '.join(HOSTS)}")
    return name


def budget(text: str) -> str:
    """Check the text of a setting: all, a share such as 33%, or a number of tokens."""
    try:
        _arguments(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected all, a share such as 33% or tokens") from error
    return text


def _arguments(text: str) -> dict[str, Any]:
    """Return the arguments of `host_pruning` for a setting."""
    if text == "all":
        return {"tokens": "none"}
    if text.endswith("%"):
        return {"keep": argtypes.share(str(float(text[:-1]) / 100))}
    return {"tokens": argtypes.at_least(1)(text)}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of this command."""
    parser = cli.new_parser("native", __doc__)
    add = parser.add_argument
    add("--host", required=True, type=host, help=f"family: {', '.join(HOSTS)}")
    add("--model", help="checkpoint folder or Hugging Face name (default: a tiny random model, a rehearsal)")
    names = argtypes.comma_separated()
    add("--benchmarks", type=names, default=names(BENCHMARKS), help=f"(default: {BENCHMARKS})")
    settings = f"all, shares of each image's tokens and numbers of tokens (default: {SETTINGS})"
    several = argtypes.comma_separated(budget)
    add("--settings", type=several, default=several(SETTINGS), help=settings.replace("%", "%%"))
    add("--method", default="vispruner", help="pruning method (default: vispruner)")
    add("--ratio", type=argtypes.ratio, help="share selected by attention (default: 0.5)")
    cli.add_data_argument(parser)
    add("--limit", type=argtypes.at_least(1), metavar="N", help="evaluate only the first N questions of each")
    add("--max-new-tokens", type=argtypes.at_least(1), help="tokens per answer (default: the benchmark's)")
    cli.add_failure_arguments(parser)
    add("--output", type=Path, default=Path("outputs", "native"), help="(default: outputs/native)")
    add("--fixed", action="store_true", help="work around known bugs of the official scoring rules")
    cli.add_bootstrap_argument(parser)
    cli.add_model_arguments(parser)
    cli.add_inference_arguments(parser)
    parser.set_defaults(model_base=None)
    return parser


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    benchmarks = find_benchmarks(args, dict.fromkeys(args.benchmarks), parser)
    note, command = "", cli.command_of(parser, args)  # as given: a rehearsal is resumed as one
    if args.model is None:
        note, args.limit = REHEARSED, args.limit or _REHEARSAL
        args.max_new_tokens = args.max_new_tokens or _SHORT
        model: Path | str = _write_tiny(args.host, args.output.expanduser() / f"tiny-{args.host}")
        args.model = str(model)
        print(f"{note}. Set --model (CKPT_DIR, CKPT) to use your own.", flush=True)
    else:
        model = cli.model_folder(args, parser, hosts=True)
    if host_class(model) != HOSTS[args.host]:
        parser.error(
            f"--model {args.model}: expected a checkpoint of {HOSTS[args.host]}, got "
            f"{host_class(model) or 'another kind'}. Set --host or --model"
        )
    try:
        pruners = _pruners(args)
        job = cli.host_job(args, model, HOSTS[args.host])
    except ValueError as error:
        parser.error(str(error))
    failures = Failures()
    session = Session(job, 0, args.max_failures)
    output = args.output.expanduser() / job.name
    cards = []
    for task in read_tasks(args, benchmarks, failures):
        try:
            runs, _ = answer_task(output, session, task, pruners, failures, command)
            found = score_task(args, task, runs, failures)
        except (ModelError, TooManyFailures):
            raise
        except Exception as error:
            failures.note(task.title, error)
            continue
        if found is not None:
            cards += [one.card for one in found]
            cli.print_settings(task.benchmark, [one.card for one in found])
    order = {json.dumps(pruner.config()): place for place, pruner in enumerate(pruners)}
    cards.sort(key=lambda card: order.get(_key(card), len(order)))
    files = _write(native_tables(job.name, args.host, cards, note and f"{note}."), output) if cards else []
    cli.report_issues(failures, "failures", str(output))
    document = {"model": job.name, "host": args.host, "rehearsal": bool(note), "output": str(output)}
    document |= {"scores": [_entry(card) for card in cards], "files": files, "failures": failures}
    print(json.dumps(document))
    return 1 if failures or not cards else 0


def _pruners(args: argparse.Namespace) -> list[HostPruning]:
    """Return the settings, each once. Raises ValueError."""
    found = {}
    for text in args.settings:
        method = None if text == "all" else args.method
        one = _arguments(text)
        found[host_pruning(method, ratio=args.ratio, seed=args.seed, **one)] = None
    return list(found)


def _key(card: Any) -> str:
    """Return the settings of a scorecard as those of its pruner are written."""
    settings = {"method": card.method, "tokens": card.tokens, "important_ratio": card.important_ratio}
    settings |= {"keep": card.keep}
    return json.dumps({name: one for name, one in settings.items() if name == "tokens" or one is not None})


def _entry(card: Any) -> dict[str, Any]:
    names = (
        "benchmark",
        "score",
        "setting",
        "tokens",
        "keep",
        "visual_tokens",
        "ci_low",
        "ci_high",
        "answered",
    )
    return {name: getattr(card, name) for name in names}


def _write_tiny(name: str, folder: Path) -> Path:
    from llava.integrations.tiny_folder import write_tiny_host

    return write_tiny_host(name, folder)


def _write(tables: Sequence[Any], folder: Path) -> list[str]:
    """Print the tables and write them; return the names of the files."""
    for table in tables:
        print("\n" + table.text())
    texts = {
        "native.md": "\n".join(table.markdown() for table in tables),
        "native.csv": csv_text(
            tables[0].header, [[cell.text for cell in row.cells] for row in tables[0].rows]
        ),
        "native.html": html_page("Budgets of a model of transformers", [table.html() for table in tables]),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return [str(folder / name) for name in texts]


if __name__ == "__main__":
    sys.exit(main())
