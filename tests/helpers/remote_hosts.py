"""Stand-ins of models whose code comes with their checkpoint: tiny, random, with the numbers of tokens of
the real.

Each has a tower that gives features and a cue, a merge of visual tokens into the prompt, and a decoder that
is called with keyword arguments, as such models do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, VOCABULARY, IMAGE = 16, 2, 40, 39


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return outputs (B, L, W) and weights (B, H, L, S) of attention over heads."""
    q, k, v = (one.unflatten(-1, (HEADS, -1)).transpose(1, 2) for one in (q, k, v))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = (logits if mask is None else logits.masked_fill(~mask[:, None], -1e30)).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2), weights


class Block(nn.Module):
    """A layer of a tower or decoder; `experts` has other weights for visual tokens (a visual expert)."""

    def __init__(self, experts: int = 1) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(experts))
        self.mlp = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(experts))

    def by_type(self, layers: nn.ModuleList, hidden: Tensor, kinds: Tensor | None) -> Tensor:
        found = layers[0](hidden)
        return found if kinds is None else torch.where(kinds[..., None] == 1, layers[1](hidden), found)

    def forward(
        self, hidden: Tensor, mask: Tensor | None = None, kinds: Tensor | None = None, past: Any = None
    ) -> tuple[Tensor, Tensor, Any]:
        q, k, v = self.by_type(self.qkv, functional.layer_norm(hidden, [WIDTH]), kinds).chunk(3, -1)
        if past is not None:
            k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
        out, weights = _attend(q, k, v, mask)
        hidden = hidden + out
        return hidden + torch.tanh(self.by_type(self.mlp, hidden, kinds)), weights, (k, v)


class Decoder(nn.Module):
    """Two layers with positions added at the input; takes a mask (B, S) and, with experts, token types."""

    def __init__(self, experts: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(2048, WIDTH)
        self.layers = nn.ModuleList(Block(experts) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        past: Any = None,
    ) -> tuple[Tensor, Any]:
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = hidden + self.places(position_ids)
        new, total = hidden.shape[1], attention_mask.shape[1]
        causal = torch.ones(new, total, dtype=torch.bool).tril(total - new)
        mask, caches = causal & attention_mask[:, None].bool(), []
        if len(self.layers[0].qkv) > 1 and token_type_ids is None:
            token_type_ids = torch.zeros(hidden.shape[:2])
        for number, layer in enumerate(self.layers):
            hidden, _, cache = layer(hidden, mask, token_type_ids, None if past is None else past[number])
            caches.append(cache)
        return self.head(hidden[:, -1]), caches


class Standin(nn.Module):
    """A model: pixels (images, patches, W) and ids (B, S) with IMAGE at visual tokens."""

    tokens: int  # per image, in the prompt

    def __init__(self, experts: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower = Block()
        self.decoder = Decoder(experts)
        self.build()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=1.3 * WIDTH**-0.5)

    def build(self) -> None: ...

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return visual tokens for the decoder, features and cue."""
        raise NotImplementedError

    def forward(self, input_ids: Tensor, pixels: Tensor) -> tuple[Tensor, Any]:
        embeds = self.decoder.embed(input_ids)
        embeds[input_ids == IMAGE] = self.see(pixels)[0].flatten(0, 1)
        return self.decoder(inputs_embeds=embeds, **self.extras(input_ids))

    def extras(self, input_ids: Tensor) -> dict[str, Tensor]:
        mask = torch.ones_like(input_ids)
        return {"attention_mask": mask, "position_ids": mask.cumsum(1) - 1}

    def pixels(self, images: int) -> Tensor:
        return torch.randn(images, self.patches, WIDTH, generator=torch.Generator().manual_seed(1))

    def prompt(self, rows: int) -> Tensor:
        text = torch.arange(3, 9).expand(rows, -1)
        return torch.cat([text[:, :3], text.new_full((rows, self.tokens), IMAGE), text[:, 3:]], 1)


class Resampler(Standin):
    """256 queries read 1,024 patches, as in the first Qwen-VL; the tower has no [CLS]."""

    tokens, patches = 256, 1024

    def build(self) -> None:
        self.queries = nn.Parameter(torch.zeros(self.tokens, WIDTH))

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        patches, weights, _ = self.tower(pixels)
        found, read = _attend(self.queries.expand(len(pixels), -1, -1), patches, patches)
        received = weights.mean((1, 2))  # (B, patches): attention that a patch receives
        # A query is as important as the patches that it reads.
        return found, found, (read.mean(1) @ received[..., None])[..., 0]


class ClsTower(Standin):
    """576 patches and [CLS], an MLP before the decoder, as in InternVL-Chat-V1."""

    tokens, patches = 576, 576

    def build(self) -> None:
        self.cls, self.project = nn.Parameter(torch.zeros(WIDTH)), nn.Linear(WIDTH, WIDTH)

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cls = self.cls.expand(len(pixels), 1, -1)
        found, weights, _ = self.tower(torch.cat([cls, pixels], 1))
        return self.project(found[:, 1:]), found[:, 1:], weights[:, :, 0, 1:]


class VisualExpert(ClsTower):
    """1,225 patches with one position for all of them, and other weights for visual tokens, as in CogVLM."""

    tokens, patches = 1225, 1225

    def __init__(self) -> None:
        super().__init__(experts=2)

    def extras(self, input_ids: Tensor) -> dict[str, Tensor]:
        visual = input_ids == IMAGE
        position = ((~visual) | (visual.cumsum(1) == 1)).long().cumsum(1) - 1
        mask = torch.ones_like(input_ids)
        return {"attention_mask": mask, "position_ids": position, "token_type_ids": visual.long()}
