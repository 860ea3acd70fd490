"""Draw Figure 2 (attention shift) or 3 (attention dispersion) of the paper for a model and a question file.

    python -m llava.analysis.figures fig2
    python -m llava.analysis.figures fig3 --model checkpoints/llava-v1.5-7b --data playground/data/eval
    python -m llava.analysis.figures fig3 --model ... --question-file mix.json --image-folder images

Panels about attention show the first N questions of POPE, or of a question file: LLaVA's training format (of
which the first turn is asked) or a question file. The model is unpruned. Samples are kept on disk, so that a
run resumes after any interruption and both figures read each sample once. Panels about scores evaluate the
model on benchmarks with visual tokens removed inside the decoder. The paper's curves are dashed. Without
--model or --data the bundled ones are used. Writes PNG, SVG and the data as CSV to OUTPUT/FIGURE; the last line of
standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava import argtypes
from llava.analysis.attention import AttentionStatistics, Collected, collect
from llava.analysis.figures import drawing, fig2, fig3
from llava.analysis.questions import read_question_file
from llava.eval import cli
from llava.eval.benchmarks import DataIssue, get_benchmark
from llava.eval.jobs.job import Task, common_anyres, read_task
from llava.eval.jobs.session import Session
from llava.eval.store.atomic import write_atomically
from llava.model.checkpoint.config import stored_config

SAMPLES = 1000  # of the paper's analysis


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser("figures", __doc__)
    parser.prog = "python -m llava.analysis.figures"
    add = parser.add_argument
    add("figure", choices=("fig2", "fig3"), help="fig2: attention shift; fig3: attention dispersion")
    add("--question-file", type=cli.path_argument, help="questions to analyze (default: those of POPE)")
    add("--image-folder", type=cli.user_path, default=Path("."), help="of their images (default: .)")
    limit = f"analyze only the first N questions (default: {SAMPLES})"
    add("--num-questions", type=argtypes.at_least(1), default=SAMPLES, metavar="N", help=limit)
    cli.add_source_arguments(parser)
    output = "folder to write to (default: outputs/figures)"
    add("--output", type=cli.path_argument, default=Path("outputs", "figures"), metavar="DIR", help=output)
    cli.add_model_arguments(parser)
    cli.add_inference_arguments(parser)
    return parser


@cli.guarded
def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    drawing.check_matplotlib()
    cli.announce_bundled(args.model is None, args.data is None and args.question_file is None)
    model = cli.model_folder(args, parser)
    task = read_samples(args)
    try:
        config = stored_config(model, args.model_base)
        job = cli.job_of(args, model, config, common_anyres(config, args.anyres, args.preset))
    except ValueError as error:
        parser.error(str(error))
    cli.print_warnings([*task.warnings, *job.warnings])
    session = Session(job, max_failures=args.max_failures)
    found = collect(session, task, args.output / "samples")
    files, caption = DRAW[args.figure](found, job.name, task, args.output / args.figure)
    cli.report_issues(found.issues, "questions have no sample")
    print(f"{args.figure}: {caption}")
    statistics = found.statistics
    document = {
        "figure": args.figure,
        "model": job.name,
        "questions": str(args.question_file or task.title),
        "samples": statistics.samples,
        "computed": found.read,
        "layers": statistics.layers,
        "visual_tokens": statistics.tokens,
        "files": files,
        "caption": caption,
        "failures": [str(issue) for issue in found.issues],
    }
    print(json.dumps(document))
    return 1 if found.issues else 0


def read_samples(args: argparse.Namespace) -> Task:
    """Return the questions to analyze. Raises DataError."""
    if args.question_file is None:
        return read_task(get_benchmark("pope"), args.data, args.num_questions)
    issues: list[DataIssue] = []
    questions = read_question_file(args.question_file, args.image_folder, issues, args.allow_outside_images)
    return Task(questions, issues, limit=args.num_questions)


def draw_fig2(found: Collected, model: str, task: Task, folder: Path) -> tuple[list[str], str]:
    """Draw and write Figure 2; return its files and its caption."""
    statistics = found.statistics
    layer = fig2.shown_layer(statistics.layers)
    caption = (
        f"{_about(model, task, statistics)} (a) Layer {layer}, from 0. Above, the share of samples that hold a "
        "token in the top quarter by the attention of the last prompt token (bars: means of neighbors); below, "
        "that attention. (b) Where the top quarter lies, by layer. Dashed: LLaVA-1.5-7B, measured from the "
        f"paper's picture, over the same share of its 32 layers. {drawing.depth_note(statistics.layers)}"
    )
    with drawing.new_figure(2.7, caption) as figure:
        grid = figure.add_gridspec(2, 2)
        fig2.draw_frequency(figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0]), statistics)
        axes = figure.add_subplot(grid[:, 1])
        fig2.draw_quartiles(axes, statistics)
        axes.legend(ncols=2, loc="upper right")
        return drawing.write_figure(figure, folder, "fig2", fig2.tables(statistics)), caption


def draw_fig3(found: Collected, model: str, task: Task, folder: Path) -> tuple[list[str], str]:
    """Draw and write Figure 3; return its files and its caption."""
    statistics = found.statistics
    layer = fig3.shown_layer(statistics.layers)
    caption = (
        f"{_about(model, task, statistics)} [CLS]: attention of the vision tower; last: of the last prompt token, "
        f"decoder layer {layer} from 0 in (a) and (b); equi last: the same with all visual keys at the position "
        "of the query. (a) Share of attention that the strongest tokens receive. (b) Densities of attention "
        "divided by its largest value; rings: the first bin of the paper. (c) Entropy, 1 if all tokens get the same. "
        f"Dashed: LLaVA-1.5-7B, measured from the paper's picture. {drawing.depth_note(statistics.layers)}"
    )
    with drawing.new_figure(2.7, caption) as figure:
        first, second, third = figure.subplots(1, 3)
        fig3.draw_cumulative(first, statistics)
        fig3.draw_densities(second, statistics)
        fig3.draw_entropy(third, statistics)
        return drawing.write_figure(figure, folder, "fig3", fig3.tables(statistics)), caption


def _about(model: str, task: Task, statistics: AttentionStatistics) -> str:
    return (
        f"{model}, {statistics.samples:,} {task.title} questions, {statistics.tokens} visual tokens, "
        f"{statistics.layers} decoder layers, unpruned."
    )


DRAW: dict[str, Any] = {"fig2": draw_fig2, "fig3": draw_fig3}

if __name__ == "__main__":
    sys.exit(main())
