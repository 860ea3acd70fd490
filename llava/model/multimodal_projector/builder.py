"""The projector, by the name in `mm_projector_type`: linear, mlpNx_gelu, identity."""

from __future__ import annotations

import re

from torch import nn


class IdentityProjector(nn.Module):
    """Returns features unchanged; tower and language model must have the same width."""

    def forward(self, features):
        return features


def build_vision_projector(config: object, delay_load: bool = False) -> nn.Module:
    """Build the projector (..., mm_hidden_size) -> (..., hidden_size) for a LLaVA config.

    `delay_load` is accepted as in LLaVA and has no effect.

    `mlpNx_gelu` is N linear layers with GELU between them (parameters `0`, `2`, ... as in LLaVA's files).

    Raises:
        ValueError: unknown name, or `identity` between different widths.
    """
    kind = getattr(config, "mm_projector_type", None) or "linear"
    width_in, width = config.mm_hidden_size, config.hidden_size
    if kind == "linear":
        return nn.Linear(width_in, width)
    if kind == "identity":
        if width_in != width:
            raise ValueError(
                f"mm_projector_type: 'identity' cannot connect widths {width_in} and {width}. Use mlp2x_gelu."
            )
        return IdentityProjector()
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if match is None:
        raise ValueError(
            f"mm_projector_type: {kind!r} is unknown. Choose linear, mlpNx_gelu (N = 1, 2, ...) or identity."
        )
    modules: list[nn.Module] = [nn.Linear(width_in, width)]
    for _ in range(1, int(match.group(1))):
        modules += [nn.GELU(), nn.Linear(width, width)]
    return nn.Sequential(*modules)
