"""A batch of n answers exactly as n single runs: other images, sizes, prompts, and rows without an image."""

from __future__ import annotations

import pytest
import torch

from helpers.golden_model import golden_image

NAMES = ("land640x480", "tall123x457", "wide1000x300", "square336")
GREEDY = {"do_sample": False, "max_new_tokens": 8}


def prompts(tokenizer, questions):
    """Rows of ids, -200 where <image> stands, and the left- or right-padded batch of them."""
    from llava.mm_utils import tokenizer_image_token

    return [torch.tensor(tokenizer_image_token(q, tokenizer)) for q in questions]


def pad(rows, side, value=0):
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), value)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


QUESTIONS = [
    "USER: <image>\nWhat is this? ASSISTANT:",
    "USER: no image here, only words ASSISTANT:",
    "USER: <image>\nIs there a cat? Answer with a single word. ASSISTANT:",
    "<image> and <image> : which is larger? ASSISTANT:",
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("key", "method", "tokens"),
    [("15s", "vispruner", 12), ("15s", "none", None), ("16s", "vispruner", 9), ("16s", "none", None)],
)
def test_batch_equals_singles(golden, key, method, tokens, side):
    g = golden(key)
    model = g.model
    model.set_pruner(method, tokens)
    rows = prompts(g.tokenizer, QUESTIONS)
    per_row = [NAMES[:1], (), NAMES[1:2], NAMES[2:]]
    singles = []
    for row, names in zip(rows, per_row, strict=True):
        kwargs = (
            {"images": g.pixels(names), "image_sizes": [golden_image(n).size for n in names]} if names else {}
        )
        singles.append(model.generate(row[None], **kwargs, **GREEDY)[0].tolist())
    ids, mask = pad(rows, side)
    pixels, sizes = g.pixels(NAMES), [golden_image(n).size for n in NAMES]
    batch = model.generate(ids, images=pixels, image_sizes=sizes, attention_mask=mask, **GREEDY)
    assert batch.tolist() == singles
    assert len({tuple(s) for s in singles}) == len(singles)


@pytest.mark.parametrize("key", ["15s", "16s"])
def test_visual_tokens_are_the_same_bits(golden, key):
    """Tower, selection and projector: the bits of an image do not depend on its neighbours."""
    g = golden(key)
    g.model.set_pruner("vispruner", 12)
    sizes = [golden_image(n).size for n in NAMES]
    together = g.model.encode_images(g.pixels(NAMES), sizes)
    for name, tokens in zip(NAMES, together, strict=True):
        (alone,) = g.model.encode_images(g.pixels((name,)), [golden_image(name).size])
        assert torch.equal(alone, tokens)


def test_order_of_images_does_not_matter(golden):
    g = golden("15s")
    g.model.set_pruner("random", 12)  # drawn by the image's identity, not by its place
    forward = g.model.encode_images(g.pixels(NAMES))
    backward = g.model.encode_images(g.pixels(NAMES[::-1]))
    assert all(torch.equal(a, b) for a, b in zip(forward, backward[::-1], strict=True))


def test_every_way_to_pass_images(golden):
    g = golden("15s")
    g.model.set_pruner("vispruner", 12)
    stacked = g.pixels(NAMES[:2])  # (2, 3, H, W)
    want = g.model.encode_images(stacked)
    for images in (
        list(stacked),
        stacked[:, None],
        [i[None] for i in stacked],
        tuple(stacked),
        stacked.double(),
    ):
        got = g.model.encode_images(images, [golden_image(n).size for n in NAMES[:2]])
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    (alone,) = g.model.encode_images(stacked[0])
    assert torch.equal(alone, want[0])
    assert g.model.encode_images([]) == []


def test_half_precision_pixels_keep_an_images_identity(golden):
    g = golden("15s")
    pixels = g.pixels(NAMES[:2])
    full, half = g.model.encode_vision(pixels), g.model.encode_vision(pixels.half())
    assert [v.keys for v in full] == [v.keys for v in half]
    assert full[0].keys != full[1].keys
    g.model.set_pruner("random", 12)
    kept = [[g.model.visual_tokens(v).kept.indices for v in seen] for seen in (full, half)]
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_mistakes(golden):
    g = golden("16s")
    image = torch.zeros(1, 3, 336, 336)
    ids = torch.tensor([[1, -200, 5], [1, 6, 5]])
    with pytest.raises(ValueError, match=r"1 <image> tag\(s\), but 2 image"):
        g.model.generate(ids, images=image.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match=r"1 <image> tag\(s\), but 0 image"):
        g.model.generate(ids)
    with pytest.raises(ValueError, match=r"1 <image> tag\(s\), but 0 image"):
        g.model(input_ids=ids)
    with pytest.raises(ValueError, match="image_sizes: 2 entries for 1"):
        g.model.encode_images(image, [(1, 2), (3, 4)])
    with pytest.raises(ValueError, match="image_sizes: missing"):
        g.model.visual_tokens(g.model.encode_vision([torch.zeros(5, 3, 336, 336)])[0])
    with pytest.raises(ValueError, match="2 dimensions"):
        g.model.encode_images(torch.zeros(336, 336))
    with pytest.raises(ValueError, match=r"images\[1\]: expected .* got \(2,\)"):
        g.model.encode_images([image, torch.zeros(2)])
    with pytest.raises(ValueError, match="different crop sizes"):
        g.model.encode_images([image, torch.zeros(1, 3, 224, 224)])
    with pytest.raises(ValueError, match="images and visual are both given"):
        g.model.generate(ids[:1], images=image, visual=[torch.zeros(1, 64)])
    with pytest.raises(ValueError, match="images: input_ids is missing"):
        g.model.generate(images=image)
