"""The data file of a training: LLaVA's JSON list, or one sample per line, checked as a whole and read lazily.

    samples = SampleFile("llava_v1_5_mix665k.json", template, image_folder="data")
    samples[3]["conversations"]
    samples.bad          # {index: BadSample}

Only positions and lengths are kept in memory, about 20 bytes per sample: a sample is read from the file when
it is used. What can be told without a tokenizer and without opening an image is checked here.
"""

from __future__ import annotations

import codecs
import json
import os
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle
from llava.train.preprocess import BadSample

_CHUNK = 1 << 20  # bytes read at once
_HEAD = 1 << 12  # bytes by which the kind of a file is recognized
_SHOWN = 5  # bad samples listed in an error
_LISTED = 200  # from so many images on, a folder is listed instead of asking for each file
_FORMATS = {
    b"\x1f\x8b": "compressed with gzip",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a Parquet table",
    b"version https://git-lfs": "a Git LFS pointer without the file's content",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


class SampleError(ValueError):
    """A data file or a sample that cannot be used; the message names it and the fix.

    A DataLoader raises the errors of its workers again, with the traceback as their message. Only the message
    itself is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class SampleFile:
    """The samples of a data file.

    Args:
        path: JSON list or JSON lines.
        template: conversation template of the training.
        image_folder: folder that the names of images are relative to.
        quiet: show no progress.

    Attributes:
        bad: samples that cannot be used, by index, as far as known.
        words: words of all turns, per sample.
        has_image: 1 where a sample has an image.

    Raises:
        FileNotFoundError: no such file.
        SampleError: the file is not JSON, or has no samples.
    """

    def __init__(
        self, path: str | Path, template: Conversation, image_folder: str | None = None, quiet: bool = False
    ) -> None:
        self.path, self.image_folder = str(path), image_folder
        self.bad: dict[int, BadSample] = {}
        self.words, self.has_image = array("i"), bytearray()
        self._starts, self._sizes = array("q"), array("i")
        self._stamp: tuple[int, int] | None = None
        images: dict[str, list[tuple[int, str]]] = {}  # by folder
        for start, size, sample in self._scan(quiet):
            index = len(self._starts)
            self._starts.append(start)
            self._sizes.append(size)
            words, image = 0, None
            try:
                if isinstance(sample, BadSample):
                    raise sample
                check_sample(sample, template)
                image = sample.get("image")
                words = sum(len(turn["value"].split()) for turn in sample["conversations"])
                if image is not None:
                    folder, name = os.path.split(image)
                    images.setdefault(folder, []).append((index, name))
            except BadSample as error:
                self.bad[index] = error
            self.has_image.append(image is not None)
            self.words.append(words)
        if not self._starts:
            raise SampleError(f"{path}: contains no samples. Pass a file with conversations.")
        if images and image_folder is not None:
            self._find_images(images, quiet)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        """Read a sample from the file."""
        with open(self.path, "rb") as file:
            if _stamp(file) != self._stamp:
                raise SampleError(
                    f"{self.path}: has changed since it was checked. Leave it as it is, and start again."
                )
            file.seek(self._starts[index])
            return json.loads(file.read(self._sizes[index]))

    def name(self, index: int) -> str:
        """Return file, index and id of a sample, for messages."""
        try:
            sample = self[index]
        except ValueError:
            sample = None
        identity = f" (id {sample['id']!r})" if isinstance(sample, dict) and "id" in sample else ""
        return f"{self.path}: sample {index}{identity}"

    def image_path(self, name: str) -> str:
        """Return the path of an image that a sample names."""
        return os.path.join(self.image_folder or "", name)

    def describe(self, bad: dict[int, BadSample] | None = None) -> str:
        """Return how many samples are bad, of which kinds, and the first ones."""
        bad = self.bad if bad is None else bad
        kinds = Counter(error.kind for error in bad.values())
        lines = [f"{len(bad)} of {len(self)} samples are bad: " + counted(kinds)]
        lines += [f"{self.name(index)}: {bad[index]}." for index in sorted(bad)[:_SHOWN]]
        if len(bad) > _SHOWN:
            lines.append(f"... and {len(bad) - _SHOWN} more")
        return "\n  ".join(lines)

    def require(self, skip: bool, has_tower: bool) -> None:
        """Check that a training can use the file.

        Args:
            skip: whether samples that cannot be used are left out.
            has_tower: whether the model takes images.

        Raises:
            SampleError: it cannot.
        """
        if any(self.has_image):
            first = self.name(self.has_image.index(1))
            if not has_tower:
                raise SampleError(f"{first}: has an image, but the model has no tower. Set --vision_tower.")
            if self.image_folder is None:
                raise SampleError(f"{first}: has an image, but no folder is given. Set --image_folder.")
        if self.bad and not skip:
            raise SampleError(
                f"{self.path}: {self.describe()}\nFix them, or leave them out by --bad_samples skip."
            )
        if len(self.bad) == len(self):
            raise SampleError(f"{self.path}: no sample can be used. {self.describe()}")

    def _scan(self, quiet: bool) -> Iterator[tuple[int, int, Any]]:
        """Yield (first byte, bytes, sample or BadSample) of every sample."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.path}: no such file. Check --data_path.") from None
        except OSError as error:
            raise SampleError(
                f"{self.path}: cannot be read ({error.strerror}). Check --data_path."
            ) from error
        with file:
            self._stamp = _stamp(file)
            head = file.read(_HEAD)
            for magic, what in _FORMATS.items():
                if head.startswith(magic):
                    raise SampleError(f"{self.path}: is {what}, not JSON. Convert or unpack it first.")
            file.seek(0)
            bar = tqdm(
                total=self._stamp[0],
                unit="B",
                unit_scale=True,
                desc="checking samples",
                disable=quiet or self._stamp[0] < 64 * _CHUNK,
                file=sys.stderr,
            )
            with bar:
                start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
                if start == b"[":
                    yield from _scan_list(file, self.path, bar)
                elif start in (b"{", b""):
                    yield from _scan_lines(file, self.path, bar)
                else:
                    raise SampleError(
                        f"{self.path}: is not JSON: it starts with {head[:20]!r}. Pass a JSON list, or one "
                        "JSON object per line."
                    )

    def _find_images(self, images: dict[str, list[tuple[int, str]]], quiet: bool) -> None:
        """Note samples whose image file does not exist."""
        total = sum(map(len, images.values()))
        bar = tqdm(
            total=total, desc="looking for images", unit="image", disable=quiet or total < 20000,
            file=sys.stderr,
        )  # fmt: skip
        with bar:
            for folder, members in images.items():
                names: set[str] = set()
                if len(members) >= _LISTED:
                    try:
                        names = set(os.listdir(self.image_path(folder)))
                    except OSError:
                        names = set()  # each file is asked for below
                for index, name in members:
                    path = self.image_path(os.path.join(folder, name))
                    if name not in names and not _exists(path):
                        self.bad[index] = BadSample(
                            "missing image", f"{path}: no such image. Check --image_folder and the file"
                        )
                    bar.update()


