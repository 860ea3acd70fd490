"""Train the embedded model's projector and language model on the embedded world. The tower stays frozen.

    bash scripts/tiny/train.sh            # everything: features, training, checkpoint, curves
    python -m llava.tiny.train --scale 0.05 --pictures 300 --output DIR     # a trial

Fairness, because the model is there to compare ways of pruning: nobody supervises [CLS] attention; token
subsets are uniformly random, and the run ends with the learning rate falling to zero at all 576 tokens. Two
auxiliary losses fade out with it: one pulls each projected patch towards
the embedding of the name of the thing that covers it (labels from the generator); the other asks for the
answer already at the word the question is about ("Is there a dog" ...), since looking there and carrying the
result to the end of the prompt are hard to learn at once.

Interrupted, the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from . import questions, tokenizer, world
from .features import PATCHES, WIDTH, FeatureStore, cache_folder, patch_labels, prepare
from .student import IGNORE, Packer, Phase, Recipe, Student
from .tower import TOWER_NAME


class Trainer:
    """One run: state, steps, validation, checkpoints."""

    def __init__(self, recipe: Recipe, store: FeatureStore, folder: Path, device: str = "cpu"):
        import sentencepiece

        torch.manual_seed(recipe.seed)
        self.recipe, self.store, self.folder, self.device = recipe, store, folder, torch.device(device)
        self.tokens = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        self.packer = Packer(self.tokens)
        self.student = Student(recipe, len(self.tokens)).to(self.device)
        things = [*world.THINGS, *world.WORDS]
        chinese = [questions.CHINESE[name] for name in world.THINGS]
        names = [self.tokens.encode(name) for name in things + chinese]
        if any(len(pieces) != 1 for pieces in names):
            raise RuntimeError(
                "a thing's name is more than one piece; train the tokenizer with a larger vocabulary"
            )
        names = torch.tensor(names, device=self.device)[:, 0]
        self.names, self.chinese = names[: len(things)], names[len(things) :]
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
        self.ends: list[dict] = []  # weights at the ends of the phases that are averaged

    def scene(self, row: int):
        """Scene and patch labels of a picture; drawn once, since drawing costs more than keeping."""
        if row not in self.scenes:
            scene = world.draw(self.store.first + row)[1]
            self.scenes[row] = scene, patch_labels(scene)
        return self.scenes[row]

    def batch(self, rows: np.ndarray, rs: np.random.RandomState, visible: int):
        mixture = self.phase()[0].mixture
        chosen = [self.scene(int(row)) for row in rows]
        asked = [questions.ask(scene, rs, self.recipe.questions, mixture) for scene, _ in chosen]
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
        thing = (patches >= 0) & (patches < len(world.THINGS))
        if wide:
            align = self.align(visual, patches, patches >= 0, self.names)
            align = align + self.align(visual, patches, thing, self.chinese)
        else:
            align = self.align(visual, patches, thing, self.names[: len(world.THINGS)])
        hint = F.cross_entropy(early, hints[hints != IGNORE]) if len(early) else answer.new_zeros(())
        return answer, align, hint, logits, labels, owner

    def align(self, visual, patches, on, names):
        """Cross-entropy of the patches `on` over their cosine similarity with the embeddings of `names`."""
        if not on.any():
            return visual.new_zeros(())
        names = F.normalize(self.student.model.embed_tokens(names), dim=-1)
        return F.cross_entropy(F.normalize(visual[on], dim=-1) @ names.T * 16, patches[on])

    def right(self, asked, logits, labels, owner) -> dict[str, list[bool]]:
        """Per question type: was every answer token the most likely one?"""
        hit = torch.ones_like(labels, dtype=torch.bool)
        hit[labels != IGNORE] = logits.argmax(-1) == labels[labels != IGNORE]
        out: dict[str, list[bool]] = {}
        for row, items in enumerate(asked):
            for number, (kind, _, _) in enumerate(items):
                out.setdefault(kind, []).append(bool(hit[row][owner[row] == number].all()))
        return out

    def rate(self) -> float:
        """Learning rate factor: warm-up, and linear within a phase, never quite zero."""
        phase, place = self.phase()
        start, end = phase.rate
        return min(1.0, (self.step + 1) / self.recipe.warmup) * max(0.02, start + (end - start) * place)

    def phase(self) -> tuple[Phase, float]:
        """The phase of the current step, and how much of it is over, in [0, 1)."""
        step = self.step
        for phase in self.recipe.phases:
            if step < phase.steps:
                break
            step -= phase.steps
        return phase, min(step, phase.steps) / phase.steps

    def train_step(self) -> dict:
        recipe = self.recipe
        phase, _ = self.phase()
        rs = np.random.RandomState(
            [recipe.seed + 1, self.step]
        )  # a step depends on its number only: resuming is exact
        rows = np.sort(rs.choice(phase.pool, phase.pictures, replace=False))
        start, end = recipe.validation
        rows += (rows >= start) * (end - start)  # leave the validation pictures out
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
        """Exact match per question type at all 576 tokens on pictures never trained on."""
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
        path = self.folder / "training.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        if state["recipe"] != json.dumps(asdict(self.recipe)):
            raise SystemExit(f"{path} belongs to another recipe; remove it or choose another --output")
        self.student.load_state_dict(state["student"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.log, self.ends = state["step"], state["log"], state["ends"]

    def keep_end(self) -> None:
        """Remember the weights where a phase ends whose end is averaged."""
        phases = self.recipe.phases
        ends = np.cumsum([phase.steps for phase in phases])
        if any(phase.averaged and self.step == end for phase, end in zip(phases, ends, strict=True)):
            self.ends.append({name: value.clone() for name, value in self.student.state_dict().items()})

    def finish(self) -> dict[str, float]:
        """Put the mean of the kept ends in the student's place; its validation. A last step without a loss.

        Where an end stands is partly chance, its last pictures; their mean loses less with fewer tokens than
        any of them (docs/tiny.md).
        """
        if self.ends:
            mean = {name: sum(end[name] for end in self.ends) / len(self.ends) for name in self.ends[0]}
            self.student.load_state_dict(mean)
        found = self.validate()
        self.log.append({"averaged": len(self.ends), "step": self.step, "validation": found})
        return found

    def run(self, every: int = 50, validate_every: int = 400) -> None:
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


def main(argv: list[str] | None = None) -> int:
    from .export import curves, export, export_anyres

    parser = argparse.ArgumentParser(prog="python -m llava.tiny.train", description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=Recipe.pictures)
    parser.add_argument("--scale", type=float, default=1.0, help="times the steps of every phase; trials")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the training itself; more rarely help a model this small"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that encode pictures")
    parser.add_argument("--work", type=Path, help="folder of the run's own files (default: in the cache)")
    parser.add_argument(
        "--output", type=Path, default=Path("playground/tiny/llava-tiny"), help="checkpoint to write"
    )
    parser.add_argument("--docs", type=Path, help="folder for the log and the curves")
    args = parser.parse_args(argv)
    first, last = Recipe.validation
    held, least = last - first, max(phase.pictures for phase in Recipe.phases)
    if args.pictures < held + least:
        parser.error(f"--pictures: at least {held + least}, since {held} are kept for validation")
    if not hasattr(torch.optim, "Muon"):
        parser.error("training needs torch >= 2.9 (torch.optim.Muon)")
    if args.scale <= 0:
        parser.error(f"--scale {args.scale}: above 0")
    rest = args.pictures - held
    phases = tuple(
        replace(phase, steps=max(1, round(phase.steps * args.scale)), pool=min(phase.pool, rest))
        for phase in Recipe.phases
    )
    recipe = Recipe(
        pictures=args.pictures,
        validation=(min(first, rest), min(last, args.pictures)),
        phases=phases,
        seed=args.seed,
    )
    digest = hashlib.sha256(json.dumps(asdict(recipe)).encode()).hexdigest()[:12]
    work = args.work or cache_folder() / f"run-{digest}"
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "tokenizer.model").exists():
        tokenizer.train(work)
    store = prepare(recipe.pictures, workers=args.workers)
    torch.set_num_threads(args.threads)
    trainer = Trainer(recipe, store, work, args.device)
    trainer.resume()
    try:
        trainer.run()
    except KeyboardInterrupt:
        trainer.save()
        print("stopped; the same command goes on from here")
        return 130
    found = trainer.finish()
    export(trainer.student, work, args.output, asdict(recipe), TOWER_NAME)
    export_anyres(args.output, args.output.with_name(args.output.name + "-anyres"))
    if args.docs:
        curves(trainer.log, asdict(recipe), args.docs)
    print(json.dumps({"checkpoint": str(args.output), "step": trainer.step, **found}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
