"""The tokenizer equals sentencepiece, on the references and on arbitrary text."""

import io
import json
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from llava.mm_utils import tokenizer_image_token
from llava.model.tokenizer import load_tokenizer

DATA = Path(__file__).parents[1] / "data/model"
FOLDER = DATA / "ckpt_llava15s"
SPECIAL = ("<s>", "</s>", "<unk>")
GOLDEN = json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))
TEXTS = [
    "Answer in one word: is there a red circle in the image? Yes or no.",
    "The quick brown fox jumps over the lazy dog, and  the dog   sleeps.",
    "aaaa bbbb ==== ---- (1, 2, 3) [x] {y} <z> #7 café naïve",
] * 40


@cache
def reference():
    return sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))


@cache
def loaded(legacy):
    return load_tokenizer(FOLDER, legacy=legacy)


def train(folder, **options):
    """A small sentencepiece model in `folder`, and sentencepiece itself on it."""
    buffer = io.BytesIO()
    options = {"normalization_rule_name": "identity", "byte_fallback": True, "vocab_size": 400} | options
    fixed = {"hard_vocab_limit": False, "minloglevel": 3, "num_threads": 1}
    texts = iter(TEXTS)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=buffer, **fixed, **options)
    (folder / "tokenizer.model").write_bytes(buffer.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())


def slow_ids(sp, text, legacy):
    """What the slow Llama tokenizer did: cut at special tokens, then sentencepiece chunk by chunk."""
    ids, at = [sp.bos_id()], 0
    for match in [*re.finditer("|".join(map(re.escape, SPECIAL)), text), None]:
        chunk = text[at : match.start() if match else None]
        if chunk and (legacy or at == 0):
            ids += sp.encode(chunk)
        elif chunk:
            # after a special token there is no leading space: encode after a piece that joins nothing
            ids += sp.encode("\n" + chunk)[len(sp.encode("\n")) :]
        if match:
            ids.append(sp.piece_to_id(match.group()))
            at = match.end()
    return ids


@pytest.mark.parametrize("name", sorted(GOLDEN["templates"]))
@pytest.mark.parametrize("turn", ["turn1", "turn2"])
def test_golden_prompts(name, turn):
    case = GOLDEN["templates"][name][turn]
    if "ids" in case:
        assert tokenizer_image_token(case["prompt"], loaded(False)) == case["ids"]["tiny_legacyF"]
    else:
        assert name in ("plain", "v0_plain")


@pytest.mark.parametrize("text", sorted(GOLDEN["extra"]))
def test_golden_texts(text):
    assert tokenizer_image_token(text, loaded(False)) == GOLDEN["extra"][text]["tiny_legacyF"]


@pytest.mark.parametrize("file", ["e2e.json", "e2e_vanilla.json"])
def test_golden_answers_decode(file):
    cases = json.loads((DATA / file).read_text(encoding="utf-8"))["cases"]
    answers = [loaded(None).decode(case["generated_ids"], skip_special_tokens=True) for case in cases]
    assert answers == [case["generated_text"] for case in cases]
    assert any("\ufffd" in answer for answer in answers)


BITS = ["  ", " the", "image", "</s>", "<s>", "<unk>", "\n", "日本", "🙂", "<0x0A>"]
ANY_TEXT = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="ab e=-\n\u2581<>/s", max_size=60),
    st.lists(st.sampled_from(BITS)).map("".join),
)


@pytest.mark.parametrize("legacy", [False, True])
@settings(deadline=None, max_examples=250)
@given(text=ANY_TEXT)
def test_ids_equal_sentencepiece(legacy, text):
    assert loaded(legacy)(text).input_ids == slow_ids(reference(), text, legacy)


