"""Load a checkpoint's tokenizer: `tokenizer.model` through sentencepiece itself, else `tokenizer.json`.

    tokenizer = load_tokenizer("liuhaotian/llava-v1.5-7b")

Original LLaVA checkpoints contain a sentencepiece `tokenizer.model` and were trained with the slow Llama
tokenizer, which transformers 5 removed. Its Rust successor gives other ids for leading and repeated spaces.
`SentencePieceTokenizer` is transformers' own sentencepiece backend with corrections, checked on 5.2 and
5.23. Without them that backend fails the golden prompts:

- it adds no BOS token;
- with `legacy=False` it needs protobuf, and omits the leading space of the text;
- its decoding strips spaces at both ends, keeps byte pieces as `<0x0A>`, and fails on ids above the
  vocabulary, which a model with padded embeddings can generate.

A folder that has only a `tokenizer.json` (llava-hf) is loaded as it is. If both exist, `tokenizer.model` is
used, because the model was trained with it.

`legacy`: special tokens such as `</s>` split a text into chunks. With `legacy=True` every chunk gets
sentencepiece's leading space (`</s>USER` becomes `</s>`, `_USER`), with `legacy=False` only a chunk at the
start of the text. Prompts and `<image>` are handled in `llava.conversation` and `llava.mm_utils`.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_PATCH_TOKEN,
    DEFAULT_VID_END_TOKEN,
    DEFAULT_VID_START_TOKEN,
)
from llava.model.checkpoint import CheckpointError, warn
from llava.model.checkpoint.entries import (
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_JSON,
    Entries,
    read_entries,
)

_SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_START = "\uffff"  # marks the start of a text; Unicode reserves it for internal use
# `normalizer_spec { add_dummy_prefix: false }` as a protocol buffer. Appended to a model file, it overrides
# that setting, because a parser merges repeated messages.
_NO_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(SentencePieceBackend):
    """transformers' sentencepiece backend with the ids and texts of sentencepiece (see the module)."""

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str,
        legacy: bool = True,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        **kwargs: Any,
    ) -> None:
        self.add_bos_token, self.add_eos_token = add_bos_token, add_eos_token
        # The backend is always given legacy=True: its other mode replaces `sp_model` and needs protobuf.
        super().__init__(vocab_file=vocab_file, legacy=True, **kwargs)
        self.legacy = self.init_kwargs["legacy"] = legacy
        content = Path(vocab_file).read_bytes()
        self._inner = SentencePieceProcessor(model_proto=content + _NO_PREFIX)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Add BOS and EOS to a text, or to both texts of a pair, as the checkpoint's files ask."""
        bos = [self.bos_token_id] if self.add_bos_token else []
        eos = [self.eos_token_id] if self.add_eos_token else []
        pair = [] if token_ids_1 is None else [*bos, *token_ids_1, *eos]
        return [*bos, *token_ids_0, *eos, *pair]

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Split a text into pieces and added tokens."""
        return super().tokenize(_START + text, **kwargs)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Split a chunk that contains no added token."""
        at_start = text.startswith(_START)
        text = text[len(_START) :] if at_start else text
        if at_start or self.legacy:
            return self.sp_model.encode(text, out_type=str)
        # A model that removes extra spaces would also remove the one between two chunks.
        spaced = text.startswith(" ") and not self._inner.encode(" ")
        return (self.sp_model if spaced else self._inner).encode(text, out_type=str)

    def _convert_id_to_token(self, index: int) -> str:
        return self.sp_model.id_to_piece(index) if 0 <= index < self.vocab_size else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces as sentencepiece does; added tokens are kept as they are.

        Only the leading space that sentencepiece adds to a text is removed. A byte that is not part of a
        valid UTF-8 character becomes U+FFFD.
        """
        added, text = self.added_tokens_encoder, ""
        for is_added, run in groupby(filter(None, tokens), added.__contains__):
            if is_added:
                text += "".join(run)
            elif text:  # a piece that is not in the vocabulary is kept, and so is a space after it
                text += self.sp_model.decode_pieces([_START, *run]).removeprefix(_START)
            else:
                text = self.sp_model.decode_pieces(list(run))
        return text


def load_tokenizer(
    folder: str | Path, model_max_length: int | None = None, legacy: bool | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder.

    BOS is added in front of every text and EOS is not, unless `tokenizer_config.json` says otherwise. Special
    tokens come from `special_tokens_map.json`, then `tokenizer_config.json`, then the model file. The default
    pad token is `<unk>`, as in Vicuna.

    Args:
        folder: local folder with `tokenizer.model` or `tokenizer.json`.
        model_max_length: longest prompt, in tokens (default: the folder's own).
        legacy: see the module docstring (default: the folder's own, else True as in the slow tokenizer).

    Raises:
        FileNotFoundError: the folder has neither file.
        ValueError: a file cannot be read or contains something unsupported; the message names it.
    """
    folder = Path(folder)
    model_file, json_file = folder / "tokenizer.model", folder / "tokenizer.json"
    config = _read(folder / "tokenizer_config.json", TOKENIZER)
    roles = _special_roles(config, _read(folder / "special_tokens_map.json", SPECIAL_TOKENS))
    if model_max_length is None:
        model_max_length = config.get("model_max_length")
    common: dict[str, Any] = {
        "name_or_path": str(folder),
        "model_max_length": model_max_length,
        "padding_side": config.get("padding_side") or "right",
        "clean_up_tokenization_spaces": False,
        "chat_template": config.get("chat_template"),
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if model_file.is_file():
        legacy = config.get("legacy") if legacy is None else legacy
        return _from_sentencepiece(folder, config, roles, legacy is None or bool(legacy), common)
    if json_file.is_file():
        return _from_json(json_file, config, roles, common)
    raise FileNotFoundError(
        f"{folder}: neither tokenizer.model nor tokenizer.json is there. Copy the checkpoint's tokenizer "
        "files into it."
    )


def add_image_tokens(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Give the tokenizer the tokens that `mm_use_im_patch_token` and `mm_use_im_start_end` name.

    A checkpoint trained with them has their embeddings already. If not, rows are added, each the mean of the
    others, with a warning. In Video-LLaVA, `mm_use_im_patch_token` is true where it is absent.
    """
    takes_clips = model.get_video_tower() is not None
    patch = getattr(model.config, "mm_use_im_patch_token", None)
    if takes_clips if patch is None else patch:
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if getattr(model.config, "mm_use_im_start_end", False):
        ends = [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN]
        if takes_clips:
            ends += [DEFAULT_VID_START_TOKEN, DEFAULT_VID_END_TOKEN]
        tokenizer.add_tokens(ends, special_tokens=True)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        warn(
            f"{tokenizer.name_or_path}: the tokenizer has {len(tokenizer)} tokens, but the checkpoint has "
            f"embeddings for {rows}: untrained ones are added. Use tokenizer and weights of one checkpoint."
        )
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for matrix in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
                matrix[rows:] = matrix[:rows].mean(0, keepdim=True)


def _from_sentencepiece(
    folder: Path, config: dict, roles: dict, legacy: bool, common: dict[str, Any]
) -> SentencePieceTokenizer:
    model = _read_model(folder / "tokenizer.model")

    def piece(index: int) -> str | None:
        return model.id_to_piece(index) if index >= 0 else None  # absent special pieces have id -1

    found = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
    for role, index in found.items():
        if role not in roles and (text := piece(index)) is not None:
            roles[role] = _token(text)
    if "pad_token" not in roles and (text := piece(model.pad_id()) or roles.get("unk_token")):
        roles["pad_token"] = _token(str(text))
    add_bos = bool(config.get("add_bos_token", True)) and "bos_token" in roles
    add_eos = bool(config.get("add_eos_token", False)) and "eos_token" in roles
    return SentencePieceTokenizer(
        vocab_file=str(folder / "tokenizer.model"),
        legacy=legacy,
        added_tokens_decoder=_number(_added_tokens(folder, config, roles), model, folder),
        add_bos_token=add_bos,
        add_eos_token=add_eos,
        **roles,
        **common,
    )


def _from_json(path: Path, config: dict, roles: dict, common: dict[str, Any]) -> PreTrainedTokenizerFast:
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"{path}: not a readable tokenizer ({error}). Download it again.") from error
    llama = "Llama" in str(config.get("tokenizer_class", ""))
    if llama:  # transformers takes these roles from tokenizer_config.json only, where they may be empty
        usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        found = {role: text for role, text in usual.items() if backend.token_to_id(text) is not None}
        roles = {role: _token(text) for role, text in found.items()} | roles
    bos = config.get("add_bos_token", True if llama else None)
    if bos is not None and "bos_token" in roles:
        # Explicit, because transformers takes BOS from the file's post-processor, which old files lack.
        common |= {"add_bos_token": bool(bos), "add_eos_token": bool(config.get("add_eos_token", False))}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **roles, **common)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _read_model(path: Path) -> SentencePieceProcessor:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check the file.") from error
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the tokenizer. Run `git lfs pull` in its folder.")
    if not content:
        raise ValueError(f"{path}: the file is empty. Download it again.")
    try:
        return SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise ValueError(f"{path}: not a valid SentencePiece model ({error}). Download it again.") from error


def _read(path: Path, rules: Entries) -> dict:
    return read_entries(path, rules) if path.exists() else {}


def _token(value: str | dict, special: bool = True) -> AddedToken:
    """Make an added token that is matched in the text as written, before any normalization."""
    options = value if isinstance(value, dict) else {}
    flags = {name: bool(options.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
    return AddedToken(
        _content(value), special=bool(options.get("special", special)), normalized=False, **flags
    )


def _content(value: str | dict | None) -> str:
    """Return a token's text; "" counts as not given, as the first conversions of LLaMA have it."""
    return (value.get("content") if isinstance(value, dict) else value) or ""


def _special_roles(config: dict, special_map: dict) -> dict[str, AddedToken]:
    """Return bos_token, eos_token ... of the folder's files, without roles that are empty or absent."""
    roles = {}
    for role in _SPECIAL_ROLES:
        given = next((one for one in (special_map.get(role), config.get(role)) if _content(one)), None)
        if given is not None:
            roles[role] = _token(given)
    return roles


def _added_tokens(
    folder: Path, config: dict, roles: dict[str, AddedToken]
) -> dict[str, tuple[AddedToken, int | None]]:
    """Return content -> (token, id); the id is None if no file names one."""
    tokens: dict[str, tuple[AddedToken, int | None]] = {}
    for entry in _read(folder / "tokenizer.json", TOKENIZER_JSON).get("added_tokens") or []:
        tokens[entry["content"]] = (_token(entry), entry["id"])
    for content, index in _read(folder / "added_tokens.json", {}).items():
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise CheckpointError(
                f"{folder / 'added_tokens.json'}: {content!r} is {index!r}, expected an id. Use the file of "
                "the original checkpoint."
            )
        tokens[content] = (_token(content, special=False), index)
    for index, entry in (config.get("added_tokens_decoder") or {}).items():
        if entry is not None:
            tokens[entry["content"]] = (_token(entry), int(index))
    extra: list[str | dict] = []
    for entries in (config, _read(folder / "special_tokens_map.json", SPECIAL_TOKENS)):
        for key in ("additional_special_tokens", "extra_special_tokens"):  # before and since transformers 5
            found = entries.get(key) or []
            extra += found.values() if isinstance(found, dict) else found
    for token in [*roles.values(), *map(_token, filter(_content, extra))]:
        tokens[token.content] = (token, tokens.get(token.content, (token, None))[1])
    tokens.pop("", None)
    return tokens


def _number(
    tokens: dict[str, tuple[AddedToken, int | None]], model: SentencePieceProcessor, folder: Path
) -> dict[int, AddedToken]:
    """Give every token its piece's id or the next free one; raise `ValueError` if a file names another id."""
    numbered: dict[int, AddedToken] = {}
    free = model.get_piece_size()
    for token, named in sorted(tokens.values(), key=lambda item: (item[1] is None, item[1] or 0)):
        index = model.piece_to_id(token.content)
        if model.id_to_piece(index) != token.content:  # not a piece: `index` is that of <unk>
            index, free = free, free + 1
        if named not in (None, index):
            raise ValueError(
                f"{folder}: added token {token.content!r} should have id {named}, but the vocabulary gives "
                f"it {index}. added_tokens.json, tokenizer_config.json and tokenizer.model do not match, or "
                "ids between them are missing. Use the tokenizer files of one checkpoint."
            )
        numbered[index] = token
    return numbered
