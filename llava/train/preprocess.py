"""Turn one LLaVA conversation into `input_ids` and `labels`.

    template = training_template("v1")
    turns = preprocess_multimodal(sample["conversations"], template, mm_use_im_start_end=False)
    ids, labels = preprocess(turns, tokenizer, template, has_image=True)

Only the assistant's answers are targets; everything else has the label -100. How they are found depends on
the template:

- `###` templates (`llava_v0`, `v0_mmtag`, `default`) write their own text, and the markers of roles are
  targets, as in LLaVA.
- `v1` and `llama_2` templates count the tokens of each round, as LLaVA does. Where the counts do not add up
  (a "tokenization mismatch"), the whole sample is masked.
- ChatML templates (`mpt`, `chatml_direct`, `mistral_direct`, `qwen_*`) and tokenizers that are not
  sentencepiece locate each answer in the text instead. LLaVA counts there too and masks everything.
- `plain` keeps only the caption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
)
from llava.conversation import Conversation, SeparatorStyle, conv_templates
from llava.mm_utils import tokenizer_image_token

Turn = dict[str, str]
Encode = Callable[[str], list[int]]


class BadSample(ValueError):
    """A sample that cannot be trained on; `kind` groups the reasons in counts."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind

    def __reduce__(self) -> tuple:
        return BadSample, (self.kind, str(self))


class Preprocessed(NamedTuple):
    """Ids and labels of a conversation.

    `mismatch` is (counted tokens, real tokens) if the sample is masked because the counts differ.
    """

    input_ids: torch.Tensor  # (L,) int64, -200 for an image
    labels: torch.Tensor  # (L,) int64, -100 where there is no target
    mismatch: tuple[int, int] | None = None


