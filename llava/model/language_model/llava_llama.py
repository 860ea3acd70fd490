"""LLaVA on Llama. Loaded by its own class: `llava` in AutoConfig is another model."""

from __future__ import annotations

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel

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
