"""The engine: a model, questions and any number of settings in; answers out, to one sink per setting.

Every distinct image is decoded and encoded once in a run, and pruned once per setting, however its
questions are scattered in the file: questions are taken image by image, in waves of at most `batch_size`
questions (or one image, if that has more). Memory therefore holds the pruned tokens of one wave, and the
pictures of the next few images, never more. Waves and batches depend on the question list and the batch
size alone, so that a run that goes on after an interruption asks in the same company and gets the same
answers.

Knows no benchmark and no file format: questions come as `Question`, pictures through `load_image`, answers
leave through `Sink.write`.
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from tqdm import tqdm

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import conv_templates
from llava.eval.benchmarks.base import DataIssue, Question
from llava.eval.inference.decode import Decoding, Row, can_share, generate, generate_shared
from llava.eval.inference.image_loading import Picture, Prepare, read_ahead
from llava.eval.inference.vision_cache import VisionCache, picture_key
from llava.eval.store.answer_file import Answer
from llava.mm_utils import tokenizer_image_token
from llava.pruning import Asked, Pruner


class Sink(Protocol):
    """Where the answers of one setting go; `answers.AnswerFile` is one."""

    def wants(self, index: int) -> bool: ...

    def write(self, answers: Sequence[Answer]) -> None: ...


@dataclass
class Memory:
    """A sink that keeps the texts: question index -> answer."""

    texts: dict[int, str] = field(default_factory=dict)

    def wants(self, index: int) -> bool:
        return index not in self.texts

    def write(self, answers: Sequence[Answer]) -> None:
        self.texts |= {answer.index: answer.text for answer in answers}


@dataclass
class Setting:
    """One way of pruning, and where its answers go. The engine adds up what it cost."""

    name: str
    pruner: Pruner
    sink: Sink
    asked: int = 0
    images: int = 0
    seconds: float = 0.0  # prune, project, answer; not decoding and encoding, which all settings share


@dataclass
class Report:
    """What a run did besides answering."""

    asked: int = 0  # questions, summed over settings
    images: int = 0  # pictures encoded
    reused: int = 0  # pictures whose features were in the vision cache
    vision_seconds: float = 0.0  # decode, preprocess, encode
    seconds: float = 0.0
    failures: list[DataIssue] = field(default_factory=list)


@dataclass(frozen=True)
class Wave:
    """Images that are in memory together, and the batches of question indices that ask about them."""

    images: tuple[Any, ...]
    batches: tuple[tuple[int, ...], ...]


def plan(questions: Sequence[Question], batch_size: int) -> list[Wave]:
    """Waves over all questions: by image in order of first appearance, no image in two waves.

    Text-only questions form a group of their own. A wave holds as many whole images as fit `batch_size`
    questions; an image with more has a wave for itself, in batches of even size.
    """
    groups: dict[Any, list[int]] = {}
    for place, question in enumerate(questions):
        groups.setdefault(question.image, []).append(place)
    waves: list[Wave] = []
    images: list[Any] = []
    inside: list[int] = []

    def close() -> None:
        if inside:
            count = -(-len(inside) // batch_size)
            cuts = [len(inside) * number // count for number in range(count + 1)]
            batches = tuple(tuple(inside[a:b]) for a, b in zip(cuts, cuts[1:], strict=False))
            waves.append(Wave(tuple(images), batches))
            images.clear()
            inside.clear()

    for image, members in groups.items():
        if len(inside) + len(members) > batch_size:
            close()
        images.append(image)
        inside.extend(members)
    close()
    return waves


class Engine:
    """Asks one model. `share_prefix` lets questions of one image share its prefill where that is exact;
    a `vision_cache` lets runs (over several benchmarks, say) share the encoding of pictures; `workers`
    processes read pictures (0: threads, None: whatever pays, see `pictures`)."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_processor: Any,
        conv_mode: str = "vicuna_v1",
        decoding: Decoding | None = None,
        batch_size: int = 64,
        seed: int = 0,
        share_prefix: bool = True,
        load_image: Callable[[Any], Any] | None = None,
        anyres: str | None = None,
        vision_cache: VisionCache | None = None,
        workers: int | None = None,
    ) -> None:
        if conv_mode not in conv_templates:
            raise ValueError(f"unknown conversation {conv_mode!r}; there are: {', '.join(conv_templates)}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.conv_mode, self.decoding, self.batch_size = conv_mode, decoding or Decoding(), batch_size
        self.seed, self.share_prefix, self.anyres = seed, share_prefix, anyres
        self._rows_at_once = batch_size  # halved when the device runs out of memory
        if load_image is None:
            from llava.mm_utils import load_image
        self._load_image = load_image
        self.vision_cache, self.workers = vision_cache, workers
        if vision_cache is not None:
            vision_cache.bind(model)
        device = torch.device(model.device)
        self._cuda = device.type == "cuda"
        # whole passes of the tower; on a CPU one at a time is as fast, and saves memory
        self._encode_at_once = 2 * model.get_vision_tower().crops_per_pass if self._cuda else 1

    def run(
        self, questions: Sequence[Question], settings: Sequence[Setting], progress: bool = True
    ) -> Report:
        """Ask every question that a setting's sink still wants; failures of single questions are reported.

        Raises whatever a sink's `write` raises, and errors of the model; unreadable pictures do not raise.
        """
        self._adopt(settings)
        report, start = Report(), time.monotonic()
        waves = [
            wave
            for wave in plan(questions, self.batch_size)
            if any(
                setting.sink.wants(questions[place].index)
                for batch in wave.batches
                for place in batch
                for setting in settings
            )
        ]
        wanted = sum(setting.sink.wants(question.index) for question in questions for setting in settings)
        images = [image for wave in waves for image in wave.images if image is not None]
        with (
            self._pictures(images) as pictures,
            tqdm(
                total=wanted,
                unit="q",
                desc="asking",
                file=sys.stderr,
                dynamic_ncols=True,
                smoothing=0.1,
                mininterval=0.5 if sys.stderr.isatty() else 10,
                disable=not progress or not wanted,
            ) as bar,
        ):
            for wave in waves:
                self._wave(wave, questions, settings, pictures, report, bar)
        report.seconds = time.monotonic() - start
        return report

    # -- one wave ---------------------------------------------------------------------------------

    def _wave(
        self,
        wave: Wave,
        questions: Sequence[Question],
        settings: Sequence[Setting],
        pictures: Iterator[Picture],
        report: Report,
        bar: Any,
    ) -> None:
        asked_about = [questions[place] for batch in wave.batches for place in batch]
        active = [
            setting
            for setting in settings
            if any(setting.sink.wants(question.index) for question in asked_about)
        ]
        shared = [setting for setting in active if not setting.pruner.needs_question]
        visual: dict[str, dict[Any, torch.Tensor]] = {setting.name: {} for setting in shared}
        vision: dict[Any, Any] = {}  # only of a wave that has a setting which chooses by the question
        broken: dict[Any, str] = {}
        images = [image for image in wave.images if image is not None]
        for begin in range(0, len(images), self._encode_at_once):
            began = time.monotonic()
            seen = self._see(images[begin : begin + self._encode_at_once], pictures, broken, report)
            report.vision_seconds += self._clock() - began
            for setting in active:
                setting.images += len(seen)
            if len(shared) < len(active):
                vision |= seen
            for setting in shared:
                began = time.monotonic()
                with torch.inference_mode():
                    for image, one in seen.items():
                        visual[setting.name][image] = self.model.visual_tokens(one, setting.pruner).embeds
                setting.seconds += self._clock() - began
        for question in asked_about:
            wrong = broken.get(question.image) or _unaskable(question)
            if wrong:
                report.failures.append(DataIssue(question.file, question.line, wrong))
        for batch in wave.batches:
            members = [
                questions[place]
                for place in batch
                if questions[place].image not in broken and not _unaskable(questions[place])
            ]
            for setting in active:
                fresh = [question for question in members if setting.sink.wants(question.index)]
                if not fresh:
                    continue
                began = time.monotonic()
                # all members are asked again, not only those that lack an answer: in half precision an
                # answer may depend on the batch it is computed in
                if setting.pruner.needs_question:
                    rows = [self._row_of_its_own(question, vision, setting.pruner) for question in members]
                else:
                    rows = [
                        Row(
                            self.prompt_ids(question),
                            visual[setting.name].get(question.image),
                            question.image,
                        )
                        for question in members
                    ]
                answers = self._ask(members, rows)
                setting.seconds += time.monotonic() - began
                setting.sink.write(answers)
                setting.asked += len(fresh)
                report.asked += len(fresh)
                bar.update(len(fresh))

    def _see(
        self,
        images: Sequence[Any],
        pictures: Iterator[Picture],
        broken: dict[Any, str],
        report: Report,
    ) -> dict[Any, Any]:
        """Image -> VisionFeatures of the next pictures, from the cache or encoded now, broken ones apart."""
        seen: dict[Any, Any] = {}
        fresh, pixels, sizes = [], [], []
        for image in images:
            picture, error = next(pictures)
            if error is not None:
                broken[image] = error
            elif isinstance(picture, tuple):
                fresh.append(image)
                pixels.append(picture[0].to(self.model.device))
                sizes.append(picture[1])
                seen[image] = None  # keeps the order
            else:
                seen[image] = picture
        report.images += len(fresh)
        report.reused += len(seen) - len(fresh)
        if fresh:
            with torch.inference_mode():
                found = self.model.encode_vision(pixels, sizes)
            seen.update(zip(fresh, found, strict=True))
        if self.vision_cache is not None:
            for image in fresh:
                self.vision_cache.put(self._picture_key(image), seen[image])
        return seen

    def _picture_key(self, image: Any) -> Any:
        anyres = getattr(self.model.config, "image_aspect_ratio", None) == "anyres"
        protocol = getattr(self.model.config, "anyres_protocol", None) if anyres else None
        return picture_key(image, self._load_image, protocol)

    @torch.inference_mode()
    def _row_of_its_own(self, question: Question, vision: dict[Any, Any], pruner: Pruner) -> Row:
        """A question whose visual tokens are chosen for it: shared with nobody who asks something else."""
        if question.image is None:
            return Row(self.prompt_ids(question), None)
        embedding = self.model.get_input_embeddings()
        ids = self.tokenizer(question.text, add_special_tokens=False).input_ids
        asked = Asked(question.text, embedding(torch.tensor(ids, dtype=torch.long, device=self.model.device)))
        visual = self.model.visual_tokens(vision[question.image], pruner, asked).embeds
        return Row(self.prompt_ids(question), visual, (question.image, question.text))

    def _ask(self, questions: Sequence[Question], rows: Sequence[Row]) -> list[Answer]:
        if not self.decoding.greedy:  # the same draws whether the run was interrupted or not
            torch.manual_seed(zlib.crc32(f"{self.seed}/{questions[0].index}".encode()))
        new = self._generate(rows)
        return [
            Answer(
                question.index,
                self.tokenizer.decode(ids, skip_special_tokens=True).strip(),
                0 if row.visual is None else len(row.visual),
            )
            for question, row, ids in zip(questions, rows, new, strict=True)
        ]

    def _generate(self, rows: Sequence[Row]) -> list[list[int]]:
        """Ids of all rows; when the device runs out of memory, in halves, and in halves from then on."""
        found: list[list[int]] = []
        begin = 0
        while begin < len(rows):
            part = rows[begin : begin + self._rows_at_once]
            try:
                share = self.share_prefix and can_share(self.model, part, self.decoding)
                ask = generate_shared if share else generate
                found += ask(self.model, self.tokenizer, part, self.decoding)
                begin += len(part)
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise
                self._rows_at_once = len(part) // 2
                tqdm.write(f"out of memory: going on with batches of {self._rows_at_once}", file=sys.stderr)
            if self._cuda and begin < len(rows):
                torch.cuda.empty_cache()
        return found

    def prompt_ids(self, question: Question) -> tuple[int, ...]:
        """Token ids of the whole conversation prompt, IMAGE_TOKEN_INDEX where the image stands."""
        text = question.text
        if question.image is not None:
            image = DEFAULT_IMAGE_TOKEN
            if getattr(self.model.config, "mm_use_im_start_end", False):
                image = DEFAULT_IM_START_TOKEN + image + DEFAULT_IM_END_TOKEN
            text = image + "\n" + text
        conversation = conv_templates[self.conv_mode].copy()
        conversation.append_message(conversation.roles[0], text)
        conversation.append_message(conversation.roles[1], None)
        return tuple(tokenizer_image_token(conversation.get_prompt(), self.tokenizer, IMAGE_TOKEN_INDEX))

    # -- pictures ---------------------------------------------------------------------------------

    def _pictures(self, images: Sequence[Any]) -> AbstractContextManager[Iterator[Picture]]:
        """In order, made ahead: what `Prepare` makes of a picture, or its VisionFeatures if the cache holds
        them."""
        cache, known = self.vision_cache, None
        if cache is not None:

            def known(image: Any) -> Any | None:
                return cache.get(self._picture_key(image))

        return read_ahead(
            images, self._reader(), self.workers, known, lambda message: tqdm.write(message, file=sys.stderr)
        )

    def _reader(self) -> Prepare:
        return Prepare(self._load_image, self.image_processor, self.model.config)

    # -- small things -----------------------------------------------------------------------------

    def _adopt(self, settings: Sequence[Setting]) -> None:
        """Set the model to these settings' anyres protocol; one for all, as it decides the crops."""
        protocols = {
            self.anyres or ("llava" if setting.pruner.tokens is None else "paper") for setting in settings
        }
        if len(protocols) > 1 and getattr(self.model.config, "image_aspect_ratio", None) == "anyres":
            raise ValueError(
                "pruned and unpruned settings cut anyres pictures differently: give "
                "anyres='paper' or 'llava' for all"
            )
        if settings and hasattr(self.model, "set_pruner"):
            self.model.set_pruner(settings[0].pruner, anyres=self.anyres or "auto")

    def _clock(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.monotonic()


def _unaskable(question: Question) -> str | None:
    """What keeps a question from being put into a prompt; None for nearly all."""
    if DEFAULT_IMAGE_TOKEN in question.text:
        return f"the text holds {DEFAULT_IMAGE_TOKEN}, which stands for a picture; the prompt adds it itself"
    return None
