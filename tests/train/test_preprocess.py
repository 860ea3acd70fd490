"""Conversations become ids and labels: only answers are targets, whatever the texts and the template."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.golden_model import DATA
from helpers.golden_training import spans_of
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import tokenizer_image_token
from llava.model.tokenizer import load_tokenizer
from llava.train.preprocess import (
    BadSample,
    conversation_name,
    preprocess,
    preprocess_multimodal,
    training_template,
    training_tokenizer,
)

SENTENCEPIECE = load_tokenizer(DATA / "ckpt_llava15", model_max_length=2048)
BPE = Path(__file__).parents[1] / "data" / "train" / "tokenizer_bpe"
CHAT = load_tokenizer(BPE)
TEXT = st.text("abcXYZ 019.,?!\n'水é😀", min_size=1, max_size=20).map(lambda text: f"a{text}z")


def turns_of(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def prompt_of(turns, template):
    conversation = template.copy()
    for i, turn in enumerate(turns):
        conversation.append_message(conversation.roles[i % 2], turn["value"])
    return conversation.get_prompt()


@settings(max_examples=6)
@given(texts=st.lists(TEXT, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
@pytest.mark.parametrize(
    ("version", "tokenizer"),
    [
        ("v1", SENTENCEPIECE),
        ("llama_2", SENTENCEPIECE),
        ("chatml_direct", CHAT),
        ("qwen_2", CHAT),
        ("v1", CHAT),
    ],
)
def test_targets_are_the_answers_and_their_end_marks(version, tokenizer, texts):
    template = training_template(version)
    turns = turns_of(f"<image>\n{texts[0]}", *texts[1:])
    ids, labels, mismatch = preprocess(turns, tokenizer, template, has_image=True)
    assert mismatch is None
    assert ids.tolist() == tokenizer_image_token(prompt_of(turns, template), tokenizer)
    spans = spans_of(ids.tolist(), labels.tolist())
    end = template.sep2 or template.sep
    answers = [tokenizer.decode(ids[start:stop]).strip() for start, stop in spans]
    assert [answer.removesuffix(end).strip() for answer in answers] == texts[1::2]
    assert all(answer.endswith(end) for answer in answers)
    without = preprocess(turns_of(*texts), tokenizer, template)
    assert IMAGE_TOKEN_INDEX not in without.input_ids
    assert (without.labels >= 0).sum() == (labels >= 0).sum()


def test_an_empty_answer_is_no_target_of_chatml_and_masks_a_sample_of_v1():
    turns = turns_of("one", "", "two", "three")
    _, labels, _ = preprocess(turns, CHAT, training_template("chatml_direct"))
    assert CHAT.decode(labels[labels >= 0]) == "three<|im_end|>"
    found = preprocess(turns_of("one", "two", "three", ""), SENTENCEPIECE, training_template("v1"))
    assert found.mismatch is not None and not (found.labels >= 0).any()


def test_a_line_break_before_an_answer_belongs_to_it():
    """The tokens of the break that ends the role and of the one that starts the answer may be one."""
    _, labels, _ = preprocess(turns_of("one", "\ntwo"), CHAT, training_template("mpt"))
    assert CHAT.decode(labels[labels >= 0]) == "\ntwo<|im_end|>"


def test_the_pad_token_of_training_does_not_end_texts(tmp_path):
    shutil.copytree(BPE, tmp_path / "base")
    path = tmp_path / "base" / "tokenizer_config.json"
    path.write_text(path.read_text("utf-8").replace("{", '{"pad_token": "<|im_end|>",', 1), "utf-8")
    assert load_tokenizer(tmp_path / "base").pad_token == "<|im_end|>"  # as SmolLM2's
    tokenizer = training_tokenizer(tmp_path / "base", 77)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.model_max_length == 77


def test_text_is_cut_at_the_longest_length_and_images_are_not():
    tokenizer = load_tokenizer(DATA / "ckpt_llava15", model_max_length=60)
    template = training_template("v1")
    text = preprocess(turns_of("one two", "three"), tokenizer, template)
    assert len(text.input_ids) == len(text.labels) == 60
    image = preprocess(turns_of("<image>\none two", "three"), tokenizer, template, has_image=True)
    assert len(image.input_ids) > 60 and (image.labels >= 0).any()


@pytest.mark.parametrize("version", ["v0", "v0.5", "vicuna", ""])
def test_unknown_versions_mean_vicuna(version):
    assert conversation_name(version) == "vicuna_v1"


@pytest.mark.parametrize(
    ("version", "turns", "kind"),
    [
        ("v1", [{"from": "system", "value": "x"}, *turns_of("a", "b")], "role"),
        ("llama_2", [*turns_of("a"), *turns_of("a", "b")], "order"),
        ("plain", turns_of("a", "b"), "order"),
        ("plain", turns_of("<image>", "b", "c", "d"), "order"),
    ],
)
def test_conversations_that_do_not_fit_the_template_are_refused(version, turns, kind):
    with pytest.raises(BadSample) as error:
        preprocess(turns, SENTENCEPIECE, training_template(version), has_image=version == "plain")
    assert error.value.kind == kind


def test_image_tags_move_to_the_front_of_their_turn():
    turns = turns_of("What is\n<image>", "See.", "And <image> this <image>?", "That.")
    moved = preprocess_multimodal(turns, training_template("v1_mmtag"), mm_use_im_start_end=True)
    assert [turn["value"] for turn in moved] == [
        "<Image><im_start><image><im_end></Image>\nWhat is",
        "See.",
        "<Image><im_start><image><im_end></Image>\nAnd  this ?",
        "That.",
    ]
    assert turns[0]["value"] == "What is\n<image>"  # the sample itself is not changed