def counted(kinds: Counter[str]) -> str:
    """Return counts as text: "3 x role, 1 x order"."""
    return ", ".join(f"{number} x {kind}" for kind, number in kinds.most_common())


def _exists(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except ValueError:  # a null character
        return False


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _scan_lines(file: BinaryIO, path: str, bar: tqdm) -> Iterator[tuple[int, int, Any]]:
    start = 0
    for number, line in enumerate(file, 1):
        bar.update(len(line))
        skipped = 3 if not start and line.startswith(codecs.BOM_UTF8) else 0
        if line[skipped:].strip():
            try:
                sample = json.loads(line[skipped:])
            except (ValueError, RecursionError) as error:
                if number == 1 and not isinstance(error, UnicodeDecodeError):
                    hint = f"{path}:1: is not JSON ({error}). Pass a JSON list, or one JSON object per line."
                    raise SampleError(hint) from error
                sample = BadSample("json", f"line {number} is not JSON ({error}). Write the line again")
            yield start + skipped, len(line) - skipped, sample
        start += len(line)


def _scan_list(file: BinaryIO, path: str, bar: tqdm) -> Iterator[tuple[int, int, Any]]:
    """Decode the values of a JSON list one after the other, with a window on the file."""
    decode = codecs.getincrementaldecoder("utf-8-sig")()
    scan = json.JSONDecoder().raw_decode
    text, place, line, ended = "", 0, 1, False
    byte = 3 if file.peek(3).startswith(codecs.BOM_UTF8) else 0  # of the file, at text[place]

    def more() -> None:
        """Drop what was read and append at least as much as is left."""
        nonlocal text, place, line, ended
        line += text.count("\n", 0, place)
        before = file.tell()
        content = file.read(max(_CHUNK, 2 * (len(text) - place)))
        bar.update(len(content))
        ended = not content
        try:
            text, place = text[place:] + decode.decode(content, final=ended), 0
        except UnicodeDecodeError as error:
            raise SampleError(
                f"{path}: is not UTF-8 ({error.reason} near byte {before + error.start}). Save it as UTF-8."
            ) from error

    def peek() -> str:
        """Return the next character that is not a space, "" at the end."""
        nonlocal place, byte
        while True:
            while place < len(text) and text[place] in " \t\r\n":
                place, byte = place + 1, byte + 1
            if place < len(text) or ended:
                return text[place : place + 1]
            more()

    def broken(what: str) -> SampleError:
        where = line + text.count("\n", 0, place)
        return SampleError(
            f"{path}:{where}: is not valid JSON: {what}. The file may be cut off or edited; write it again."
        )

    peek()
    place, byte, count = place + 1, byte + 1, 0  # after the opening bracket
    while (character := peek()) != "]":
        if count:
            if character != ",":
                found = repr(character) if character else "the end of the file"
                raise broken(f"expected ',' or ']' after sample {count - 1}, got {found}")
            place, byte = place + 1, byte + 1
            peek()
        while True:
            try:
                sample, end = scan(text, place)
            except RecursionError:
                raise broken(f"sample {count} is nested too deeply") from None
            except json.JSONDecodeError as error:
                if ended:
                    place = min(error.pos, len(text))
                    raise broken(f"sample {count}: {error.msg}") from error
                more()
                continue
            if end < len(text) or ended:  # a number may continue in the next chunk
                break
            more()
        size = len(text[place:end].encode())
        yield byte, size, sample
        place, byte, count = end, byte + size, count + 1
    place += 1
    if extra := peek():
        raise broken(f"unexpected {extra!r} after the list")


def check_sample(sample: Any, template: Conversation) -> None:
    """Check what can be told without a tokenizer and the image.

    Raises:
        BadSample: the sample cannot be trained on.
    """
    if not isinstance(sample, dict):
        raise BadSample("format", f'is {_kind(sample)}, expected an object with "conversations"')
    turns = sample.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadSample("format", '"conversations" is missing, empty or not a list. Write the turns there')
    tags = 0
    for number, turn in enumerate(turns, 1):
        _check_turn(number, turn)
        found = turn["value"].count(DEFAULT_IMAGE_TOKEN)
        if found and turn["from"] == "gpt":
            raise BadSample("tags", f"turn {number} is an answer with {DEFAULT_IMAGE_TOKEN}. Remove the tag")
        tags += found
    _check_order(turns, template)
    _check_image(sample, tags)


def _check_turn(number: int, turn: Any) -> None:
    if not isinstance(turn, dict):
        raise BadSample("format", f'turn {number} is {_kind(turn)}, expected {{"from": ..., "value": ...}}')
    unknown = sorted(turn.keys() - {"from", "value"})
    missing = sorted({"from", "value"} - turn.keys())
    if unknown or missing:
        found = f"unknown keys {unknown}" if unknown else f"no {missing}"
        raise BadSample("keys", f'turn {number} has {found}, expected "from" and "value" only. Rename them')
    role, value = turn["from"], turn["value"]
    if role not in ("human", "gpt"):
        raise BadSample(
            "role", f"turn {number} is from {role!r}, expected 'human' or 'gpt'. Fix its \"from\""
        )
    if not isinstance(value, str):
        raise BadSample("format", f'the "value" of turn {number} is {_kind(value)}, expected a text')
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadSample(
            "format", f"turn {number} contains half of a character (a lone surrogate). Write the text again"
        ) from None
    if role == "gpt" and not value.strip():
        raise BadSample("empty answer", f"turn {number} is an empty answer. Write or remove it")


def _check_order(turns: list[dict], template: Conversation) -> None:
    roles = [turn["from"] for turn in turns]
    if "gpt" not in roles:
        raise BadSample("no answer", "no turn is from 'gpt'. Add an answer")
    if template.sep_style is SeparatorStyle.PLAIN:
        if roles != ["human", "gpt"] or DEFAULT_IMAGE_TOKEN not in turns[0]["value"]:
            raise BadSample(
                "order",
                f"{len(turns)} turns, but --version plain needs a question with {DEFAULT_IMAGE_TOKEN} and a "
                "caption. Use another --version for conversations and text",
            )
        return
    first = int(roles[0] == "gpt")  # LLaVA drops a first answer, too
    for number, role in enumerate(roles[first:]):
        if role != ("human", "gpt")[number % 2]:
            raise BadSample(
                "order",
                f"turns {number + first} and {number + first + 1} are both from {role!r}, expected question "
                "and answer in turn. Merge or remove one",
            )
    if len(roles) == first or roles[-1] == "human":
        raise BadSample("no answer", "the last question has no answer. Add or remove it")
    counts_rounds = template.sep_style in (SeparatorStyle.TWO, SeparatorStyle.LLAMA_2)
    for number, turn in enumerate(turns[first:], 1 + first):
        if counts_rounds and not turn["value"]:
            raise BadSample("empty question", f"turn {number} is an empty question. Write or remove it")


def _check_image(sample: dict, tags: int) -> None:
    if "image" not in sample:
        if tags:
            raise BadSample(
                "tags", f'{tags} {DEFAULT_IMAGE_TOKEN} and no "image". Name the image or remove the tag'
            )
        return
    image = sample["image"]
    if not isinstance(image, str) or not image.strip():
        raise BadSample(
            "image",
            f'"image" is {_kind(image)}, expected a file name. Name one image, or remove the key from text',
        )
    if tags != 1:
        raise BadSample("tags", f"{tags} {DEFAULT_IMAGE_TOKEN} for one image. Write one in a question")


def _kind(value: Any) -> str:
    if value is None or value != value:
        return "null" if value is None else "NaN"
    kinds = {list: "a list", dict: "an object", str: "a text", bool: "true or false"}
    if isinstance(value, str) and not value.strip():
        return "empty"
    return kinds.get(type(value), "a number")
