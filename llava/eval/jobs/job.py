"""The job: everything that is decided before a model is loaded, made once and never changed.

    config = stored_config(model)
    pruner, anyres = resolve_pruner(config, "vispruner", 64, 0.5)
    job = resolve_job(model, config, device="cuda", anyres=anyres)
    task = read_task(get_benchmark("pope"), folder)
    configuration = job.configuration(task, pruner)

A job names the model and how it answers; a task is one benchmark with its questions; a pruner is one setting.
Arguments win over the environment, the environment over the checkpoint's config.json. Loads no weights, so a
finished run is recognized without a model.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava import paths
from llava.eval.benchmarks import Benchmark, DataError, DataIssue, Question
from llava.eval.store.provenance import Configuration, fingerprint_questions
from llava.model.checkpoint.fingerprint import fingerprint_checkpoint

if TYPE_CHECKING:
    from llava.model.decode import Decoding
    from llava.pruning import Pruner


@dataclass(frozen=True)
class Job:
    """A model and how it answers; see `resolve_job`."""

    model: Path | str
    name: str  # LLaVA's name of the checkpoint
    device: str
    dtype: str
    tower_dtype: str
    conv_mode: str
    batch_size: int | None = None  # questions per batch; None: see `jobs.batches`
    model_base: str | None = None
    attn_implementation: str = "sdpa"
    preset: str = "exact"
    anyres: str | None = None  # None: the default of the method
    clip_budget: str = "total"  # what the budget of a clip is, see `llava.model.clips`
    max_new_tokens: int | None = None  # None: the benchmark's
    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    seed: int = 0
    share_prefix: bool = True
    num_workers: int | None = None  # processes that load images; None: automatic
    graphs: bool = False  # capture stages as CUDA graphs
    compile: bool = False  # compile layers
    num_processes: int = 1  # that this one starts; they share the GPUs
    server: str | None = None  # address of a server that runs the language model
    server_model: str | None = None  # its name there
    host: str | None = None  # class of transformers, where the model is not one of ours
    spread: bool = False  # over all GPUs that this process sees, as device_map="auto"
    load_bits: int | None = None  # 8 or 4: quantized layers of the decoder
    warnings: tuple[str, ...] = ()

    def answer_length(self, benchmark: Benchmark | None) -> int:
        """Return the number of new tokens per answer."""
        return self.max_new_tokens or (benchmark.max_new_tokens if benchmark is not None else 128)

    def configuration(self, task: Task, pruner: Pruner) -> Configuration:
        """Return everything that decides the answers of one setting to one task.

        Without a batch size of the job, it has none yet (see `llava.eval.jobs.batches`).
        """
        same = (
            *("conv_mode", "dtype", "tower_dtype", "attn_implementation", "preset", "anyres"),
            *("temperature", "top_p", "num_beams", "seed", "batch_size", "graphs", "compile", "load_bits"),
        )
        decoding = self.decoding(task.benchmark)
        return Configuration(
            model=self.name,
            weights=_weights(self.model, self.model_base),
            questions=task.fingerprint,
            pruning=tuple(pruner.config().items()),
            device=self.device.split(":")[0],
            max_new_tokens=decoding.max_new_tokens,
            top_k=decoding.top_k,
            clip_budget=self.clip_budget if task.is_video else None,
            unused_settings=tuple(decoding.unused(self.generation_settings).items()),
            server=None if self.server is None else self.server_model or "unnamed",
            **{name: getattr(self, name) for name in same},
        )

    def decoding(self, benchmark: Benchmark | None) -> Decoding:
        """Return how answers are decoded."""
        from llava.model.decode import Decoding

        return Decoding(self.answer_length(benchmark), self.temperature, self.top_p, self.num_beams)

    @functools.cached_property
    def generation_settings(self) -> dict[str, Any]:
        """The checkpoint's generation_config.json, which is not used; {} if there is none on this machine."""
        return _generation_settings(self.model, self.model_base)

    @functools.cached_property
    def free_memory(self) -> int:
        """Bytes of the GPU for a process of this run, before its weights are loaded.

        That of the GPU with the fewest, if there are several. A GPU that several processes share is divided.
        The GPUs that one model is spread over add up.
        """
        import torch

        if self.spread:
            everywhere = range(torch.cuda.device_count())
            return sum(torch.cuda.mem_get_info(one)[0] for one in everywhere)
        places = [torch.device(self.device)]
        if self.num_processes > 1:  # one per GPU, in turn
            count = min(self.num_processes, torch.cuda.device_count())
            places = [torch.device("cuda", number) for number in range(count)]
        sharing = -(-self.num_processes // len(places))
        # What this process holds, such as weights loaded for an earlier task, is free for it.
        return (
            min(torch.cuda.mem_get_info(one)[0] + torch.cuda.memory_reserved(one) for one in places)
            // sharing
        )


@dataclass(frozen=True)
class Task:
    """The questions of one benchmark, or (without one) of a question file."""

    questions: Sequence[Question]
    issues: Sequence[DataIssue] = ()  # lines that cannot be used
    benchmark: Benchmark | None = None
    folder: Path | None = None  # of the benchmark
    limit: int | None = None  # answer the first N questions
    warnings: Sequence[str] = field(default=())

    @property
    def title(self) -> str:
        return self.benchmark.title if self.benchmark is not None else "questions"

    @property
    def is_video(self) -> bool:
        """True if the questions are about clips."""
        return self.benchmark is not None and self.benchmark.media == "video"

    @functools.cached_property
    def asked(self) -> Sequence[Question]:
        """The questions to answer now; answers to the others may exist already."""
        return self.questions[: self.limit]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of all questions, so that a run with --limit can be continued without it.

        Without the extensions of videos: those of missing ones are not known yet.
        """
        if not self.is_video:
            return fingerprint_questions(self.questions)
        return fingerprint_questions(replace(one, image=one.image.with_suffix("")) for one in self.questions)

    @property
    def partial(self) -> bool:
        """True if only a part of the questions is asked; official rules are about whole sets."""
        return len(self.asked) < len(self.questions)


def read_task(benchmark: Benchmark, data: Path | None, limit: int | None = None) -> Task:
    """Read the questions of a benchmark.

    Args:
        data: The benchmark's own folder or the one above; None: the bundled data.

    Raises:
        DataError: No such data, or no readable question.
    """
    if data is None:
        bundled = paths.BUNDLED_CLIPS if benchmark.media == "video" else paths.BUNDLED_DATA
        given = paths.require_bundled(bundled, "--data (DATA_DIR)") / benchmark.folder
    else:
        given = data.expanduser()
    if data is None and not benchmark.owns(given):
        raise DataError(
            f"{benchmark.title}: no bundled data ({given} has no {benchmark.marker}). Set --data (DATA_DIR)"
        )
    folder = benchmark.locate(given)
    names = (benchmark.folder, *benchmark.other_folders)
    if not benchmark.owns(folder) and not (folder / benchmark.folder).is_dir() and folder.name not in names:
        raise DataError(
            f"{folder}: contains neither {benchmark.marker} nor a folder {benchmark.folder} with it. Run "
            f"python -m llava.eval.data check {benchmark.name} to see what is needed"
        )
    issues: list[DataIssue] = []
    questions = list(benchmark.questions(folder, issues))
    if not questions and issues:
        more = f" (and {len(issues) - 1} more lines)" if len(issues) > 1 else ""
        raise DataError(f"{issues[0]}{more}: no readable question")
    asked = questions[:limit]
    lines = {question.line for question in asked}
    if limit is not None:  # lines beyond the limit are not evaluated
        issues = [issue for issue in issues if not lines or issue.line <= max(lines)]
    return Task(questions, issues, benchmark, folder, limit, benchmark.check(folder, asked))


def check_media(benchmark: Benchmark, config: dict[str, Any], model: Path | str) -> None:
    """Check that a model takes what a benchmark asks about, images or videos, and that videos can be read.

    Args:
        config: The checkpoint's config.json.

    Raises:
        DataError: It does not, or PyAV is not installed.
    """
    if benchmark.media == "video" and not config.get("mm_video_tower"):
        raise DataError(
            f"{benchmark.title}: asks about videos, but {model} takes images only (its config.json names no "
            "mm_video_tower). Use a Video-LLaVA in its original layout (--model; CKPT_DIR), or score answers "
            "made elsewhere with python -m llava.eval.video --answers FILE"
        )
    if benchmark.media == "video" and importlib.util.find_spec("av") is None:
        raise DataError(
            f"{benchmark.title}: PyAV is not installed, but needed to read videos. Run: pip install "
            "'vispruner[video]'"
        )
    if benchmark.media == "image" and config.get("mm_video_tower") and not config.get("mm_image_tower"):
        raise DataError(
            f"{benchmark.title}: asks about images, but {model} takes videos only (its config.json names no "
            "mm_image_tower). Use a checkpoint with an image tower"
        )


def resolve_job(
    model: Path | str,
    config: dict[str, Any],
    device: str | None = None,
    dtype: str | None = None,
    tower_dtype: str | None = None,
    conv_mode: str | None = None,
    batch_size: int | None = None,
    local_rank: int | None = None,
    preset: str | None = None,
    anyres: str | None = None,
    graphs: bool | None = None,
    compile: bool = False,
    **given: Any,
) -> Job:
    """Decide device, dtypes, conversation template and captured graphs where they are not given.

    The batch size stays None unless it is given: it depends on the questions and on what is recorded.

    Args:
        config: The checkpoint's config.json.
        graphs, compile: See `load_pretrained_model`.
        preset: See `llava.model.settings.Preset`; None is VISPRUNER_PRESET, else exact.
        anyres: What `resolve_pruner` or `common_anyres` returned for the same preset.
        local_rank: Rank of this process on its machine, if there are several; each takes its own GPU.
        given: Further fields of `Job`.

    Raises:
        ValueError: Unknown device, preset or conversation template, a dtype that contradicts the preset,
            compiled layers without CUDA, or an entry of config.json that is not a length.
    """
    import torch

    from llava.conversation import conv_templates
    from llava.model.checkpoint.config import conversation_for
    from llava.model.settings import choose_dtypes, choose_runtime, resolve_preset
    from llava.model.splice import ContextLimits

    spread = device == "auto"
    if spread and (local_rank is not None or given.get("num_processes", 1) > 1):
        raise ValueError(
            "--device auto: spreads one model over all GPUs, but there are several processes. Give each "
            "process GPUs of its own with CUDA_VISIBLE_DEVICES and --num-chunks, or leave --device out"
        )
    place = (None if spread else device) or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(place).type
    except RuntimeError as error:
        raise ValueError(f"--device {place}: no such device ({str(error).splitlines()[0]})") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {place}: torch finds no CUDA device. Use --device cpu")
    if kind not in ("cpu", "cuda"):
        from llava.model.checkpoint.placement import main_device

        main_device(None, place)  # refuses what this machine or this torch does not have
    if place == "cuda" and local_rank is not None and torch.cuda.device_count() > 1:
        place = f"cuda:{local_rank % torch.cuda.device_count()}"
    graphs = choose_runtime(graphs, compile, torch.device(place))
    name = model_name(model)
    saved_in = config.get("torch_dtype") or config.get("dtype")
    dtypes = choose_dtypes(dtype, tower_dtype, saved_in, torch.device(place), preset)
    preset = resolve_preset(preset).name
    ContextLimits.of(config)
    usual, warnings = conversation_for(config, name), []
    if preset == "published" and dtypes[0] != torch.float16:
        warnings.append(
            f"preset published: the language model runs in {str(dtypes[0]).removeprefix('torch.')} on a CPU; "
            "the published numbers come from float16 on a GPU"
        )
    if conv_mode is not None and conv_mode not in conv_templates:
        raise ValueError(
            f"--conv-mode {conv_mode}: no such template. Choose from {', '.join(conv_templates)}"
        )
    if conv_mode not in (None, usual):
        warnings.append(f"--conv-mode {conv_mode}: {name} calls for {usual}. Use --conv-mode {usual}")
    job = Job(
        model,
        name,
        place,
        *(str(one).removeprefix("torch.") for one in dtypes),
        conv_mode or usual,
        batch_size,
        preset=preset,
        anyres=anyres,
        graphs=graphs,
        compile=compile,
        spread=spread and kind == "cuda" and torch.cuda.device_count() > 1,
        **given,
    )
    if unused := job.decoding(None).unused(job.generation_settings):
        listed = ", ".join(f"{key}={value!r}" for key, value in unused.items())
        warnings.append(f"generation_config.json: {listed} not used. Only the options of this command decide")
    return replace(job, warnings=tuple(warnings))


def resolve_pruner(
    config: dict[str, Any],
    method: str | None,
    budget: int | str | None,
    important_ratio: float | None,
    anyres: str | None = None,
    seed: int = 0,
    preset: str | None = None,
) -> tuple[Pruner, str | None]:
    """Return the pruner of a run, and the anyres protocol if one was chosen.

    No budget in arguments, environment and config.json means no pruning.

    Raises:
        ValueError: An unknown method, a method without a budget, or an anyres protocol that contradicts the
            preset.
    """
    from llava.model.settings import resolve_pruning
    from llava.pruning import get_pruner

    number = budget if isinstance(budget, int) else None
    found = resolve_pruning(config, method, number, important_ratio, anyres, preset)
    if budget == "none":
        return get_pruner("none"), found.anyres
    name, tokens = found.pruner.name, found.pruner.tokens
    if name != "none" and tokens is None:
        raise ValueError(f"method {name}: no budget. Set --tokens to a number or to none")
    if name == "none" and number is not None and method != "none":
        raise ValueError(f"--tokens {number}: the method set elsewhere is none. Set --method")
    return get_pruner(name, tokens, found.pruner.important_ratio, seed), found.anyres


def common_anyres(config: dict[str, Any], anyres: str | None, preset: str | None = None) -> str | None:
    """Return the anyres protocol of a pass with several settings, which needs one way to cut images."""
    from llava.model.settings import resolve_pruning

    is_anyres = str(config.get("image_aspect_ratio")).startswith("anyres") or "image_grid_pinpoints" in config
    chosen = resolve_pruning(config, "none", None, None, anyres, preset).anyres
    return chosen or ("paper" if is_anyres else None)


def setting_name(pruner: Any) -> str:
    """Return a pruner's settings as a folder name and row label: none, random-64, vispruner-r0.5-64.

    A share of the tokens is named as such: vispruner-r0.5-keep=0.33. Options of single methods are named
    only where they are not the default: score-exponent=0.5-64.
    """
    settings = pruner.config()
    defaults = {one.name: one.default for one in fields(getattr(pruner, "pruner", pruner))}
    settings.pop("seed", None)
    method, budget = settings.pop("method"), settings.pop("tokens")
    ratio = settings.pop("important_ratio", None)
    parts = [
        method,
        f"r{ratio:g}" if ratio is not None else None,
        *(f"{key}={value}" for key, value in settings.items() if value != defaults.get(key, MISSING)),
        str(budget) if budget is not None else None,
    ]
    return "-".join(part for part in parts if part)


def model_name(model: Path | str) -> str:
    """Return LLaVA's name of a checkpoint: its folder's, with the parent's before a `checkpoint-N`."""
    parts = [part for part in Path(model).parts if part not in ("/", ".")]
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


def _generation_settings(model: Path | str, base: str | None) -> dict[str, Any]:
    from llava.model.checkpoint.entries import GENERATION, read_entries
    from llava.model.checkpoint.folder import CheckpointFolder

    folders = [Path(one).expanduser() if one else None for one in (model, base)]
    path = CheckpointFolder(*folders).generation_config()
    return {} if path is None else read_entries(path, GENERATION)


@functools.cache
def _weights(model: Path | str, base: str | None) -> str:
    """Fingerprint the checkpoint, and the base of a LoRA or projector-only folder."""
    from llava.model.checkpoint.folder import CheckpointFolder

    folder = Path(base).expanduser() if base else None
    if folder is None and isinstance(model, Path):
        folder = CheckpointFolder(model).base
    found = fingerprint_checkpoint(model, folder) if isinstance(model, Path) else "hub"
    if folder is None:
        return found
    return f"{found}+{fingerprint_checkpoint(folder) if folder.is_dir() else base}"
