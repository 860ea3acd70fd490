"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: a row per image, and per temporal patch (two frames) of a video.

The tower has no [CLS]: a patch's score is the attention that it receives within its frame, in the last block
(Qwen2.5-VL: the last one that attends to whole frames), and a token's the mean of its patches. Similarity is
computed on the merged tokens, which are what the language model gets. Kept tokens keep their time, row and
column. Qwen2.5-VL orders patches by window inside the tower. Qwen3-VL adds features of earlier blocks to the
first layers of the language model (deepstack), so tokens cannot be merged there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava.integrations.cue import TowerParts

from .base import POOLED_CUES, Host, HostRow, HostRows, Seen

_GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


class QwenVLHost(Host):
    classes = ("Qwen2VLForConditionalGeneration",)
    modalities = {"image": "image_token_id", "video": "video_token_id"}
    projector = None
    mrope = True
    needs_ids = True
    cues = {"image": POOLED_CUES, "video": POOLED_CUES}
    merges = {"image": True, "video": True}

    def towers(self, base: nn.Module) -> dict[str, TowerParts]:
        tower = base.visual
        whole = self.whole_blocks(tower)
        select = max(whole) if whole else len(tower.blocks) - 1
        parts = TowerParts(tower, tower.blocks, "attn", False, select, whole)
        return {"image": parts, "video": parts}

    def whole_blocks(self, tower: nn.Module) -> tuple[int, ...]:
        """Return the blocks that attend to whole frames; empty if all do."""
        return ()

    def order(self, tower: nn.Module, grid: Tensor) -> Tensor | None:
        """Return the place inside the tower of each token, None if they are in order."""
        return None

    def rows(self, base: nn.Module, seen: Seen) -> HostRows:
        grid = seen.arguments[_GRIDS[seen.modality]].cpu()
        merge = base.visual.spatial_merge_size
        embeds = seen.embeds().detach()
        frames = [(t, h // merge, w // merge) for t, h, w in grid.tolist()]
        sizes = [h * w for t, h, w in frames for _ in range(t)]
        order = self.order(base.visual, grid)
        cues = {}
        for name, parts in seen.cues.items():  # of one frame each: (1, H, patches), or (1, patches)
            joined = torch.cat([part[0].unflatten(-1, (-1, merge**2)).mean(-1) for part in parts], dim=-1)
            joined = joined if order is None else joined[..., order.to(joined.device)]
            cues[name] = joined.split(sizes, dim=-1)
        parts, pixels = embeds.split(sizes), seen.pixels.split([n * merge**2 for n in sizes])
        rows, start = [], 0
        for t, h, w in frames:
            for i in range(t):
                number = len(rows)
                found = {name: cue[number] for name, cue in cues.items()}
                rows.append(
                    HostRow(
                        torch.arange(start, start + h * w),
                        parts[number],
                        {**found, "projected": parts[number]},
                        pixels[number],
                        frame=(i, t) if seen.modality == "video" else None,
                        grid=(h, w),
                    )
                )
                start += h * w
        return HostRows(start, rows)

    def project(self, base: nn.Module, features: Tensor) -> Tensor:
        return features


class Qwen25VLHost(QwenVLHost):
    classes = ("Qwen2_5_VLForConditionalGeneration",)

    def whole_blocks(self, tower: nn.Module) -> tuple[int, ...]:
        return tuple(sorted(tower.fullatt_block_indexes))

    def order(self, tower: nn.Module, grid: Tensor) -> Tensor | None:
        if hasattr(tower, "get_window_index"):
            index = tower.get_window_index(grid)[0]
        else:
            from transformers.vision_utils import get_vision_window_index

            index = get_vision_window_index(
                grid,
                spatial_merge_size=tower.spatial_merge_size,
                window_size=tower.window_size,
                patch_size=tower.patch_size,
                kwargs={},
            )[0]
        return torch.as_tensor(index).argsort()


class Qwen3VLHost(QwenVLHost):
    classes = ("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration")
    merges = {"image": False, "video": False}
