"""Visual embeddings into text."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llava.model.splice import splice

EMBED = nn.Embedding(20, 4)
A, B = torch.full((3, 4), 100.0), torch.full((2, 4), 200.0)


def rows(batch):
    """Each row as a list of text ids, "A" and "B"."""
    table = {tuple(v.tolist()): i for i, v in enumerate(EMBED.weight)}
    table |= {(100.0,) * 4: "A", (200.0,) * 4: "B"}
    return [
        [table[tuple(v.tolist())] for v in row[m]] for row, m in zip(batch.embeds, batch.mask, strict=True)
    ]


def test_in_place_and_in_reading_order():
    ids = torch.tensor([[1, -200, 5, -200, 6]])
    batch = splice(ids, None, torch.arange(5)[None], [A, B], EMBED, "right")
    assert rows(batch) == [[1, "A", "A", "A", 5, "B", "B", 6]]
    assert batch.labels.tolist() == [[0, -100, -100, -100, 2, -100, -100, 4]]
    assert batch.position_ids.tolist() == [list(range(8))]


def test_image_at_both_ends_and_no_text():
    assert rows(splice(torch.tensor([[-200, 3, -200]]), None, None, [B, A], EMBED, "left")) == [
        [*"BB", 3, *"AAA"]
    ]
    assert rows(splice(torch.tensor([[-200]]), None, None, [B], EMBED, "left")) == [["B", "B"]]
    assert rows(splice(torch.tensor([[-200, 3]]), None, None, [A[:0]], EMBED, "left")) == [[3]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("given", ["left", "right"])
def test_batches_are_padded_again(given, side):
    """Padding of the ids is dropped wherever it lies; the batch is padded on `side`. One row is text only."""
    short = [7, 8]
    pad = [0, 0]
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1] if given == "left" else [1, 1, 0, 0]])
    ids = torch.tensor([[1, -200, 5, 6], pad + short if given == "left" else short + pad])
    batch = splice(ids, mask, ids.clone(), [A], EMBED, side)
    assert rows(batch) == [[1, "A", "A", "A", 5, 6], [7, 8]]
    gap = [False] * 4
    assert batch.mask[1].tolist() == (gap + [True] * 2 if side == "left" else [True] * 2 + gap)
    assert batch.position_ids[1][batch.mask[1]].tolist() == [0, 1]
    assert (batch.embeds[1][~batch.mask[1]] == 0).all() and (batch.labels[1][~batch.mask[1]] == -100).all()
    assert batch.labels[1][batch.mask[1]].tolist() == short


def test_too_long_is_cut_on_the_right_with_a_warning():
    ids = torch.tensor([[1, -200, 5, 6], [1, 2, 3, 4]])
    with pytest.warns(UserWarning, match="6 tokens.*tokenizer_model_max_length=5"):
        batch = splice(ids, None, ids, [A], EMBED, "right", max_length=5)
    assert rows(batch) == [[1, "A", "A", "A", 5], [1, 2, 3, 4]]
    assert batch.labels.tolist() == [[1, -100, -100, -100, 5], [1, 2, 3, 4, -100]]


@pytest.mark.parametrize(("tags", "images"), [(0, 1), (1, 0), (2, 1), (1, 3)])
def test_images_and_tags_must_agree(tags, images):
    ids = torch.tensor([[1] + [-200] * tags + [5]])
    with pytest.raises(ValueError, match=rf"{tags} <image> tag\(s\), but {images} image\(s\)"):
        splice(ids, None, None, [A] * images, EMBED, "left")


def test_tags_in_padding_do_not_count():
    ids = torch.tensor([[-200, 5, 6]])
    assert rows(splice(ids, torch.tensor([[0, 1, 1]]), None, [], EMBED, "left")) == [[5, 6]]


def test_mistakes():
    with pytest.raises(ValueError, match=r"shape is \(2,\), expected \(B, L\)"):
        splice(torch.tensor([1, 2]), None, None, [], EMBED, "left")
    with pytest.raises(ValueError, match="-7 is neither a token"):
        splice(torch.tensor([[1, -7]]), None, None, [], EMBED, "left")
    with pytest.raises(ValueError, match="row 1 of the batch has no token"):
        splice(torch.tensor([[1, 2], [0, 0]]), torch.tensor([[1, 1], [0, 0]]), None, [], EMBED, "left")
    with pytest.raises(ValueError, match=r"differ in shape: \(1, 3\) and \(1, 2\)"):
        splice(torch.tensor([[1, 2]]), torch.ones(1, 3), None, [], EMBED, "left")
    with pytest.raises(ValueError, match="padding side"):
        splice(torch.tensor([[1, 2]]), None, None, [], EMBED, "middle")


def test_gradient_reaches_text_and_image():
    image = torch.ones(2, 4, requires_grad=True)
    EMBED.zero_grad()
    splice(torch.tensor([[1, -200, 5]]), None, None, [image], EMBED, "right").embeds.sum().backward()
    assert (image.grad == 1).all() and EMBED.weight.grad[5].sum() == 4
