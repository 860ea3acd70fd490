"""The inference engine: a model, questions and pruning settings in; answers out, one writer per setting.

    engine = Engine(model, tokenizer, image_processor, "vicuna_v1", Decoding(max_new_tokens=128))
    stats = engine.run(questions, [PassSetting("vispruner-64", pruner, answer_file)])

Every distinct image is loaded and encoded once per run and pruned once per setting, wherever its questions
are in the file. Questions are processed image by image, in groups of at most `batch_size` questions (or one
image, if it has more). Memory therefore holds the pruned tokens of one group and the pixels of the next few
images. Groups and batches depend only on the question list and the batch size, so a resumed run uses
identical batches and gets identical answers.

Independent of benchmarks and file formats: questions come as `Question`, images through `load_image`, answers
leave through `AnswerWriter.write`.
"""

from __future__ import annotations

import functools
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from tqdm import tqdm

from llava.constants import (
    DEFAULT_IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import conv_templates
from llava.eval.benchmarks import Answer, DataIssue, Question
from llava.eval.inference.image_loading import ImageLoader, LoadedImage, read_ahead
from llava.eval.inference.memory import images_at_once, most_crops
from llava.eval.inference.server import Prompt, Reply, VllmServer
from llava.eval.inference.stopwatch import Stopwatch
from llava.eval.inference.vision_cache import VisionCache, image_key
from llava.mm_utils import is_anyres, load_image, media_tags, tokenizer_image_token
from llava.model.clips import join_frame_tags
from llava.model.decode import Decoding, Row, can_share, generate, generate_shared, stop_ids
from llava.model.features import VisualTokens
from llava.model.flops import VisionShape
from llava.model.multimodal_encoder.cues import tower_cues
from llava.model.runtime.graphs import is_out_of_memory
from llava.model.splice import ContextLimits
from llava.pruning import Pruner, TextCue
from llava.pruning.inside import DecoderPruner

_REMEMBERED = 4096  # texts whose ids are kept
_IMAGES_AHEAD = 64  # most images in memory before a GPU needs them, up to 7 MB each


class AnswerWriter(Protocol):
    """Destination of one setting's answers; `store.answer_file.AnswerFile` is one."""

    def wants(self, index: int) -> bool: ...

    def write(self, answers: Sequence[Answer]) -> None: ...

    def note(self, notes: Sequence[str]) -> None: ...


@dataclass
class PassSetting:
    """One pruning setting in a pass over the images, with its answer writer and its own cost."""

    name: str
    pruner: Pruner
    writer: AnswerWriter
    generated: int = 0
    images: int = 0
    seconds: float = 0.0  # prune, project, answer; loading and encoding are shared by all settings
    failures: list[DataIssue] = field(default_factory=list)  # questions without an answer of this setting


@dataclass
class InferenceStats:
    """Cost and failures of one pass."""

    generated: int = 0  # answers, summed over settings
    images: int = 0  # images encoded
    reused: int = 0  # images whose features were in the vision cache
    vision_seconds: float = 0.0  # load, preprocess, encode
    seconds: float = 0.0
    failures: list[DataIssue] = field(default_factory=list)


@dataclass(frozen=True)
class ImageGroup:
    """Images held in memory together, and the batches of question positions that ask about them."""

    images: tuple[Any, ...]
    batches: tuple[tuple[int, ...], ...]


def plan(questions: Sequence[Question], batch_size: int) -> list[ImageGroup]:
    """Group questions by image, in order of first appearance; no image is in two groups.

    Text-only questions form an image of their own. A group holds as many whole images as fit `batch_size`
    questions; an image with more questions has a group for itself, in batches of even size.
    """
    by_image: dict[Any, list[int]] = {}
    for position, question in enumerate(questions):
        by_image.setdefault(question.image, []).append(position)
    groups: list[ImageGroup] = []
    images: list[Any] = []
    members: list[int] = []

    def close() -> None:
        if members:
            count = -(-len(members) // batch_size)
            cuts = [len(members) * number // count for number in range(count + 1)]
            batches = tuple(tuple(members[a:b]) for a, b in zip(cuts, cuts[1:], strict=False))
            groups.append(ImageGroup(tuple(images), batches))
            images.clear()
            members.clear()

    for image, positions in by_image.items():
        if len(members) + len(positions) > batch_size:
            close()
        images.append(image)
        members.extend(positions)
    close()
    return groups


@dataclass
class Engine:
    """Runs one model over questions.

    Attributes:
        share_prefix: Prefill each image once for all its questions where that is exact.
        load_image: Question.image -> PIL image, or the frames of a clip; `mm_utils.load_image` by default.
        clip_budget: What the budget of a clip is (`model.clips`), where questions are about clips; else None.
        vision_cache: Shares encoded images between runs, e.g. over several benchmarks.
        num_workers: Processes that load images; 0 for threads, None for automatic (see `image_loading`).
        after_group: Called with the cost and failures so far after each group of images; may raise to stop.
        server: Answers in place of the model's own language model; see `server.VllmServer`.

    Raises:
        ValueError: Unknown conversation template, or a batch size below 1.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    conv_mode: str = "vicuna_v1"
    decoding: Decoding = Decoding()
    batch_size: int = 64
    seed: int = 0
    share_prefix: bool = True
    load_image: Callable[[Any], Any] = load_image
    anyres: str | None = None
    clip_budget: str | None = None
    vision_cache: VisionCache | None = None
    num_workers: int | None = None
    after_group: Callable[[InferenceStats], Any] | None = None
    server: VllmServer | None = None

    def __post_init__(self) -> None:
        if self.conv_mode not in conv_templates:
            raise ValueError(
                f"conv_mode {self.conv_mode!r}: unknown; choose from {', '.join(conv_templates)}"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        self._limits = ContextLimits.of(self.model.config)
        self._frames = 0 if self.clip_budget is None else self.model.get_video_tower().num_frames
        self._rows_at_once = self.batch_size  # halved when the device runs out of memory
        if self.vision_cache is not None:
            self.vision_cache.bind(self.model)
        device = torch.device(self.model.device)
        # torch.cuda, torch.mps, ...
        self._accelerator = None if device.type == "cpu" else torch.get_device_module(device)
        runtime = getattr(self.model, "runtime", None)
        self._deferred = runtime is not None and (runtime.graphs or self._accelerator is not None)
        self._is_cuda = device.type == "cuda"
        self._encode_at_once = self._images_at_once()
        self._images_per_call = self._encode_at_once  # halved when the device runs out of memory
        self._watch = Stopwatch(device)
        self._cues: tuple[str, ...] = ()  # of the tower, which the methods of a run read
        self._tokenize = _RememberingTokenizer(self.tokenizer)
        # visual tokens of an image in every layer, of settings that prune inside the language model
        self.visual_per_layer: dict[Pruner, list[int]] = {}

    def run(
        self,
        questions: Sequence[Question],
        settings: Sequence[PassSetting],
        progress: bool = True,
        stats: InferenceStats | None = None,
    ) -> InferenceStats:
        """Answer every question that a setting's writer requests; report failures of single questions.

        Cost and failures are added to `stats` (default: a new one), which is returned.

        Raises:
            Whatever a writer's `write` raises, and errors of the model. Unreadable images do not raise.
        """
        self._adopt(settings)
        if notes := getattr(self.model, "loading_notes", ()):
            for setting in settings:
                setting.writer.note(notes)
        stats, start = stats or InferenceStats(), time.monotonic()
        groups = [
            group
            for group in plan(questions, self.batch_size)
            if any(_wanted(settings, questions[one]) for batch in group.batches for one in batch)
        ]
        wanted = sum(len(_wanted(settings, question)) for question in questions)
        images = [image for group in groups for image in group.images if image is not None]
        # A GPU answers about a group while the images of the next one are loaded.
        ahead = max((len(group.images) for group in groups), default=0) if self._accelerator else 0
        with (
            self._read_ahead(images, min(ahead, _IMAGES_AHEAD)) as loaded,
            tqdm(
                total=wanted,
                unit="q",
                desc="inference",
                file=sys.stderr,
                dynamic_ncols=True,
                smoothing=0.1,
                mininterval=0.5 if sys.stderr.isatty() else 10,
                disable=not progress or not wanted,
            ) as bar,
        ):
            for group in groups:
                self._run_group(group, questions, settings, loaded, stats, bar)
                if self.after_group is not None:
                    self.after_group(stats)
        self._watch.settle()
        stats.seconds += time.monotonic() - start
        return stats

    def encoded(self, images: Sequence[Any], pruner: Pruner) -> Iterator[tuple[Any, Any]]:
        """Yield (image, features) with the cues of a method; skip images that cannot be read."""
        self._adopt([SimpleNamespace(pruner=pruner)])
        with self._read_ahead(images, 0) as loaded:
            for image in images:
                yield from self._encode([image], loaded, {}, InferenceStats()).items()

    # -- one group --------------------------------------------------------------------------------

    def _run_group(
        self,
        group: ImageGroup,
        questions: Sequence[Question],
        settings: Sequence[PassSetting],
        loaded: Iterator[LoadedImage],
        stats: InferenceStats,
        bar: Any,
    ) -> None:
        members = [questions[position] for batch in group.batches for position in batch]
        active = [one for one in settings if any(_wanted([one], question) for question in members)]
        shared = [setting for setting in active if not setting.pruner.needs_question]
        visual: dict[str, dict[Any, VisualTokens]] = {setting.name: {} for setting in shared}
        waiting: deque[dict[Any, Any]] = deque()  # images whose flags were not read yet
        features: dict[Any, Any] = {}  # kept only for settings that choose by the question
        broken: dict[Any, str] = {}
        images = [image for image in group.images if image is not None]
        for begin in range(0, len(images), self._encode_at_once):
            with self._watch.span(stats, "vision_seconds"):
                encoded = self._encode(images[begin : begin + self._encode_at_once], loaded, broken, stats)
            for setting in active:
                setting.images += len(encoded)
            if len(shared) < len(active):
                features |= encoded
            for setting in shared:
                with self._watch.span(setting, "seconds"):
                    visual[setting.name] |= self._prune(encoded, setting.pruner)
            if self._deferred:
                waiting.append(encoded)
            if len(waiting) > 1:  # flags of images before these: the device has work meanwhile
                self._settle(waiting.popleft(), shared, visual)
        wrong = {one.index: broken.get(one.image) or _unaskable(one) for one in members}
        unasked = [DataIssue(one.file, one.line, wrong[one.index]) for one in members if wrong[one.index]]
        stats.failures += unasked
        for setting in active:
            setting.failures += unasked
        for batch in group.batches:
            askable = [questions[position] for position in batch if not wrong[questions[position].index]]
            for setting in active:
                new = [question for question in askable if _wanted([setting], question)]
                if not new:
                    continue
                # a server has batches of its own, so that nothing is gained by asking twice
                asked = askable if self.server is None else new
                with self._watch.span(setting, "seconds"):
                    answers = self._answer_batch(asked, setting, features, visual, shared, waiting)
                setting.writer.write([one for one in answers if isinstance(one, Answer)])
                if self.server is not None:
                    self.server.check()
                lost = [
                    DataIssue(question.file, question.line, reason)
                    for question, reason in zip(asked, answers, strict=True)
                    if isinstance(reason, str)
                ]
                setting.failures += lost
                stats.failures += lost
                count = sum(not _wanted([setting], question) for question in new)
                setting.generated += count
                stats.generated += count
                bar.update(len(new))

    def _encode(
        self,
        images: Sequence[Any],
        loaded: Iterator[LoadedImage],
        broken: dict[Any, str],
        stats: InferenceStats,
    ) -> dict[Any, Any]:
        """Return image -> VisionFeatures of the next images, cached or encoded now; fill `broken`."""
        found: dict[Any, Any] = {}
        new, pixels, sizes = [], [], []
        for image in images:
            content, error = next(loaded)
            if error is not None:
                broken[image] = error
            elif isinstance(content, tuple):
                new.append(image)
                pixels.append(content[0])
                sizes.append(content[1])
                found[image] = None  # keeps the order
            else:
                found[image] = content
        stats.images += len(new)
        stats.reused += len(found) - len(new)
        found.update(zip(new, self._encode_pixels(pixels, sizes), strict=True))
        if self.vision_cache is not None:
            for image in new:
                self.vision_cache.put(self._key(image), found[image])
        return found

    def _answer_batch(
        self,
        questions: Sequence[Question],
        setting: PassSetting,
        features: dict[Any, Any],
        visual: dict[str, dict[Any, VisualTokens]],
        shared: Sequence[PassSetting],
        waiting: deque[dict[Any, Any]],
    ) -> list[Answer | str]:
        """Answer a whole batch, and again if a flag of its images turns out to be set (see `_settle`).

        Not only the missing answers: in half precision an answer may depend on the batch it is computed in.
        """
        if setting.pruner.needs_question:
            rows = [self._row_by_question(one, features, setting.pruner) for one in questions]
            return self._answer(questions, rows, setting.pruner)
        if self.server is not None:  # which is not asked twice
            for one in waiting:
                self._settle(one, shared, visual)
            waiting.clear()
        answers = self._answer(questions, self._rows(questions, visual[setting.name]), setting.pruner)
        changed = [self._settle(one, shared, visual) for one in waiting]
        waiting.clear()
        if any(changed):
            answers = self._answer(questions, self._rows(questions, visual[setting.name]), setting.pruner)
        return answers

    @torch.inference_mode()
    def _prune(self, encoded: dict[Any, Any], pruner: Pruner) -> dict[Any, VisualTokens]:
        """Return image -> visual tokens; on an accelerator without waiting for it (see `_settle`)."""
        if self._deferred:
            found = self.model.visual_tokens_deferred(list(encoded.values()), pruner)
            return dict(zip(encoded, found, strict=True))
        return {image: self.model.visual_tokens(one, pruner) for image, one in encoded.items()}

    @torch.inference_mode()
    def _settle(
        self,
        encoded: dict[Any, Any],
        settings: Sequence[PassSetting],
        visual: dict[str, dict[Any, VisualTokens]],
    ) -> bool:
        """Read the flags of pruned images; prune those that need it with care, and return whether any did."""
        flags = {
            (setting.name, image): visual[setting.name][image].doubt
            for setting in settings
            for image in encoded
            if visual[setting.name][image].doubt is not None
        }
        if not flags or not torch.stack(list(flags.values())).any():
            return False
        for setting in settings:
            for image, one in encoded.items():
                if flags.get((setting.name, image)) is not None:
                    visual[setting.name][image] = self.model.visual_tokens(one, setting.pruner)
        return True

    def _rows(self, questions: Sequence[Question], visual: dict[Any, VisualTokens]) -> list[Row]:
        images: dict[Any, Any] = {
            image: (
                tokens.embeds,
                len(tokens.kept.indices),
                tokens.kept.important.flatten(),
                *_places(tokens),
            )
            for image, tokens in visual.items()
        }
        images[None] = (None, 1, None, None, 0)
        rows = []
        for one in questions:
            embeds, crops, marked, places, span = images[one.image]
            rows.append(Row(self.prompt_ids(one), embeds, one.image, crops, marked, places, span))
        return rows

    @torch.inference_mode()
    def _row_by_question(self, question: Question, features: dict[Any, Any], pruner: Pruner) -> Row:
        """Build the row of a question whose visual tokens are chosen for that question."""
        if question.image is None:
            return Row(self.prompt_ids(question), None)
        visual = self.model.visual_tokens(features[question.image], pruner, self.text_cue(question))
        key = (question.image, question.text)
        places, span = _places(visual)
        return Row(self.prompt_ids(question), visual.embeds, key, places=places, span=span)

    def text_cue(self, question: Question) -> TextCue:
        """Return what methods whose selection depends on a question read of it."""
        ids = self.tokenizer(question.text, add_special_tokens=False).input_ids
        embedding = self.model.get_input_embeddings()
        embeds = embedding(torch.tensor(ids, dtype=torch.long, device=self.model.device))
        return TextCue(question.text, embeds, question.bare)

    def _answer(
        self, questions: Sequence[Question], rows: Sequence[Row], pruner: Pruner
    ) -> list[Answer | str]:
        """Return one answer per question, or the reason why it has none."""
        if not self.decoding.greedy and questions:  # the same draws whether or not the run was interrupted
            torch.manual_seed(zlib.crc32(f"{self.seed}/{questions[0].index}".encode()))
        visual = [0 if row.visual is None else len(row.visual) for row in rows]
        too_long = [self._limits.refuse(row.length, count) for row, count in zip(rows, visual, strict=True)]
        fitting = [number for number, reason in enumerate(too_long) if reason is None]
        asked = [questions[number] for number in fitting], [rows[number] for number in fitting]
        said = iter(self._said(asked[1], pruner) if self.server is None else self._ask_server(*asked))
        answers: list[Answer | str] = []
        for question, row, count, reason in zip(questions, rows, visual, too_long, strict=True):
            text, reason = next(said) if reason is None else ("", reason)
            if reason is not None:
                answers.append(reason)
                continue
            answers.append(Answer(question.index, text, self._entering(row, count, pruner)))
        return answers

    def _said(self, rows: Sequence[Row], pruner: Pruner) -> list[tuple[str, str | None]]:
        """Return the model's text for every row, and the reason if it is not an answer."""
        found: list[tuple[str, str | None]] = []
        for row, ids in zip(rows, self._generate(rows, pruner), strict=True):
            if ids is None:
                found.append(("", not_finite(self.model)))
            else:
                found.append((self._text(ids), self._limits.overrun(row.length, len(ids))))
        return found

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _ask_server(self, questions: Sequence[Question], rows: Sequence[Row]) -> list[tuple[str, str | None]]:
        """Return the server's text for every question, and the reason if there is no answer."""
        seeds = [zlib.crc32(f"{self.seed}/{question.index}".encode()) for question in questions]
        texts = [question.text for question in questions]
        prompts = [Prompt(*one) for one in zip(texts, rows, seeds, strict=True)]
        found: list[tuple[str, str | None]] = []
        for reply in self.server.generate(prompts, self.decoding, stop_ids(self.model, self.tokenizer)):
            if isinstance(reply, Reply):
                found.append((reply.text.strip() if reply.ids is None else self._text(reply.ids), None))
            else:
                found.append(("", str(reply)))
        return found

    def _entering(self, row: Row, count: int, pruner: Pruner) -> int | float:
        """Return the visual tokens that enter a layer of the language model, the mean over its layers."""
        if not isinstance(pruner, DecoderPruner):
            return count
        layers = pruner.visual_per_layer(self.model.config.num_hidden_layers, count, row.crops)
        if any(layers):
            self.visual_per_layer.setdefault(pruner, layers)
        return sum(layers) / len(layers)

    def _generate(self, rows: Sequence[Row], pruner: Pruner) -> list[list[int] | None]:
        """Generate ids for all rows; halve the batch when the device runs out of memory."""
        found: list[list[int] | None] = []
        begin = 0
        while begin < len(rows):
            part = rows[begin : begin + self._rows_at_once]
            try:
                share = self.share_prefix and can_share(part, self.decoding)
                generated = (generate_shared if share else generate)(
                    self.model, self.tokenizer, part, self.decoding, pruner
                )
                found += generated
                begin += len(part)
                continue
            except RuntimeError as error:  # also in the prefill, and while a stage is captured
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
                self._rows_at_once = len(part) // 2
                tqdm.write(f"out of memory: continuing with batches of {self._rows_at_once}", file=sys.stderr)
            self._free_memory()  # not above: the error holds what was computed so far
        return found

    def prompt_ids(self, question: Question, answer: str | None = None) -> tuple[int, ...]:
        """Return the token ids of the whole prompt, with IMAGE_TOKEN_INDEX in place of the image or clip."""
        ids = tokenizer_image_token(self.prompt(question, answer), self._tokenize, IMAGE_TOKEN_INDEX)
        if self._frames and question.image is not None:
            ids = join_frame_tags(ids, [self._frames])
        return tuple(ids)

    def prompt(self, question: Question, answer: str | None = None) -> str:
        """Return the whole prompt, with <image> in place of the image, or of every frame of a clip.

        The tags stand before the question's text, if it has none.

        Args:
            answer: Follows the prompt, with the end of the turn.
        """
        text = question.text
        tags = media_tags([bool(self._frames)], self.model.config, self._frames)
        if question.image is not None and DEFAULT_IMAGE_TOKEN not in text:
            text = tags + "\n" + text
        else:
            text = text.replace(DEFAULT_IMAGE_TOKEN, tags)
        conversation = conv_templates[self.conv_mode].copy()
        conversation.append_message(conversation.roles[0], text)
        conversation.append_message(conversation.roles[1], answer or None)
        return conversation.get_prompt()

    # -- images -----------------------------------------------------------------------------------

    def _images_at_once(self) -> int:
        """Return how many images are encoded together."""
        if self._accelerator is None:  # as fast as several, and saves memory
            return 1
        tower = self.model.get_vision_tower()
        if not self._is_cuda:
            return 2 * tower.crops_per_pass
        free = torch.cuda.mem_get_info(tower.device)[0]
        vision, config = VisionShape.from_config(tower.config), self.model.config
        crops = self._frames or most_crops(config, tower.image_size)
        element = tower.dtype.itemsize
        return images_at_once(free, vision, crops, element, tower.crops_per_pass)

    def _encode_pixels(self, pixels: Sequence[torch.Tensor], sizes: Sequence[Any]) -> list[Any]:
        """Run the tower on images; halve how many at once when the device runs out of memory."""
        found: list[Any] = []
        while len(found) < len(pixels):
            here = slice(len(found), len(found) + self._images_per_call)
            count = len(pixels[here])
            try:
                extra = {"cues": self._cues} if self._cues else {}  # other models do not know them
                with torch.inference_mode():
                    found += self.model.encode_vision(list(pixels[here]), list(sizes[here]), **extra)
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error) or count == 1:
                    raise
                self._images_per_call = count // 2
                tqdm.write(f"out of memory: encoding {count // 2} images at once", file=sys.stderr)
            self._free_memory()
        return found

    def _free_memory(self) -> None:
        """Free what the device keeps for later: graphs, buffers of larger batches, cached blocks."""
        if (runtime := getattr(self.model, "runtime", None)) is not None:
            runtime.clear()
        if self._accelerator:
            self._accelerator.empty_cache()

    def _read_ahead(self, images: Sequence[Any], ahead: int) -> AbstractContextManager[Iterator[LoadedImage]]:
        """Load images ahead, in order; images in the vision cache come as their features."""
        cache, known = self.vision_cache, None
        if cache is not None:

            def known(image: Any) -> Any | None:
                return cache.get(self._key(image), self._cues)

        return read_ahead(
            images,
            ImageLoader(self.load_image, self.image_processor, self.model.config),
            self.num_workers,
            known,
            lambda message: tqdm.write(message, file=sys.stderr),
            pin=self._is_cuda,
            ahead=ahead,
        )

    def _key(self, image: Any) -> Any:
        anyres = is_anyres(getattr(self.model.config, "image_aspect_ratio", None))
        protocol = getattr(self.model.config, "anyres_protocol", None) if anyres else None
        return image_key(image, self.load_image, protocol)

    def _adopt(self, settings: Sequence[Any]) -> None:
        """Set the anyres protocol of the model; one for all settings, because it decides the crops."""
        chosen = self.anyres or getattr(getattr(self.model, "preset", None), "anyres", None)
        protocols = {
            chosen or ("llava" if setting.pruner.tokens is None else "paper") for setting in settings
        }
        if len(protocols) > 1 and is_anyres(getattr(self.model.config, "image_aspect_ratio", None)):
            raise ValueError(
                "anyres: pruned and unpruned settings cut images differently. Set anyres='paper' or "
                "anyres='llava' for all of them"
            )
        self._cues = tower_cues([cue for setting in settings for cue in setting.pruner.cues])
        if settings and hasattr(self.model, "set_pruner"):
            clips = {"clip_budget": self.clip_budget} if self._frames else {}
            self.model.set_pruner(settings[0].pruner, anyres=self.anyres or "auto", **clips)


class _RememberingTokenizer:
    """Returns what a tokenizer does, and keeps it: prompts begin alike, and settings ask the same ones."""

    def __init__(self, tokenizer: Any) -> None:
        self.bos_token_id = tokenizer.bos_token_id
        self._ids = functools.lru_cache(_REMEMBERED)(lambda text: tuple(tokenizer(text).input_ids))

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=self._ids(text))


def _places(tokens: VisualTokens) -> tuple[torch.Tensor | None, int]:
    return getattr(tokens, "places", None), getattr(tokens, "span", 0)  # models of other origin have none


def _wanted(settings: Sequence[PassSetting], question: Question) -> list[PassSetting]:
    return [setting for setting in settings if setting.writer.wants(question.index)]


def _unaskable(question: Question) -> str | None:
    """Return why a question cannot be put into a prompt; None for nearly all."""
    if DEFAULT_IMAGE_TOKEN in question.text:
        return f"the text contains {DEFAULT_IMAGE_TOKEN}, the placeholder that the prompt adds for the image"
    return None


def not_finite(model: Any) -> str:
    """Return the reason of a question whose logits are NaN or infinite."""
    fix = "The weights of the checkpoint, or its base, are corrupt. Copy or download them again"
    if model.get_input_embeddings().weight.dtype == torch.float16:
        fix = "float16 overflows above 65,504. Use --dtype bfloat16 or float32 (with --preset exact)"
    return f"the language model computed NaN or infinite logits. {fix}"
