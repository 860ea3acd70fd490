"""LanguageBind's video encoder as a tower: a CLIP whose layers first attend over the frames of each place.

As in Video-LLaVA: each layer adds a temporal embedding to the hidden states, then a temporal attention, in
which the places of a frame do not see each other; then it does what CLIP's does, frame by frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig

from llava.model.checkpoint.tower import VIDEO_KIND
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_encoder.cues import budgets


class VideoTower(CLIPVisionTower):
    """CLIP with temporal attention. Rows are frames; the frames of a clip follow each other."""

    file_kind = VIDEO_KIND

    @property
    def num_frames(self) -> int:
        """F, the frames of a clip."""
        return self.config.num_frames

    def extend(self, layer: nn.Module, config: CLIPVisionConfig) -> None:
        if not config.add_time_attn:
            return
        width = config.hidden_size
        if config.num_frames > 1:
            layer.temporal_embedding = nn.Parameter(torch.empty(1, config.num_frames, width))
        layer.temporal_layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        layer.temporal_attn = nn.ModuleDict(
            {f"{part}_proj": nn.Linear(width, width) for part in ("q", "k", "v", "out")}
        )

    def enter(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        if not self.config.add_time_attn:
            return hidden
        (rows, places, width), frames, heads = hidden.shape, self.num_frames, self.config.num_attention_heads
        # (B F, T, C) -> (B T, F, C): one sequence per place
        hidden = hidden.view(-1, frames, places, width).transpose(1, 2).flatten(0, 1)
        if frames > 1:
            hidden = hidden + layer.temporal_embedding
        normed, attention = layer.temporal_layer_norm1(hidden), layer.temporal_attn
        query, key, value = (
            attention[f"{part}_proj"](normed).unflatten(-1, (heads, -1)).transpose(1, 2) for part in "qkv"
        )
        attended = functional.scaled_dot_product_attention(query, key, value)
        hidden = hidden + attention["out_proj"](attended.transpose(1, 2).flatten(2))
        return hidden.view(-1, places, frames, width).transpose(1, 2).reshape(rows, places, width)

    def prepare(self, cues: Sequence[str]) -> None:
        if budgets(cues):
            raise ValueError(
                "the video tower cannot merge patches inside its layers: its frames attend to equal places "
                "of each other. Choose a method that does not."
            )
        super().prepare(cues)

    def passes(self, images: Tensor, counts: Sequence[int]) -> list[tuple[int, int, int]]:
        """Choose passes of one clip each, whose bits so never depend on the clips beside it."""
        frames = self.num_frames
        if any(count != frames for count in counts):
            raise ValueError(
                f"images: clips of {', '.join(map(str, sorted(set(counts))))} frames, but the video tower "
                f"takes exactly {frames}. Take {frames} frames (llava.video_files.read_frames)."
            )
        return [(start, start + frames, frames) for start in range(0, len(images), frames)]

    @property
    def crops_per_pass(self) -> int:
        return self.num_frames
