"""Mistral3 (`mistralai/Mistral-Small-3.1-24B`): a row per image of any size, with a Pixtral tower.

The tower gets all images as one sequence, with a mask between them; it has no [CLS], so a patch's score is
the attention that it receives within its image, in the layer whose features are used. 2 x 2 patches become
one token, whose score is the mean of theirs; similarity is computed on the projector's output. The tokens
that end a row of the grid are text, which stays.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava.integrations.cue import TowerParts

from .base import POOLED_CUES, Host, HostRow, HostRows, Seen, feature_layer


class Mistral3Host(Host):
    classes = ("Mistral3ForConditionalGeneration",)
    cues = {"image": POOLED_CUES}

    def towers(self, base: nn.Module) -> dict[str, TowerParts]:
        layers, layer = base.vision_tower.transformer.layers, feature_layer(base.config)
        index = (layer if isinstance(layer, int) else list(layer)[-1]) % (len(layers) + 1) - 1
        return {"image": TowerParts(base.vision_tower, layers, "attention", False, index)}

    def rows(self, base: nn.Module, seen: Seen) -> HostRows:
        patch, merge = base.vision_tower.patch_size, base.config.spatial_merge_size
        grids = [(int(h) // patch, int(w) // patch) for h, w in seen.arguments["image_sizes"]]
        lengths = [h * w for h, w in grids]
        cues: dict[str, list[Tensor]] = {}
        for name, parts in seen.cues.items():  # (1, H, patches of all images), or (1, patches)
            each = parts[0][0].split(lengths, dim=-1)
            # The mean over queries of all images, of which only those of its own attend to a patch
            scaled = [one * (sum(lengths) / n) for one, n in zip(each, lengths, strict=True)]
            cues[name] = [_merged(one, grid, merge) for one, grid in zip(scaled, grids, strict=True)]
        embeds = seen.embeds().detach()
        rows, start = [], 0
        for number, (h, w) in enumerate(grids):
            tokens = (h // merge) * (w // merge)
            features = embeds[start : start + tokens]
            found = {name: cue[number] for name, cue in cues.items()}
            rows.append(
                HostRow(
                    torch.arange(start, start + tokens),
                    features,
                    {**found, "projected": features},
                    seen.pixels[number, :, : h * patch, : w * patch],
                    grid=(h // merge, w // merge),
                )
            )
            start += tokens
        return HostRows(start, rows)

    def project(self, base: nn.Module, features: Tensor) -> Tensor:
        return features


def _merged(cue: Tensor, grid: tuple[int, int], merge: int) -> Tensor:
    """Average squares of patches: (..., h w) -> (..., h w / merge ** 2)."""
    maps = cue.reshape(-1, 1, *grid)
    return torch.nn.functional.avg_pool2d(maps, merge).reshape(*cue.shape[:-1], -1)
