"""Read a sentencepiece `tokenizer.model` without sentencepiece.

The file is one protocol-buffer message. What a tokenizer needs of it is a list of pieces and about ten
settings, so it is parsed here in a few lines: loading a checkpoint then depends neither on `sentencepiece`
nor on `protobuf`, whose generated code breaks between major versions.

Not known here: how text becomes pieces (`llava.model.tokenizer`), and the trainer's other settings.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True)
class Piece:
    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclass
class SentencePieceFile:
    """What a `tokenizer.model` says; the defaults are those of the format."""

    pieces: list[Piece] = field(default_factory=list)
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    suffix_whitespace: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    charsmap: bytes = b""  # normalisation table, empty = identity
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    @property
    def model_type_name(self) -> str:
        return _MODEL_TYPES.get(self.model_type, str(self.model_type))

    def piece(self, index: int) -> str | None:
        """Text of piece `index`; None where the model has none (ids of absent special pieces are -1)."""
        return self.pieces[index].text if 0 <= index < len(self.pieces) else None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one message; length-delimited and fixed-width values stay bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("a field runs past the end")
        yield number, data[at : at + size]
        at += size


def _signed(value: int) -> int:
    """Protocol buffers write a negative int32 as its 64-bit two's complement."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = value.decode("utf-8")
        elif number == 2:
            score = struct.unpack("<f", value)[0]
        elif number == 3:
            kind = value
    return Piece(text, score, kind)


def _trainer(spec: SentencePieceFile, data: bytes) -> None:
    ids = {40: "unk_id", 41: "bos_id", 42: "eos_id", 43: "pad_id"}
    for number, value in _fields(data):
        if number == 3:
            spec.model_type = value
        elif number == 24:
            spec.suffix_whitespace = bool(value)
        elif number == 35:
            spec.byte_fallback = bool(value)
        elif number in ids:
            setattr(spec, ids[number], _signed(value))


def _normalizer(spec: SentencePieceFile, data: bytes) -> None:
    flags = {3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"}
    for number, value in _fields(data):
        if number == 2:
            spec.charsmap = value
        elif number in flags:
            setattr(spec, flags[number], bool(value))


def read_sentencepiece(path: str | Path) -> SentencePieceFile:
    """Parse a sentencepiece model file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no sentencepiece model (a Git LFS pointer, say, or cut short), with its name.
    """
    path = Path(path)
    data = path.read_bytes()
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the tokenizer: run `git lfs pull` in its folder.")
    spec = SentencePieceFile()
    try:
        for number, value in _fields(data):
            if number == 1:
                spec.pieces.append(_piece(value))
            elif number == 2:
                _trainer(spec, value)
            elif number == 3:
                _normalizer(spec, value)
    except (ValueError, IndexError, AttributeError, TypeError, struct.error) as error:
        raise ValueError(f"{path} is no readable sentencepiece model ({error}): fetch it again.") from error
    if not spec.pieces:
        raise ValueError(f"{path} is not a sentencepiece model (it holds no pieces): fetch it again.")
    return spec
