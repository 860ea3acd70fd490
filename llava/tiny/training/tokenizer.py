"""The sentencepiece tokenizer of the bundled model (BPE, byte fallback), trained on the dataset's questions.

Deterministic: one thread, a fixed corpus. Every name, color and word becomes a single piece.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

from llava.tiny import world
from llava.tiny.world import questions
from llava.tiny.world.mixtures import ask

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER:"
)
VOCABULARY = 1024


def corpus() -> list[str]:
    """Build the training lines: prompts in the form of inference, and every word many times."""
    rs = np.random.RandomState(1)
    lines = []
    for seed in range(400):
        scene = world.draw(seed)[1]
        lines += [f"{SYSTEM} {text} ASSISTANT: {answer}" for _, text, answer in ask(scene, rs, 8)]
    for name in world.SPRITES:
        lines += [f"{name} {name}, {questions.plural(name)} {questions.existence(name)}"] * 60
    lines += [f"{name} {name}, the {name}" for name in world.SHAPES + tuple(world.COLORS) for _ in range(60)]
    lines += [f"{word} {word}, {word}" for word in world.WORDS for _ in range(200)]
    lines += [f"A. {name}\nB. {name}" for name in questions.CHINESE.values() for _ in range(200)]
    return lines


def train(folder: Path, lines: list[str] | None = None, length: int = 2048) -> None:
    """Write tokenizer.model, tokenizer_config.json and special_tokens_map.json into `folder`.

    Args:
        lines: Text to train on (default: `corpus`).
        length: Longest prompt of the model, in tokens.
    """
    import sentencepiece

    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "corpus.txt"
        # The trainer reads lines, but prompts contain newlines, and a word after a newline has no leading
        # space. A bar represents the newline (pieces never cross scripts), so that such words become pieces.
        text.write_text(
            "\n".join(entry.replace("\n", "\n|") for entry in lines or corpus()) + "\n", encoding="utf-8"
        )
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=str(Path(scratch) / "tokenizer"),
            model_type="bpe",
            vocab_size=VOCABULARY,
            byte_fallback=True,
            character_coverage=1.0,
            num_threads=1,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
            hard_vocab_limit=False,
        )
        (folder / "tokenizer.model").write_bytes((Path(scratch) / "tokenizer.model").read_bytes())
    special = {
        name: {"content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        for name, text in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    }
    (folder / "special_tokens_map.json").write_text(
        json.dumps({**special, "pad_token": "<unk>"}, indent=2) + "\n"
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "add_bos_token": True,
                "add_eos_token": False,
                "legacy": False,
                "model_max_length": length,
                "padding_side": "right",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "pad_token": "<unk>",
                "clean_up_tokenization_spaces": False,
                "sp_model_kwargs": {},
            },
            indent=2,
        )
        + "\n"
    )
