"""sentencepiece's rules in terms of the `tokenizers` library, equal to sentencepiece by test.

Pieces and scores become a model, the treatment of spaces a normaliser and a pre-tokeniser; decoding is done
here. Not known here: which files a checkpoint has, and which tokens are special (`llava.model.tokenizer`).
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llava.model import sentencepiece_file as spm

SPACE = "\u2581"  # sentencepiece's visible space


class SentencePieceTokenizer(PreTrainedTokenizerFast):
    """A `PreTrainedTokenizerFast` that also decodes as sentencepiece does.

    The difference to the stock decoder: in a run of byte tokens that is not valid UTF-8 as a whole (an answer
    cut in the middle of a character), the valid characters survive and every stray byte becomes one U+FFFD.
    """

    model_input_names = ["input_ids", "attention_mask"]
    legacy: bool = True
    silent_ids: frozenset[int] = frozenset()  # control pieces not listed as special decode to nothing

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        """ids -> text. One leading space, the one sentencepiece puts before every text, is dropped."""
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        skip = self.silent_ids.union(self.all_special_ids if skip_special_tokens else ())
        added = self.added_tokens_decoder
        text: list[str] = []
        raw = bytearray()
        for index in ids:
            token = None if index in skip else self._tokenizer.id_to_token(index)
            if token is None:
                continue
            byte = None if index in added else _byte_of(token)
            if byte is not None:
                raw.append(byte)
                continue
            # sentencepiece drops the first piece's visible space only; one from byte pieces is the text's own
            token = token if text or raw else token.removeprefix(SPACE)
            text.append(_decode_utf8(raw))
            raw.clear()
            text.append(token if index in added else token.replace(SPACE, " "))
        text.append(_decode_utf8(raw))
        return "".join(text)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._decode(self.convert_tokens_to_ids(tokens))


def _byte_of(token: str) -> int | None:
    """The value of a byte piece such as `<0x0A>`, else None."""
    is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return int(token[3:5], 16) if is_byte else None


def _decode_utf8(raw: bytes | bytearray) -> str:
    """Valid characters, and one U+FFFD for each byte that starts none (Python would merge some of them)."""
    text, at = [], 0
    while at < len(raw):
        for size in (1, 2, 3, 4):
            try:
                text.append(bytes(raw[at : at + size]).decode("utf-8"))
            except UnicodeDecodeError:
                continue
            at += size
            break
        else:
            text.append("\ufffd")
            at += 1
    return "".join(text)


def build_model(spec: spm.SentencePieceFile, path: Path) -> models.Model:
    """The `tokenizers` model with sentencepiece's pieces, scores and byte fallback."""
    vocab = {piece.text: index for index, piece in enumerate(spec.pieces)}
    if len(vocab) != len(spec.pieces):
        raise ValueError(f"{path} names a piece twice, which no trainer writes: fetch it again.")
    if spec.suffix_whitespace or not spec.escape_whitespaces:
        raise ValueError(f"{path} writes spaces in a way that is not supported (as a suffix, or unescaped).")
    if spec.model_type == spm.BPE:
        return models.BPE(
            vocab,
            bpe_merges(spec.pieces),
            unk_token=spec.piece(spec.unk_id),
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    if spec.model_type == spm.UNIGRAM:
        scores = [(piece.text, piece.score) for piece in spec.pieces]
        return models.Unigram(scores, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    raise ValueError(f"{path} is a {spec.model_type_name} model; only bpe and unigram are supported.")


def bpe_merges(pieces: Iterable[spm.Piece]) -> list[tuple[str, str]]:
    """The merge list equivalent to sentencepiece's scores.

    sentencepiece joins the neighbours whose union has the best score, leftmost first; a merge list joins the
    pair that comes first in it. So: all ways to cut each piece in two pieces, pieces in order of score. Among
    the cuts of one piece the longer left part comes first, because in a run ("aaaaa") the pieces to the left
    have already grown.
    """
    joined = (spm.NORMAL, spm.USER_DEFINED, spm.UNUSED)
    known = {piece.text: piece.score for piece in pieces if piece.kind in joined}
    return [
        (text[:cut], text[cut:])
        for text in sorted(known, key=known.__getitem__, reverse=True)
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in known and text[cut:] in known
    ]


def text_rules(
    spec: spm.SentencePieceFile, legacy: bool
) -> tuple[normalizers.Normalizer, pre_tokenizers.PreTokenizer]:
    """How a chunk's spaces are treated before its pieces are sought; `legacy` as in `load_tokenizer`."""
    everywhere = spec.add_dummy_prefix and legacy
    at_the_start = spec.add_dummy_prefix and not legacy
    rules: list[normalizers.Normalizer] = []
    splits: list[pre_tokenizers.PreTokenizer] = []
    if spec.charsmap:
        rules.append(normalizers.Precompiled(spec.charsmap))
    if spec.remove_extra_whitespaces:
        # \A and \z: in this dialect ^ and $ also match at line ends. A leading space stays where it will do
        # for the prefix, because removing it would move the chunk away from the start.
        ends = rf"[ {SPACE}]+\z" if at_the_start else rf"\A +|[ {SPACE}]+\z"
        rules += [normalizers.Replace(Regex(ends), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if everywhere:
        rules.append(normalizers.Prepend(SPACE))
    rules.append(normalizers.Replace(" ", SPACE))
    if at_the_start:
        # Only Metaspace knows where a chunk lies. It leaves out the prefix where the text already starts with
        # its own symbol; where that is wrong, it is given a symbol that cannot occur any more (all spaces
        # have been replaced), and a second one turns that into the visible space.
        symbol = SPACE if spec.remove_extra_whitespaces else " "
        splits.append(pre_tokenizers.Metaspace(replacement=symbol, prepend_scheme="first", split=False))
        splits.append(pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False))
    if spec.model_type == spm.UNIGRAM:
        # tokenizers' unigram model also finds control and byte pieces that are spelled out in the text;
        # sentencepiece does not. Cutting behind their first character hides them.
        names = [piece.text for piece in spec.pieces if piece.kind in (spm.CONTROL, spm.UNKNOWN, spm.BYTE)]
        cuts = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names if len(name) > 1)
        splits.append(pre_tokenizers.Split(Regex(cuts), "isolated"))
    return normalizers.Sequence(rules), pre_tokenizers.Sequence(splits)
