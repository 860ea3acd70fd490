"""The batch size of a run: that of --batch-size, else the recorded one, else by the memory of the GPU.

    configuration, line = with_batch_size(job, task, pruner, [pruner], folder / "run.json", [answers])

It is decided before the questions are planned and shared out over processes, because both depend on it. In
half precision an answer may depend on its batch, so a run that is resumed keeps the size it began with.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.eval.inference.memory import most_crops, question_bytes, questions_per_batch, weight_bytes
from llava.eval.jobs.job import Job, Task
from llava.eval.jobs.session import MethodUnavailable, ModelError
from llava.eval.store.provenance import Configuration
from llava.eval.store.run_record import recorded_batch_size

if TYPE_CHECKING:
    from llava.model.checkpoint.tower import TowerSource
    from llava.pruning import Pruner

_USUAL = {"cpu": 64}  # by kind of device, where the memory is not looked at
_OTHER = 16
_HOST = 8  # of a model of transformers, whose images differ in their number of tokens
_CLIP_FRAMES = 8
_LONG = 0.99  # share of the questions that are not longer than what is planned for; the others may halve
_BYTES_A_TOKEN = 3  # of UTF-8; fewer than the 4 of English, as other languages have
_TEMPLATE = 48  # tokens of a conversation besides its system prompt and the question


def with_batch_size(
    job: Job,
    task: Task,
    pruner: Pruner,
    together: Sequence[Pruner],
    record: Path,
    answers: Sequence[Path],
) -> tuple[Configuration, str]:
    """Return the configuration of a setting with its batch size, and a line about it ("" for the usual).

    Args:
        together: All settings of the pass, this one included; their memory adds up.
        record: run.json of the setting.
        answers: Its answer files so far.

    Raises:
        ModelError: The sizes of the model cannot be read.
    """
    configuration = job.configuration(task, pruner)
    if job.batch_size is not None:
        return configuration, ""
    size, line = recorded_batch_size(record, answers, configuration), ""
    kind = configuration.device
    if size is not None:
        line = "" if size == _USUAL.get(kind) else f"batches of {size} questions, as recorded"
    else:
        size, line = default_batch_size(job, task, together)
    return dataclasses.replace(configuration, batch_size=size), line


def default_batch_size(job: Job, task: Task, together: Sequence[Pruner]) -> tuple[int, str]:
    """Return the batch size where none is given or recorded, and a line about it. Raises ModelError."""
    kind = job.device.split(":")[0]
    if job.server is not None:  # requests at the same time; no memory of this machine
        return _USUAL["cpu"], ""
    if job.host is not None:
        return _HOST, ""
    return size_by_memory(job, task, together) if kind == "cuda" else (_USUAL.get(kind, _OTHER), "")


def size_by_memory(job: Job, task: Task, together: Sequence[Pruner]) -> tuple[int, str]:
    """Return the batch size that the GPU has memory for, and a line about it. Raises ModelError."""
    from llava.model.flops import LanguageShape, VisionShape
    from llava.model.settings import parse_dtype

    config, source = _sizes(job)
    tower = source.config
    language, vision = LanguageShape.from_config(config), VisionShape.from_config(tower)
    element, tower_element = (parse_dtype(one).itemsize for one in (job.dtype, job.tower_dtype))
    side = vision.patch_size * round(vision.patches**0.5)
    crops = _CLIP_FRAMES if task.is_video else most_crops(config, side)
    everything = [one.tokens is None or one.acts_in == "decoder" for one in together]
    rows, each = (1, crops * vision.patches) if task.is_video else (crops, vision.patches)
    visual = [
        crops * vision.patches if all_enter else rows * min(one.tokens or 0, each)
        for one, all_enter in zip(together, everything, strict=True)
    ]
    held = sum(visual) * language.width * element
    if any(one.needs_question for one in together):
        held += crops * vision.patches * vision.width * element
    decoding = job.decoding(task.benchmark)
    text, new = text_tokens(job, task), decoding.max_new_tokens
    images = len({question.image for question in task.asked}) / max(1, len(task.asked))
    # Embeddings and projector are not quantized.
    held_as = element if job.load_bits is None else job.load_bits / 8 + 0.1
    weights = int(weight_bytes(language, config.vocab_size, vision, held_as, tower_element))
    row = question_bytes(
        language,
        config.vocab_size,
        element,
        text,
        max(visual),
        new,
        images,
        decoding.num_beams,
        round(images * held),
    )
    free = job.free_memory
    size = questions_per_batch(free, weights, row)
    line = (
        f"batches of {size} questions, by memory: {free / 1e9:.1f} GB are free, the weights take about "
        f"{weights / 1e9:.1f} GB, a question of {text + max(visual)} + {new} tokens {row / 1e9:.2f} GB"
    )
    return size, line


def text_tokens(job: Job, task: Task) -> int:
    """Return about how many tokens the text of a long prompt has, without a tokenizer."""
    from llava.conversation import conv_templates

    lengths = sorted(len(question.text.encode()) for question in task.asked)
    longest = lengths[min(len(lengths) - 1, int(_LONG * len(lengths)))] if lengths else 0
    system = len(conv_templates[job.conv_mode].system.encode())
    return (longest + system) // _BYTES_A_TOKEN + _TEMPLATE


def check_inside(job: Job, task: Task, pruner: Pruner) -> None:
    """Refuse what a method that prunes inside the language model cannot do, before the model is loaded.

    Raises:
        MethodUnavailable: sampling, beams, or a budget that cannot be had with the model's layers.
        ModelError: The sizes of the model cannot be read.
    """
    if pruner.acts_in != "decoder":
        return
    from llava.model.decode import check_greedy
    from llava.model.flops import LanguageShape, VisionShape

    config, source = _sizes(job)
    try:
        check_greedy(pruner, job.decoding(task.benchmark))
        vision = VisionShape.from_config(source.config)
        side = vision.patch_size * round(vision.patches**0.5) if source.side is None else source.side
        pruner.stages(LanguageShape.from_config(config).layers, (side // vision.patch_size) ** 2)
    except ValueError as error:
        raise MethodUnavailable(f"method {error}") from error


def _sizes(job: Job) -> tuple[Any, TowerSource]:
    """Return the model's configuration and what its tower is made from, as they will be loaded."""
    from llava.model.checkpoint.config import stored_config, understand
    from llava.model.checkpoint.find import resolve_config
    from llava.model.checkpoint.folder import CheckpointFolder

    base = Path(job.model_base).expanduser() if job.model_base else None
    with warnings.catch_warnings():  # the loader gives them
        warnings.simplefilter("ignore")
        try:
            if isinstance(job.model, Path):
                checkpoint = CheckpointFolder(job.model, base)
                folder, base = checkpoint.config_folder, checkpoint.base
            else:
                folder = resolve_config(job.model)
            _, config, sources = understand(folder, stored_config(job.model, job.model_base), base)
        except ValueError as error:
            raise ModelError(str(error)) from error
    return config, next(iter(sources.values()))
