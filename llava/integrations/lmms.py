"""Models for lmms-eval, found by their entry point: `vispruner` and `vispruner_hf`.

    lmms-eval eval --model vispruner --model_args pretrained=CHECKPOINT,tokens=64 --tasks pope
    lmms-eval eval --model vispruner_hf --model_args host=qwen2_5_vl,tokens=64 --tasks pope

`vispruner` answers with our engine (original LLaVA checkpoints); `vispruner_hf` builds one of lmms-eval's
own models and prunes it with `llava.prune`. See docs/lmms_eval.md. No other module imports lmms-eval.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string

from llava import argtypes
from llava.integrations.budget import HostBudget
from llava.integrations.core import POSITIONS, prune
from llava.integrations.lmms_requests import (
    EngineArguments,
    Request,
    RequestEngine,
    check_names,
    parse_values,
    refuse_environment,
)
from llava.pruning import get_pruner

# model_type of a checkpoint -> lmms-eval's model that runs it
HOSTS = {
    "internvl": "internvl_hf",
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_onevision": "llava_hf",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "video_llava": "video_llava",
}
# Arguments of `llava.prune`, and how their text is read
PRUNING = {
    "method": str,
    "tokens": argtypes.tokens,
    "keep": float,
    "clip_tokens": argtypes.at_least(0),
    "important_ratio": argtypes.ratio,
    "positions": str,
}


def manifests() -> list[Any]:
    """Return the models of the entry point group lmms_eval.models."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest("vispruner", simple_class_path=f"{__name__}.EngineLmms"),
        ModelManifest(
            "vispruner_hf",
            simple_class_path=f"{__name__}.HostLmms",
            chat_class_path=f"{__name__}.ChatHostLmms",
        ),
    ]


