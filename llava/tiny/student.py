"""The embedded model while it is trained: its settings, projector and Llama, and the packing of questions.

About twelve questions share one picture: they stand behind it one after another, and a mask lets each see the
prompt, the picture and itself only, with the positions it would have alone. That is exactly the prompt the
model is asked with later. Knows tensors and token ids; no files, no optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from . import questions, tokenizer, world
from .features import WIDTH

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
OFFERING = ("choice", "science", "read")  # offer names, of which one is in the picture
LETTERS = "ABCD"


@dataclass(frozen=True)
class Phase:
    """A stretch of training: how long, on what, and the learning rate factor from its start to its end."""

    steps: int
    pictures: int  # per step
    visible: tuple[int, int]  # tokens a picture keeps, uniformly random ones: from, to; equal: always so many
    rate: tuple[float, float] = (1.0, 1.0)
    mixture: str = "pope"  # of `questions.MIXTURES`
    pool: int = 3400  # training pictures drawn from; later phases see more of them
    wide: bool = False  # auxiliary losses: Chinese names, words on signs and offered options, too
    averaged: bool = False  # what ships is the mean of the weights at the ends of these phases


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on; its JSON lies beside the checkpoint."""

    pictures: int = 5000
    validation: tuple[int, int] = (3400, 3600)  # pictures from, to: never trained on
    phases: tuple[Phase, ...] = (
        Phase(700, 12, (128, 256)),
        Phase(500, 8, (576, 576), (1.0, 0.0)),
        Phase(450, 12, (64, 160), (0.5, 0.5)),  # few tokens: one patch has to do
        Phase(350, 8, (576, 576), (0.5, 0.0)),
        Phase(1600, 12, (48, 224), (0.8, 0.64), "suite", 4800),
        Phase(600, 8, (576, 576), (0.6, 0.0), "suite", 4800, averaged=True),
        Phase(1400, 12, (48, 224), (0.8, 0.6), "late", 4800, True),  # what is still at chance, more often
        Phase(600, 8, (576, 576), (0.6, 0.0), "late", 4800, True, True),
        Phase(300, 12, (48, 160), (0.5, 0.5), "suite", 4800, True),  # few tokens once more, and existence
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
    bfloat16: bool = True  # autocast: half the time where the processor has bfloat16 instructions
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
        # Queries and keys start equal, and large enough to matter: a word looks at patches that resemble it
        # from the first step on. Started apart, 800 steps did not lift yes/no questions off chance.
        for layer in self.model.layers:
            nn.init.normal_(layer.self_attn.q_proj.weight, std=0.05)
            with torch.no_grad():
                layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)

    def forward(self, visual, ids, positions, mask, prefix_length: int):
        """Projected patches (B, n, width) -> hidden states of the text behind them (B, S, width)."""
        text = self.model.embed_tokens(ids)  # (B, prefix + S, width)
        embeds = torch.cat([text[:, :prefix_length], visual, text[:, prefix_length:]], dim=1)
        hidden = self.model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        )
        return hidden.last_hidden_state[:, prefix_length + visual.shape[1] :]


class Packer:
    """Turns pictures and questions into one batch of ids, positions, mask and labels."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.prefix = [1] + tokens.encode(tokenizer.SYSTEM + " ")
        self.cache: dict[str, list[int]] = {}
        words = [*world.THINGS, *map(questions.plural, world.SPRITES), *world.COLORS]
        self.content = {pieces[0] for pieces in map(tokens.encode, words) if len(pieces) == 1}
        offered = [*world.THINGS, *world.WORDS, *questions.CHINESE.values()]
        self.offered = {tokens.encode(name)[0] for name in offered}
        self.yes, self.no = (tokens.encode(word)[0] for word in ("Yes", "No"))

    def encode(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokens.encode(text)
        return self.cache[text]

    def hints(self, kind: str, prompt: list[int], answer: str, wide: bool) -> dict[int, int]:
        """Place in the prompt -> token that is asked for there, too: the answer at the word it is about.

        wide: also at every option and OCR token of a question that offers some, whether it is the right one.
        """
        if wide and kind in OFFERING:
            places = [k for k, piece in enumerate(prompt) if piece in self.offered]
            right = [prompt[k] == self.encode(answer)[0] for k in places]
            if answer in LETTERS:
                right = [k == LETTERS.index(answer) for k in range(len(places))]
            return {k: self.yes if is_it else self.no for k, is_it in zip(places, right, strict=True)}
        about = [k for k, piece in enumerate(prompt) if piece in self.content] if kind in HINTED else []
        return {about[-1]: self.encode(answer)[0]} if about else {}

    def pack(self, asked: list[list[tuple[str, str, str]]], visible: int, wide: bool = False):
        """Questions `asked` per picture -> the tensors of one batch.

        ids (B, P+S), positions (B, P+n+S), mask (B, 1, P+n+S, P+n+S), labels, owner and hints (B, S). owner
        is the number of the question a text token belongs to (-1: padding); labels are shifted, so that
        position t holds the token to predict after t.
        """
        rows = []
        for items in asked:
            ids, labels, owner, place, hints = [], [], [], [], []
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
                place += range(len(prompt) + len(target) - 1)
            rows.append((ids, labels, owner, place, hints))
        longest, front = max(len(row[0]) for row in rows), len(self.prefix) + visible

        def pad(k: int, value: int) -> torch.Tensor:
            return torch.tensor([row[k] + [value] * (longest - len(row[k])) for row in rows])

        ids, labels, owner, place, hints = pad(0, 0), pad(1, IGNORE), pad(2, -1), pad(3, 0), pad(4, IGNORE)
        size = front + longest
        mask = torch.ones(size, size, dtype=torch.bool).tril().repeat(len(rows), 1, 1)
        mask[:, front:, front:] &= owner[:, :, None] == owner[:, None, :]
        positions = torch.cat([torch.arange(front).repeat(len(rows), 1), front + place], dim=1)
        ids = torch.cat([torch.tensor(self.prefix).repeat(len(rows), 1), ids], dim=1)
        return ids, positions, mask[:, None], labels, owner, hints
