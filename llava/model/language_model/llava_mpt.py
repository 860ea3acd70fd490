"""LLaVA on MPT: its name, so that scripts which import it run, and a refusal."""

from __future__ import annotations

from typing import Any, NoReturn


class LlavaMptForCausalLM:
    """Refuses to be used: LLaVA on MPT is not supported."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.from_pretrained()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise `NotImplementedError`."""
        raise NotImplementedError(
            "LlavaMptForCausalLM: LLaVA on MPT is not supported; no result with visual token pruning was "
            "published for it. Use a checkpoint on Llama/Vicuna or Mistral."
        )
