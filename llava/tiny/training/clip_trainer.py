"""Training of the bundled Video-LLaVA: its projector and language model, on features of clips.

The weights start from the bundled image model, whose embeddings are copied piece by piece into a vocabulary
that also has the words of video questions. The tower stays frozen. As in `trainer`, tokens are uniformly
random where fewer than all are used (equally many per frame in half of the steps, from the whole clip in the
others, so that neither kind of budget is favored), and training ends at all 2,056 tokens. Two auxiliary
losses use labels of the generator; they fade out in the last phase.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from llava.conversation import conv_templates
from llava.paths import BUNDLED_MODEL
from llava.tiny.video_tower import WIDTH, frame_codes
from llava.tiny.world.clip_questions import ask_about
from llava.tiny.world.clips import DIRECTIONS, SLIDING, Clip, ClipObject, draw_clip
from llava.tiny.world.vocabulary import COLORS, OBJECTS
from llava.video_files import frame_indices

from .clip_features import FRAMES, PLACES, ClipFeatures
from .student import IGNORE, Packer, Recipe, Student
from .tokenizer import corpus, train
from .trainer import read_state

CONVERSATION = "llava_v1"
PATCH, GRID = 14, 16
LENGTH = 3072  # longest prompt
_HINTED = ("exist", "exist_at", "color", "color_at", "direction", "action")


@dataclass(frozen=True)
class ClipPhase:
    """One phase of training; the field names are keys of recipe.json."""

    steps: int
    clips: int  # per step
    visible: tuple[int, int]  # visual tokens per clip: minimum, maximum; 2056 is all
    rate: tuple[float, float]  # learning rate factor: first step, last step
    questions: int = 12  # per clip


@dataclass(frozen=True)
class ClipRecipe:
    """All settings of a run, saved as recipe.json in the checkpoint. The field names are its keys."""

    clips: int = 297  # the first `validation` of them are not trained on
    validation: int = 40
    phases: tuple[ClipPhase, ...] = (
        ClipPhase(400, 6, (64, 192), (1.0, 0.767), 10),
        ClipPhase(60, 6, (64, 192), (0.767, 0.1), 10),
        ClipPhase(8, 2, (2056, 2056), (0.1, 0.03), 24),
        ClipPhase(162, 6, (64, 256), (0.8, 0.53), 10),
        ClipPhase(40, 3, (256, 1024), (0.53, 0.15), 14),
        ClipPhase(14, 2, (2056, 2056), (0.15, 0.0), 24),
    )
    muon_lr: float = 0.006
    adam_lr: float = 1e-3
    warmup: int = 40
    align: float = 0.3  # weight of both auxiliary losses
    seed: int = 0


class ClipPacker(Packer):
    """Packs clips and questions; the prompt is that of Video-LLaVA."""

    def __init__(self, tokens) -> None:
        super().__init__(tokens)
        self.prefix = [1] + tokens.encode(conv_templates[CONVERSATION].system + " USER: ")

    def hints(self, kind: str, prompt: list[int], answer: str, wide: bool) -> dict[int, int]:
        about = [k for k, piece in enumerate(prompt) if piece in self.content] if kind in _HINTED else []
        return {about[-1]: self.encode(answer)[0]} if about else {}


def clip_corpus() -> list[str]:
    """Build the training lines of the tokenizer: those of the image model, and prompts about clips."""
    rs, system = np.random.RandomState(2), conv_templates[CONVERSATION].system
    lines = corpus()
    for seed in range(400):
        for _, text, answer in ask_about(draw_clip(seed), rs, 8):
            lines.append(f"{system} USER: \n{text} ASSISTANT: {answer}")
    words = "yes no left right up down enters leaves stays still changes moves start end video".split()
    return lines + [f"{word} {word}, the {word}" for word in words for _ in range(60)]


def reversed_clip(clip: Clip) -> Clip:
    """Return the labels of a clip that is played backwards."""
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}

    def turned(item: ClipObject) -> ClipObject:
        if item.role == "moves":
            x, y = DIRECTIONS[item.direction]
            place = (item.place[0] + x * item.distance, item.place[1] + y * item.distance)
            return replace(item, place=place, direction=opposite[item.direction])
        if item.role == "changes":
            return replace(item, color=item.new_color, new_color=item.color, when=1 - item.when)
        role = {"enters": "leaves", "leaves": "enters"}.get(item.role)
        return replace(item, role=role, when=1 - SLIDING - item.when) if role else item

    return replace(clip, objects=tuple(map(turned, clip.objects)))


def clip_labels(clip: Clip) -> np.ndarray:
    """Label the patches of the eight frames: (8, 257) indices into OBJECTS, -1 for background and [CLS]."""
    labels = np.full((FRAMES, GRID, GRID), -1, np.int64)
    centers = np.arange(GRID) * PATCH + PATCH / 2
    for frame, index in enumerate(frame_indices(clip.length, FRAMES)):
        for item in clip.objects:
            corner = item.corner(clip.time(index))
            if corner is not None:
                columns, rows = ((centers > low) & (centers < low + item.side) for low in corner)
                labels[frame][np.ix_(rows, columns)] = OBJECTS.index(item.name)
    return np.concatenate([np.full((FRAMES, 1), -1), labels.reshape(FRAMES, -1)], axis=1)


def places_of(rs: np.random.RandomState, visible: int) -> np.ndarray:
    """Draw which of the 8 x 257 places are used, in order; all of them, or patches only."""
    patches = np.arange(FRAMES * PLACES).reshape(FRAMES, PLACES)
    if visible == patches.size:
        return patches.ravel()
    patches = patches[:, 1:]
    if rs.rand() < 0.5:
        share = np.diff(np.arange(FRAMES + 1) * visible // FRAMES)
        chosen = [rs.permutation(row)[:count] for row, count in zip(patches, share, strict=True)]
        return np.sort(np.concatenate(chosen))
    return np.sort(rs.permutation(patches.ravel())[:visible])


def start(student: Student, tokens, image_model: Path = BUNDLED_MODEL) -> None:
    """Copy the weights of the bundled image model, piece by piece.

    A piece that is new starts as its capitalized form ("Yes" for "yes"), else as the mean of its old pieces.
    """
    import sentencepiece
    from safetensors.torch import load_file

    state = load_file(image_model / "model.safetensors")
    state = {name: tensor.float() for name, tensor in state.items()}
    old = sentencepiece.SentencePieceProcessor(model_file=str(image_model / "tokenizer.model"))
    rows = []
    for piece in map(tokens.id_to_piece, range(len(tokens))):
        word = piece.replace("\u2581", "")
        forms = (piece, "\u2581" + word.capitalize(), word.capitalize())
        same = [one for one in map(old.piece_to_id, forms) if one != old.unk_id() or piece == "<unk>"]
        if same:
            rows.append(same[:1])
        else:
            # encoded without the space that sentencepiece adds in front
            found = old.encode(word)
            rows.append([one for one in found if one != old.piece_to_id("\u2581")] or [old.unk_id()])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.stack([state[name][row].mean(0) for row in rows])
    first = state["model.mm_projector.0.weight"]
    extra = torch.randn(len(first), WIDTH - first.shape[1]) * 0.05
    state["model.mm_projector.0.weight"] = torch.cat([first, extra], 1)
    student.load_state_dict(state)


class ClipTrainer:
    """Runs the training of one recipe; `folder` holds its tokenizer and its state."""

    def __init__(self, recipe: ClipRecipe, store: ClipFeatures, folder: Path) -> None:
        import sentencepiece

        torch.manual_seed(recipe.seed)
        self.recipe, self.store, self.folder = recipe, store, folder
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "tokenizer.model").exists():
            train(folder, clip_corpus(), LENGTH)
        tokens = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self.packer = ClipPacker(tokens)
        self.student = Student(Recipe(), len(tokens))
        self.student.model.mm_projector[0] = nn.Linear(WIDTH, Recipe.width)
        start(self.student, tokens)
        names = [tokens.encode(name) for name in (*OBJECTS, *COLORS)]
        if any(len(pieces) != 1 for pieces in names):
            raise RuntimeError(f"{folder / 'tokenizer.model'}: an object name takes more than one piece.")
        self.names = torch.tensor(names)[: len(OBJECTS), 0]
        named = list(self.student.named_parameters())
        matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
        chosen = {id(p) for p in matrices}
        others = [p for _, p in named if id(p) not in chosen]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.0),
            torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.step, self.log = 0, []
        self.codes = frame_codes()[:, None]  # (8, 1, 396)

    def batch(self, rows: np.ndarray, rs: np.random.RandomState, phase: ClipPhase, visible: int):
        """Return the questions, features (B, visible, 396) and labels (B, visible) of some clips."""
        asked, features, labels = [], [], []
        for row in rows:
            clip, backwards = draw_clip(int(row)), rs.rand() < 0.5
            hidden, patches = self.store.read(int(row)), clip_labels(clip)
            hidden = F.pad(hidden - hidden.mean(-1, keepdim=True), (0, WIDTH - hidden.shape[-1]))
            if backwards:
                clip, hidden, patches = reversed_clip(clip), hidden.flip(0), patches[::-1]
            places = places_of(rs, visible)
            features.append((hidden + self.codes).flatten(0, 1)[torch.from_numpy(places)])
            labels.append(torch.from_numpy(patches.reshape(-1)[places].copy()))
            asked.append(ask_about(clip, rs, phase.questions))
        return asked, torch.stack(features), torch.stack(labels)

    def losses(self, asked, features, patches):
        """Return losses (answer, alignment, hint), and whether each question is answered exactly."""
        ids, positions, mask, labels, owner, hints = self.packer.pack(asked, features.shape[1])
        visual = self.student.model.mm_projector(features)
        hidden = self.student(visual, ids, positions, mask, len(self.packer.prefix))
        logits = self.student.lm_head(hidden[labels != IGNORE])
        answer = F.cross_entropy(logits, labels[labels != IGNORE])
        on, early = patches >= 0, hints != IGNORE
        zero = answer.new_zeros(())
        align = hint = zero
        if on.any():
            names = F.normalize(self.student.model.embed_tokens(self.names), dim=-1)
            align = F.cross_entropy(F.normalize(visual[on], dim=-1) @ names.T * 16, patches[on])
        if early.any():
            hint = F.cross_entropy(self.student.lm_head(hidden[early]), hints[early])
        hit = torch.ones_like(labels, dtype=torch.bool)
        hit[labels != IGNORE] = logits.argmax(-1) == labels[labels != IGNORE]
        right: dict[str, list[bool]] = {}
        for row, items in enumerate(asked):
            for number, (kind, _, _) in enumerate(items):
                right.setdefault(kind, []).append(bool(hit[row][owner[row] == number].all()))
        return answer, align, hint, right

    def phase(self) -> tuple[ClipPhase, float]:
        """Return the phase of the current step and its progress in [0, 1)."""
        step = self.step
        for phase in self.recipe.phases:
            if step < phase.steps:
                break
            step -= phase.steps
        return phase, min(step, phase.steps) / phase.steps

    def train_step(self) -> dict[str, float]:
        """Run one optimizer step; return its losses."""
        phase, progress = self.phase()
        # A step depends only on its number, so a resumed run equals an uninterrupted one.
        rs = np.random.RandomState([self.recipe.seed + 1, self.step])
        first = self.recipe.validation
        pool = first + np.flatnonzero(self.store.done[first : self.recipe.clips])
        rows = rs.choice(pool, phase.clips, replace=False)
        visible = int(rs.randint(phase.visible[0], phase.visible[1] + 1))
        answer, align, hint, _ = self.losses(*self.batch(rows, rs, phase, visible))
        begin, end = phase.rate
        factor = min(1.0, (self.step + 1) / self.recipe.warmup) * (begin + (end - begin) * progress)
        last = phase is self.recipe.phases[-1]
        weight = self.recipe.align * (factor / begin if last else 1.0)
        (answer + weight * (align + hint)).backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        rates = (self.recipe.muon_lr, self.recipe.adam_lr)
        for optimizer, base in zip(self.optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = base * max(factor, 0.01)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"loss": answer.item(), "align": align.item(), "hint": hint.item()}

    @torch.no_grad()
    def validate(self, visible: int) -> dict[str, float]:
        """Return the exact match per question type on the validation clips, at random or all tokens."""
        rs, found = np.random.RandomState(7), {}
        rows = np.arange(self.recipe.validation)
        phase = replace(self.recipe.phases[0], questions=24)
        for begin in range(0, len(rows), 4):
            *_, right = self.losses(*self.batch(rows[begin : begin + 4], rs, phase, visible))
            for kind, hits in right.items():
                found.setdefault(kind, []).extend(hits)
        return {kind: round(float(np.mean(hits)), 3) for kind, hits in sorted(found.items())}

    def save(self) -> None:
        """Write the state of the run to training.pt."""
        state = {
            "step": self.step,
            "log": self.log,
            "recipe": json.dumps(asdict(self.recipe)),
            "student": self.student.state_dict(),
            "optimizers": [one.state_dict() for one in self.optimizers],
        }
        path = self.folder / "training.tmp"
        torch.save(state, path)
        path.replace(self.folder / "training.pt")

    def resume(self) -> None:
        """Restore the state of training.pt if it exists; exit if it is of another recipe."""
        state = read_state(self.folder, self.recipe, self.student, self.optimizers)
        if state is None:
            return
        self.step, self.log = state["step"], state["log"]

    def run(self, every: int = 25, validate_every: int = 150) -> None:
        """Train to the end of the recipe; log and save every `every` steps."""
        total, window, begin = sum(phase.steps for phase in self.recipe.phases), [], time.time()
        while self.step < total:
            window.append(self.train_step())
            if self.step % every == 0 or self.step == total:
                entry = {"step": self.step, "seconds": round(time.time() - begin, 1)}
                entry |= {key: round(float(np.mean([one[key] for one in window])), 4) for key in window[0]}
                window = []
                if self.step % validate_every == 0 or self.step == total:
                    entry["validation"] = self.validate(self.phase()[0].visible[1])
                self.log.append(entry)
                print(json.dumps(entry), flush=True)
                self.save()
