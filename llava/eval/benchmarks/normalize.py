"""How official scorers rewrite answers before they compare them, restated from their behaviour.

    evalai("The 'T-shirt', 2 items")  ->  "'t shirt' 2 items"

Four rules that differ in small ways, each with its quirks, because a score is only comparable when these are:
`evalai` (TextVQA's scorer, and what LLaVA sends to the VQAv2 and VizWiz servers), `vqa_official` (VQAv2's own
evaluation), `vizwiz_official` (the same code with typographic apostrophes in its table) and `gqa` (LLaVA's
conversion). Pure functions of one string; none of them reads a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # no . ' : $ % & * #
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")  # the official look-behind is mistyped and never excludes anything
_FULL_STOPS_AT_MOST = 32  # a regex flag that landed in the place of `count`
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
_SPECIAL = {
    "let's": "let's",
    "she's": "she's",
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
}
_ASCII_KEYS_IN_VIZWIZ = {"couldn'tve", "hadn'tve"}
_ASCII_IN_VIZWIZ = {"ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've"}


def _contractions() -> dict[str, str]:
    table = dict(_SPECIAL)
    for word in _WITHOUT_APOSTROPHE:
        table[word.replace("'", "")] = word
    for word in _ONE_OF_TWO_APOSTROPHES:
        first, second, third = word.split("'")
        table[f"{first}{second}'{third}"] = table[f"{first}'{second}{third}"] = word
    return table


CONTRACTIONS: Mapping[str, str] = _contractions()
# Words are lower-cased before they are looked up, so that Im, Ive ... are never found; they are kept as they
# are in the official table.
VIZWIZ_CONTRACTIONS: Mapping[str, str] = {
    key if key in _ASCII_KEYS_IN_VIZWIZ else key.replace("'", "\u2019"): word
    if word in _ASCII_IN_VIZWIZ
    else word.replace("'", "\u2019")
    for key, word in CONTRACTIONS.items()
}


def evalai(text: str) -> str:
    """The answer processor of LLaVA and MMF ("EvalAI"): TextVQA's comparison, VQAv2's and VizWiz's upload."""
    text = _spaces(evalai_tokenize(text)).strip()
    return digits_and_articles(punctuation(text))


def evalai_tokenize(text: str) -> str:
    """First stage of `evalai`: lower case, no `,` and `?`, `'s` a word of its own."""
    return text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()


def vqa_official(text: str) -> str:
    """The rule of VQAv2's evaluation; it applies to a question only if its human answers differ."""
    return digits_and_articles(punctuation(_spaces(text).strip()))


def vizwiz_official(text: str) -> str:
    """The rule of VizWiz's evaluation; it applies to the prediction only, human answers stay as they are."""
    return digits_and_articles(punctuation(_spaces(text).strip()), VIZWIZ_CONTRACTIONS)


def gqa(text: str) -> str:
    """LLaVA's conversion for GQA, nothing else: final full stops off, lower case."""
    return text.rstrip(".").lower()


def punctuation(text: str) -> str:
    """Delete or space out punctuation, then delete full stops that no digit follows.

    A mark is deleted everywhere if anywhere it stands next to a space, or if the text holds a number such as
    1,000; else each becomes a space. Only the first 32 full stops go.
    """
    result, glued = text, _DIGIT_COMMA_DIGIT.search(text) is not None
    for mark in _PUNCTUATION:
        delete = glued or mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if delete else " ")
    return _FULL_STOP.sub("", result, count=_FULL_STOPS_AT_MOST)


def digits_and_articles(text: str, contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    """Lower case, number words as digits, no articles, apostrophes put back, single spaces."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(prediction: str, humans: list[str]) -> float:
    """VQA accuracy: mean over the humans of min(1, agreeing *other* humans / 3); in [0, 1].

    Both sides as they are to be compared. Agreement of 0, 1, 2, 3, 4 of ten gives 0, 0.3, 0.6, 0.9, 1.
    """
    agree = humans.count(prediction)
    total = agree * min(1.0, (agree - 1) / 3) + (len(humans) - agree) * min(1.0, agree / 3)
    return total / len(humans) if agree else 0.0


def _spaces(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ")
