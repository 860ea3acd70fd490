"""Training of projector and language model: steps, validation, checkpoints. The vision tower stays frozen.

The model is used to compare pruning methods, so training must not favor any: [CLS] attention is not
supervised, token subsets are uniformly random, and the learning rate falls to zero at all 576 tokens. Two
auxiliary losses fade out with it. One pulls each projected patch towards the embedding of the name of the
object that covers it. The other predicts the answer already at the object in the question ("Is there a dog"),
because attending to it and carrying the result to the end of the prompt are hard to learn at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from llava.tiny import world
from llava.tiny.world import questions
from llava.tiny.world.mixtures import ask

from .features import PATCHES, WIDTH, FeatureStore, patch_labels
from .student import IGNORE, Packer, Phase, Recipe, Student


def read_state(
    folder: Path, recipe: Any, student: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any] | None:
    """Load training.pt of a folder into a student and its optimizers; exit if it is of another recipe.

    Returns:
        The whole state; None if there is no such file.
    """
    path = folder / "training.pt"
    if not path.exists():
        return None
    state = torch.load(path, weights_only=True)
    if state["recipe"] != json.dumps(asdict(recipe)):
        raise SystemExit(
            f"{path}: cannot resume from another recipe. Remove the file or choose another --work."
        )
    student.load_state_dict(state["student"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state


class Trainer:
    """Runs the training of one recipe; `folder` holds its tokenizer and its state."""

    def __init__(self, recipe: Recipe, store: FeatureStore, folder: Path, device: str = "cpu"):
        import sentencepiece

        torch.manual_seed(recipe.seed)
        self.recipe, self.store, self.folder, self.device = recipe, store, folder, torch.device(device)
        self.tokens = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self.packer = Packer(self.tokens)
        self.student = Student(recipe, len(self.tokens)).to(self.device)
        objects = [*world.OBJECTS, *world.WORDS]
        chinese = [questions.CHINESE[name] for name in world.OBJECTS]
        names = [self.tokens.encode(name) for name in objects + chinese]
        if any(len(pieces) != 1 for pieces in names):
            raise RuntimeError(
                f"{folder / 'tokenizer.model'}: an object name takes more than one piece. "
                "Train the tokenizer with a larger vocabulary."
            )
        names = torch.tensor(names, device=self.device)[:, 0]
        self.names, self.chinese = names[: len(objects)], names[len(objects) :]
        matrices = [
            p
            for n, p in self.student.named_parameters()
            if p.ndim == 2 and "embed" not in n and "lm_head" not in n
        ]
        chosen = {id(p) for p in matrices}
        self.optimizers = [
            torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.0),
            torch.optim.AdamW(
                [p for p in self.student.parameters() if id(p) not in chosen],
                lr=recipe.adam_lr,
                betas=(0.9, 0.98),
                weight_decay=0.0,
            ),
        ]
        self.base = [recipe.muon_lr, recipe.adam_lr]
        self.scenes: dict[int, tuple] = {}
        self.step, self.log = 0, []
        self.ends: list[dict] = []  # weights at the ends of averaged phases

    def scene(self, row: int):
        """Return scene and patch labels of an image, cached because drawing is slow."""
        if row not in self.scenes:
            scene = world.draw(self.store.first + row)[1]
            self.scenes[row] = scene, patch_labels(scene)
        return self.scenes[row]

    def batch(self, rows: np.ndarray, rs: np.random.RandomState, visible: int):
        """Sample questions; return them, features (B, visible, 384) and labels (B, visible)."""
        mixture = self.phase()[0].mixture
        chosen = [self.scene(int(row)) for row in rows]
        asked = [ask(scene, rs, self.recipe.questions, mixture) for scene, _ in chosen]
        features, labels = (
            self.store.read(rows),
            torch.from_numpy(np.stack([patches for _, patches in chosen])),
        )
        if visible < PATCHES:
            index = torch.from_numpy(np.stack([np.sort(rs.permutation(PATCHES)[:visible]) for _ in rows]))
            features = features.gather(1, index[..., None].expand(-1, -1, WIDTH))
            labels = labels.gather(1, index)
        return asked, features.to(self.device), labels.to(self.device)

    def losses(self, asked, features, patches):
        """Return losses (answer, alignment, hint), answer logits, labels and owner of one batch."""
        wide = self.phase()[0].wide
        packed = self.packer.pack(asked, features.shape[1], wide)
        ids, positions, mask, labels, owner, hints = (tensor.to(self.device) for tensor in packed)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bfloat16):
            visual = self.student.model.mm_projector(features)
            hidden = self.student(visual, ids, positions, mask, len(self.packer.prefix))
            logits = self.student.lm_head(hidden[labels != IGNORE])
            early = self.student.lm_head(hidden[hints != IGNORE])
        logits, early, visual = logits.float(), early.float(), visual.float()
        answer = F.cross_entropy(logits, labels[labels != IGNORE])
        on_object = (patches >= 0) & (patches < len(world.OBJECTS))
        if wide:
            align = self.align(visual, patches, patches >= 0, self.names)
            align = align + self.align(visual, patches, on_object, self.chinese)
        else:
            align = self.align(visual, patches, on_object, self.names[: len(world.OBJECTS)])
        hint = F.cross_entropy(early, hints[hints != IGNORE]) if len(early) else answer.new_zeros(())
        return answer, align, hint, logits, labels, owner

    def align(self, visual, patches, on, names):
        """Cross-entropy of the patches `on` over cosine similarities with the embeddings of `names`."""
        if not on.any():
            return visual.new_zeros(())
        names = F.normalize(self.student.model.embed_tokens(names), dim=-1)
        return F.cross_entropy(F.normalize(visual[on], dim=-1) @ names.T * 16, patches[on])

    def right(self, asked, logits, labels, owner) -> dict[str, list[bool]]:
        """Tell per question type whether all answer tokens are the most likely ones."""
        hit = torch.ones_like(labels, dtype=torch.bool)
        hit[labels != IGNORE] = logits.argmax(-1) == labels[labels != IGNORE]
        out: dict[str, list[bool]] = {}
        for row, items in enumerate(asked):
            for number, (kind, _, _) in enumerate(items):
                out.setdefault(kind, []).append(bool(hit[row][owner[row] == number].all()))
        return out

    def rate(self) -> float:
        """Return the learning rate factor: warm-up, then linear within a phase, at least 0.02."""
        phase, progress = self.phase()
        start, end = phase.rate
        return min(1.0, (self.step + 1) / self.recipe.warmup) * max(0.02, start + (end - start) * progress)

    def phase(self) -> tuple[Phase, float]:
        """Return the phase of the current step and its progress in [0, 1)."""
        step = self.step
        for phase in self.recipe.phases:
            if step < phase.steps:
                break
            step -= phase.steps
        return phase, min(step, phase.steps) / phase.steps

    def train_step(self) -> dict:
        """Run one optimizer step; return its losses."""
        recipe = self.recipe
        phase, _ = self.phase()
        # A step depends only on its number, so a resumed run equals an uninterrupted one.
        rs = np.random.RandomState([recipe.seed + 1, self.step])
        rows = np.sort(rs.choice(phase.pool, phase.pictures, replace=False))
        start, end = recipe.validation
        rows += (rows >= start) * (end - start)  # skip the validation images
        low, high = phase.visible
        visible = low if low == high else rs.randint(low, high + 1)
        asked, features, patches = self.batch(rows, rs, visible)
        answer, align, hint, *_ = self.losses(asked, features, patches)
        factor = self.rate()
        weight = recipe.align * (factor if visible == PATCHES else 1.0)
        (answer + weight * (align + hint)).backward()
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        for optimizer, base in zip(self.optimizers, self.base, strict=True):
            optimizer.param_groups[0]["lr"] = base * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {
            "loss": answer.item(),
            "align": align.item(),
            "hint": hint.item(),
            "norm": norm.item(),
            "visible": visible,
        }

    @torch.no_grad()
    def validate(self, batch: int = 10) -> dict[str, float]:
        """Return the exact match per question type at all 576 tokens on the validation images."""
        rs, hits = np.random.RandomState(7), {}
        first, last = self.recipe.validation
        for start in range(first, last, batch):
            rows = np.arange(start, min(start + batch, last))
            asked, features, patches = self.batch(rows, rs, PATCHES)
            _, _, _, logits, labels, owner = self.losses(asked, features, patches)
            for kind, values in self.right(asked, logits, labels, owner).items():
                hits.setdefault(kind, []).extend(values)
        return {kind: round(float(np.mean(values)), 4) for kind, values in sorted(hits.items())}

    def save(self) -> None:
        """Write the state of the run to training.pt."""
        path = self.folder / "training.pt"
        state = {
            "step": self.step,
            "log": self.log,
            "recipe": json.dumps(asdict(self.recipe)),
            "student": self.student.state_dict(),
            "ends": self.ends,
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def resume(self) -> None:
        """Restore the state of training.pt if it exists; exit if it is of another recipe."""
        state = read_state(self.folder, self.recipe, self.student, self.optimizers)
        if state is None:
            return
        self.step, self.log, self.ends = state["step"], state["log"], state["ends"]

    def keep_end(self) -> None:
        """Keep the weights at the end of an averaged phase."""
        phases = self.recipe.phases
        ends = np.cumsum([phase.steps for phase in phases])
        if any(phase.averaged and self.step == end for phase, end in zip(phases, ends, strict=True)):
            self.ends.append({name: value.clone() for name, value in self.student.state_dict().items()})

    def finish(self) -> dict[str, float]:
        """Replace the weights by the mean over the kept ends, and validate it.

        The end of a phase depends partly on its last images. The mean loses less accuracy at few tokens than
        any single end (docs/tiny.md).
        """
        if self.ends:
            mean = {name: sum(end[name] for end in self.ends) / len(self.ends) for name in self.ends[0]}
            self.student.load_state_dict(mean)
        found = self.validate()
        self.log.append({"averaged": len(self.ends), "step": self.step, "validation": found})
        return found

    def run(self, every: int = 50, validate_every: int = 400) -> None:
        """Train to the end of the recipe; log and save every `every` steps."""
        from tqdm import tqdm

        total, window, start = sum(p.steps for p in self.recipe.phases), [], time.time()
        bar = tqdm(total=total, initial=self.step, unit="step", desc="training")
        while self.step < total:
            window.append(self.train_step())
            bar.update()
            self.keep_end()
            if self.step % every == 0 or self.step == total:
                entry = {
                    "step": self.step,
                    "seconds": round(time.time() - start, 1),
                    "rate": round(self.rate(), 4),
                }
                entry |= {key: round(float(np.mean([w[key] for w in window])), 4) for key in window[0]}
                window = []
                if self.step % validate_every == 0 or self.step == total:
                    entry["validation"] = self.validate()
                    tqdm.write(json.dumps(entry))
                bar.set_postfix(loss=entry["loss"], align=entry["align"])
                self.log.append(entry)
                self.save()
