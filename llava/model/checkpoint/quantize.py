"""8-bit and 4-bit weights of the language model's layers, through bitsandbytes (an optional package).

Tower, projector, embeddings and output layer are not quantized: they are small, and selection reads the
tower's features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Quantizer:
    """Swaps linear layers of a model on the meta device, then quantizes their weights as they are read."""

    def __init__(self, bits: int, dtype: torch.dtype) -> None:
        """Choose `bits` (8 or 4) and the `dtype` of activations; `ImportError` if bitsandbytes is missing."""
        try:
            import bitsandbytes
        except ImportError as error:
            raise ImportError(
                f"load_{bits}bit: the bitsandbytes package is missing. Run `pip install bitsandbytes`."
            ) from error
        self.bnb, self.bits, self.dtype = bitsandbytes, bits, dtype
        self.weights: dict[str, nn.Module] = {}

    def swap(self, model: nn.Module) -> None:
        """Replace every nn.Linear of the decoder layers by its quantized counterpart, without memory."""
        for name, module in list(model.named_modules()):
            if not (name.startswith("model.layers.") and type(module) is nn.Linear):
                continue
            bias = module.bias is not None
            with torch.device("meta"):
                if self.bits == 8:
                    new = self.bnb.nn.Linear8bitLt(
                        module.in_features, module.out_features, bias, has_fp16_weights=False, threshold=6.0
                    )
                else:
                    new = self.bnb.nn.Linear4bit(
                        module.in_features,
                        module.out_features,
                        bias,
                        compute_dtype=self.dtype,
                        quant_type="nf4",
                        compress_statistics=True,
                    )
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, new)
            self.weights[f"{name}.weight"] = new

    def wrap(self, name: str, tensor: Tensor, device: torch.device) -> nn.Parameter | None:
        """Return the quantized parameter for `name`, None if it is an ordinary one."""
        module = self.weights.get(name)
        if module is None:
            return None
        tensor = tensor.to(self.dtype).contiguous()
        if self.bits == 8:
            parameter = self.bnb.nn.Int8Params(tensor, requires_grad=False, has_fp16_weights=False)
        else:
            parameter = self.bnb.nn.Params4bit(
                tensor, requires_grad=False, quant_type="nf4", compress_statistics=True, module=module
            )
        return parameter.to(device)  # moving to the device quantizes
