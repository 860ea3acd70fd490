"""What every vision tower does: run to the select layer, and compute the [CLS] row of attention next to it.

Assumes one transformer of Hugging Face shape (embeddings, a list of pre-norm layers). Independent of pruning,
projectors and language models. `clip_encoder.py` and `dinov2_encoder.py` name the parts of each architecture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from llava.model.transformers_compat import attention_of, run_layer

CUDA_GROUP = 5  # crops per pass on an accelerator: those of a LLaVA-NeXT image; see VisionTower.group_size


class VisionTower(nn.Module, ABC):
    """A frozen image encoder with a [CLS] token.

    `tower(images)` with images (B, 3, S, S) of any float dtype returns two tensors:

    - features (B, N, C) in the tower's dtype: `hidden_states[select_layer]` without [CLS], before any final
      norm;
    - attention (B, H, N), float32 or wider: softmax of the [CLS] query over all N + 1 keys in the layer whose
      output `features` is, without the [CLS] column and not renormalized.

    Layers after the select layer are not built. Every layer runs `attn_implementation` (default: SDPA); the
    one attention row is computed separately, so no (N + 1) x (N + 1) matrix exists.
    """

    kind = ""

    def __init__(
        self,
        model: nn.Module,
        config: object,
        image_processor: object,
        image_size: int,
        select_layer: int,
    ) -> None:
        super().__init__()
        self.vision_tower = model
        self.config = config
        self.image_processor = image_processor
        self.image_size = image_size
        self.select_layer = select_layer
        self.select_feature = "patch"
        self.is_loaded = True  # False until `load_model` of a tower that was built with delay_load
        self._load: Callable[[VisionTower, object], None] | None = None  # reads the weights
        # Crops per pass; None = 1 on CPU, CUDA_GROUP elsewhere. A pass always has exactly this many crops
        # (the last one is filled up), so the same kernels with the same blocking see every crop and the
        # result of one image never depends on its neighbours in the batch.
        self.group_size: int | None = None

    # --- the parts of a layer: one implementation per architecture ------------------------------------------
    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Embed (B, 3, S, S) to the hidden states (B, N + 1, C) that enter the first layer."""

    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """Return the transformer layers up to the select layer."""

    @abstractmethod
    def attention_parts(self, layer: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Return (norm before attention, query projection, key projection) of a layer."""

    # --- loading -----------------------------------------------------------------------------------------
    def load_model(self, device_map: object = None) -> None:
        """Read the weights of a tower that was built with `delay_load`, in float32; else do nothing.

        Args:
            device_map: a device, "auto" (a GPU if there is one), or {"": device} (default: the CPU).

        Raises:
            FileNotFoundError, CheckpointError: the weights cannot be read, or do not fit.
        """
        if not self.is_loaded and self._load is not None:
            self._load(self, device_map)
            self.requires_grad_(False)
            self.is_loaded = True

    # --- running -----------------------------------------------------------------------------------------
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode (B, 3, S, S) to features (B, N, C), attention (B, H, N), in passes of a fixed size.

        Raises:
            ValueError: the shape is not (B, 3, S, S) with S = `image_size`.
        """
        if not self.is_loaded:
            raise ValueError("vision tower: the weights are not loaded. Call load_model() first.")
        side = self.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            shape = tuple(images.shape)
            raise ValueError(
                f"images: shape is {shape}, but the vision tower expects (B, 3, {side}, {side}). Use the "
                "checkpoint's image processor."
            )
        group = self.crops_per_pass
        if len(images) == 0:
            channels, heads = self.hidden_size, self.config.num_attention_heads
            return (
                torch.empty(0, self.num_patches, channels, dtype=self.dtype, device=self.device),
                torch.empty(0, heads, self.num_patches, dtype=torch.float32, device=self.device),
            )
        features, attention = [], []
        for start in range(0, len(images), group):
            part = images[start : start + group].to(device=self.device, dtype=self.dtype)
            real = len(part)
            if real < group:
                part = torch.cat([part, part[-1:].expand(group - real, -1, -1, -1)])
            f, a = self.forward_features(part)
            features.append(f[:real])
            attention.append(a[:real])
        return torch.cat(features), torch.cat(attention)

    def forward_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run one pass: (B, 3, S, S) in the tower's dtype -> features (B, N, C), attention (B, H, N)."""
        trainable = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        with torch.set_grad_enabled(trainable):
            hidden = self.embed(images)
            layers = self.layers()
            for layer in layers[:-1]:
                hidden = run_layer(layer, hidden)
            norm, query, key = self.attention_parts(layers[-1])
            row = cls_row(norm(hidden), query, key, self.config.num_attention_heads)
            hidden = run_layer(layers[-1], hidden)
        return hidden[:, 1:], row

    @property
    def crops_per_pass(self) -> int:
        """Crops per pass: `group_size`, or the default of the device."""
        return self.group_size or (1 if self.device.type == "cpu" else CUDA_GROUP)

    # --- facts -------------------------------------------------------------------------------------------
    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, and of `features`."""
        return next(self.vision_tower.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.vision_tower.parameters()).device

    @property
    def dummy_feature(self) -> Tensor:
        """Zeros (1, C), as LLaVA takes for a missing image."""
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def hidden_size(self) -> int:
        """C, channels of a patch feature."""
        return self.config.hidden_size

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of a crop."""
        return self.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        """N, patches of a crop."""
        return self.num_patches_per_side**2

    @property
    def attn_implementation(self) -> str:
        """Kernels of the layers: sdpa, eager, flash_attention_2 ..."""
        return attention_of(self.vision_tower.config)


def cls_row(hidden: Tensor, query: nn.Module, key: nn.Module, heads: int) -> Tensor:
    """Compute the attention of the [CLS] query over the patches: softmax over all N + 1 keys without [CLS].

    Args:
        hidden: (B, N + 1, C) after the norm, [CLS] first.

    Returns:
        (B, H, N), float32 or wider whatever the tower's dtype: half precision would create ties.
    """
    batch, tokens, _ = hidden.shape
    q = query(hidden[:, :1]).view(batch, 1, heads, -1).transpose(1, 2)  # (B, H, 1, d)
    k = key(hidden).view(batch, tokens, heads, -1).transpose(1, 2)  # (B, H, N + 1, d)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).transpose(2, 3) * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1)[:, :, 0, 1:]


def layers_to_run(select_layer: int, depth: int) -> int:
    """Return how many of `depth` layers make `hidden_states[select_layer]` (entry 0 is the embedding).

    Raises:
        ValueError: there is no such entry, or it is the embedding, which has no attention.
    """
    if isinstance(select_layer, bool) or not isinstance(select_layer, int):
        raise ValueError(f"mm_vision_select_layer: {select_layer!r} is not an integer.")
    count = select_layer if select_layer >= 0 else depth + 1 + select_layer
    if not 1 <= count <= depth:
        raise ValueError(
            f"mm_vision_select_layer: {select_layer} is not one of the tower's {depth} layers. Choose "
            f"1..{depth} or -{depth}..-1."
        )
    return count
