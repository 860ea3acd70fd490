"""The example in docs/add_a_method.md runs as printed."""

import re
from pathlib import Path

import torch

from llava.pruning import get_pruner, registry

GUIDE = Path(__file__).parents[2] / "docs" / "add_a_method.md"


def test_the_guides_example_runs(monkeypatch):
    monkeypatch.setattr(registry, "_PRUNERS", dict(registry._PRUNERS))
    example = re.search(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL).group(1)
    exec(example.replace("from .", "from llava.pruning."), {"__name__": "guide"})
    features, attention = torch.randn(2, 16, 8), torch.rand(2, 3, 16)
    kept = get_pruner("norm", tokens=5).select(features, attention)
    wanted = features.norm(dim=-1).topk(5).indices.sort().values
    assert torch.equal(kept, wanted)
    assert get_pruner("norm", tokens=99).select(features, attention).shape == (2, 16)
