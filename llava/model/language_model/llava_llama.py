"""LLaVA on Llama. Registered with transformers' Auto classes as `llava_llama`."""

from __future__ import annotations

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)

from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaConfig(LlamaConfig):
    """A Llama configuration with LLaVA's `mm_*` entries; files have `llava` or `llava_llama`."""

    model_type = "llava_llama"


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    """The decoder with vision tower, projector and image_newline."""

    config_class = LlavaConfig


class LlavaLlamaForCausalLM(LlavaMetaForCausalLM, LlamaForCausalLM):
    """Llama with images in its prompt."""

    config_class = LlavaConfig

    def __init__(self, config: LlavaConfig) -> None:
        LlamaPreTrainedModel.__init__(
            self, config
        )  # LlamaForCausalLM's would build a decoder without images first
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.init_pruning()


AutoConfig.register(LlavaConfig.model_type, LlavaConfig)
for _auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
    _auto.register(LlavaConfig, LlavaLlamaForCausalLM, exist_ok=True)
