"""Requests of lmms-eval answered by our engine: arguments, images, decoding, stop strings.

    arguments = EngineArguments.parse({"pretrained": "checkpoints/llava-v1.5-7b", "tokens": 64})
    engine = RequestEngine(*arguments.resolve())
    engine.answers([Request("Is there a dog?", lambda: [image], {"max_new_tokens": 16, "until": ["\\n\\n"]})])

Requests are answered in windows: the images of a window are in memory, equal ones once. Within a window every
image is encoded once, pruned once and prefilled once for all its questions, as in `llava.eval.run`. Does not
import lmms-eval (see `llava.integrations.lmms`).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from PIL import Image

from llava import argtypes, paths
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.environment import check_environment
from llava.eval.benchmarks import Answer, DataIssue, Question
from llava.eval.jobs.batches import default_batch_size
from llava.eval.jobs.job import Job, Task, resolve_job, resolve_pruner
from llava.eval.jobs.session import Session
from llava.image_files import to_rgb
from llava.pruning import Pruner

MAX_NEW_TOKENS = 1024  # where a task sets none, as in lmms-eval's llava wrapper
_WINDOW_BYTES = 1 << 30  # of images in memory
_CACHE_BYTES = 1 << 30  # of encoded images in memory, for equal images of other windows
_NAMED = 3  # failures in a message
# Entries of a task's generation_kwargs besides those of `Decoding`, with the values that change no answer.
_NEUTRAL = {"repetition_penalty": (1,), "length_penalty": (1,), "use_cache": (True, False)}
_SAMPLING = ("top_p", "top_k", "min_p", "typical_p", "seed")  # change nothing without sampling
_IGNORED = ("image_aspect_ratio",)  # the checkpoint decides, as in lmms-eval's llava wrapper


@dataclass(frozen=True)
class EngineArguments:
    """The --model_args of `vispruner`, checked; None where an argument was not given."""

    pretrained: str | None = None  # a checkpoint's folder or name on the Hub (default: the bundled model)
    model_base: str | None = None
    method: str | None = None
    tokens: int | str | None = None
    important_ratio: float | None = None
    anyres: str | None = None
    preset: str | None = None
    dtype: str | None = None
    tower_dtype: str | None = None
    attn_implementation: str = "sdpa"
    conv_mode: str | None = None
    device: str | None = None
    batch_size: int | None = None
    seed: int = 0

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> EngineArguments:
        """Check names and values. Raises ValueError."""
        known = [one.name for one in fields(cls)]
        check_names(given, known, "vispruner")
        kinds: dict[str, Callable[[str], Any]] = {
            "tokens": argtypes.tokens,
            "important_ratio": argtypes.ratio,
            "batch_size": argtypes.batch_size,
            "seed": argtypes.at_least(0),
        }
        return cls(**parse_values(given, kinds))

    def resolve(self, local_rank: int | None = None) -> tuple[Job, Pruner]:
        """Return the job and the pruner; loads no weights.

        Args:
            local_rank: of this process on its machine, if there are several.

        Raises:
            ValueError: an invalid value, or a setting in the environment.
            FileNotFoundError: there is no such checkpoint.
        """
        from llava.model.checkpoint.config import stored_config
        from llava.model.checkpoint.find import local_folder
        from llava.model.checkpoint.folder import CheckpointFolder

        check_environment()
        refuse_environment(vars(self), "vispruner")
        if self.pretrained is None:
            config_file = paths.BUNDLED_MODEL / "config.json"
            model: Path | str = paths.require_bundled(config_file, "pretrained= in --model_args").parent
        else:
            folder = local_folder(self.pretrained)
            base = local_folder(self.model_base) if self.model_base else None
            if folder is not None and (self.model_base is None or base is not None):
                CheckpointFolder(folder, base).check()
            model = folder or self.pretrained
        config = stored_config(model, self.model_base)
        pruning = (self.method, self.tokens, self.important_ratio, self.anyres, self.seed, self.preset)
        pruner, anyres = resolve_pruner(config, *pruning)
        same = (
            *("model_base", "preset", "dtype", "tower_dtype", "attn_implementation", "conv_mode"),
            *("device", "batch_size", "seed"),
        )
        given = {name: getattr(self, name) for name in same}
        return resolve_job(model, config, anyres=anyres, local_rank=local_rank, **given), pruner


def check_names(given: Mapping[str, Any], known: Sequence[str], model: str) -> None:
    """Raise ValueError if --model_args has a name that the model does not know."""
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(
            f"model_args: {', '.join(map(repr, unknown))} is not an argument of model {model}. Choose from "
            f"{', '.join(known)}."
        )


def parse_values(given: Mapping[str, Any], kinds: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """Return arguments, each read by its kind, else as text. Raises ValueError."""
    found = {}
    for name, value in given.items():
        try:
            found[name] = kinds.get(name, str)(str(value))
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise ValueError(f"model_args: {name}={error}.") from None
    return found


def refuse_environment(given: Mapping[str, Any], model: str) -> None:
    """Raise ValueError if the environment sets what changes answers and --model_args does not.

    lmms-eval names a result and finds a cached response by its --model_args alone.
    """
    from llava.model.settings import ENVIRONMENT

    for name in ("method", "tokens", "ratio", "anyres", "tower_dtype", "preset"):
        argument = "important_ratio" if name == "ratio" else name
        value = os.environ.get(ENVIRONMENT[name])
        if value and argument in given and given[argument] is None:
            raise ValueError(
                f"{ENVIRONMENT[name]}: {value!r} is set in the environment, but lmms-eval identifies a run "
                f"of {model} by --model_args. Add {argument}={value} to them, or unset the variable."
            )


@dataclass(frozen=True)
class Generation:
    """How one request is decoded, and the strings at which its answer ends."""

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    until: tuple[str, ...] = ()

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Generation:
        """Read the generation_kwargs of a task.

        `do_sample: true` without a temperature samples at 1, as in transformers; `do_sample: false` or a
        temperature of 0 does not sample. Entries that would change an answer and are not supported are
        refused.

        Raises:
            ValueError: an entry with an invalid value or that is not supported.
        """
        rest = {name: value for name, value in given.items() if value is not None and name not in _IGNORED}
        until = _stop_strings(rest.pop("until", ())) + _stop_strings(rest.pop("stop_sequences", ()))
        sample = rest.pop("do_sample", None)
        temperature = _number(rest, "temperature", 1.0 if sample else 0.0, low=0.0)
        if sample is False:
            temperature = 0.0
        beams = int(_number(rest, "num_beams", 1, low=1))
        length = int(_number(rest, "max_new_tokens", MAX_NEW_TOKENS, low=1))
        top_p = rest.pop("top_p", None) if temperature else None
        if not temperature:
            rest = {name: value for name, value in rest.items() if name not in _SAMPLING}
        for name, value in rest.items():
            if value not in _NEUTRAL.get(name, ()):
                known = "until, max_new_tokens, do_sample, temperature, top_p, num_beams"
                raise ValueError(
                    f"generation_kwargs: {name}={value!r} is not supported by vispruner, and leaving it "
                    f"out would change answers. Use only {known}."
                )
        return cls(length, temperature, None if top_p is None else float(top_p), beams, until)


def _stop_strings(value: Any) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(one, str) for one in found):
        raise ValueError(f"generation_kwargs: until={value!r}, expected a string or a list of strings.")
    return tuple(one for one in found if one)


def _number(given: dict[str, Any], name: str, default: float, low: float) -> float:
    value = given.pop(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= low:
        raise ValueError(f"generation_kwargs: {name}={value!r}, expected a number >= {low:g}.")
    return value


def cut(text: str, until: Sequence[str]) -> str:
    """Return the text before the first of the stop strings."""
    ends = [place for stop in until if (place := text.find(stop)) >= 0]
    return text[: min(ends)].rstrip() if ends else text


@dataclass(frozen=True)
class Request:
    """One prompt with its images.

    Attributes:
        images: Called when the images are needed; a list of PIL images, None or empty for text only.
        generation: generation_kwargs of the task.
        answer: The continuation whose likelihood is asked.
        task, document: Named in messages.
    """

    text: str
    images: Callable[[], Sequence[Any] | None]
    generation: Mapping[str, Any] = field(default_factory=dict)
    answer: str = ""
    task: str = ""
    document: int = 0


class _AnswerCollector:
    """The writer of a pass: index -> answer."""

    def __init__(self) -> None:
        self.found: dict[int, Answer] = {}

    def wants(self, index: int) -> bool:
        return index not in self.found

    def write(self, answers: Sequence[Answer]) -> None:
        self.found |= {one.index: one for one in answers}

    def note(self, notes: Sequence[str]) -> None:
        pass


class RequestEngine:
    """A loaded model that answers requests with one pruner.

    Attributes:
        failures: Requests that could not be answered; their answer is empty.
        seconds: Time of all requests so far.
        visual_tokens: Visual tokens in the language model, one number per answered request.

    Raises:
        ModelError: The checkpoint cannot be loaded.
        MethodUnavailable: The model does not have what the method reads.
    """

    def __init__(self, job: Job, pruner: Pruner) -> None:
        self.job, self.pruner = job, pruner
        self.session = Session(job, cache_bytes=_CACHE_BYTES)
        self.session.engine(Task(()))
        self.session.check_method(pruner)
        self.failures: list[DataIssue] = []
        self.visual_tokens: list[int | float] = []
        self.seconds = 0.0
        self._images: dict[bytes, Any] = {}  # of the current window, by content

    @property
    def model(self) -> Any:
        return self.session.loaded[0]

    @property
    def tokenizer(self) -> Any:
        return self.session.loaded[1]

    def close(self) -> None:
        """Free the model."""
        self.session = Session(self.job)
        self._images.clear()

    def answers(self, requests: Sequence[Request], progress: bool = False) -> list[str]:
        """Return the answers, cut at their stop strings.

        Raises:
            ValueError: generation_kwargs that are not supported, or no request could be answered.
            TypeError: a visual that is not an image.
        """
        start, before = time.monotonic(), len(self.failures)
        generations = [Generation.parse(one.generation) for one in requests]
        groups: dict[Generation, list[int]] = {}
        for index, one in enumerate(generations):
            groups.setdefault(dataclasses.replace(one, until=()), []).append(index)
        found: dict[int, Answer] = {}
        for generation, members in groups.items():
            found |= self._answer_group(generation, members, requests, progress)
        self._report(len(requests), self.failures[before:])
        self.visual_tokens += [one.visual_tokens for one in found.values()]
        self.seconds += time.monotonic() - start
        return [
            cut(found[index].text, one.until) if index in found else ""
            for index, one in enumerate(generations)
        ]

    def losses(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Return (loss, is_greedy) of every request's `answer`.

        The loss is the mean negative log-likelihood of the answer's tokens, the end of the turn included, as
        lmms-eval's own wrappers return it: of several choices it takes the one with the smallest. is_greedy
        tells whether greedy decoding gives exactly this answer.

        Raises:
            ValueError: a request that cannot be asked, or a method that prunes inside the language model.
        """
        if self.pruner.acts_in == "decoder":
            raise ValueError(
                f"method {self.pruner.name}: prunes inside the language model, where likelihoods are not "
                "supported. Use a method that prunes before it, or a task that generates."
            )
        start, found, before = time.monotonic(), {}, len(self.failures)
        engine = None
        for questions in self._windows(requests, range(len(requests))):
            engine = engine or self._engine(questions, self.job)
            visual: dict[bytes, Any] = {}
            for begin in range(0, len(questions), engine.batch_size):
                batch = questions[begin : begin + engine.batch_size]
                answers = [requests[one.index].answer for one in batch]
                found |= zip(
                    (one.index for one in batch), self._losses(engine, batch, answers, visual), strict=True
                )
        if failed := self.failures[before:]:
            raise ValueError(f"{failed[0]}: has no likelihood.")
        self.seconds += time.monotonic() - start
        return [found[index] for index in range(len(requests))]

    # -- one group of requests that are decoded alike ----------------------------------------------------

    def _answer_group(
        self, generation: Generation, members: Sequence[int], requests: Sequence[Request], progress: bool
    ) -> dict[int, Answer]:
        from llava.eval.inference.engine import PassSetting
        from llava.model.splice import ContextLimits

        length = generation.max_new_tokens
        if (positions := ContextLimits.of(self.model.config).positions) is not None:
            length = min(length, positions)
        decoding = {name: getattr(generation, name) for name in ("temperature", "top_p", "num_beams")}
        job = dataclasses.replace(self.job, max_new_tokens=length, **decoding)
        engine, found = None, {}
        for questions in self._windows(requests, members):
            engine = engine or self._engine(questions, job)
            several = [one for one in questions if _has_tags(one)]
            single = [one for one in questions if not _has_tags(one)]
            collected = _AnswerCollector()
            setting = PassSetting(self.pruner.name, self.pruner, collected)
            engine.run(single, [setting], progress)
            self.failures += setting.failures
            for begin in range(0, len(several), engine.batch_size):
                collected.write(self._answer_several(engine, several[begin : begin + engine.batch_size]))
            found |= collected.found
        return found

    def _answer_several(self, engine: Any, questions: Sequence[Question]) -> list[Answer]:
        """Answer questions with several images, or with images in the middle of the text."""
        from llava.eval.inference.engine import not_finite
        from llava.model.decode import Row, generate
        from llava.model.splice import ContextLimits

        limits, rows, asked = ContextLimits.of(self.model.config), [], []
        for question in questions:
            if self.pruner.acts_in == "decoder" and len(question.image) > 1:
                self._fail(question, f"method {self.pruner.name} takes one image, got {len(question.image)}")
                continue
            visual = self._visual(engine, question, {})
            row = Row(engine.prompt_ids(question), visual)
            if reason := limits.refuse(row.length, sum(map(len, visual))):
                self._fail(question, reason)
                continue
            rows.append(row)
            asked.append(question)
        if not rows:
            return []
        answers = []
        for question, row, ids in zip(
            asked,
            rows,
            generate(self.model, self.tokenizer, rows, engine.decoding, self.pruner),
            strict=True,
        ):
            if ids is None:
                self._fail(question, not_finite(self.model))
                continue
            text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
            answers.append(Answer(question.index, text, sum(map(len, row.images))))
        return answers

    def _losses(
        self, engine: Any, questions: Sequence[Question], answers: Sequence[str], known: dict[bytes, Any]
    ) -> list[tuple[float, bool]]:
        import torch

        from llava.eval.inference.engine import not_finite
        from llava.model.runtime.stages import repeatable_attention
        from llava.model.splice import ContextLimits, pad_rows, splice

        model, pieces, targets = self.model, [], []
        embed, device = model.get_input_embeddings(), model.device
        for question, answer in zip(questions, answers, strict=True):
            before = engine.prompt_ids(question)
            whole = engine.prompt_ids(question, answer.strip())
            shared = next(
                (i for i, pair in enumerate(zip(before, whole, strict=False)) if len({*pair}) > 1),
                len(before),
            )
            visual = list(self._visual(engine, question, known))
            row = splice(torch.tensor([whole], device=device), None, None, visual, embed, "left").embeds[0]
            if reason := ContextLimits.of(model.config).refuse(len(row), new=0):
                raise ValueError(f"{question.file}, document {question.question_id}: {reason}.")
            pieces.append(row)
            targets.append(torch.tensor(whole[shared:], dtype=torch.long, device=device))
        none = [torch.full((len(row),), -100, device=device) for row in pieces]
        batch = pad_rows(pieces, none, "left")
        with torch.inference_mode(), repeatable_attention(device):
            hidden = model.get_model()(
                inputs_embeds=batch.embeds,
                attention_mask=batch.mask.long(),
                position_ids=batch.position_ids,
                use_cache=False,
            ).last_hidden_state
            found = []
            for states, ids in zip(hidden, targets, strict=True):
                if not len(ids):
                    found.append((0.0, True))
                    continue
                # The answer is at the right end, whatever was pruned before it.
                scores = model.get_output_embeddings()(states[-len(ids) - 1 : -1]).float()
                loss = torch.nn.functional.cross_entropy(scores, ids)
                if not torch.isfinite(loss):
                    raise ValueError(not_finite(model))
                found.append((float(loss), bool((scores.argmax(-1) == ids).all())))
        return found

    def _visual(self, engine: Any, question: Question, known: dict[bytes, Any]) -> tuple[Any, ...]:
        """Return the visual tokens of every image of a question; those in `known` are not computed again."""
        import torch

        if question.image is None:
            return ()
        images = question.image if isinstance(question.image, tuple) else (question.image,)
        cue = engine.text_cue(question) if self.pruner.needs_question else None
        found = {} if self.pruner.needs_question else known
        missing = [one for one in dict.fromkeys(images) if one not in found]
        with torch.inference_mode():
            for image, features in engine.encoded(missing, self.pruner):
                found[image] = self.model.visual_tokens(features, self.pruner, cue).embeds
        if any(one not in found for one in images):
            raise ValueError(f"{question.file}, document {question.question_id}: an image cannot be resized.")
        return tuple(found[one] for one in images)

    # -- images and questions ----------------------------------------------------

    def _windows(self, requests: Sequence[Request], members: Sequence[int]) -> Iterator[list[Question]]:
        """Yield the questions of windows; their images are in memory until the next one is asked for."""
        questions: list[Question] = []
        held = 0
        for index in members:
            request = requests[index]
            name = {"file": request.task, "line": request.document}
            question = Question(index, request.document, None, request.text, **name)
            try:
                images = [as_image(one) for one in request.images() or () if one is not None]
            # An image of the task that cannot be decoded, or has no pixels
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                self._fail(question, str(error))
                continue
            digests = []
            for image in images:
                digest = hashlib.blake2b(image.tobytes() + repr(image.size).encode(), digest_size=20).digest()
                held += 0 if digest in self._images else 3 * image.width * image.height
                self._images.setdefault(digest, image)
                digests.append(digest)
            text, tags = _with_tags(request.text, len(digests))
            if tags not in (0, len(digests)):
                self._fail(question, f"{tags} {DEFAULT_IMAGE_TOKEN} in the text, but {len(digests)} images")
                continue
            asked = tuple(digests) if tags else (digests[0] if digests else None)
            questions.append(dataclasses.replace(question, image=asked, text=text))
            if held >= _WINDOW_BYTES:
                yield questions
                questions, held = [], 0
                self._images.clear()
        if questions:
            yield questions
        self._images.clear()

    def _load(self, digest: bytes) -> Any:
        return self._images[digest]

    def _engine(self, questions: Sequence[Question], job: Job) -> Any:
        """Return an engine for requests that are decoded alike, with a batch size for such questions."""
        task = Task(questions)
        size = job.batch_size or default_batch_size(job, task, [self.pruner])[0]
        self.session.job = job
        engine = self.session.engine(task, size)
        engine.load_image = self._load
        return engine

    # -- failures ----------------------------------------------------

    def _fail(self, question: Question, reason: str) -> None:
        self.failures.append(DataIssue(question.file, question.line, reason))

    def _report(self, asked: int, failures: Sequence[DataIssue]) -> None:
        if not failures:
            return
        first = "".join(f"\n  {one}" for one in failures[:_NAMED])
        if len(failures) == asked:
            raise ValueError(f"none of {asked} requests could be answered. First:{first}")
        print(f"error: {len(failures)} of {asked} requests have an empty answer:{first}", flush=True)


def as_image(visual: Any) -> Any:
    """Return a visual of a task as an RGB image.

    Raises:
        TypeError: it is not an image.
        OSError, ValueError: it cannot be decoded, or has no pixels.
    """
    if not isinstance(visual, Image.Image):
        what = f"a path ({visual})" if isinstance(visual, str) else type(visual).__name__
        raise TypeError(
            f"visual: expected a PIL image, got {what}. Model vispruner takes images; for videos use "
            "--model vispruner_hf --model_args host=video_llava."
        )
    return to_rgb(visual)


def _with_tags(text: str, images: int) -> tuple[str, int]:
    """Return the text and how many image tags it has: none if the engine puts the only image before it."""
    if images == 1 and text.startswith(DEFAULT_IMAGE_TOKEN + "\n"):
        text = text.removeprefix(DEFAULT_IMAGE_TOKEN + "\n")
    tags = text.count(DEFAULT_IMAGE_TOKEN)
    if not tags and images > 1:
        return " ".join([DEFAULT_IMAGE_TOKEN] * images) + "\n" + text, images
    return text, tags


def _has_tags(question: Question) -> bool:
    return isinstance(question.image, tuple)
