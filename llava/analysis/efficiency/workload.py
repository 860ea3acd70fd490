"""What `engine.py` measures: a model and questions, answered by the engine or by the naive baseline."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import torch

from llava.analysis.efficiency.baseline import (
    baseline_answer,
    baseline_select,
    baseline_tower,
    eagerly,
)
from llava.analysis.efficiency.dummy_models import build_model, dummy_image
from llava.eval.benchmarks import Answer, get_benchmark
from llava.eval.benchmarks.base import Question
from llava.eval.inference.engine import Engine, PassSetting
from llava.eval.inference.image_loading import ImageLoader
from llava.eval.inference.vision_cache import VisionCache
from llava.mm_utils import load_image
from llava.model import load_pretrained_model
from llava.model.decode import Decoding
from llava.model.flops import LanguageShape
from llava.pruning import Pruner, get_pruner

GQA_PER_IMAGE, GQA_NEW_TOKENS = 31, 4
_CACHE_BYTES = 1 << 33


class WordTokenizer:
    """A tokenizer for dummy models: one id below `size` per word; answers are decoded to numbers."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
        ids = [3 + crc32(word.encode()) % (self.size - 3) for word in text.split()]
        return SimpleNamespace(input_ids=[1, *ids] if add_special_tokens else ids)

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return " ".join(map(str, ids))


@dataclass
class CollectedAnswers:
    """An answer writer in memory: question index -> text."""

    texts: dict[int, str] = field(default_factory=dict)

    def wants(self, index: int) -> bool:
        return index not in self.texts

    def write(self, answers: Sequence[Answer]) -> None:
        self.texts |= {answer.index: answer.text for answer in answers}


