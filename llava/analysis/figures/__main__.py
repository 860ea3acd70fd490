"""Draw Figure 2 (attention shift) or 3 (attention dispersion) of the paper for a model and a question file.

    python -m llava.analysis.figures fig2
    python -m llava.analysis.figures fig3 --model checkpoints/llava-v1.5-7b --data playground/data/eval
    python -m llava.analysis.figures fig3 --model ... --question-file mix.json --image-folder images

Panels about attention show the first N questions of POPE, or of a question file: LLaVA's training format (of
which the first turn is asked) or a question file. The model is unpruned. Samples are kept on disk, so that a
run resumes after any interruption and both figures read each sample once. Panels about scores evaluate the
model on benchmarks with visual tokens removed inside the decoder. The paper's curves are dashed. Without
--model or --data the bundled ones are used, and without --limit the first 200 questions of each bundled
benchmark. Writes PNG, SVG and the data as CSV to OUTPUT/FIGURE; the last line of standard output is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from llava import argtypes
from llava.analysis.attention import AttentionStatistics, collect
from llava.analysis.figures import drawing, fig2, fig3
from llava.analysis.figures.scores import BENCHMARKS, MEAN, PanelScore, evaluate, read_tasks
from llava.analysis.questions import read_question_file
from llava.eval import cli
from llava.eval.benchmarks import DataIssue, benchmark_name, get_benchmark, list_benchmarks
from llava.eval.jobs.job import Task, common_anyres, read_task
from llava.eval.jobs.session import Session
from llava.mm_utils import is_anyres
from llava.model.checkpoint.config import stored_config

SAMPLES = 1000  # of the paper's analysis
_BUNDLED_LIMIT = 200  # questions per benchmark, which take minutes
_CACHE = 2 << 30  # bytes for encoded images that several benchmarks show


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser("figures", __doc__)
    parser.prog = "python -m llava.analysis.figures"
    add = parser.add_argument
    add("figure", choices=("fig2", "fig3"), help="fig2: attention shift; fig3: attention dispersion")
    add("--question-file", type=cli.path_argument, help="questions to analyze (default: those of POPE)")
    add("--image-folder", type=cli.user_path, default=Path("."), help="of their images (default: .)")
    limit = f"analyze only the first N questions (default: that of --limit, at most {SAMPLES})"
    add("--num-questions", type=argtypes.at_least(1), metavar="N", help=limit)
    known = f"comma-separated, of the panel about scores, or none (default: {','.join(BENCHMARKS)})"
    add("--benchmarks", type=_benchmarks, default=list(BENCHMARKS), help=known)
    cli.add_source_arguments(parser)
    output = "folder to write to (default: outputs/figures)"
    add("--output", type=cli.path_argument, default=Path("outputs", "figures"), metavar="DIR", help=output)
    cli.add_model_arguments(parser)
    cli.add_inference_arguments(parser)
    return parser


def _benchmarks(text: str) -> list[str]:
    names = [benchmark_name(part.strip()) for part in text.split(",") if part.strip()]
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
    if args.num_questions is None:
        args.num_questions = min(SAMPLES, args.limit or SAMPLES)
    if args.limit is None and args.data is None:
        args.limit = _BUNDLED_LIMIT
    needs_data = args.question_file is None or bool(args.benchmarks)
    cli.announce_bundled(args.model is None, args.data is None and needs_data)
    model = cli.model_folder(args, parser)
    task, tasks = read_samples(args), read_tasks(args)
    try:
        config = stored_config(model, args.model_base)
        job = cli.job_of(args, model, config, common_anyres(config, args.anyres, args.preset))
    except ValueError as error:
        parser.error(str(error))
    cli.print_warnings(
        [*task.warnings, *(warning for one in tasks for warning in one.warnings), *job.warnings]
    )
    session = Session(job, _CACHE if len(tasks) > 1 else 0, args.max_failures)
    found = collect(session, task, args.output / "samples")
    statistics = found.statistics
    crops = 5 if is_anyres(config.get("image_aspect_ratio")) else 1
    settings = {
        "fig2": lambda: fig2.pruners(statistics.layers, first=int(crops > 1)),
        "fig3": lambda: fig3.pruners(statistics.layers, statistics.tokens // crops, args.seed),
    }
    command = cli.command_of(parser, args, but=["figure"])
    command.insert(1, args.figure)
    folder = args.output / "runs" / job.name
    issues = list(found.issues)
    scores = evaluate(session, tasks, settings[args.figure](), folder, command, issues) if tasks else []
    source = task.title if args.question_file is None else args.question_file.name
    about = [
        f"{job.name}: {statistics.samples:,} questions of {source}, {statistics.tokens} visual tokens, "
        f"{statistics.layers} decoder layers, unpruned."
    ]
    draw = {"fig2": draw_fig2, "fig3": draw_fig3}[args.figure]
    files, caption = draw(statistics, scores, about, args.output / args.figure)
    cli.report_issues(issues, "questions have no sample or no answer")
    print(f"{args.figure}: {caption}")
    document = {
        "figure": args.figure,
        "model": job.name,
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
    print(json.dumps(document))
    return 1 if issues else 0


def read_samples(args: argparse.Namespace) -> Task:
    """Return the questions to analyze. Raises DataError."""
    if args.question_file is None:
        return read_task(get_benchmark("pope"), args.data, args.num_questions)
    issues: list[DataIssue] = []
    questions = read_question_file(args.question_file, args.image_folder, issues, args.allow_outside_images)
    return Task(questions, issues, limit=args.num_questions)


def draw_fig2(
    statistics: AttentionStatistics, scores: list[PanelScore], about: list[str], folder: Path
) -> tuple[list[str], str]:
    """Draw and write Figure 2; return its files and its caption."""
    depth = statistics.layers
    layer = fig2.shown_layer(depth)
    seen = statistics.means["last"].sum(1)[layer]
    text = [
        *about,
        f"(a) Layer {layer} (from 0), where the last prompt token gives {100 * seen:.2g} % of its attention "
        "to the image. Above: share of samples in which a token is in the top quarter (means of neighbors; "
        "dotted: evenly spread). Below: mean attention.",
        "(b) Share of the top quarter in each quarter of the image.",
    ]
    if scores:
        text += [
            f"(c) {_names(scores)} if only one quarter of the visual tokens is kept from a layer on, "
            "positions renumbered; whiskers: 95% intervals; dotted: all tokens."
        ]
    text += ["Dashed: LLaVA-1.5-7B, measured from the paper's picture, first to last of 32 layers"]
    text[-1] += "; in (c) the mean of GQA, TextVQA, POPE, MME / 20." if scores else "."
    caption = " ".join([*text, drawing.depth_note(depth)]).strip()
    with drawing.new_figure(2.7, caption) as figure:
        grid = figure.add_gridspec(2, 2 + bool(scores))
        fig2.draw_frequency(figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0]), statistics)
        axes = figure.add_subplot(grid[:, 1])
        fig2.draw_quartiles(axes, statistics)
        axes.legend(loc="upper right")
        if scores:
            fig2.draw_scores(figure.add_subplot(grid[:, 2]), scores, depth)
        tables = fig2.tables(statistics) | (fig2.score_tables(scores) if scores else {})
        return drawing.write_figure(figure, folder, "fig2", caption, tables), caption


def draw_fig3(
    statistics: AttentionStatistics, scores: list[PanelScore], about: list[str], folder: Path
) -> tuple[list[str], str]:
    """Draw and write Figure 3; return its files and its caption."""
    layer = fig3.shown_layer(statistics.layers)
    text = [
        *about,
        "[CLS]: attention in the vision tower. Last: of the last prompt token, in (a) and (b) in decoder "
        f"layer {layer} (from 0). Equi last: the same with all visual keys at the position of the query.",
        "(a) Attention that the strongest tokens receive together.",
        "(b) Densities of attention divided by its largest value, 200 bins; open markers: the paper's first.",
        "(c) Entropy; 1 is equal attention to all tokens.",
    ]
    if scores:
        one = scores[-1].pruner
        text += [
            f"(d) {one.tokens} tokens per crop kept by each score before layer {one.layer}, at their "
            "positions; whiskers: 95% intervals; dotted: all tokens; open markers: the paper."
        ]
    text += ["Dashed: LLaVA-1.5-7B, measured from the paper's picture."]
    caption = " ".join([*text, drawing.depth_note(statistics.layers)]).strip()
    with drawing.new_figure(4.9 if scores else 2.7, caption) as figure:
        panels = list(figure.subplots(*((2, 2) if scores else (1, 3))).flat)
        for axes, function in zip(
            panels, (fig3.draw_cumulative, fig3.draw_densities, fig3.draw_entropy), strict=False
        ):
            function(axes, statistics)
        if scores:
            fig3.draw_scores(panels[3], scores)
        tables = fig3.tables(statistics) | (fig3.score_tables(scores) if scores else {})
        return drawing.write_figure(figure, folder, "fig3", caption, tables), caption


def _names(scores: list[PanelScore]) -> str:
    """Return what the last score is: the mean of benchmarks, or the score of the only one."""
    names = [name for name in dict.fromkeys(one.benchmark for one in scores) if name != MEAN]
    titles = [get_benchmark(name).title + (" / 20" if name == "mme" else "") for name in names]
    return f"Mean score of {', '.join(titles)}" if len(names) > 1 else f"Score on {titles[0]}"


if __name__ == "__main__":
    sys.exit(main())
