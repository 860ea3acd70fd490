"""Answer normalization of the official scorers, reimplemented from their behavior.

    evalai("The 'T-shirt', 2 items")  ->  "'t shirt' 2 items"

The four rules differ in small ways, and their bugs are reproduced, because scores are comparable only under
the same rule: `evalai` (TextVQA's scorer, and what LLaVA sends to the VQAv2 and VizWiz servers),
`vqa_official` (VQAv2's own evaluation), `vizwiz_official` (the same code with typographic apostrophes in its
table) and `gqa` (LLaVA's conversion). `cleaned` and `yes_or_no` read answers as a person does; no official
rule uses them. Pure functions of one string.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # no . ' : $ % & * #
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")  # the official look-behind has a typo and excludes nothing
_MAX_FULL_STOPS = 32  # the official code passes a regex flag as `count`
_NUMBERS = {"none": "0"} | {
    word: str(value)
    for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_ARTICLES = {"a", "an", "the"}

_WITHOUT_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll
    how's I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't
    shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll
    that's there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't
    would've wouldn't y'all you'd you'll you're you've
""".split()
_ONE_OF_TWO_APOSTROPHES = """
    couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've
""".split()
_SPECIAL = """
    let's:let's she's:she's somebody'd:somebodyd ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at
    yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've
""".split()
_ASCII_KEYS_IN_VIZWIZ = {"couldn'tve", "hadn'tve"}
_ASCII_IN_VIZWIZ = {"ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've"}


def _contractions() -> dict[str, str]:
    table = dict(pair.split(":") for pair in _SPECIAL)
    table |= {word.replace("'", ""): word for word in _WITHOUT_APOSTROPHE}
    for word in _ONE_OF_TWO_APOSTROPHES:
        first, second, third = word.split("'")
        table[f"{first}{second}'{third}"] = table[f"{first}'{second}{third}"] = word
    return table


CONTRACTIONS: Mapping[str, str] = _contractions()
# Words are lower-cased before they are looked up, so Im, Ive ... never match; they are in the official table.
VIZWIZ_CONTRACTIONS: Mapping[str, str] = {
    key if key in _ASCII_KEYS_IN_VIZWIZ else key.replace("'", "\u2019"): word
    if word in _ASCII_IN_VIZWIZ
    else word.replace("'", "\u2019")
    for key, word in CONTRACTIONS.items()
}


def evalai(text: str) -> str:
    """Normalize as LLaVA and MMF do ("EvalAI"), for TextVQA's scorer and the VQAv2 and VizWiz uploads."""
    return digits_and_articles(punctuation(one_line(evalai_tokenize(text))))


def evalai_tokenize(text: str) -> str:
    """Apply the first stage of `evalai`: lower case, no `,` and `?`, `'s` as a separate word."""
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def vqa_official(text: str) -> str:
    """Normalize as VQAv2's evaluation does for questions whose reference answers differ."""
    return digits_and_articles(punctuation(one_line(text)))


def vizwiz_official(text: str) -> str:
    """Normalize as VizWiz's evaluation does for the prediction; reference answers stay unmodified."""
    return digits_and_articles(punctuation(one_line(text)), VIZWIZ_CONTRACTIONS)


def gqa(text: str) -> str:
    """Convert as LLaVA does for GQA: remove final periods, lower-case, nothing else."""
    return text.rstrip(".").lower()


def punctuation(text: str) -> str:
    """Delete punctuation or replace it by spaces, then delete periods that no digit follows.

    A mark is deleted everywhere if it is next to a space anywhere, or if the text contains a number such as
    1,000; otherwise each occurrence becomes a space. Only the first 32 periods are deleted.
    """
    result, glued = text, _DIGIT_COMMA_DIGIT.search(text) is not None
    for mark in _PUNCTUATION:
        delete = glued or mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if delete else " ")
    return _FULL_STOP.sub("", result, count=_MAX_FULL_STOPS)


def digits_and_articles(text: str, contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    """Lower-case, write number words as digits, drop articles, restore apostrophes, use single spaces."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(prediction: str, references: Sequence[str]) -> float:
    """Return the VQA accuracy in [0, 1]: mean over references of min(1, equal *other* references / 3).

    Both sides must already be normalized. 0, 1, 2, 3, 4 equal ones of ten give 0, 0.3, 0.6, 0.9, 1.
    """
    equal = references.count(prediction)
    total = equal * min(1.0, (equal - 1) / 3) + (len(references) - equal) * min(1.0, equal / 3)
    return total / len(references) if equal else 0.0


def one_line(text: str) -> str:
    """Replace line breaks and tabs by spaces, then strip."""
    return text.replace("\n", " ").replace("\t", " ").strip()


# -- what a person reads ----------------------------------------------------------------------------------
_SPECIAL_TOKEN = re.compile(
    r"</?s>|<pad>|<unk>|<\|[^|<>\s]*\|>|<image>|[\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]"
)
_PREFIX = re.compile(
    r"^(?:(?:assistant|(?:the )?(?:final |correct )?answer)\s*(?::|\bis\b:?)"
    r"|(?:正确)?答案[是为]?\s*:?|选项?\s*:?(?=\s*[A-E](?![a-z])))\s*",
    re.I,
)
# Chinese keyboards write letters and marks of twice the width.
_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {ord("。"): ".", ord("、"): ","}
_QUOTED = re.compile(r"^(\*\*|__|[\"'`*])(.*)\1$", re.S)
_CHINESE = dict.fromkeys("是 有 对".split(), "yes") | dict.fromkeys("否 不 不是 没有 没 无".split(), "no")
_UNSURE = re.compile(
    r"\b(?:not sure|unsure|(?:do not|don't) know|unknown|unclear)\b|\b(?:cannot|can't|unable to)\b"
)


def is_blank(text: str) -> bool:
    """Return True for a text that is empty but for spaces and special tokens."""
    return not _SPECIAL_TOKEN.sub("", text).strip()


def cleaned(text: str) -> str:
    """Remove what is not part of an answer: special tokens, "Answer:" in front, quotes or stars around it.

    Invisible marks are removed as well, and full-width letters and marks become ASCII.
    """
    text = _PREFIX.sub("", _SPECIAL_TOKEN.sub(" ", text).translate(_HALF_WIDTH).strip())
    while quoted := _QUOTED.match(text):
        text = quoted[2].strip()
    return text


def yes_or_no(text: str) -> str | None:
    """Return yes or no as a person reads the first sentence that says either; None for none or both."""
    text = cleaned(text)
    if text.rstrip(".,!的") in _CHINESE:
        return _CHINESE[text.rstrip(".,!的")]
    for sentence in re.split(r"[.!?\n]+", text.lower().replace("\u2019", "'")):
        words = re.findall(r"[a-z']+", sentence)
        if said := _said(words):
            return said if said in ("yes", "no") else None
    return None


def _said(words: list[str]) -> str | None:
    """Return yes, no, or "unclear" for the words of a sentence; None if it says neither."""
    is_yes, is_no = ({"yes", "yeah", "yep", "y"} & {*words}, {"no", "nope", "n"} & {*words})
    if is_yes or is_no:
        return "unclear" if is_yes and is_no else "yes" if is_yes else "no"
    if _UNSURE.search(" ".join(words)):
        return "unclear"
    if any(word in ("not", "none", "never", "nothing") or word.endswith("n't") for word in words):
        return "no"
    stated = len(words) > 2 and {"is", "are", "has", "have", "contains", "shows", "appears"} & {*words}
    return "yes" if stated else None