@dataclass
class EngineWorkload:
    """A model, its pruner, and questions about images."""

    tokenizer: Any
    model: Any
    processor: Any
    questions: list[Question]
    decoding: Decoding
    pruner: Pruner
    batch_size: int | None = 64  # None: as in an evaluation
    vision_cache: VisionCache | None = None

    @classmethod
    def from_checkpoint(cls, args: argparse.Namespace) -> EngineWorkload:
        """Load --model and the POPE questions about the first --num-images images of --data."""
        pope = get_benchmark("pope")
        questions = list(pope.questions(args.data, []))
        images = set(list(dict.fromkeys(question.image for question in questions))[: args.num_images or 2])
        tokenizer, model, processor, _ = load_pretrained_model(
            str(args.model),
            device=args.device,
            dtype=args.dtype,
            tower_dtype=args.tower_dtype,
            method="none",
            visual_token_num=0,
        )
        questions = [question for question in questions if question.image in images]
        decoding, pruner = Decoding(pope.max_new_tokens), get_pruner("vispruner", args.tokens, args.ratio)
        return cls(tokenizer, model, processor, questions, decoding, pruner, args.batch_size)

    @classmethod
    def from_dummy_model(
        cls, args: argparse.Namespace, folder: Path, model: Any | None = None
    ) -> EngineWorkload:
        """Build --dummy-model, or take `model`, and questions like GQA's about image files in `folder`."""
        if model is None:
            model = build_model(args.dummy_model, args.device, args.dtype, args.tower_dtype, seed=args.seed)
        image, random = dummy_image(folder / "image.jpg").read_bytes(), Random(args.seed)
        questions = []
        for number in range(args.questions or 1000):
            path = folder / f"{number // GQA_PER_IMAGE}.jpg"
            if number % GQA_PER_IMAGE == 0:
                path.write_bytes(image)
            words = " ".join(f"w{random.randrange(3000)}" for _ in range(random.randint(6, 18)))
            text = f"{words}?\nAnswer the question using a single word or phrase ."
            questions.append(Question(number, number, path, text))
        tokenizer, processor = (
            WordTokenizer(model.config.vocab_size),
            model.get_vision_tower().image_processor,
        )
        decoding, pruner = Decoding(GQA_NEW_TOKENS), get_pruner("vispruner", args.tokens, args.ratio)
        return cls(tokenizer, model, processor, questions, decoding, pruner, args.batch_size)

    @cached_property
    def rows_at_once(self) -> int:
        """Questions per batch: `batch_size`, else what an evaluation chooses, by memory on CUDA."""
        if self.batch_size is not None:
            return self.batch_size
        device = torch.device(self.model.device)
        if device.type == "cpu":
            return 64
        from llava.eval.inference.memory import most_crops, question_bytes, questions_per_batch

        engine = Engine(self.model, self.tokenizer, self.processor, decoding=self.decoding)
        tower = self.model.get_vision_tower()
        patches, budget = tower.num_patches, self.pruner.tokens
        visual = patches if budget is None else min(patches, budget)
        visual *= most_crops(self.model.config, tower.image_size)
        text = max(len(engine.prompt_ids(question)) for question in self.questions)
        images = len({question.image for question in self.questions}) / len(self.questions)
        row = question_bytes(
            LanguageShape.from_config(self.model.config),
            self.model.config.vocab_size,
            self.model.dtype.itemsize,
            text,
            visual,
            self.decoding.max_new_tokens,
            images,
        )
        # what torch holds without using it is free as well; the weights are there already
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return questions_per_batch(free, 0, row)

    def engine(self, **options: Any) -> Engine:
        """Create the engine with the workload's decoding and batch size, or other `options`."""
        cache = {} if self.vision_cache is None else {"vision_cache": self.vision_cache}
        settings = {"decoding": self.decoding, "batch_size": self.rows_at_once, **cache, **options}
        return Engine(self.model, self.tokenizer, self.processor, **settings)

    def ask(self, questions: Sequence[Question] | None = None, **options: Any) -> tuple[dict[int, str], Any]:
        """Answer questions with the engine.

        Returns:
            Answers by question index, and the engine's statistics.
        Raises:
            ValueError: if a question was not answered.
        """
        answers = CollectedAnswers()
        settings = [PassSetting("it", self.pruner, answers)]
        report = self.engine(**options).run(questions or self.questions, settings, progress=False)
        if report.failures:
            raise ValueError(f"not answered: {report.failures[0]}")
        return answers.texts, report

    def ask_baseline(self, questions: Sequence[Question]) -> dict[int, str]:
        """Answer questions with the naive baseline, from image files to texts by question index."""
        self.model.set_pruner(self.pruner, anyres="auto")
        model = (self.model, self.tokenizer, self.processor)
        engine, found = self.engine(), {}
        for question in questions:
            new = baseline_answer(*model, question.image, engine.prompt_ids(question), self.decoding)
            found[question.index] = self.tokenizer.decode(new, skip_special_tokens=True).strip()
        return found

    def agreement(
        self, questions: Sequence[Question], answers: dict[int, str], baseline: dict[int, str]
    ) -> dict[str, int]:
        """Compare the engine's answers with the baseline's, and attribute the differences.

        The baseline's tower rounds differently, so its selection may keep other tokens. With the engine's own
        tokens, one question at a time, float32 answers have to be equal.
        """
        different = {index for index in baseline if baseline[index] != answers[index]}
        equal = {image: self._equal_tokens(image) for image in {question.image for question in questions}}
        same_tokens = {question.index for question in questions if equal[question.image]}
        singles, _ = self.ask(questions, **_one_at_a_time(VisionCache(_CACHE_BYTES)))
        return {
            "flips": len(different),
            "answers_compared": len(baseline),
            "images_compared": len(equal),
            "images_with_equal_tokens": sum(equal.values()),
            "flips_in_images_with_equal_tokens": len(same_tokens & different),
            "flips_against_one_at_a_time_with_equal_tokens": count_flips(answers, singles),
        }

    def _crops(self, image: Any) -> tuple[torch.Tensor, Any]:
        """Return the crops (crops, 3, S, S) of an image file on the device, and the size of the image."""
        (pixels, size), _ = ImageLoader(load_image, self.processor, self.model.config)(image)
        return (pixels[None] if pixels.ndim == 3 else pixels).to(self.model.device), size

    @torch.inference_mode()
    def kept_tokens(self, image: Any) -> torch.Tensor:
        """Return the indices (crops, K) that the model keeps of an image file."""
        crops, size = self._crops(image)
        return self.model.visual_tokens(
            self.model.encode_vision([crops], [size])[0], self.pruner
        ).kept.indices

    @torch.inference_mode()
    def _equal_tokens(self, image: Any) -> bool:
        """Check whether the model and the baseline keep the same tokens of an image file."""
        encoded = baseline_tower(self.model.get_vision_tower(), self._crops(image)[0])
        return torch.equal(
            self.kept_tokens(image),
            baseline_select(*encoded, self.pruner.tokens, self.pruner.important_ratio),
        )

    def flips(self) -> dict[str, int]:
        """Count answers that change with prefix sharing, and with the batch size alone; vision is shared."""
        cache = VisionCache(_CACHE_BYTES)
        singles, _ = self.ask(**_one_at_a_time(cache))
        engine, _ = self.ask(vision_cache=cache)
        batches, _ = self.ask(vision_cache=cache, share_prefix=False)
        eager: dict[str, int] = {}
        if self.model is not None and (self.model.runtime.graphs or self.model.runtime.compiled):
            with eagerly(self.model):
                eager["eager_against_engine"] = count_flips(self.ask()[0], engine)
        return {
            "answers": len(singles),
            "engine_against_singles": count_flips(engine, singles),
            f"unshared_batches_of_{self.rows_at_once}_against_singles": count_flips(batches, singles),
            **eager,
        }


def _one_at_a_time(cache: VisionCache) -> dict[str, Any]:
    return {"vision_cache": cache, "share_prefix": False, "batch_size": 1}


def count_flips(answers: dict[int, str], others: dict[int, str]) -> int:
    """Count the questions of `others` that `answers` answers differently."""
    return sum(answers[index] != text for index, text in others.items())
