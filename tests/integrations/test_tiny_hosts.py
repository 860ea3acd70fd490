"""The tiny hosts are what tests of pruning need: deterministic, sensitive to pixels, answering in words."""

from __future__ import annotations

import pytest
import torch

from helpers.hosts import HOSTS
from llava.integrations.tiny_hosts import IMAGE, ROW_END


@pytest.mark.parametrize("name", HOSTS)
def test_hosts_take_all_their_batches_and_see_the_pixels(name):
    case = HOSTS[name]
    model, again = case.build(), case.build()
    other = case.build(seed=1)
    for (key, a), b, c in zip(
        model.state_dict().items(), again.state_dict().values(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), key
        assert a.dim() == 0 or not a.is_floating_point() or (a.unique().numel() == 1) or not torch.equal(a, c)
    for batch, inputs in case.batches().items():
        with torch.no_grad():
            logits = model(**inputs).logits
            pixels = {k: v.flip(-1) if "pixel_values" in k else v for k, v in inputs.items()}
            changed = model(**pixels).logits
        assert logits.std() > 1, (name, batch)
        last = -1  # left padding: the last place is text after all images
        assert (logits[:, last] - changed[:, last]).abs().amax(1).min() > 0.02, (name, batch)
        assert ("video" in batch or "mixed" in batch) <= case.video
        assert (inputs["attention_mask"][:, -1] == 1).all()


@pytest.mark.parametrize("name", HOSTS)
def test_answers_have_no_placeholders_and_right_padding_is_offered(name):
    case = HOSTS[name]
    model, inputs = case.build(), case.batches()["padded"]
    new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert new.shape[1] == 6 and not ((new >= IMAGE) & (new <= ROW_END)).any()
    right = case.batches("right")["padded"]
    assert (right["attention_mask"][:, 0] == 1).all() and not right["attention_mask"].all()
    for a, m, b, n in zip(
        inputs["input_ids"],
        inputs["attention_mask"],
        right["input_ids"],
        right["attention_mask"],
        strict=True,
    ):
        assert torch.equal(a[m == 1], b[n == 1])
