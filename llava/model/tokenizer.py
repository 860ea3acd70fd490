"""Load a checkpoint's tokenizer: the same ids as sentencepiece, from `tokenizer.model` or `tokenizer.json`.

Original LLaVA checkpoints hold a sentencepiece `tokenizer.model` and were trained with the slow Llama
tokenizer, which is gone from transformers 5; its Rust successor differs on leading and repeated spaces. So
the model file is rebuilt here as a `tokenizers` pipeline whose output equals sentencepiece's, with everything
that used to be implicit (BOS, padding side, special tokens, `legacy`) set explicitly. A folder that has only
a `tokenizer.json` (llava-hf) is loaded as it is. Where both lie, `tokenizer.model` wins: it is what the model
was trained with.

`legacy`: special tokens such as `</s>` cut a text into chunks. With `legacy=True` every chunk gets
sentencepiece's leading space (`</s>USER` becomes `</s>`, `_USER`), with `legacy=False` only a chunk at the
very start of the text.

Not known here: prompts and `<image>` (`llava.conversation`, `llava.mm_utils`).
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders
from transformers import PreTrainedTokenizerFast

from llava.model import sentencepiece_file as spm
from llava.model.sentencepiece_backend import SPACE, SentencePieceTokenizer, build_model, text_rules

_SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def load_tokenizer(
    folder: str | Path, model_max_length: int | None = None, legacy: bool | None = None
) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a checkpoint folder.

    BOS is put in front of every text and EOS is not, unless `tokenizer_config.json` says otherwise. Special
    tokens come from `special_tokens_map.json`, then `tokenizer_config.json`, then the model file; without a
    pad token `<unk>` pads, as in Vicuna.

    Args:
        folder: local folder with `tokenizer.model` or `tokenizer.json`.
        model_max_length: longest prompt, in tokens; None takes the folder's own.
        legacy: see the module docstring; None takes the folder's own, and True where it says nothing (the
            default of the slow tokenizer).

    Raises:
        FileNotFoundError: the folder has neither file.
        ValueError: a file cannot be read, or asks for something unsupported; the message names it.
    """
    folder = Path(folder)
    model_file, json_file = folder / "tokenizer.model", folder / "tokenizer.json"
    config = _read_json(folder / "tokenizer_config.json")
    roles = _special_roles(config, _read_json(folder / "special_tokens_map.json"))
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
        f"{folder} holds no tokenizer: neither tokenizer.model nor tokenizer.json is there. Copy the "
        "checkpoint's tokenizer files into it."
    )


def _from_sentencepiece(
    folder: Path, config: dict, roles: dict, legacy: bool, common: dict[str, Any]
) -> SentencePieceTokenizer:
    path = folder / "tokenizer.model"
    spec = spm.read_sentencepiece(path)
    backend = Tokenizer(build_model(spec, path))
    backend.normalizer, backend.pre_tokenizer = text_rules(spec, legacy)
    # Only for callers who take the backend by itself: `SentencePieceTokenizer` decodes on its own.
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for role, index in (("bos_token", spec.bos_id), ("eos_token", spec.eos_id), ("unk_token", spec.unk_id)):
        if role not in roles and spec.piece(index) is not None:
            roles[role] = _token(spec.piece(index))
    if "pad_token" not in roles:
        pad = spec.piece(spec.pad_id)
        if pad is not None or "unk_token" in roles:
            roles["pad_token"] = roles["unk_token"] if pad is None else _token(pad)
    _add_tokens(backend, _added_tokens(folder, config, roles, spec), path)
    tokenizer = SentencePieceTokenizer(
        tokenizer_object=backend,
        add_bos_token=bool(config.get("add_bos_token", True)) and "bos_token" in roles,
        add_eos_token=bool(config.get("add_eos_token", False)) and "eos_token" in roles,
        **roles,
        **common,
    )
    tokenizer.legacy = legacy
    controls = {index for index, piece in enumerate(spec.pieces) if piece.kind == spm.CONTROL}
    tokenizer.silent_ids = frozenset(controls.difference(tokenizer.added_tokens_decoder))
    return tokenizer


def _from_json(path: Path, config: dict, roles: dict, common: dict[str, Any]) -> PreTrainedTokenizerFast:
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception
        raise ValueError(f"{path} is not a readable tokenizer ({error}): fetch it again.") from error
    llama = "Llama" in str(config.get("tokenizer_class", ""))
    bos = config.get("add_bos_token", True if llama else None)
    if bos is not None and "bos_token" in roles:
        # Said explicitly, because transformers takes BOS from the file's own post-processor, which old files
        # lack.
        common |= {"add_bos_token": bool(bos), "add_eos_token": bool(config.get("add_eos_token", False))}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **roles, **common)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, not a {type(content).__name__}: fetch it again.")
    return content


def _token(value: str | dict, special: bool = True) -> AddedToken:
    """An added token that is looked for in the text as written, before any normalisation."""
    options = value if isinstance(value, dict) else {}
    flags = {name: bool(options.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
    content = options["content"] if options else value
    return AddedToken(content, special=bool(options.get("special", special)), normalized=False, **flags)


def _special_roles(config: dict, special_map: dict) -> dict[str, AddedToken]:
    """bos_token, eos_token ... as the folder's files give them; roles given as null or not at all are left "
    "out."""
    given = {role: special_map.get(role) or config.get(role) for role in _SPECIAL_ROLES}
    return {role: _token(value) for role, value in given.items() if value}


def _added_tokens(
    folder: Path, config: dict, roles: dict[str, AddedToken], spec: spm.SentencePieceFile
) -> dict[str, tuple[AddedToken, int | None]]:
    """content -> (token, id); id None where no file gives one (then the piece's own, or the next free "
    "one)."""
    tokens: dict[str, tuple[AddedToken, int | None]] = {}
    for entry in _read_json(folder / "tokenizer.json").get("added_tokens", []):
        tokens[entry["content"]] = (_token(entry), int(entry["id"]))
    for content, index in _read_json(folder / "added_tokens.json").items():
        tokens[content] = (_token(content, special=False), int(index))
    for index, entry in (config.get("added_tokens_decoder") or {}).items():
        tokens[entry["content"]] = (_token(entry), int(index))
    for piece in spec.pieces:
        if piece.kind == spm.USER_DEFINED:
            tokens.setdefault(piece.text, (_token(piece.text, special=False), None))
    extra = config.get("additional_special_tokens") or []
    extra += _read_json(folder / "special_tokens_map.json").get("additional_special_tokens") or []
    for token in [*roles.values(), *map(_token, extra)]:
        tokens[token.content] = (token, tokens.get(token.content, (token, None))[1])
    return tokens


def _add_tokens(backend: Tokenizer, tokens: dict[str, tuple[AddedToken, int | None]], path: Path) -> None:
    """Add in order of id, because `tokenizers` numbers new tokens as they come; then check that all ids "
    "are right."""
    ordered = sorted(tokens.values(), key=lambda item: (item[1] is None, item[1] or 0))
    for token, _ in ordered:
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    for token, index in ordered:
        if index is not None and backend.token_to_id(token.content) != index:
            raise ValueError(
                f"{path.parent}: added token {token.content!r} should have id {index}, but the vocabulary "
                f"gives it {backend.token_to_id(token.content)}: added_tokens.json, tokenizer_config.json "
                "and tokenizer.model do not belong together, or ids are missing between them."
            )
