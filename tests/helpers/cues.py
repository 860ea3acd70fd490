"""Random cues of every kind for tests of pruning methods."""

from __future__ import annotations

import torch
from torch import Tensor

from llava.pruning import Pruner, TextCue
from llava.pruning.base import parse_cue

QUESTION = TextCue("What is it?", None)


def make_cues(pruner: Pruner, features: Tensor, attention: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Make the cues that a method declares: functions of the features, so that equal tokens have equal ones.

    They are exact in float16 where the features are: a few channels, permuted or copied.
    """
    rows, n, channels = features.shape
    dtype, device = features.dtype, features.device
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).half().to(device=device, dtype=dtype)

    with_cls = torch.cat([draw(1, 1, channels).expand(rows, -1, -1), features], dim=1)
    found: dict[str, Tensor] = {}
    for cue in pruner.cues:
        name, number = parse_cue(cue, 24)
        if name == "merged":
            found[cue] = features[:, : min(number, n)]
        elif name == "merged_groups":
            columns = torch.arange(n, device=device) % max(min(number, n), 1)
            found[cue] = columns.flip(0).repeat(rows, 1)
        elif name == "received":
            found[cue] = attention[:, 0] if number is None else attention[:, -1].flip(1)
        elif name == "cls":
            found[cue] = draw(1, channels).expand(rows, -1)
        elif name == "last_query":
            found[cue] = draw(1, channels).expand(rows, -1)
        elif name in ("keys", "last_keys"):
            found[cue] = with_cls
        elif name == "projected":
            found[cue] = torch.cat([features, features.flip(2)], dim=2)
        elif name == "image_embeds":
            found[cue] = features
        elif name == "text_embeds":
            found[cue] = draw(2, channels)
        else:
            raise ValueError(f"no random cue {cue!r}")
    return found


def keep(pruner: Pruner, features: Tensor, attention: Tensor, seed: int = 0):
    """Call `pruner.keep` with random cues and a question."""
    return pruner.keep(features, attention, None, QUESTION, make_cues(pruner, features, attention, seed))
