"""The loaded model of a job, and the limit on failed questions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava.eval.benchmarks import DataIssue
from llava.eval.jobs.job import Job, Task, check_media

_STORE_GIB = 2.0  # of encoded images on disk, on a CPU
_NAMED = 3  # failures in the message of a run that was stopped


class ModelError(RuntimeError):
    """The checkpoint cannot be loaded as asked; the message says why and what to do."""


class MethodUnavailable(RuntimeError):
    """The model does not have what a pruning method reads; the message says what."""


class TooManyFailures(RuntimeError):
    """More questions failed than --max-failures allows; the message counts them and names the first."""


@dataclass
class Session:
    """The loaded model, and the encoded images that the tasks of a job share.

    Attributes:
        cache_bytes: Limit of the vision cache; 0 disables it.
        max_failures: Stop when more questions of a task fail: a number, or a share (float) of them.
        images, seconds: Images encoded in all passes, and the time for loading and encoding them.
    """

    job: Job
    cache_bytes: int = 0
    max_failures: int | float | None = None
    loaded: Any = None
    cache: Any = None
    images: int = 0
    seconds: float = 0.0

    def engine(self, task: Task, batch_size: int = 1) -> Any:
        """Return an engine for one task; the first call loads the model.

        Raises:
            ModelError: The model cannot be loaded.
            DataError: It does not take what the task asks about, images or videos.
        """
        from llava.eval.inference.engine import Engine
        from llava.eval.inference.host_engine import HostEngine
        from llava.eval.inference.server import VllmServer
        from llava.eval.inference.vision_cache import VisionCache

        if self.loaded is None:
            self.loaded = load_model(self.job)
            store = vision_store(self.loaded)
            if self.cache_bytes or store:  # in main memory: an accelerator has better uses for its own
                self.cache = VisionCache(self.cache_bytes, "cpu", store)
        job, benchmark = self.job, task.benchmark
        if benchmark is not None:
            check_media(benchmark, vars(self.loaded[0].config), job.model)
        same = ("conv_mode", "seed", "share_prefix", "anyres", "num_workers")
        engine = (Engine if job.host is None else HostEngine)(
            *self.loaded,
            decoding=job.decoding(benchmark),
            batch_size=batch_size,
            vision_cache=self.cache,
            clip_budget=job.clip_budget if task.is_video else None,
            **{name: getattr(job, name) for name in same},
        )
        if benchmark is not None:
            engine.load_image = benchmark.load_image
        if job.server is not None:
            engine.server = VllmServer.connect(
                job.server, job.server_model, conv_mode=job.conv_mode, concurrency=batch_size
            )
        return engine

    def check_method(self, pruner: Any) -> None:
        """Raise MethodUnavailable if the loaded model does not have what a pruning method reads."""
        from llava.eval.inference.host_engine import pruned_by

        model = self.loaded[0]
        if self.job.host is not None:
            try:
                with pruned_by(model, pruner):
                    return
            except ValueError as error:
                raise MethodUnavailable(str(error)) from error
        if hasattr(model, "check_pruner"):  # not a model of another origin
            try:
                model.check_pruner(pruner)
            except ValueError as error:
                raise MethodUnavailable(str(error)) from error

    def check_failures(self, task: Task, asked: int, failures: Sequence[DataIssue] = ()) -> None:
        """Raise TooManyFailures if there are too many, lines that cannot be read included.

        Args:
            asked: Number of questions that this process answers.
        """
        if self.max_failures is None:
            return
        found = [*dict.fromkeys([*task.issues, *failures])]
        total = asked + len(task.issues)
        allowed = self.max_failures * total if isinstance(self.max_failures, float) else self.max_failures
        if len(found) > allowed:
            what = f"{task.title}: stopped, as {len(found)} of {total} questions failed"
            first = "".join(f"\n  {issue}" for issue in found[:_NAMED])
            fix = "Answers so far are kept. Fix the cause and run the same command to resume"
            raise TooManyFailures(f"{what}, and --max-failures is {self.max_failures}. {fix}. First:{first}")


def vision_store(loaded: tuple[Any, Any, Any]) -> Any | None:
    """Return the store of encoded images, None where it does not pay: a GPU encodes faster than a disk reads.

    VISPRUNER_VISION_CACHE sets its size in GiB, on any device; 0 disables it.
    """
    from llava.model.vision_store import VisionStore
    from llava.paths import cache_folder

    model, _, image_processor = loaded
    chosen = os.environ.get("VISPRUNER_VISION_CACHE")
    size = float(chosen) if chosen else _STORE_GIB
    if not size or not hasattr(model, "preset"):  # a model of another origin: its features may depend on more
        return None
    if not chosen and model.get_vision_tower().device.type != "cpu":
        return None
    return VisionStore(cache_folder() / "vision", int(size * 2**30), model, image_processor)


def load_model(job: Job) -> tuple[Any, Any, Any]:
    """Return (model, tokenizer, image_processor); the model is unpruned, the engine prunes.

    Raises:
        ModelError: The checkpoint cannot be loaded.
    """
    if job.host is not None:
        return _load_host(job)
    from llava.model.builder import load_pretrained_model

    if job.device.startswith("cuda:"):  # our own kernels are launched on the current device
        import torch

        torch.cuda.set_device(job.device)
    try:
        same = (
            "dtype",
            "tower_dtype",
            "attn_implementation",
            "anyres",
            "preset",
            "graphs",
            "compile",
        )
        # Every pruning setting is given, so that environment and config.json are not asked again.
        pruning = {"method": "none", "visual_token_num": 0, "important_ratio": 0.5}
        loading = {"decoder": job.server is None}
        if job.load_bits is not None:
            loading[f"load_{job.load_bits}bit"] = True
        tokenizer, model, image_processor, _ = load_pretrained_model(
            str(job.model),
            job.model_base,
            job.name,
            **{name: getattr(job, name) for name in same},
            **pruning,
            **loading,
            device=None if job.spread else job.device,
        )
    except (ValueError, ImportError, OSError) as error:
        raise ModelError(str(error)) from error
    return model, tokenizer, image_processor


def _load_host(job: Job) -> tuple[Any, Any, Any]:
    """Return (model, tokenizer, processor) of a model of transformers. Raises ModelError."""
    from llava.eval.inference.host_engine import load_host

    try:
        where = (job.device, job.dtype, job.attn_implementation, job.spread)
        return load_host(str(job.model), job.host, *where)
    except (ValueError, ImportError, OSError) as error:
        raise ModelError(str(error)) from error
