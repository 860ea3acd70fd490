"""A method that chooses by the question: pruned per question, sharing nothing; others share as before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from llava.analysis.efficiency.workload import CollectedAnswers
from llava.eval.benchmarks.base import Question
from llava.eval.inference.engine import Engine, PassSetting
from llava.eval.inference.image_loading import ImageLoader
from llava.mm_utils import load_image
from llava.model.decode import Decoding
from llava.pruning import Kept, Pruner, TextCue, get_pruner

MODEL = Path(__file__).parents[2] / "data" / "model" / "ckpt_llava15s"
CHOICES: list[tuple[str, list[int]]] = []


@dataclass(frozen=True)
class ByText(Pruner):
    """Keeps the patches whose number the letters of the question spell. A toy, not registered."""

    name = "bytext"
    needs_question = True

    def choose(self, features, cues, tokens) -> Kept:
        question = cues.question
        start = sum(question.text.encode()) % (features.shape[1] - tokens)
        assert question.embeds.ndim == 2 and len(question.embeds) > 0
        CHOICES.append((question.text, list(range(start, start + tokens))))
        indices = torch.arange(start, start + tokens).expand(len(features), -1)
        return Kept(indices, torch.zeros_like(indices, dtype=torch.bool))


@pytest.fixture(scope="module")
def loaded():
    from llava.model.builder import load_pretrained_model

    return load_pretrained_model(str(MODEL), device="cpu", dtype="float32")[:3]


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    from PIL import Image

    folder, found = tmp_path_factory.mktemp("pictures"), []
    for number in range(2):
        path = folder / f"{number}.png"
        Image.effect_noise((60, 40), 90).convert("RGB").save(path)
        found += [(path, "Is there a cat?"), (path, "What colour is it?"), (path, "Who is that?")]
    found += [(found[0][0], "Is there a cat?"), (None, "What is two and two?")]
    return [Question(place, place, image, text) for place, (image, text) in enumerate(found)]


def run(loaded, questions, pruners, **options):
    tokenizer, model, processor = loaded
    engine = Engine(model, tokenizer, processor, decoding=Decoding(6), **options)
    settings = [PassSetting(str(number), pruner, CollectedAnswers()) for number, pruner in enumerate(pruners)]
    report = engine.run(questions, settings, progress=False)
    return report, [setting.writer.texts for setting in settings]


def test_tokens_and_answers_are_each_questions_own(loaded, questions):
    tokenizer, model, processor = loaded
    CHOICES.clear()
    report, (own,) = run(loaded, questions, [ByText(5)], batch_size=8)
    assert report.images == 2 and not report.failures and len(own) == len(questions)
    chosen = dict(CHOICES)
    assert len({tuple(kept) for kept in chosen.values()}) == 3
    engine = Engine(model, tokenizer, processor, decoding=Decoding(6))
    for question in questions[:6]:  # what the model says when it is shown exactly these tokens
        (pixels, size), _ = ImageLoader(load_image, engine.image_processor, engine.model.config)(
            question.image
        )
        (seen,) = model.encode_vision([pixels], [size])
        visual = model.get_model().mm_projector(seen.features[0, chosen[question.text]])
        new = model.generate(
            torch.tensor([engine.prompt_ids(question)]), visual=[visual], max_new_tokens=6, do_sample=False
        )[0]
        assert own[question.index] == tokenizer.decode(new, skip_special_tokens=True).strip()
    assert own[6] == own[0]


def test_methods_that_share_are_not_affected(loaded, questions):
    sharing = [get_pruner("vispruner", 7), get_pruner("none")]
    alone = run(loaded, questions, sharing, batch_size=8)[1]
    beside = run(loaded, questions, [sharing[0], ByText(5), sharing[1]], batch_size=8)[1]
    assert [beside[0], beside[2]] == alone
    assert beside[1] == run(loaded, questions, [ByText(5)], batch_size=2, share_prefix=False)[1][0]


def test_without_a_question_it_says_so(loaded):
    features, attention = torch.randn(1, 9, 4), torch.rand(1, 2, 9)
    with pytest.raises(ValueError, match="chooses by the question"):
        ByText(3).keep(features, attention)
    kept = ByText(3).select(features, attention, question=TextCue("a", torch.zeros(1, 4)))
    assert kept.tolist() == [[97 % 6, 97 % 6 + 1, 97 % 6 + 2]]
    with pytest.raises(ValueError, match="chooses by the question"):
        loaded[1].set_pruner(ByText(5))
        loaded[1].encode_images(torch.randn(1, 3, 336, 336))
    loaded[1].set_pruner("none")
