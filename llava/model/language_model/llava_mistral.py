"""LLaVA on Mistral. Registered with transformers' Auto classes as `llava_mistral`."""

from __future__ import annotations

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    MistralPreTrainedModel,
)

from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaMistralConfig(MistralConfig):
    """A Mistral configuration with LLaVA's `mm_*` entries; files have `llava` or `llava_mistral`."""

    model_type = "llava_mistral"


class LlavaMistralModel(LlavaMetaModel, MistralModel):
    """The decoder with vision tower, projector and image_newline."""

    config_class = LlavaMistralConfig


class LlavaMistralForCausalLM(LlavaMetaForCausalLM, MistralForCausalLM):
    """Mistral with images in its prompt."""

    config_class = LlavaMistralConfig

    def __init__(self, config: LlavaMistralConfig) -> None:
        MistralPreTrainedModel.__init__(
            self, config
        )  # MistralForCausalLM's would build another decoder first
        self.model = LlavaMistralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.init_pruning()


AutoConfig.register(LlavaMistralConfig.model_type, LlavaMistralConfig)
for _auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
    _auto.register(LlavaMistralConfig, LlavaMistralForCausalLM, exist_ok=True)
