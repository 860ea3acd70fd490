"""Arguments, checks and endings shared by the commands of `llava.eval`.

Arguments are checked before a model is loaded. Independent of inference and scoring.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava import argtypes, paths
from llava.argtypes import at_least, failures, ratio
from llava.environment import check_environment
from llava.eval.benchmarks import Benchmark, DataError, DataIssue, Score, benchmark_name
from llava.eval.inference.memory import MOST_QUESTIONS
from llava.eval.jobs.host import host_class, with_host
from llava.eval.jobs.job import Job, resolve_job, resolve_pruner
from llava.eval.jobs.session import MethodUnavailable, ModelError, TooManyFailures
from llava.eval.metrics.scorecard import Scorecard
from llava.eval.store.answer_file import AnswerFileError
from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.entries import read_object
from llava.model.checkpoint.find import local_folder, resolve_config
from llava.model.checkpoint.folder import CheckpointFolder
from llava.table import number, text_table

if TYPE_CHECKING:
    from llava.pruning import Pruner

DTYPES = ("float32", "float16", "bfloat16")
_PATHS = ("model", "model_base")  # arguments that are folders or names on the Hugging Face hub
_SHOWN = 50  # failures listed at the end
_JOB_ARGUMENTS = (
    *("device", "dtype", "tower_dtype", "attn_implementation", "preset", "conv_mode", "batch_size"),
    *("model_base", "load_bits"),
    *("max_new_tokens", "temperature", "top_p", "num_beams", "seed", "num_workers", "graphs", "compile"),
)


def new_parser(command: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of `python -m llava.eval.COMMAND`, described by its module's docstring."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        f"python -m llava.eval.{command}", description=description, formatter_class=form
    )


def answer_parser(
    command: str, description: str, benchmarks: Sequence[str], data: str = "", answers: str = ""
) -> argparse.ArgumentParser:
    """Return the parser of a command about answer files.

    Args:
        data, answers: What the help adds to the argument of that name, which is then optional.
    """
    parser = new_parser(command, description)
    add, text = parser.add_argument, "benchmark of the answers"
    add("--benchmark", required=True, type=benchmark_name, choices=benchmarks, help=text)
    add("--answers", required=not answers, type=path_argument, help=f"answer file of the benchmark{answers}")
    add("--data", required=not data, type=path_argument, help=f"folder of the benchmark{data}")
    return parser


def user_path(text: str) -> Path:
    """Return a path with ~ expanded; unlike `Path.expanduser`, it accepts ~name of an unknown user."""
    return Path(os.path.expanduser(text))


def path_argument(text: str) -> Path:
    """Parse the path of an argument; an unset shell variable gives an empty one, which is refused."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path. Give the name of a file or folder")
    return user_path(text)


