"""Dummy models have the sizes of the published ones, and reproducible random weights."""

import torch

from llava.analysis.efficiency.dummy_models import DUMMY_MODELS, build_model, build_tower
from llava.model import flops


def test_sizes_are_those_of_the_published_models():
    sevens = flops.LanguageShape(layers=32, width=4096, mlp=11008, kv_width=4096)
    thirteens = flops.LanguageShape(layers=40, width=5120, mlp=13824, kv_width=5120)
    for name, language, crops, patches in (
        ("llava-1.5-7b", sevens, 1, 576),
        ("llava-next-7b", sevens, 5, 576),
        ("video-llava-7b", sevens, 8, 256),
        ("llava-1.5-13b", thirteens, 1, 576),
    ):
        sizes = DUMMY_MODELS[name]
        assert (sizes.crops, sizes.patches) == (crops, patches)
        assert flops.LanguageShape.from_config(sizes.language) == language
    assert {budget * 5 for budget in DUMMY_MODELS["llava-next-7b"].budgets} == {640, 320, 160}


def test_weights_are_reproducible_and_in_the_requested_dtype():
    one, again = (build_model("tiny", dtype="bfloat16", tower_dtype="float32", seed=3) for _ in range(2))
    assert one.dtype == torch.bfloat16 and one.get_vision_tower().dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not any(tensor.is_meta for tensor in [*one.parameters(), *one.buffers()])
    other = build_tower("tiny", seed=4)
    assert not torch.equal(next(other.parameters()), next(build_tower("tiny", seed=3).parameters()))
    shallow = build_tower("tiny", select_layer=1, seed=4)
    first = (other.layers()[0], shallow.layers()[0])
    assert len(shallow.layers()) == 1
    assert all(torch.equal(a, b) for a, b in zip(*(layer.parameters() for layer in first), strict=True))
