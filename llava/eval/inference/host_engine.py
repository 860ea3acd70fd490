"""The engine for models of transformers: the same questions, writers and resumption, pruned by `llava.prune`.

    name = "Qwen2_5_VLForConditionalGeneration"
    model, tokenizer, processor = load_host(path, name, "cuda", "bfloat16", "sdpa")
    engine = HostEngine(model, tokenizer, processor, decoding=Decoding(max_new_tokens=16), batch_size=8)
    engine.run(questions, [PassSetting("vispruner-r0.5-64", pruner, answer_file)])

Every question is a conversation of one turn by the checkpoint's chat template, with the text of the
benchmark. Images are encoded for every batch and every setting, because the tower is run by the model's own
`generate`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.eval.benchmarks import Answer, Question
from llava.eval.inference.engine import Engine, InferenceStats, not_finite
from llava.eval.inference.image_loading import LoadedImage, read_ahead
from llava.eval.inference.stopwatch import Stopwatch
from llava.integrations import pruned, pruning_of
from llava.integrations.inputs import HostParts, host_inputs, load_processor
from llava.model.decode import FiniteCheck, only_asked, stop_ids, until_stop
from llava.model.runtime.graphs import is_out_of_memory

_TEMPLATES = ("chat_template.json",)  # which transformers reads with a processor only


def load_host(
    path: str, class_name: str, device: str, dtype: str, attn_implementation: str, spread: bool = False
) -> tuple[Any, Any, Any]:
    """Return (model, tokenizer, processor) of a checkpoint of transformers.

    Args:
        spread: Over all GPUs, by accelerate.

    Raises:
        ValueError: Weights are missing, or the checkpoint has no chat template.
        OSError: The checkpoint cannot be read.
    """
    import transformers

    processor = load_processor(path)
    tokenizer = processor.tokenizer
    owner = tokenizer if isinstance(processor, HostParts) else processor
    if getattr(owner, "chat_template", None) is None:
        owner.chat_template = _stored_template(path)
    options = {"device_map": "auto"} if spread else {}
    model, found = getattr(transformers, class_name).from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        attn_implementation=attn_implementation,
        output_loading_info=True,
        **options,
    )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} weights of {class_name} are missing (first: {missing[0]}). Weights and "
            "config.json do not match; use one checkpoint's files."
        )
    return (model if spread else model.to(device)).eval(), tokenizer, processor


def _stored_template(path: str) -> str:
    for name in _TEMPLATES:
        file = Path(path).expanduser() / name
        if file.is_file():
            template = json.loads(file.read_bytes()).get("chat_template")
            if isinstance(template, str):
                return template
    raise ValueError(
        f"{path}: the checkpoint has no chat template, which makes its prompts. Add chat_template.jinja of "
        "the original checkpoint."
    )


def pruned_by(model: Any, pruner: Any) -> AbstractContextManager[Any]:
    """Return a context in which a model of transformers prunes as a setting does; see `jobs.host`."""
    settings = pruner.config()
    keep, tokens = settings.get("keep"), settings["tokens"]
    if keep is None and tokens is None:
        return nullcontext()
    ratio = settings.get("important_ratio", 0.5)
    return pruned(model, settings["method"], tokens=tokens, keep=keep, important_ratio=ratio)


class HostEngine(Engine):
    """An `Engine` whose `image_processor` is the processor of the model; see `load_processor`.

    `share_prefix`, `anyres`, `vision_cache`, `conv_mode` and `server` have no effect.
    """

    def __post_init__(self) -> None:
        self.vision_cache = self.server = None
        device = torch.device(self.model.device)
        self._accelerator = None if device.type == "cpu" else torch.get_device_module(device)
        self._deferred = self._is_cuda = False
        self._encode_at_once = self._rows_at_once = self.batch_size
        self._watch = Stopwatch(device)
        self.visual_per_layer = {}
        config = self.model.config
        self._image_id = getattr(config, "image_token_id", None) or config.image_token_index

    def prompt(self, question: Question) -> str:
        """Return the whole prompt, with the placeholder of the model for the image."""
        content = [{"type": "text", "text": question.text}]
        if question.image is not None:
            content.insert(0, {"type": "image"})
        owner = self.tokenizer if isinstance(self.image_processor, HostParts) else self.image_processor
        turns = [{"role": "user", "content": content}]
        return owner.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def prompt_ids(self, question: Question) -> tuple[int, ...]:
        """Return the token ids of the prompt, with IMAGE_TOKEN_INDEX in place of the image."""
        ids = self.tokenizer(self.prompt(question)).input_ids
        return tuple(IMAGE_TOKEN_INDEX if one == self._image_id else one for one in ids)

    def _adopt(self, settings: Sequence[Any]) -> None:
        pass

    def _read_ahead(self, images: Sequence[Any], ahead: int) -> AbstractContextManager[Iterator[LoadedImage]]:
        """Open images ahead, in order; threads suffice, as the processor runs with the batch."""
        return read_ahead(images, self._open, num_workers=0, ahead=ahead)

    def _open(self, image: Any) -> LoadedImage:
        try:
            return self.load_image(image).convert("RGB"), None
        except Exception as error:  # decoders raise anything
            return None, str(error) or type(error).__name__

    def _encode(
        self,
        images: Sequence[Any],
        loaded: Iterator[LoadedImage],
        broken: dict[Any, str],
        stats: InferenceStats,
    ) -> dict[Any, Any]:
        """Return image -> PIL image of those that can be opened; fill `broken`."""
        found = {}
        for image in images:
            content, error = next(loaded)
            if error is None:
                found[image] = content
            else:
                broken[image] = error
        stats.images += len(found)
        return found

    def _prune(self, encoded: dict[Any, Any], pruner: Any) -> dict[Any, Any]:
        return encoded

    @torch.inference_mode()
    def _answer_batch(
        self, questions: Sequence[Question], setting: Any, _features: Any, visual: Any, *_rest: Any
    ) -> list[Answer | str]:
        if not self.decoding.greedy:  # the same draws whether or not the run was interrupted
            torch.manual_seed(zlib.crc32(f"{self.seed}/{questions[0].index}".encode()))
        images, found = visual[setting.name], []
        with pruned_by(self.model, setting.pruner), only_asked(self.model, self.tokenizer):
            while len(found) < len(questions):
                part = questions[len(found) : len(found) + self._rows_at_once]
                try:
                    found += self._answer_together(part, images)
                    continue
                except RuntimeError as error:
                    if not is_out_of_memory(error) or len(part) == 1:
                        raise
                    self._rows_at_once = len(part) // 2
                self._free_memory()  # not above: the error holds what was computed so far
        return found

    def _answer_together(self, questions: Sequence[Question], images: dict[Any, Any]) -> list[Answer | str]:
        """Return an answer, or the reason why there is none, for each question of one call of `generate`."""
        try:
            inputs = host_inputs(
                self.image_processor,
                [self.prompt(question) for question in questions],
                [images[question.image] for question in questions if question.image is not None],
            )
        except ValueError as error:  # an image of an impossible shape, or a placeholder in a question
            if len(questions) == 1:
                return [str(error)]
            return [one for question in questions for one in self._answer_together([question], images)]
        weight = self.model.get_input_embeddings().weight
        inputs = {name: self._placed(one, weight) for name, one in inputs.items()}
        check, stops = FiniteCheck(), stop_ids(self.model, self.tokenizer)
        pad = self.tokenizer.pad_token_id
        whole = self.model.generate(
            **inputs,
            **self.decoding.arguments(),
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
            logits_processor=[check],
        )
        ids = inputs["input_ids"]
        answers: list[Answer | str] = []
        visual, finite = self._visual_tokens(ids), check.rows(len(questions))
        for question, row, count, valid in zip(questions, whole.tolist(), visual, finite, strict=True):
            text = self._text(until_stop(row[ids.shape[1] :], stops))
            answers.append(Answer(question.index, text, count) if valid else not_finite(self.model))
        return answers

    @staticmethod
    def _placed(one: Any, weight: Tensor) -> Any:
        if not isinstance(one, Tensor):
            return one
        return one.to(weight.device, weight.dtype if one.is_floating_point() else None)

    def _visual_tokens(self, ids: Tensor) -> list[int]:
        """Return how many placeholders of images entered the language model, by row."""
        pruning = pruning_of(self.model)
        if pruning is None or pruning.last is None or pruning.last.length != ids.shape[1]:
            return (ids == self._image_id).sum(1).tolist()
        plan = pruning.last
        kept = ids.gather(1, plan.sel.to(ids.device)) == self._image_id
        return (kept & plan.valid.to(ids.device)).sum(1).tolist()
