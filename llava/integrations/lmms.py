"""Models for lmms-eval, found by their entry point: `vispruner` and `vispruner_hf`.

    lmms-eval eval --model vispruner --model_args pretrained=CHECKPOINT,method=vispruner,tokens=64 --tasks pope
    lmms-eval eval --model vispruner_hf --model_args host=qwen2_5_vl,pretrained=Qwen/...,tokens=64 --tasks pope

`vispruner` answers with our engine (original LLaVA checkpoints); `vispruner_hf` builds one of lmms-eval's own
models and prunes it with `llava.prune`. See docs/lmms_eval.md. This is the only module that imports lmms-eval.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string

from llava.integrations.lmms_requests import EngineArguments, Request, RequestEngine


def manifests() -> list[Any]:
    """Return the models of the entry point group lmms_eval.models."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest("vispruner", simple_class_path=f"{__name__}.EngineLmms")]


def parse_model_args(text: str | Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return --model_args as a dictionary, with what lmms-eval's own options add.

    --batch_size 1 is lmms-eval's default and counts as not given.

    Raises:
        ValueError: an entry without value, or a name twice.
    """
    if isinstance(text, str):
        parts = [part for part in re.split(r",(?=\s*\w+=)", text) if part.strip()]
        names = [part.partition("=")[0].strip() for part in parts]
        if wrong := [part for part in parts if "=" not in part]:
            raise ValueError(f"model_args: {wrong[0]!r} has no value. Write name=value,name=value.")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"model_args: {', '.join(twice)} is given twice. Give it once.")
        found = simple_parse_args_string(text)
    else:
        found = dict(text or {})
    for name, value in (config or {}).items():
        usual = name == "batch_size" and str(value) == "1"
        if value is not None and name != "max_batch_size" and not usual:
            found.setdefault(name, value)
    return found


def record_settings(requests: Sequence[Any], settings: Mapping[str, Any]) -> None:
    """Add the settings to the arguments that lmms-eval writes to its result file.

    There they are config.resolved_cli_args.vispruner. The arguments are those of the task whose method loads
    the documents of a request.
    """
    for request in requests:
        for value in request.args:
            arguments = getattr(getattr(value, "__self__", None), "args", None)
            if arguments is not None:
                arguments.vispruner = dict(settings)


class EngineLmms(lmms):
    """`--model vispruner`: an original LLaVA checkpoint on our engine.

    Args:
        arguments: `EngineArguments`, by name; the bundled model without `pretrained`.

    Raises:
        ValueError: an argument or an environment variable that cannot be used.
        FileNotFoundError: there is no such checkpoint.
        ModelError: it cannot be loaded.
        MethodUnavailable: it does not have what the method reads.
    """

    is_simple = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        parsed = EngineArguments.parse(arguments)
        self.accelerator = Accelerator()
        several = self.accelerator.num_processes > 1
        job, pruner = parsed.resolve(self.accelerator.local_process_index if several else None)
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.engine = RequestEngine(job, pruner)
        same = ("conv_mode", "preset", "anyres", "dtype", "tower_dtype", "device", "batch_size", "seed")
        self.settings = {
            "checkpoint": str(job.model) if parsed.pretrained else job.name,
            **pruner.config(),
            **{name: getattr(job, name) for name in same},
        }

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> EngineLmms:
        """Build the model of --model_args; raises as the class."""
        return cls(**parse_model_args(arg_string, additional_config))

    @property
    def device(self) -> torch.device:
        """Where lmms-eval puts the tensors that it gathers from all processes."""
        return torch.device(self.engine.job.device)

    @property
    def batch_size(self) -> int:
        """Questions per batch, 1 if the engine chooses."""
        return self.engine.job.batch_size or 1

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests (context, generation_kwargs, doc_to_visual, document, task, split)."""
        asked = [self._request(*one.args[:1], *one.args[2:], generation=one.args[1]) for one in requests]
        before = self.engine.seconds
        answers = self.engine.answers(asked, progress=self._rank == 0)
        self._record(requests, self.engine.seconds - before, answers)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return (loss, is_greedy) of requests (context, continuation, doc_to_visual, document, task, split)."""
        asked = []
        for one in requests:
            context, continuation, *document = one.args
            if callable(continuation):
                continuation = continuation(self._document(*document[1:]))
            asked.append(self._request(context, *document, answer=str(continuation)))
        found = self.engine.losses(asked)
        self._record(requests)
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raise NotImplementedError: tasks of several rounds are not supported."""
        raise NotImplementedError(
            "model vispruner: tasks of several rounds are not supported. Use tasks with one question each."
        )

    def clean(self) -> None:
        """Free the model before scores are computed."""
        self.engine.close()
        super().clean()

    def _document(self, document: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][document]

    def _request(
        self,
        context: str | list[str],
        to_visual: Any = None,
        document: int = 0,
        task: str = "",
        split: str = "",
        generation: Mapping[str, Any] | None = None,
        answer: str = "",
    ) -> Request:
        text = context[0] if isinstance(context, list) else context
        images = (lambda: to_visual(self._document(document, task, split))) if to_visual else lambda: None
        return Request(text, images, generation or {}, answer, task, document)

    def _record(self, requests: Sequence[Any], seconds: float = 0.0, answers: Sequence[str] = ()) -> None:
        failures = self.engine.failures
        record_settings(
            requests, {**self.settings, "failed": len(failures), "failures": [str(one) for one in failures[:20]]}
        )
        if not answers:
            return
        from lmms_eval.models.model_utils.gen_metrics import log_metrics

        new = sum(len(self.engine.tokenizer(text, add_special_tokens=False).input_ids) for text in answers)
        visual = self.engine.visual_tokens
        numbers = {"num_requests": len(answers), "visual_tokens": sum(visual) / max(1, len(visual))}
        log_metrics(seconds, new, new / max(seconds, 1e-9), numbers)
