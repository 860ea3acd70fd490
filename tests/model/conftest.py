"""The reference checkpoints, loaded once a session; their images encoded once."""

from __future__ import annotations

import pytest
import torch

from helpers.golden_model import CHECKPOINT, DATA, golden_image
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.model.settings import ENVIRONMENT


class Golden:
    """A loaded reference checkpoint: tokenizer, model, processor, and a cache of encoded images."""

    def __init__(self, key: str, kernels: str) -> None:
        loaded = load_pretrained_model(DATA / CHECKPOINT[key], device="cpu", attn_implementation=kernels)
        self.tokenizer, self.model, self.processor, self.context = loaded
        self._seen: dict = {}

    def pixels(self, names: tuple[str, ...]) -> torch.Tensor | list[torch.Tensor]:
        return process_images([golden_image(n) for n in names], self.processor, self.model.config)

    def vision(self, name: str):
        """VisionFeatures of an image under the model's current protocol."""
        key = (name, self.model.config.anyres_protocol)
        if key not in self._seen:
            with torch.no_grad():
                (self._seen[key],) = self.model.encode_vision(self.pixels((name,)), [golden_image(name).size])
        return self._seen[key]


@pytest.fixture(scope="session")
def _goldens():
    return {}


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Models this small only wait for threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    for name in ENVIRONMENT.values():
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def golden(_goldens):
    """golden("15s") -> Golden, unpruned and with default protocol whatever an earlier test did."""

    def get(key: str, kernels: str = "sdpa") -> Golden:
        if (key, kernels) not in _goldens:
            _goldens[key, kernels] = Golden(key, kernels)
        _goldens[key, kernels].model.set_pruner(None, anyres="auto")
        return _goldens[key, kernels]

    return get
