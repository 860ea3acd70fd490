"""The bundled model during training: recipe, projector and language model, and the packing of questions.

About twelve questions share one image. They follow it one after another, and a mask lets each attend only to
the system prompt, the image and itself, at the positions it would have alone. This equals the prompts of
inference. Independent of files and of the optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llava.tiny import world
from llava.tiny.world import questions

from .features import WIDTH
from .tokenizer import SYSTEM

IGNORE = -100
HINTED = (
    "exist",
    "color",
    "color_check",
    "count",
    "count_check",
    "position",
    "mme",
    "choice_color",
    "unanswerable",
)
OFFERING = ("choice", "science", "read")  # these list names, one of which is in the image
LETTERS = "ABCD"


@dataclass(frozen=True)
class Phase:
    """One phase of training. The field names are keys of recipe.json."""

    steps: int
    pictures: int  # images per step
    visible: tuple[int, int]  # visual tokens per image, uniformly random ones: minimum, maximum
    rate: tuple[float, float] = (1.0, 1.0)  # learning rate factor: first step, last step
    mixture: str = "pope"  # key of `mixtures.MIXTURES`
    pool: int = 3400  # number of training images to sample from; later phases use more
    wide: bool = False  # auxiliary losses also cover Chinese names, words on signs and listed options
    averaged: bool = False  # the exported weights are the mean over the ends of these phases


@dataclass(frozen=True)
class Recipe:
    """All settings of a run, saved as recipe.json in the checkpoint. The field names are its keys."""

    pictures: int = 5000  # training and validation images
    validation: tuple[int, int] = (3400, 3600)  # first and last (exclusive) image that is never trained on
    phases: tuple[Phase, ...] = (
        Phase(700, 12, (128, 256)),
        Phase(500, 8, (576, 576), (1.0, 0.0)),
        Phase(450, 12, (64, 160), (0.5, 0.5)),  # few tokens: one patch per object must suffice
        Phase(350, 8, (576, 576), (0.5, 0.0)),
        Phase(1600, 12, (48, 224), (0.8, 0.64), "suite", 4800),
        Phase(600, 8, (576, 576), (0.6, 0.0), "suite", 4800, averaged=True),
        Phase(
            1400, 12, (48, 224), (0.8, 0.6), "late", 4800, True
        ),  # more of the types that are still at chance
        Phase(600, 8, (576, 576), (0.6, 0.0), "late", 4800, True, True),
        Phase(300, 12, (48, 160), (0.5, 0.5), "suite", 4800, True),  # few tokens and existence again
        Phase(250, 8, (576, 576), (0.5, 0.0), "suite", 4800, True, True),
    )
    questions: int = 12
    muon_lr: float = 0.01
    adam_lr: float = 1e-3
    warmup: int = 100
    align: float = 0.5  # weight of both auxiliary losses
    width: int = 192
    layers: int = 3
    heads: int = 3
    mlp: int = 512
    bfloat16: bool = True  # autocast; halves the time on processors with bfloat16 instructions
    seed: int = 0


class Student(nn.Module):
    """Projector and Llama, with the parameter names of an original LLaVA checkpoint."""

    def __init__(self, recipe: Recipe, vocabulary: int):
        super().__init__()
        from transformers import LlamaConfig, LlamaModel

        self.config = LlamaConfig(
            hidden_size=recipe.width,
            intermediate_size=recipe.mlp,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            vocab_size=vocabulary,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            attn_implementation="sdpa",
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=False,
            use_cache=False,
        )
        self.model = LlamaModel(self.config)
        self.model.mm_projector = nn.Sequential(
            nn.Linear(WIDTH, recipe.width), nn.GELU(), nn.Linear(recipe.width, recipe.width)
        )
        self.lm_head = nn.Linear(recipe.width, vocabulary, bias=False)
        # Queries and keys start equal and large, so that a word attends to similar patches from the first
        # step. With independent initialization, yes/no questions were still at chance after 800 steps.
        for layer in self.model.layers:
            nn.init.normal_(layer.self_attn.q_proj.weight, std=0.05)
            with torch.no_grad():
                layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)

    def forward(self, visual, ids, positions, mask, prefix_length: int):
        """Map projected patches (B, n, width) to hidden states of the following text (B, S, width)."""
        text = self.model.embed_tokens(ids)  # (B, prefix + S, width)
        embeds = torch.cat([text[:, :prefix_length], visual, text[:, prefix_length:]], dim=1)
        hidden = self.model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        )
        return hidden.last_hidden_state[:, prefix_length + visual.shape[1] :]


class Packer:
    """Packs images and questions into one batch of ids, positions, mask and labels."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.prefix = [1] + tokens.encode(SYSTEM + " ")
        self.cache: dict[str, list[int]] = {}
        words = [*world.OBJECTS, *map(questions.plural, world.SPRITES), *world.COLORS]
        self.content = {pieces[0] for pieces in map(tokens.encode, words) if len(pieces) == 1}
        offered = [*world.OBJECTS, *world.WORDS, *questions.CHINESE.values()]
        self.offered = {tokens.encode(name)[0] for name in offered}
        self.yes, self.no = (tokens.encode(word)[0] for word in ("Yes", "No"))

    def encode(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokens.encode(text)
        return self.cache[text]

    def hints(self, kind: str, prompt: list[int], answer: str, wide: bool) -> dict[int, int]:
        """Map positions in the prompt to tokens that are also predicted there: the answer at its object.

        Args:
            wide: Also predict, at every option and OCR token that a question lists, whether it is correct.
        """
        if wide and kind in OFFERING:
            listed = [k for k, piece in enumerate(prompt) if piece in self.offered]
            right = [prompt[k] == self.encode(answer)[0] for k in listed]
            if answer in LETTERS:
                right = [k == LETTERS.index(answer) for k in range(len(listed))]
            return {k: self.yes if is_it else self.no for k, is_it in zip(listed, right, strict=True)}
        about = [k for k, piece in enumerate(prompt) if piece in self.content] if kind in HINTED else []
        return {about[-1]: self.encode(answer)[0]} if about else {}

    def pack(self, asked: list[list[tuple[str, str, str]]], visible: int, wide: bool = False):
        """Pack the questions `asked` about each image, (type, question, answer), into one batch.

        Returns:
            ids (B, P+S), positions (B, P+n+S), mask (B, 1, P+n+S, P+n+S), labels, owner and hints (B, S).
            `owner` is the index of the question of a token (-1: padding). Labels are shifted: position t
            holds the token that follows t.
        """
        rows = []
        for items in asked:
            ids, labels, owner, steps, hints = [], [], [], [], []
            for number, (kind, text, answer) in enumerate(items):
                prompt = self.encode(f"\n{text} ASSISTANT:")
                target = [*self.encode(answer), 2]
                ahead = [IGNORE] * (len(prompt) + len(target) - 1)
                for k, token in self.hints(kind, prompt, answer, wide).items():
                    ahead[k] = token
                hints += ahead
                ids += prompt + target[:-1]
                labels += [IGNORE] * (len(prompt) - 1) + target
                owner += [number] * (len(prompt) + len(target) - 1)
                steps += range(len(prompt) + len(target) - 1)
            rows.append((ids, labels, owner, steps, hints))
        longest, front = max(len(row[0]) for row in rows), len(self.prefix) + visible

        def pad(k: int, value: int) -> torch.Tensor:
            return torch.tensor([row[k] + [value] * (longest - len(row[k])) for row in rows])

        ids, labels, owner, steps, hints = pad(0, 0), pad(1, IGNORE), pad(2, -1), pad(3, 0), pad(4, IGNORE)
        size = front + longest
        mask = torch.ones(size, size, dtype=torch.bool).tril().repeat(len(rows), 1, 1)
        mask[:, front:, front:] &= owner[:, :, None] == owner[:, None, :]
        positions = torch.cat([torch.arange(front).repeat(len(rows), 1), front + steps], dim=1)
        ids = torch.cat([torch.tensor(self.prefix).repeat(len(rows), 1), ids], dim=1)
        return ids, positions, mask[:, None], labels, owner, hints
