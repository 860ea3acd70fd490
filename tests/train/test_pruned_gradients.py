"""Training with pruned tokens: loss and gradients are those of a run that masks the dropped tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from helpers.checkpoints import SOURCE, load
from llava.train.budgets import Budgets
from llava.train.forward import TrainingForward

TAG, NONE = -200, -100
PAD = 0


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    model = load(SOURCE)
    model.requires_grad_(True)
    model.get_vision_tower().requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def batch(model):
    """An answer after a question, a caption directly after the image, and a sample of text alone."""
    rows = [
        ([1, 292, TAG, 554, 13, 29, 31, 2], [NONE] * 5 + [29, 31, 2]),
        ([1, TAG, 77, 41, 2], [NONE, NONE, 77, 41, 2]),
        ([1, 60, 61, 62, 63, 64], [NONE, NONE, 61, 62, NONE, 64]),
    ]
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [PAD] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [NONE] * (longest - len(labels)) for _, labels in rows])
    mask = torch.tensor([[i < len(ids) for i in range(longest)] for ids, _ in rows])
    side = model.get_vision_tower().image_size
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "images": images}


def masked_loss(model, pruner, input_ids, labels, attention_mask, images):
    """The same batch by hand, row by row, with all tokens in place and the dropped ones masked."""
    losses, count = 0.0, 0
    for row in range(len(input_ids)):
        ids = input_ids[row][attention_mask[row]].tolist()
        wanted = labels[row][attention_mask[row]].tolist()
        embeds, kept, targets = [], [], []
        for token, label in zip(ids, wanted, strict=True):
            if token != TAG:
                embeds.append(model.get_input_embeddings()(torch.tensor([token])))
                kept.append(True)
                targets.append(label)
                continue
            with torch.no_grad():
                (vision,) = model.encode_vision([images[row]], None, pruner.cues)
                chosen = pruner.keep(vision.features, vision.attention, vision.keys, cues=vision.cues)
            patches = vision.features.shape[1]
            embeds.append(model.get_model().mm_projector(vision.features[0]))
            stays = set(chosen.indices[0].tolist())
            kept += [patch in stays for patch in range(patches)]
            targets += [NONE] * patches
        kept = torch.tensor(kept)
        places = (kept.cumsum(0) - 1).clamp(min=0)  # of the pruned prompt
        hidden = model.get_model()(
            inputs_embeds=torch.cat(embeds)[None],
            attention_mask=kept[None],
            position_ids=places[None],
            use_cache=False,
        ).last_hidden_state
        logits = model.lm_head(hidden[0][kept])[:-1]
        after = torch.tensor(targets)[kept][1:]
        losses = losses + functional.cross_entropy(logits, after, ignore_index=NONE, reduction="sum")
        count += int((after != NONE).sum())
    return losses / count


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    return {name: p.grad.clone() for name, p in trained.items()}


@pytest.mark.parametrize(
    ("method", "budget"),
    [("vispruner", 32), ("vispruner", 5), ("random", 16), ("fastervlm", 32), ("none", 0)],
)
def test_gradients_are_those_of_the_masked_run(model, batch, method, budget) -> None:
    budgets = Budgets.parse(method, str(budget or "none")).within(model.get_vision_tower().num_patches)
    pruner = budgets.draw(3)
    loss = TrainingForward(pruner)(model, **batch).loss
    found = gradients(model, loss)
    masked = masked_loss(model, pruner, **batch)
    wanted = gradients(model, masked)
    assert torch.allclose(loss, masked, rtol=0, atol=2e-6)
    assert any("mm_projector" in name for name in wanted) and any("layers.0" in name for name in wanted)
    for name, gradient in wanted.items():
        largest = gradient.abs().max()
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=float(2e-5 * largest) + 1e-9), name
        assert largest > 0, name


def test_random_tokens_change_with_the_step_and_return_with_it(model, batch) -> None:
    budgets = Budgets.parse("random", "16", seed=5)
    losses = [float(TrainingForward(budgets.draw(step))(model, **batch).loss.detach()) for step in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]
