"""LLaVA-OneVision: a row per crop, with newlines as in LLaVA-NeXT, and a row per frame, one newline per clip.

The tower has no [CLS]: scores are the attention that each patch receives. Frames are pooled bilinearly after
the projector; here the projector's input and the scores are pooled in the same way. A grid above
`anyres_max_N` is resized, so that its tokens are not patches any more: then it is one row, with the budget of
all its crops.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from .base import ALL_CUES, POOLED_CUES, HostRow, HostRows, Seen, plain_rows
from .llava_next import LlavaNextHost, crop_rows, indices_like, repack


class LlavaOnevisionHost(LlavaNextHost):
    classes = ("LlavaOnevisionForConditionalGeneration",)
    modalities = {"image": "image_token_id", "video": "video_token_id"}
    cues = {"image": ALL_CUES, "video": POOLED_CUES}
    merges = {"image": False, "video": False}  # frames are pooled after the projector

    def rows(self, base: nn.Module, seen: Seen) -> HostRows:
        if seen.modality == "video":
            pooled = replace(
                seen,
                features=base.apply_pooling(seen.features.detach()),
                projected=base.apply_pooling(seen.projected.detach()),
            )
            frames = seen.arguments["pixel_values_videos"].shape[1]
            return plain_rows(pooled, partial(_pooled, base), frames=frames, gap=1)
        arguments, pack = seen.calls["pack_image_features"][0]
        crops, embeds = iter(plain_rows(seen).rows), seen.embeds().detach()
        result = HostRows(0, [])
        for i, features in enumerate(arguments["image_features"]):
            mine = [next(crops) for _ in features]
            pack_one = partial(
                repack, pack, {**arguments, "image_sizes": arguments["image_sizes"][i : i + 1]}
            )
            number = indices_like([features])[0]
            packed = pack_one([torch.cat([number, number**2], dim=-1)], -1.0)[0]
            end = result.count + len(packed)
            if bool(((packed[:, 0] ** 2 == packed[:, 1]) | (packed[:, 0] < 0)).all()):
                rows = crop_rows(mine, packed[:, 0]).rows
            else:
                rows = [mine[0], _resized(mine, pack_one, embeds[result.count : end])]
                rows[0].places = torch.arange(len(mine[0].places))
            for row in rows:
                row.places = torch.where(row.places < 0, row.places, row.places + result.count)
            result.rows += rows
            result.count = end
        return result


def _resized(crops: list[HostRow], pack: partial, embeds: Tensor) -> HostRow:
    """Return the row of a grid that was resized: features and scores are resized with it.

    Args:
        crops: The base crop and those of the grid.
        pack: Packs channels (crops, N, C) of one image.
        embeds: (L, D), the image's features in the language model.
    """
    patches = len(crops[0].places)
    names = [name for name in crops[0].cues if name != "projected"]
    channels = [torch.stack([row.features for row in crops]).float()]
    for name in names:
        cue = torch.stack([row.cues[name] for row in crops]).float()
        channels.append(cue[..., None] if cue.ndim == 2 else cue.transpose(1, 2))
    channels.append(torch.ones_like(channels[0][..., :1]))  # newlines are negative
    packed = pack([torch.cat(channels, dim=-1)], -1.0)[0][patches:]
    token = packed[:, -1] > 0
    features, *cues, _ = packed[token].split([one.shape[-1] for one in channels], dim=-1)
    found = {
        name: cue[:, 0] if crops[0].cues[name].ndim == 1 else cue.T
        for name, cue in zip(names, cues, strict=True)
    }
    places = token.nonzero()[:, 0].cpu() + patches
    return HostRow(
        places,
        features.to(crops[0].features.dtype),
        {**found, "projected": embeds[places.to(embeds.device)]},
        torch.stack([row.pixels for row in crops]),
        crops=len(crops) - 1,
        grid=None,
    )


def _pooled(base: nn.Module, cue: Tensor) -> Tensor:
    """Pool scores as the model pools features: (..., N) -> (..., n)."""
    maps = cue.reshape(len(cue), -1, cue.shape[-1]).transpose(1, 2)
    return base.apply_pooling(maps).transpose(1, 2).reshape(*cue.shape[:-1], -1)