@settings(deadline=None, max_examples=250)
@given(st.lists(st.integers(1, 639), max_size=24), st.booleans())
@example([197, 1, 131], False)
def test_decoding_equals_sentencepiece(ids, legacy):
    # Special ids are skipped before the pieces are joined, so two bytes around <s> make one character; for
    # sentencepiece <s> would part them. 0 is left out: sentencepiece prints a mark for unknown pieces.
    pieces = [i for i in ids if i not in (1, 2)]
    assert loaded(legacy).decode(ids, skip_special_tokens=True) == reference().decode(pieces)


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet=st.characters(exclude_characters="\u2581", codec="utf-8"), max_size=40))
def test_text_survives_the_round_trip(text):
    tokenizer = loaded(True)
    if not any(token in text for token in SPECIAL):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_special_tokens_are_explicit():
    tokenizer = load_tokenizer(FOLDER)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.unk_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.padding_side == "right" and tokenizer.legacy is False
    assert tokenizer.model_max_length == 2048
    assert load_tokenizer(FOLDER, model_max_length=77).model_max_length == 77
    assert tokenizer("hi</s>").input_ids[-1] == 2 and tokenizer("hi").input_ids[-1] != 2
    assert tokenizer.decode([1, *tokenizer("hi").input_ids[1:], 2]) == "<s> hi</s>"
    batch = tokenizer(["hi", "hi there"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][0, -1] == 0 and batch["attention_mask"][0, -1] == 0


def test_folder_with_the_model_file_alone(tmp_path):
    shutil.copy(FOLDER / "tokenizer.model", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.legacy is True
    assert tokenizer("hi</s>USER").input_ids == slow_ids(reference(), "hi</s>USER", legacy=True)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "<unk>")


def test_added_tokens_keep_their_ids(tmp_path):
    shutil.copy(FOLDER / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 641, "<image>": 640}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [640, 641]
    assert tokenizer.pad_token_id == 641 and len(tokenizer) == 642
    assert tokenizer("hi<image>").input_ids[-1] == 640
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<image>": 700}))
    with pytest.raises(ValueError, match="'<image>' should have id 700.*640"):
        load_tokenizer(tmp_path)


def test_folder_with_tokenizer_json(tmp_path):
    vocab = {reference().id_to_piece(i): i for i in range(640)}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens([*SPECIAL, "<image>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer"}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": "left"}))
    tokenizer = load_tokenizer(tmp_path)
    letters = [vocab[letter] for letter in ("\u2581", "h", "i")]
    assert tokenizer("hi</s>").input_ids == [1, *letters, 2]
    assert tokenizer("<image>").input_ids == [1, 640]
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<unk>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    assert load_tokenizer(tmp_path)("<image>").input_ids == [640]


def test_ids_outside_the_vocabulary_decode_to_nothing():
    """Models with padded embeddings can generate ids that no tokenizer knows."""
    ids = loaded(False)("hello there").input_ids
    assert loaded(False).decode([*ids, 640, 31999], skip_special_tokens=True) == "hello there"


@pytest.mark.parametrize("remove_extra_whitespaces", [True, False])
def test_a_space_after_a_special_token_is_kept(tmp_path, remove_extra_whitespaces):
    train(tmp_path, model_type="bpe", remove_extra_whitespaces=remove_extra_whitespaces)
    tokenizer = load_tokenizer(tmp_path, legacy=False)
    for text in ("the dog</s> the fox", "the dog</s>the fox"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_pieces_that_the_trainer_was_told_to_keep(tmp_path):
    sp = train(tmp_path, model_type="bpe", user_defined_symbols=["<dog>", "fox"])
    tokenizer = load_tokenizer(tmp_path)
    for text in ("a <dog> and a fox", "<dog>fox", "foxes"):
        assert tokenizer(text).input_ids == [1, *sp.encode(text)]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_saved_and_loaded_again(tmp_path):
    load_tokenizer(FOLDER).save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    for text in ("hello there", "  two  spaces", "a</s>b"):
        assert again(text).input_ids == loaded(None)(text).input_ids
    assert (again.pad_token_id, again.bos_token_id) == (0, 1)


SAMPLES = [
    *("", " ", "   ", "hello world", "  lead", "trail  ", "in  the   middle", "a\nb", "\n x", "naïve fox\t."),
    *("aaaaaaa ====", "日本 café", "(1, 2) <0x41>", "x \u2581y", "<unk", "<0x0A><0x0a>"),
]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe", "remove_extra_whitespaces": False},
        {"model_type": "bpe"},
        {"model_type": "bpe", "byte_fallback": False, "vocab_size": 120},
        {"model_type": "bpe", "add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"},
        {"model_type": "char", "byte_fallback": False},
        {"model_type": "unigram", "vocab_size": 340},
        {"model_type": "unigram", "vocab_size": 340, "remove_extra_whitespaces": False},
    ],
    ids=str,
)
def test_other_kinds_of_models(tmp_path, options, legacy):
    sp = train(tmp_path, **options)
    tokenizer = load_tokenizer(tmp_path, legacy=legacy)
    for text in SAMPLES + TEXTS[:3]:
        assert tokenizer(text).input_ids == [1, *sp.encode(text)], text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"", "the file is empty"),
        (b"not a model at all", "Download it again"),
        ((FOLDER / "tokenizer.model").read_bytes()[:5000], "Download it again"),
    ],
    ids=["lfs", "empty", "text", "cut"],
)
def test_unreadable_model_file(tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=rf"tokenizer\.model.*{message}"):
        load_tokenizer(tmp_path)


def test_invalid_and_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{oops")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not valid JSON"):
        load_tokenizer(tmp_path)


EMPTY = {"__type": "AddedToken", "content": "", "lstrip": False, "normalized": True, "rstrip": False}


@pytest.mark.parametrize("empty", ["", EMPTY])
@pytest.mark.parametrize("place", ["config", "map", "additional", "extra", "decoder", "added", "json"])
def test_special_tokens_with_empty_content(tmp_path, empty, place):
    """The first conversions of LLaMA have them; they count as not given."""
    shutil.copy(FOLDER / "tokenizer.model", tmp_path)
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), empty)
    many = {"additional_special_tokens": [empty, empty], "extra_special_tokens": [empty]}
    file, content = {
        "config": ("tokenizer_config.json", roles),
        "map": ("special_tokens_map.json", roles),
        "additional": ("tokenizer_config.json", many),
        "extra": ("special_tokens_map.json", {"extra_special_tokens": {"image": empty}, **many}),
        "decoder": ("tokenizer_config.json", {"added_tokens_decoder": {"1": EMPTY, "640": EMPTY}}),
        "added": ("added_tokens.json", {"": 640}),
        "json": ("tokenizer.json", {"added_tokens": [{**EMPTY, "id": 1}]}),
    }[place]
    (tmp_path / file).write_text(json.dumps(content))
    found = load_tokenizer(tmp_path)
    assert (found.bos_token_id, found.eos_token_id, found.unk_token_id) == (1, 2, 0)
    text = "What is</s>it?"
    assert found(text).input_ids == load_tokenizer(FOLDER, legacy=True)(text).input_ids


def test_empty_special_tokens_over_tokenizer_json(tmp_path):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<unk>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": EMPTY, "eos_token": "", "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = load_tokenizer(tmp_path)
    assert (found.bos_token_id, found.eos_token_id, found.unk_token_id) == (1, 2, 0)
    assert found("a").input_ids == [1, 3]
