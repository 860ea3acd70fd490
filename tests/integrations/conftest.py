"""Tiny models, built once; every test leaves them as they were."""

from __future__ import annotations

import functools

import pytest

import llava
from helpers.hosts import HOSTS


@functools.cache
def _built(name: str):
    return HOSTS[name].build()


@pytest.fixture
def model(request):
    """The tiny model that the parameter `name` names, unpruned before and after."""
    built = _built(request.getfixturevalue("name"))
    yield built
    if llava.pruning_of(built) is not None:
        llava.unprune(built)
    assert not {"forward", "generate"} & set(vars(built))