def training_tokenizer(folder: str | Path, model_max_length: int) -> Any:
    """Load a tokenizer for training.

    The pad token is never the end of a text, where the folder has another one: padding gets no attention.

    Raises:
        FileNotFoundError, ValueError: as `load_tokenizer`.
    """
    from llava.model.tokenizer import load_tokenizer  # imports transformers

    tokenizer = load_tokenizer(folder, model_max_length=model_max_length)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def is_padding(ids: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Tell which ids are the pad token, as in LLaVA; none are where that also ends texts."""
    pad, eos = tokenizer.pad_token_id, getattr(tokenizer, "eos_token_id", None)
    return torch.zeros_like(ids, dtype=torch.bool) if pad == eos else ids == pad


def conversation_name(version: str) -> str:
    """Return the template of `--version`: unknown names, v0 and v0.5 mean vicuna_v1, as in LLaVA."""
    return version if version in conv_templates and version not in ("v0", "v0.5") else "vicuna_v1"


def training_template(version: str) -> Conversation:
    """Return the template that `conversation_name` names."""
    return conv_templates[conversation_name(version)]


def preprocess_multimodal(
    turns: Sequence[Turn], template: Conversation, mm_use_im_start_end: bool = False
) -> list[Turn]:
    """Put `<image>` and a line break in front of every turn that contains it.

    A turn keeps one tag however many it has. The `mmtag` templates and `mm_use_im_start_end` enclose it.
    """
    tag = DEFAULT_IMAGE_TOKEN
    marked = f"<Image>{tag}</Image>" if "mmtag" in template.version else tag
    if mm_use_im_start_end:
        marked = marked.replace(tag, f"{DEFAULT_IM_START_TOKEN}{tag}{DEFAULT_IM_END_TOKEN}")
    moved = []
    for turn in turns:
        value = turn["value"]
        if tag in value:
            text = value.replace(tag, "").strip()
            value = f"{tag}\n{text}".strip().replace(tag, marked)
        moved.append({**turn, "value": value})
    return moved


def preprocess(
    turns: Sequence[Turn], tokenizer: Any, template: Conversation, has_image: bool = False
) -> Preprocessed:
    """Tokenize a conversation and mask everything but the answers.

    Args:
        turns: `{"from": "human" or "gpt", "value": text}`, after `preprocess_multimodal`. A first turn of
            the assistant is dropped.
        tokenizer: without an image, the ids are cut at its `model_max_length`; with one, the collator cuts.
        has_image: whether `<image>` stands for an image.

    Raises:
        BadSample: a role is unknown, or the turns do not alternate.
    """
    if has_image:

        def encode(text: str) -> list[int]:
            return tokenizer_image_token(text, tokenizer)
    else:

        def encode(text: str) -> list[int]:
            return list(tokenizer(text).input_ids)

    style = template.sep_style
    if style is SeparatorStyle.PLAIN:
        return _plain(turns, tokenizer, template)
    if style is SeparatorStyle.SINGLE:
        text, ids, spans = _with_markers(turns, template, encode)
        mismatch = None
    else:
        conversation = _alternate(turns, template)
        text = conversation.get_prompt()
        ids = encode(text)
        counts_rounds = style in (SeparatorStyle.TWO, SeparatorStyle.LLAMA_2) and hasattr(tokenizer, "legacy")
        if counts_rounds:
            limit = None if has_image else tokenizer.model_max_length
            spans, mismatch = _count_rounds(text, ids[:limit], conversation, tokenizer, encode)
        else:
            spans, mismatch = _locate_answers(conversation, ids, encode), None
    if not has_image:
        ids = ids[: tokenizer.model_max_length]
    return Preprocessed(*_tensors(ids, spans), mismatch)


def _tensors(ids: list[int], spans: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    input_ids = torch.tensor(ids, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for start, end in spans:
        labels[start:end] = input_ids[start:end]
    return input_ids, labels


def _plain(turns: Sequence[Turn], tokenizer: Any, template: Conversation) -> Preprocessed:
    """Keep the image and the caption; the question is dropped."""
    if len(turns) != 2 or DEFAULT_IMAGE_TOKEN not in turns[0]["value"]:
        raise BadSample(
            "order",
            f"{len(turns)} turns, but --version plain needs a question with <image> and a caption. Use "
            "another --version for conversations and text",
        )
    text = DEFAULT_IMAGE_TOKEN + turns[1]["value"] + template.sep
    ids = tokenizer_image_token(text, tokenizer)
    start = len(tokenizer_image_token(DEFAULT_IMAGE_TOKEN, tokenizer))
    return Preprocessed(*_tensors(ids, [(start, len(ids))]))


def _with_markers(
    turns: Sequence[Turn], template: Conversation, encode: Encode
) -> tuple[str, list[int], list[tuple[int, int]]]:
    """Write `### Role: text` blocks; all tokens but the questions' texts are targets."""
    names = {"human": template.roles[0], "gpt": template.roles[1]}
    header = f"{template.system}\n\n"
    blocks = [f"### {names.get(turn['from'].lower(), 'unknown')}: {turn['value']}\n" for turn in turns]
    text = header + "".join(blocks) + "### "
    ids = encode(text)
    spans, begin = [], len(encode(header))
    place = begin
    for turn, block in zip(turns, blocks, strict=True):
        length = len(encode(block))
        if turn["from"] == "human":
            # The "###" is a target; the rest of a question is not.
            spans.append((begin, min(place + 2, len(ids))))
            begin = place + length
        place += length
    return text, ids, [*spans, (begin, len(ids))]


def _alternate(turns: Sequence[Turn], template: Conversation) -> Conversation:
    """Return the conversation of turns that alternate, without a first answer."""
    roles = {"human": template.roles[0], "gpt": template.roles[1]}
    for number, turn in enumerate(turns, 1):
        if turn["from"] not in roles:
            raise BadSample(
                "role", f"turn {number} is from {turn['from']!r}, expected 'human' or 'gpt'. Fix its \"from\""
            )
    if turns and turns[0]["from"] == "gpt":
        turns = turns[1:]
    conversation = template.copy()
    conversation.messages = []
    for i, turn in enumerate(turns):
        expected = ("human", "gpt")[i % 2]
        if turn["from"] != expected:
            raise BadSample(
                "order",
                f"two turns in a row are from {turn['from']!r}. Questions and answers must alternate. Merge "
                "or remove one",
            )
        conversation.append_message(roles[turn["from"]], turn["value"])
    return conversation


def _count_rounds(
    text: str, ids: list[int], template: Conversation, tokenizer: Any, encode: Encode
) -> tuple[list[tuple[int, int]], tuple[int, int] | None]:
    """Find answers by the number of tokens of each round, as LLaVA does."""
    two = template.sep_style is SeparatorStyle.TWO
    opening = f"{template.sep}{template.roles[1]}: " if two else "[/INST] "
    # Tokens that a round has more when tokenized alone than in the text: with legacy=False, `</s>USER` has no
    # space before USER. LLaVA assumes one; a vocabulary with a piece for the word with its space has -1.
    extra = 0
    if two and not tokenizer.legacy:
        role = template.roles[0]
        extra = len(tokenizer(role).input_ids) + 1 - len(tokenizer(template.sep2 + role).input_ids)
    spans, place = [], 1
    for number, block in enumerate(text.split(template.sep2)):
        question, *answer = block.split(opening)
        if not block or len(answer) != 1:
            break
        # Not part of the question: BOS, and the space after the colon, which belongs to the answer's first
        # token.
        length, skipped = len(encode(block)), len(encode(question + opening)) - 2
        if number:
            length, skipped = length - extra, skipped - extra
        spans.append((place + skipped, place + length))
        place += length
    real = int((~is_padding(torch.tensor(ids), tokenizer)).sum())
    if place < tokenizer.model_max_length and place != real:
        return [], (place, real)
    return spans, None


def _locate_answers(template: Conversation, ids: list[int], encode: Encode) -> list[tuple[int, int]]:
    """Find each answer with its end mark by the text in front of it."""
    spans = []
    prefix = template.copy()
    prefix.messages = []
    for number, (role, value) in enumerate(template.messages):
        if number % 2 and value:
            prefix.append_message(role, None)
            start = _tokens_before(prefix.get_prompt(), ids, encode)
            prefix.messages.pop()
            prefix.append_message(role, value)
            end = prefix.get_prompt()
            if template.sep_style is SeparatorStyle.CHATML:
                end = end.removesuffix("\n")
            spans.append((start, _tokens_before(end, ids, encode)))
        else:
            prefix.append_message(role, value)
    return spans


def _tokens_before(text: str, ids: list[int], encode: Encode) -> int:
    """Return how many of `ids` lie wholly in front of the end of a text that they begin with."""
    count = 0
    for found, wanted in zip(encode(text), ids, strict=False):
        if found != wanted:
            break
        count += 1
    return count
