"""Models of transformers in place of a LLaVA checkpoint: which checkpoints are such, and how they are pruned.

    name = host_class(folder)                      # "Qwen2_5_VLForConditionalGeneration", None for ours
    pruning = host_pruning("vispruner", keep=0.33)

Checkpoints in the format of transformers that our own classes load (LLaVA over Llama or Mistral) stay with
them. Loads no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava.eval.jobs.job import Job, resolve_pruner
from llava.model.checkpoint import CheckpointError
from llava.model.checkpoint.entries import read_object
from llava.model.checkpoint.find import resolve_config

CHAT = "chat template"  # conv_mode of models whose checkpoint makes the prompts
_OURS = ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")
_OUR_TEXT = ("llama", "mistral")


@dataclass(frozen=True)
class HostPruning:
    """A setting for a model of transformers: a method with a number of tokens per row, or a share of them.

    Attributes:
        pruner: Method with its options; without `tokens` where there is a share.
        keep: Share of the visual tokens of each row, in (0, 1].
    """

    pruner: Any
    keep: float | None = None
    acts_in = "image"
    needs_question = False

    @property
    def tokens(self) -> int | None:
        return self.pruner.tokens

    def config(self) -> dict[str, object]:
        """Return the settings that affect the result, ready for JSON."""
        share = {} if self.keep is None else {"keep": self.keep}
        return {**self.pruner.config(), **share}


def host_class(model: Path | str) -> str | None:
    """Return the class of transformers that a checkpoint is of; None for our own classes and unknown ones.

    Args:
        model: Folder, or name on the Hugging Face Hub, from which config.json is then downloaded.
    """
    try:
        config = read_object(resolve_config(model) / "config.json")
    except (CheckpointError, FileNotFoundError):
        return None  # the loader says what is wrong
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    text = config.get("text_config")
    if name in _OURS and isinstance(text, dict) and text.get("model_type", "llama") in _OUR_TEXT:
        return None
    from llava.integrations import supported_classes

    return name if name in supported_classes() else None


def host_pruning(
    method: str | None,
    tokens: int | str | None = None,
    ratio: float | None = None,
    keep: float | None = None,
    seed: int = 0,
) -> HostPruning:
    """Return a setting; no budget in arguments and environment means no pruning.

    Args:
        tokens: Visual tokens per row, or "none".

    Raises:
        ValueError: An unknown method, one that `llava.prune` cannot serve, or two budgets.
    """
    if keep is None:
        pruner, _ = resolve_pruner({}, method, tokens, ratio, seed=seed)
    elif tokens is not None:
        raise ValueError(f"--keep {keep:g}: --tokens {tokens} is given as well. Choose one of them")
    else:
        from llava.pruning import get_pruner

        pruner, _ = resolve_pruner({}, method or "vispruner", 1, ratio, seed=seed)
        if pruner.name == "none":
            raise ValueError(f"--keep {keep:g}: method none keeps all tokens. Choose another one")
        pruner = get_pruner(pruner.name, None, pruner.important_ratio, seed)
    if pruner.acts_in != "image" or pruner.needs_question:
        why = "chooses by the question" if pruner.acts_in == "image" else "prunes inside the language model"
        raise ValueError(
            f"--method {pruner.name}: {why}, which models of transformers do not do here. Choose a method "
            "that reads the image only"
        )
    if pruner.uses_seed and seed:
        raise ValueError(f"--seed {seed}: models of transformers are pruned with seed 0. Leave it out")
    return HostPruning(pruner, keep)


def with_host(job: Job, name: str, given: Sequence[str]) -> Job:
    """Return the job of a model of transformers.

    Args:
        name: Of `host_class`.
        given: Options of the command that only our own classes have.

    Raises:
        ValueError: Such an option is given.
    """
    if given:
        raise ValueError(f"{given[0]}: not for {name}, which transformers loads and prompts. Leave it out")
    return replace(job, host=name, conv_mode=CHAT, tower_dtype=job.dtype, graphs=False, warnings=())
