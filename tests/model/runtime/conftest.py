"""Stand-ins of CUDA graphs that share memory, as graphs of one pool do."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch

from llava.model.runtime import graphs


@pytest.fixture(autouse=True)
def shared_memory(monkeypatch):
    """Replaying a stand-in spoils the outputs of all that were captured later.

    They may be where the earlier graph has intermediate results, which were free at the later capture.
    """
    known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
    number, replay = itertools.count(), graphs._StandIn.replay

    def replay_and_spoil(self):
        mine = known.setdefault(self, next(number))
        replay(self)
        for output in (one for other, age in known.items() if age > mine for one in other.outputs):
            if output.dtype == torch.bool:
                output.logical_not_()
            else:
                output.fill_(float("nan") if output.is_floating_point() else 1 << 40)

    monkeypatch.setattr(graphs._StandIn, "replay", replay_and_spoil)
