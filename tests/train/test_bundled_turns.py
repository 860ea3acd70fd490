"""Several turns with a tokenizer that has a piece for the role with its space, as the bundled model's."""

from __future__ import annotations

import pytest

from llava.model.tokenizer import load_tokenizer
from llava.paths import BUNDLED_MODEL
from llava.train.preprocess import preprocess, preprocess_multimodal, training_template


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_labels_are_the_answers_of_every_turn(rounds: int) -> None:
    tokenizer, template = load_tokenizer(BUNDLED_MODEL), training_template("v1")
    assert tokenizer.tokenize("USER") == ["▁USER"]  # and two pieces after </s>
    answers = [f"No, {number}" for number in range(rounds)]
    turns = []
    for number, answer in enumerate(answers):
        question = "" if number else "<image>\n"
        turns.append({"from": "human", "value": f"{question}Is there a dog in the image?"})
        turns.append({"from": "gpt", "value": answer})
    found = preprocess(preprocess_multimodal(turns, template, False), tokenizer, template, has_image=True)
    assert found.mismatch is None
    labels = [label for label in found.labels.tolist() if label != -100]
    ends = [place for place, label in enumerate(labels) if label == tokenizer.eos_token_id]
    starts = [0, *(place + 1 for place in ends)]
    assert [tokenizer.decode(labels[a:b]).strip() for a, b in zip(starts, ends, strict=False)] == answers