def parse_model_args(
    text: str | Mapping[str, Any] | None, config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return --model_args as a dictionary, with what lmms-eval's own options add.

    --batch_size 1 is lmms-eval's default and counts as not given.

    Raises:
        ValueError: an entry without value, or a name twice.
    """
    if isinstance(text, str):
        names = re.findall(r"(?:^|,)\s*(\w+)=", text)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"model_args: {', '.join(twice)} is given twice. Give it once.")
        try:
            found = simple_parse_args_string(text)
        except ValueError as error:
            raise ValueError(
                f"model_args: {text!r} has an entry without value. Write name=value,name=value."
            ) from error
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


class Likelihood(tuple, GenerationResult):
    """(loss, is_greedy) that reaches the task.

    The evaluator of lmms-eval 0.7.3 takes every result for text and turns a plain tuple into a string, on
    which multiple-choice tasks fail. It passes on what a `GenerationResult` has as its text.
    """

    token_counts = None

    def __new__(cls, loss: float, is_greedy: bool) -> Likelihood:
        return super().__new__(cls, (loss, is_greedy))

    def __init__(self, loss: float, is_greedy: bool) -> None:
        pass

    @property
    def text(self) -> tuple[float, bool]:
        """What the evaluator stores as the response."""
        return self[0], self[1]


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
        """Return (loss, is_greedy) of requests (context, continuation, doc_to_visual, document, ...)."""
        asked = []
        for one in requests:
            context, continuation, *document = one.args
            if callable(continuation):
                continuation = continuation(self._document(*document[1:]))
            asked.append(self._request(context, *document, answer=str(continuation)))
        found = self.engine.losses(asked)
        self._record(requests)
        return [Likelihood(*one) for one in found]

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
            requests,
            {**self.settings, "failed": len(failures), "failures": [str(one) for one in failures[:20]]},
        )
        if not answers:
            return
        from lmms_eval.models.model_utils.gen_metrics import log_metrics

        new = sum(len(self.engine.tokenizer(text, add_special_tokens=False).input_ids) for text in answers)
        visual = self.engine.visual_tokens
        numbers = {"num_requests": len(answers), "visual_tokens": sum(visual) / max(1, len(visual))}
        log_metrics(seconds, new, new / max(seconds, 1e-9), numbers)


class HostLmms(lmms):
    """`--model vispruner_hf`: one of lmms-eval's own models, pruned by `llava.prune`.

    `create_from_arg_string` returns an instance of that model's class with `PrunedHost` in front. Without a
    budget the model is not pruned: that is the baseline, with the same prompts.
    """

    is_simple = True
    wants_chat: ClassVar[bool] = False

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> lmms:
        """Build the host model and prune it.

        Raises:
            ValueError: an unknown host, or arguments that neither pruning nor the host takes.
            ImportError: the host needs a package that is not installed.
        """
        given = parse_model_args(arg_string, additional_config)
        refuse_environment({**dict.fromkeys(PRUNING), **given}, "vispruner_hf")
        name = host_name(given.pop("host", None), given.get("pretrained"))
        asked = parse_values({key: given.pop(key) for key in PRUNING if key in given}, PRUNING)
        budget = {key: asked.pop(key, None) for key in ("tokens", "keep", "clip_tokens")}
        whole = budget["tokens"] == "none"
        budget = {key: value for key, value in budget.items() if value not in (None, "none")}
        _check_pruning(asked, budget, whole)
        built = host_class(name, cls.wants_chat)
        known = accepted_arguments(built)
        check_names(given, ["host", *PRUNING, *known], f"vispruner_hf with host={name}")
        if not torch.cuda.is_available():  # the hosts' default is CUDA
            usual = {"device": "cpu", "device_map": "auto" if name == "video_llava" else "cpu"}
            given = {key: value for key, value in usual.items() if key in known} | given
        host = type(f"Pruned{built.__name__}", (PrunedHost, built), {"__module__": __name__})
        model = host(**given)
        if budget:
            prune(model.model, **asked, **budget)
        model.settings = {"host": name, **given, "method": "none", **budget}
        if budget:
            model.settings |= prune_settings(asked)
        return model

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("an instance comes from create_from_arg_string")

    generate_until = generate_until_multi_round = loglikelihood


class ChatHostLmms(HostLmms):
    """As `HostLmms`, with lmms-eval's chat version of the host where there is one."""

    is_simple = False
    wants_chat = True


def _check_pruning(asked: Mapping[str, Any], budget: Mapping[str, Any], whole: bool) -> None:
    """Raise ValueError for arguments of `llava.prune` that no model can serve, before one is loaded."""
    method = asked.get("method", "none" if not budget else "vispruner")
    if method != "none" and not budget and not whole:
        raise ValueError(f"model_args: method={method} has no budget. Add tokens=, keep= or clip_tokens=.")
    if asked.get("positions", POSITIONS[0]) not in POSITIONS:
        raise ValueError(f"model_args: positions={asked['positions']!r}. Choose from {', '.join(POSITIONS)}.")
    if budget:
        HostBudget(**budget)
    get_pruner(method, tokens=1, important_ratio=asked.get("important_ratio", 0.5))


def prune_settings(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `llava.prune` besides the budget, with its defaults."""
    defaults = inspect.signature(prune).parameters
    names = ("method", "important_ratio", "positions")
    return {name: asked.get(name, defaults[name].default) for name in names}


def host_name(host: str | None, pretrained: str | None) -> str:
    """Return lmms-eval's model of `host=`, else of the checkpoint's model_type.

    Raises:
        ValueError: an unknown host, or a checkpoint that it cannot load.
        OSError: there is no such checkpoint.
    """
    from transformers import PreTrainedConfig

    if host is None and pretrained is None:
        raise ValueError(f"model_args: host is missing. Add host=NAME: {', '.join(HOSTS)}.")
    if host is not None and host not in HOSTS and host not in HOSTS.values():
        raise ValueError(f"model_args: host={host!r} is not supported. Choose from {', '.join(HOSTS)}.")
    asked = HOSTS.get(host, host)
    if pretrained is None:
        return asked
    config = PreTrainedConfig.get_config_dict(pretrained)[0]
    if "mm_vision_tower" in config:
        raise ValueError(
            f"model_args: pretrained={pretrained} is a checkpoint of the original LLaVA, whose weights "
            "transformers' classes do not load. Use --model vispruner, or the -hf conversion."
        )
    found = HOSTS.get(config.get("model_type"))
    if found is None or asked not in (None, found):
        what = "is not supported" if found is None else f"does not run with host={host}"
        raise ValueError(
            f"model_args: pretrained={pretrained}: model_type {config.get('model_type')!r} {what}. Choose a "
            f"checkpoint of {', '.join(HOSTS)}, and omit host."
        )
    return found


def host_class(name: str, chat: bool) -> type[lmms]:
    """Return lmms-eval's class of a host, the chat version if there is one and it is wanted."""
    from lmms_eval.models import get_model

    try:
        return get_model(name, force_simple=not chat)
    except ModuleNotFoundError as error:  # decord, for example: lmms-eval does not require it, the extra does
        raise ImportError(
            f"host={name}: lmms-eval's model needs the package {error.name}, which is not installed. Install "
            f"it: pip install {error.name}."
        ) from error


def accepted_arguments(built: type) -> list[str]:
    """Return the arguments of a host: of its class, and of those that it passes further arguments to."""
    names: dict[str, None] = {}
    for cls in built.__mro__:
        if "__init__" not in vars(cls) or cls is lmms:
            continue
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        names |= {
            one.name: None for one in parameters if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)
        }
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            break
    return list(names)


class PrunedHost:
    """In front of one of lmms-eval's classes: records settings, lets no failure become an empty answer."""

    settings: Mapping[str, Any]

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answer as the host; raise if the model raised, which some hosts turn into empty answers."""
        record_settings(requests, self.settings)
        with _errors_of(self.model) as errors:
            answers = super().generate_until(requests)
        if errors:
            raise RuntimeError(
                f"{len(errors)} of {len(requests)} requests failed. First: {errors[0]}"
            ) from errors[0]
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return (loss, is_greedy) as lmms-eval's `llava_hf`, of a prompt whose length pruning changes.

        The answer's tokens are at the right end of the logits. Other hosts have no likelihoods.
        """
        if not hasattr(self, "_image_processor"):
            return super().loglikelihood(requests)
        record_settings(requests, self.settings)
        return [self._likelihood(*one.args) for one in requests]

    def _likelihood(
        self,
        context: str,
        continuation: Any,
        to_visual: Any = None,
        document: int = 0,
        task: str = "",
        split: str = "",
    ) -> tuple[float, bool]:
        row = self.task_dict[task][split][document] if to_visual else None
        answer = str(continuation(row) if callable(continuation) else continuation).strip()
        images = [one for one in (to_visual(row) or () if to_visual else ()) if one is not None]
        tags = " ".join(["<image>"] * len(images))
        text = f"{tags}\n{context}" if images and "<image>" not in context else context
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        template = self.chat_template or self.tokenizer.chat_template or _vicuna_template(type(self))
        prompts = [
            self.tokenizer.apply_chat_template(
                some, chat_template=template, tokenize=False, add_generation_prompt=ask
            )
            for some, ask in ((turns[:1], True), (turns, False))
        ]
        before, whole = (
            self._image_processor(text=one, images=images or None, return_tensors="pt") for one in prompts
        )
        ids, start = whole["input_ids"][0], before["input_ids"].shape[1]
        same = (ids[:start] == before["input_ids"][0][: len(ids)]).long().cumprod(0).sum()
        targets = ids[int(same) :].to(self.device)
        with torch.inference_mode():
            logits = self.model(**whole.to(self.device, self.model.dtype)).logits[0]
        logits = logits[-len(targets) - 1 : -1].float()
        loss = torch.nn.functional.cross_entropy(logits, targets)
        return Likelihood(float(loss), bool((logits.argmax(-1) == targets).all()))


def _vicuna_template(cls: type) -> str:
    """Return the template that lmms-eval's `llava_hf` uses for a tokenizer without one."""
    return next(
        template
        for base in cls.__mro__
        if (template := getattr(inspect.getmodule(base), "VICUNA_CHAT_TEMPLATE", None))
    )


@contextmanager
def _errors_of(model: Any) -> Iterator[list[Exception]]:
    """Collect what `model.generate` raises within the block."""
    errors: list[Exception] = []
    generate, was_set = model.generate, "generate" in vars(model)

    def watched(*args: Any, **kwargs: Any) -> Any:
        try:
            return generate(*args, **kwargs)
        except Exception as error:
            errors.append(error)
            raise

    model.generate = watched
    try:
        yield errors
    finally:
        if was_set:
            model.generate = generate
        else:
            del model.generate
