"""The trainer: resuming is exact, and the result is the mean over the ends."""

from dataclasses import asdict

import pytest
import torch

from llava.tiny.training.student import Recipe
from llava.tiny.training.trainer import Trainer


def test_resuming_is_exact(folder, store, tmp_path, recipe):
    def fresh(name):
        work = tmp_path / name
        work.mkdir(exist_ok=True)
        (work / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
        return Trainer(recipe, store, work)

    whole = fresh("whole")
    losses = [whole.train_step()["loss"] for _ in range(4)]
    first = fresh("parts")
    parts = [first.train_step()["loss"] for _ in range(2)]
    first.save()
    second = fresh("parts")
    second.resume()
    assert second.step == 2
    parts += [second.train_step()["loss"] for _ in range(2)]
    assert parts == losses
    for a, b in zip(whole.student.parameters(), second.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_exported_weights_are_the_mean_of_the_ends(folder, store, tmp_path, recipe):
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    first = Trainer(recipe, store, tmp_path)
    first.train_step()
    first.save()
    trainer = Trainer(recipe, store, tmp_path)  # resumes from the file
    trainer.resume()
    ends = []
    for step in (2, 3, 4):
        trainer.train_step()
        trainer.keep_end()
        if step != 3:
            ends.append([value.detach().clone() for value in trainer.student.parameters()])
    trainer.save()
    again = Trainer(recipe, store, tmp_path)
    again.resume()
    found = again.finish()
    assert again.log[-1] == {"averaged": 2, "step": 4, "validation": found}
    for one, two, mean in zip(*ends, again.student.parameters(), strict=True):
        assert torch.equal((one + two) / 2, mean)


def test_another_recipe_is_refused(folder, store, tmp_path, recipe):
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    Trainer(recipe, store, tmp_path).save()
    other = Recipe(**{**asdict(recipe), "seed": 5})
    with pytest.raises(SystemExit, match="cannot resume from another recipe"):
        Trainer(other, store, tmp_path).resume()