def guarded(main: Callable[..., int]) -> Callable[..., int]:
    """Turn errors that users can cause into one line and an exit code: 1 errors, 2 arguments, 130 stopped."""

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except KeyboardInterrupt:
            print("\nstopped; run the same command to resume", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader of our output is gone: `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except (AnswerFileError, DataError, MethodUnavailable, ModelError, OSError, TooManyFailures) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    return wrapper


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is evaluated: model, data, limit, answer length."""
    add = parser.add_argument
    add("--model", help="checkpoint folder or Hugging Face name (default: the bundled model)")
    add("--model-base", help="base checkpoint of a LoRA or projector-only folder")
    add_data_argument(parser)
    add("--limit", type=at_least(1), metavar="N", help="evaluate only the first N questions")
    add("--max-new-tokens", type=at_least(1), help="tokens per answer (default: the benchmark's)")
    add_failure_arguments(parser)


def add_failure_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what happens to questions that cannot be asked."""
    add, stop = parser.add_argument, "stop when more questions fail: a number, or a share such as 0.01"
    add("--max-failures", type=failures, metavar="N|SHARE", help=f"{stop} (default: never)")
    add_outside_argument(parser)


def add_outside_argument(parser: argparse.ArgumentParser) -> None:
    text = "accept images that question files name outside the image folder"
    parser.add_argument("--allow-outside-images", action="store_true", help=text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    kernels = ("eager", "sdpa", "flash_attention_2")
    add("--dtype", choices=DTYPES, help="language model (default: float32 on a CPU, else the checkpoint's)")
    add("--tower-dtype", choices=DTYPES, help="vision tower (default: as --dtype)")
    add("--attn-implementation", default="sdpa", choices=kernels, help="attention kernel (default: sdpa)")
    devices = (
        "cpu, cuda, cuda:1, mps ...; auto spreads the model over all GPUs that are visible (default: cuda "
    )
    add("--device", help=f"{devices}if available)")
    add = parser.add_argument_group("model").add_mutually_exclusive_group().add_argument
    for bits in (8, 4):
        text = f"quantize the layers of the language model to {bits} bits (bitsandbytes)"
        add(f"--load-{bits}bit", dest="load_bits", action="store_const", const=bits, help=text)
    add = parser.add_argument_group("model").add_argument
    cut = "how LLaVA-NeXT images are cut (default: paper when pruning, else llava)"
    add("--anyres", choices=("paper", "llava"), help=cut)
    text = (
        "published: as the published numbers, float32 tower, pixels rounded to float16, float16 language "
        "model (on a CPU: float32), --anyres paper; exact: float32 pixels (default: VISPRUNER_PRESET, else "
        "exact)"
    )
    add("--preset", choices=("exact", "published"), help=text)


def add_inference_arguments(
    parser: argparse.ArgumentParser, temperature: float = 0.0, conv_mode: str | None = None
) -> None:
    """Add how answers are generated, with the defaults of the command."""
    add, count = parser.add_argument_group("inference").add_argument, at_least(1)
    template = f"conversation template (default: {conv_mode or 'that of the checkpoint'})"
    add("--conv-mode", default=conv_mode, help=template)
    sizes = "questions per batch; auto: the recorded size of a run that is resumed, else by the free memory "
    sizes += f"of the GPU, at most {MOST_QUESTIONS}, or 64 on a CPU (default: auto)"
    add("--batch-size", type=argtypes.batch_size, metavar="N|auto", help=sizes)
    note = f"of sampling; 0 is greedy (default: {temperature:g})"
    add("--temperature", type=at_least(0, float), default=temperature, help=note)
    add("--top_p", "--top-p", type=ratio, help="nucleus sampling mass (default: off)")
    add("--num_beams", "--num-beams", type=count, default=1, help="beams of beam search (default: 1)")
    add("--seed", type=int, default=0, help="seed for random pruning and sampling (default: 0)")
    add("--no-share-prefix", action="store_true", help="prefill every question instead of once per image")
    workers = "image loading processes; 0 uses threads (default: auto)"
    add("--num-workers", "--workers", type=at_least(0), help=workers)
    graphs = "launch every kernel by itself instead of replaying CUDA graphs (also VISPRUNER_GRAPHS=0)"
    add("--no-graphs", dest="graphs", action="store_const", const=False, help=graphs)
    add("--compile", action="store_true", help="compile layers, on CUDA: faster, with other last bits")


def add_server_arguments(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Add the server that runs the language model."""
    add = parser.add_argument_group("server").add_argument
    text = (
        "address of a vLLM server with --enable-mm-embeds that runs the language model; --batch-size is the "
    )
    text += "number of requests at the same time; OPENAI_API_KEY is sent if it is set"
    add("--server", required=required, metavar="URL", help=text + ("" if required else " (default: none)"))
    add("--server-model", metavar="NAME", help="name of the model there (default: its only one)")


def with_server(job: Job, pruner: Pruner, url: str, model: str | None) -> Job:
    """Return the job with a server as its language model.

    Raises:
        EndpointError: There is no such server, or it has several models.
        ValueError: The server cannot do what is asked.
    """
    from llava.eval.inference.server import VllmServer

    refused = {
        f"--num_beams {job.num_beams}: a server decodes without beams. Use 1": job.num_beams > 1,
        f"--method {pruner.name}: prunes inside the language model, which the server runs. Choose a method "
        "that prunes the image's tokens": pruner.acts_in != "image",
        "--tokens 0: a server takes no image without tokens. Use 1 or more": pruner.tokens == 0,
        f"--method {pruner.name}: needs the original positions of the kept tokens, which a server does not "
        "take. Choose another method": pruner.positions == "original",
    }
    for problem, found in refused.items():
        if found:
            raise ValueError(problem)
    return replace(job, server=url, server_model=VllmServer.connect(url, model).model)


def host_job(args: argparse.Namespace, model: Path | str, name: str, local_rank: int | None = None) -> Job:
    """Return the job of a model of transformers. Raises ValueError, also for options that it does not have.

    Args:
        name: Its class; see `jobs.host.host_class`.
    """
    ours = (
        "conv_mode",
        "anyres",
        "tower_dtype",
        "model_base",
        "compile",
        "server",
        "server_model",
    )
    given = [f"--{name.replace('_', '-')}" for name in ours if getattr(args, name, None)]
    given += [] if args.load_bits is None else [f"--load-{args.load_bits}bit"]
    given += ["--preset"] if args.preset not in (None, "exact") else []
    config = read_object(resolve_config(model) / "config.json")
    text = config.get("text_config") or {}
    saved = {"dtype": config.get("dtype") or config.get("torch_dtype") or text.get("dtype")}
    job = job_of(args, model, {**config, **saved, "torch_dtype": None}, None, local_rank)
    return with_host(job, name, given)


def add_clip_argument(parser: argparse.ArgumentParser) -> None:
    """Add what the budget of a clip is."""
    text = "of videos: total splits the budget over the frames, clip chooses among all frames at once "
    text += "(default: total)"
    parser.add_argument("--clip-budget", choices=("total", "clip"), default="total", help=text)


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    text = "folder of the benchmark, or the one above (default: the bundled data)"
    parser.add_argument("--data", type=path_argument, help=text)


def add_bootstrap_argument(parser: argparse.ArgumentParser) -> None:
    text = "bootstrap iterations (default: 2000)"
    parser.add_argument("--bootstrap-iters", "--resamples", type=at_least(100), default=2000, help=text)


def job_of(
    args: argparse.Namespace,
    model: Path | str,
    config: dict[str, Any],
    anyres: str | None,
    local_rank: int | None = None,
) -> Job:
    """Return the job of parsed arguments. Raises ValueError, also for invalid environment variables."""
    from llava.model.settings import ARGUMENTS, ENVIRONMENT

    given = {name for name, value in vars(args).items() if value is not None}
    check_environment(ENVIRONMENT[name] for name in ENVIRONMENT if given & {name, ARGUMENTS.get(name)})
    given = {name: getattr(args, name) for name in _JOB_ARGUMENTS}
    shared = not args.no_share_prefix
    given |= {"share_prefix": shared, "num_processes": getattr(args, "num_processes", None) or 1}
    given |= {"clip_budget": getattr(args, "clip_budget", "total")}
    return resolve_job(model, config, anyres=anyres, local_rank=local_rank, **given)


def command_of(
    parser: argparse.ArgumentParser, args: argparse.Namespace, but: Sequence[str] = ()
) -> list[str]:
    """Return module and arguments that repeat a command from any folder: paths are absolute.

    Args:
        but: Names of arguments to leave out.
    """
    module = parser.prog.split()[-1]
    command = [module if module.startswith("llava.") else f"llava.eval.{module}"]
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        is_given = value != parser.get_default(action.dest) or isinstance(value, Path)
        if action.dest in but or value is None or not is_given:
            continue
        if action.nargs == 0:
            command += action.option_strings[:1] if value == action.const else []
            continue
        if isinstance(value, Path) or (action.dest in _PATHS and Path(value).expanduser().exists()):
            value = os.path.abspath(os.path.expanduser(value))
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        if not action.option_strings:
            command.append(text)
            continue
        # An option and its value are one argument where the value may look like an option.
        option = action.option_strings[0]
        command += [f"{option}={text}"] if text.startswith("-") else [option, text]
    return command


def pruner_of(args: argparse.Namespace, config: dict[str, Any]) -> tuple[Pruner, str | None]:
    """Return pruner and anyres protocol of LLaVA's commands. Raises ValueError."""
    given = (args.method, args.visual_token_num, args.important_ratio)
    return resolve_pruner(config, *given, args.anyres, args.seed, args.preset)


def model_folder(
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    option: str = "--model",
    hosts: bool = False,
    media: str = "image",
) -> Path | str:
    """Return the checkpoint of --model (or of `option`), checked as far as possible without loading it.

    Args:
        hosts: Accept models of transformers; see `jobs.host`.
        media: What the bundled model takes that is used without --model: image or video.
    """
    if args.model is None:
        bundled = paths.BUNDLED_VIDEO_MODEL if media == "video" else paths.BUNDLED_MODEL
        return paths.require_bundled(bundled / "config.json", "--model (CKPT_DIR, CKPT)").parent
    given, folders = getattr(args, "model_base", None), []
    for asked, name in ((option, args.model), ("--model-base", given)):
        try:
            folders.append(local_folder(name) if name is not None else None)
        except FileNotFoundError as error:
            parser.error(f"{asked} {error}")
    folder, base = folders
    if folder is None:
        return args.model  # a name on the hub
    if hosts and host_class(folder) is not None:
        return folder
    if given is None or base is not None:
        try:
            CheckpointFolder(folder, base).check()
        except CheckpointError as error:
            parser.error(str(error))
    return folder


def is_bundled(model: str | None) -> bool:
    """Return True if --model is not given, or names a bundled checkpoint."""
    if model is None or (not user_path(model).exists() and paths.bundled_model(str(model)) is not None):
        return True
    return os.path.realpath(user_path(model)) in map(os.path.realpath, paths.BUNDLED_MODELS)


def announce_bundled(model: bool, data: bool) -> None:
    """Print, as the first line of standard output, that the bundled model or data are used."""
    used = {"model": "--model (CKPT_DIR, CKPT)"} if model else {}
    used |= {"data": "--data (DATA_DIR)"} if data else {}
    if used:
        what, options = " and ".join(used), " and ".join(used.values())
        print(f"Using the bundled {what} of playground/tiny. Set {options} to use your own.", flush=True)


def print_warnings(warnings: Sequence[str]) -> None:
    """Print warnings on standard error, each once."""
    for warning in dict.fromkeys(warnings):
        print(f"warning: {warning}", file=sys.stderr)


def print_score_warnings(score: Score) -> None:
    """Print the warnings of a score and its number of empty answers, beside the lines that LLaVA prints."""
    empty = f"{score.empty} answers are empty, and scored as the rule scores an empty text"
    print_warnings([*score.warnings, *([empty] if score.empty else [])])


def report_issues(
    issues: Sequence[DataIssue | str], what: str = "questions were not answered", where: str = ""
) -> None:
    """Print a count and the first failures, on standard error, at the end of a command.

    Args:
        where: File that contains all of them, named if they are too many to print.
    """
    if not issues:
        return
    print(f"{len(issues)} {what}:", file=sys.stderr)
    for issue in issues[:_SHOWN]:
        print(f"  {issue}", file=sys.stderr)
    if len(issues) > _SHOWN:
        print(f"  ... and {len(issues) - _SHOWN} more{where and f', all in {where}'}", file=sys.stderr)


def print_settings(benchmark: Benchmark, cards: Sequence[Scorecard]) -> None:
    """Print one table row per setting of a benchmark."""
    header = ["method", "ratio", "tokens", benchmark.metric, "95% CI", "visual tokens", "prefill GFLOPs"]
    rows = []
    for card in cards:
        speed, budget = card.speed or {}, "all" if card.tokens is None else str(card.tokens)
        budget = budget if card.keep is None else f"{100 * card.keep:g}%"
        interval = "-" if card.ci_low is None else f"[{card.ci_low:.1f}, {card.ci_high:.1f}]"
        row = [card.method, number(card.important_ratio, "g"), budget, number(card.score, ".2f"), interval]
        row += [number(card.visual_tokens, ".1f"), number(card.llm_gflops, ".3g"), str(card.answered)]
        row += ["-" if count is None else str(count) for count in (card.empty, card.unreadable)]
        row += [number(speed.get(f"questions_per_second{key}"), ".1f") for key in ("", "_without_vision")]
        rows.append(row)
    print(text_table([*header, "answered", "empty", "unreadable", "questions/s", "w/o vision"], rows))
