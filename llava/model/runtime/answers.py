"""Greedy `generate` of a model over captured stages, and the choice of which stages are captured."""

from __future__ import annotations

import warnings
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.decode import Decoding, id_set
from llava.model.runtime.generation import Doubtful, answer, prefill
from llava.model.runtime.runtime import Runtime
from llava.model.runtime.stages import INVALID
from llava.model.splice import ContextLimits

# arguments of `generate` that captured stages know, and settings that change the form of the result
_GREEDY_ARGUMENTS = {"do_sample", "num_beams", "max_new_tokens", "use_cache", "pad_token_id", "eos_token_id"}
_OTHER_RESULTS = (
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "cache_implementation",
    "assistant",
)


class CapturedAnswers:
    """Mixed into a causal model that encodes images (see `VisualTokenMixin`)."""

    @property
    def runtime(self) -> Runtime:
        """The captured stages of this model (see `set_runtime`)."""
        if self.__dict__.get("_runtime") is None:
            self.set_runtime()
        return self.__dict__["_runtime"]

    def set_runtime(self, graphs: bool | None = None, compiled: bool = False) -> Runtime:
        """Choose how stages run, from the next call on; frees graphs that were captured before.

        Args:
            graphs: replay captured CUDA graphs, with the bits of eager stages; None: on CUDA, unless
                VISPRUNER_GRAPHS is 0.
            compiled: fuse the kernels of a layer with torch.compile, which moves last bits.
        """
        runtime = Runtime(self.get_input_embeddings().weight.device, graphs, compiled)
        for tower in self.get_model().towers():
            tower.compile_layers(compiled)
        self.__dict__["_runtime"] = runtime
        return runtime

    def is_plain_greedy(self, kwargs: dict[str, Any]) -> bool:
        """Return whether `generate` with these arguments is greedy search and nothing else."""
        stored = self.generation_config
        unused = Decoding().unused({**vars(stored), **kwargs})
        return (
            not kwargs.get("do_sample", stored.do_sample)
            and isinstance(kwargs.get("max_new_tokens"), int)
            and {name for name, value in kwargs.items() if value is not None} <= _GREEDY_ARGUMENTS
            and kwargs.get("num_beams", stored.num_beams) in (None, 1)
            and kwargs.get("use_cache", True) is True
            and not unused
            and not any(getattr(stored, name, None) for name in _OTHER_RESULTS)
        )

    def answer_greedily(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        images: Any,
        image_sizes: object,
        visual: list[Tensor] | None,
        max_new_tokens: int,
        pad_token_id: int | None = None,
        eos_token_id: Any = None,
        **_: Any,
    ) -> Tensor | None:
        """Answer prompts greedily by captured stages; None if the careful way has to judge the inputs."""
        if input_ids.ndim != 2 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
            return None
        rows = len(input_ids)
        if rows > 1:
            input_ids = input_ids.cpu()  # before anything was launched
        doubts: list[Tensor] = []
        if visual is None and images is not None:
            visual, doubts = self.image_tokens_deferred(images, image_sizes)
        visual = visual or []
        tags = [len(visual)] if rows < 2 else (input_ids == IMAGE_TOKEN_INDEX).sum(1).tolist()
        if sum(tags) != len(visual):
            return None
        counts = iter([len(one) for one in visual])
        longest = max(input_ids.shape[1] - n + sum(islice(counts, n)) for n in tags)
        limits = ContextLimits.of(self.config)
        if longest < 1 or limits.refuse(longest) or max_new_tokens < 1:
            return None
        eos = self.generation_config.eos_token_id if eos_token_id is None else eos_token_id
        stops = id_set(eos.tolist() if isinstance(eos, Tensor) else eos)
        try:
            prompts, arena = prefill(self, input_ids, attention_mask, visual, longest, max_new_tokens)
            prompts.doubts += doubts
            said, lengths = answer(self, prompts, arena, max_new_tokens, stops)
        except Doubtful:
            return None
        if any(INVALID in ids for ids in said):
            return None
        worst = max(zip(lengths, map(len, said), strict=True), key=sum)
        if reason := limits.overrun(*worst):
            warnings.warn(reason, stacklevel=3)
        width = max(map(len, said))
        pad = 0 if pad_token_id is None else pad_token_id
        device = self.get_input_embeddings().weight.device
        return torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in said], device=device)
