"""Draw a figure of the paper for a model and data.

    python -m llava.analysis.figures fig1 --tokens 32             # what every method keeps, and its answer
    python -m llava.analysis.figures fig2                         # attention shift
    python -m llava.analysis.figures fig3 --model checkpoints/llava-v1.5-7b --data playground/data/eval
    python -m llava.analysis.figures fig4                         # how VisPruner chooses
    python -m llava.analysis.figures fig5                         # its components

Without --model or --data the bundled ones are used. Writes PNG, SVG, the caption and the data as CSV to
OUTPUT/FIGURE; the last line of standard output is one JSON document. `fig1 --help` describes one figure.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava import argtypes
from llava.analysis.attention import collect
from llava.analysis.figures import drawing, fig2, fig3
from llava.analysis.figures.scores import BENCHMARKS, evaluate, read_tasks
from llava.analysis.questions import read_question_file
from llava.eval import cli
from llava.eval.benchmarks import DataIssue, benchmark_name, get_benchmark, list_benchmarks
from llava.eval.jobs.job import Task, common_anyres, read_task
from llava.eval.jobs.session import Session
from llava.mm_utils import is_anyres
from llava.model.checkpoint.config import stored_config
from llava.pruning import get_pruner, list_pruners

SAMPLES = 1000  # of the paper's analysis
_BUNDLED_LIMIT = 200  # questions per benchmark, which take minutes
_CACHE = 2 << 30  # bytes for encoded images that several benchmarks show


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser("figures", __doc__)
    parser.prog = "python -m llava.analysis.figures"
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    form = argparse.RawDescriptionHelpFormatter
    for name, (title, about, add_arguments) in _FIGURES.items():
        one = figures.add_parser(name, help=title, description=f"{title}.\n\n{about}", formatter_class=form)
        add_arguments(one)
        cli.add_source_arguments(one)
        output = "folder to write to (default: outputs/figures)"
        one.add_argument(
            "--output", type=cli.path_argument, default=Path("outputs", "figures"), metavar="DIR", help=output
        )
        if name == "fig5":
            cli.add_bootstrap_argument(one)
        cli.add_model_arguments(one)
        cli.add_inference_arguments(one)
        one.set_defaults(parser=one)
    return parser


def _add_questions(parser: argparse.ArgumentParser, what: str) -> None:
    add = parser.add_argument
    add("--question-file", type=cli.path_argument, help=f"questions to {what} (default: those of POPE)")
    text = "folder of the images that --question-file names (default: .)"
    add("--image-folder", type=cli.user_path, default=Path("."), help=text)


def _add_attention(parser: argparse.ArgumentParser) -> None:
    _add_questions(parser, "analyze")
    limit = f"analyze only the first N questions (default: that of --limit, at most {SAMPLES})"
    parser.add_argument("--num-questions", type=argtypes.at_least(1), metavar="N", help=limit)
    known = f"comma-separated, of the panel about scores, or none (default: {','.join(BENCHMARKS)})"
    parser.add_argument("--benchmarks", type=_benchmarks, default=list(BENCHMARKS), help=known)


def _add_examples(parser: argparse.ArgumentParser) -> None:
    _add_questions(parser, "show")
    budget = "visual tokens to keep per crop (default: 64)"
    parser.add_argument("--tokens", type=argtypes.at_least(0), default=64, metavar="N", help=budget)
    known = [name for name in list_pruners() if name != "none"]
    methods = f"comma-separated (default: all, {','.join(known)})"
    parser.add_argument("--methods", type=_methods, default=_methods(",".join(known)), help=methods)


def _add_selection(parser: argparse.ArgumentParser) -> None:
    _add_questions(parser, "take images from")
    budget = "visual tokens to keep per crop (default: 64)"
    parser.add_argument("--tokens", type=argtypes.at_least(1), default=64, metavar="N", help=budget)
    share = "share of tokens kept for their attention, in [0, 1] (default: 0.5)"
    parser.add_argument("--ratio", type=argtypes.ratio, default=0.5, help=share)


def _add_components(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    known = f"comma-separated (default: those of the ablation); choose from {', '.join(list_benchmarks())}"
    add("--benchmarks", type=_benchmarks, help=known)
    budgets = "comma-separated visual tokens to keep per crop (default: 64,32)"
    add("--tokens", type=argtypes.comma_separated(argtypes.at_least(1)), default=[64, 32], help=budgets)
    where = "folder of the ablation, whose answers are used (default: outputs/ablation)"
    add("--ablation", type=cli.path_argument, default=Path("outputs", "ablation"), metavar="DIR", help=where)
    add("--fixed", action="store_true", help="work around known bugs of the official scoring rules")


_OF_ATTENTION = """Panels about attention show the first N questions of POPE, or of --question-file: LLaVA's
training format (of which the first turn is asked) or a question file. The model is unpruned. Samples are kept
on disk, so that a run resumes after any interruption and both figures read each sample once. Panels about
scores evaluate the model on benchmarks with visual tokens removed inside the decoder. The paper's curves are
dashed. With bundled data and without --limit, the first 200 questions of each benchmark are used."""
_FIGURES = {  # title, description and arguments of every figure
    "fig1": (
        "What every method keeps of an image, and its answer",
        "Of all questions about an image, the first one on which the methods differ is shown. Images: the\n"
        "first one of POPE and the bundled photograph, or the first two of --question-file. In LLaVA's\n"
        "training format, the reply in the file is the truth.",
        _add_examples,
    ),
    "fig2": ("Attention shift", _OF_ATTENTION, _add_attention),
    "fig3": ("Attention dispersion", _OF_ATTENTION, _add_attention),
    "fig4": (
        "How VisPruner chooses: attention, important tokens, rounds, kept tokens",
        "Images: the first one of POPE and the bundled photograph, or the first two of --question-file.",
        _add_selection,
    ),
    "fig5": (
        "Components: random, important or diverse tokens, or both",
        'Scores of the ablation "components" (scripts/ablation/components.sh), which is run or resumed.',
        _add_components,
    ),
}


def _methods(text: str) -> list[str]:
    names = list(dict.fromkeys(argtypes.comma_separated()(text)))
    known = [name for name in list_pruners() if name != "none"]
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r}: no such method. Choose from {', '.join(known)}")
    if not names:
        raise argparse.ArgumentTypeError("no method. Name at least one")
    if set(names) == set(known):  # related methods side by side, and those inside the decoder last
        names.sort(key=lambda name: (get_pruner(name).acts_in == "decoder", name))
    return names


def _benchmarks(text: str) -> list[str]:
    names = argtypes.comma_separated(benchmark_name)(text)
    if names == ["none"]:
        return []
    for name in names:
        if name not in list_benchmarks():
            known = ", ".join(list_benchmarks())
            raise argparse.ArgumentTypeError(f"{name!r}: no such benchmark. Choose from {known}, or none")
    return list(dict.fromkeys(names))


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    drawing.check_matplotlib()
    run = {"fig1": _of_images, "fig4": _of_images, "fig5": _of_components}.get(args.figure, _of_attention)
    document, code = run(args, args.parser)
    print(f"{args.figure}: {document['caption']}")
    print(json.dumps(document))
    return code


def _session(
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    data_used: bool,
    tasks: Sequence[Task],
    several: bool,
) -> tuple[Session, dict[str, Any]]:
    """Return the session of the arguments, without a loaded model, and its config.json."""
    cli.announce_bundled(args.model is None, args.data is None and data_used)
    model = cli.model_folder(args, parser)
    try:
        config = stored_config(model, args.model_base)
        job = cli.job_of(args, model, config, common_anyres(config, args.anyres, args.preset))
    except ValueError as error:
        parser.error(str(error))
    cli.print_warnings([*(warning for one in tasks for warning in one.warnings), *job.warnings])
    return Session(job, _CACHE if several else 0, args.max_failures), config


def _of_images(args: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[dict[str, Any], int]:
    """Draw figure 1 or 4."""
    from llava.analysis.figures import fig1, fig4

    if args.figure == "fig1":
        try:
            for name in args.methods:
                get_pruner(name, args.tokens)
        except ValueError as error:
            parser.error(str(error))
    found = fig1.read_examples(args)
    session, _ = _session(args, parser, args.question_file is None, [task for task, _ in found], True)
    document = {"fig1": fig1.run, "fig4": fig4.run}[args.figure](args, session, found)
    issues = [issue for task, _ in found for issue in task.issues]
    cli.report_issues(issues, "entries are not questions about an image")
    return document | {"failures": [str(issue) for issue in issues]}, 1 if issues else 0


def _of_components(args: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[dict[str, Any], int]:
    """Draw figure 5."""
    if args.benchmarks == [] or not args.tokens:
        parser.error("nothing to draw: --tokens and --benchmarks must each name at least one")
    from llava.analysis.figures import fig5

    command = cli.command_of(parser, args, but=["ablation", "output"])[1:]
    return fig5.run(args, [*command, "--output", str(args.ablation)], cli.is_bundled(args.model))


def _of_attention(args: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[dict[str, Any], int]:
    """Draw figure 2 or 3."""
    if args.num_questions is None:
        args.num_questions = min(SAMPLES, args.limit or SAMPLES)
    if args.limit is None and args.data is None:
        args.limit = _BUNDLED_LIMIT
    needs_data = args.question_file is None or bool(args.benchmarks)
    task, tasks = read_samples(args), read_tasks(args)
    session, config = _session(args, parser, needs_data, [task, *tasks], len(tasks) > 1)
    found = collect(session, task, args.output / "samples")
    statistics = found.statistics
    crops = 5 if is_anyres(config.get("image_aspect_ratio")) else 1
    settings = {
        "fig2": lambda: fig2.pruners(statistics.layers, first=int(crops > 1)),
        "fig3": lambda: fig3.pruners(statistics.layers, statistics.tokens // crops, args.seed),
    }
    folder, name = args.output / "runs" / session.job.name, session.job.name
    # What repeats the command; the figure is not an argument of its own parser
    command = ["llava.analysis.figures", args.figure, *cli.command_of(parser, args)[1:]]
    issues = list(found.issues)
    scores = evaluate(session, tasks, settings[args.figure](), folder, command, issues) if tasks else []
    source = task.title if args.question_file is None else args.question_file.name
    about = [
        f"{name}: {statistics.samples:,} questions of {source}, {statistics.tokens} visual tokens, "
        f"{statistics.layers} decoder layers, unpruned."
    ]
    files, caption = {"fig2": fig2.draw, "fig3": fig3.draw}[args.figure](
        statistics, scores, about, args.output / args.figure
    )
    cli.report_issues(issues, "questions have no sample or no answer")
    document = {
        "figure": args.figure,
        "model": name,
        "questions": str(args.question_file or task.title),
        "samples": statistics.samples,
        "computed": found.read,
        "layers": statistics.layers,
        "visual_tokens": statistics.tokens,
        "benchmarks": {one.benchmark.name: len(one.asked) for one in tasks},
        "files": files,
        "caption": caption,
        "failures": [str(issue) for issue in issues],
    }
    return document, 1 if issues else 0


def read_samples(args: argparse.Namespace) -> Task:
    """Return the questions to analyze. Raises DataError."""
    if args.question_file is None:
        return read_task(get_benchmark("pope"), args.data, args.num_questions)
    issues: list[DataIssue] = []
    questions = read_question_file(args.question_file, args.image_folder, issues, args.allow_outside_images)
    return Task(questions, issues, limit=args.num_questions)


if __name__ == "__main__":
    sys.exit(main())
