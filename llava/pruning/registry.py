"""Names of the pruning methods: lower-case, and the same in code, command lines, answer files and tables."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches

from .base import Pruner

_PRUNERS: dict[str, type[Pruner]] = {}


def register_pruner(name: str) -> Callable[[type[Pruner]], type[Pruner]]:
    """Register a `Pruner` subclass as `name` (class decorator).

    Raises:
        ValueError: if the name is taken by another class or is not lower-case.
    """

    def register(cls: type[Pruner]) -> type[Pruner]:
        if not re.fullmatch(r"[a-z][a-z0-9_+-]*", name):
            raise ValueError(f"pruner names are lower-case letters, digits, '_', '+', '-': got {name!r}")
        taken = _PRUNERS.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"pruner {name!r} already exists: {taken.__module__}.{taken.__qualname__}")
        cls.name = name
        _PRUNERS[name] = cls
        return cls

    return register


def list_pruners() -> list[str]:
    """Return all registered names, sorted."""
    return sorted(_PRUNERS)


def get_pruner(
    name: str, tokens: int | None = None, important_ratio: float = 0.5, seed: int = 0, **options: object
) -> Pruner:
    """Create the method `name` with its settings.

    Args:
        name: One of `list_pruners()`.
        tokens: Visual tokens to keep per crop, None for all ("none" ignores it).
        important_ratio: Share of tokens to keep for their attention, in [0, 1]; used if `uses_ratio`.
        seed: Seed of random methods; used if `uses_seed`.
        options: Further fields of the method's class, if it has any.
    Raises:
        ValueError: for an unknown name or option, and for invalid settings.
    """
    if name not in _PRUNERS:
        near = get_close_matches(str(name).lower(), _PRUNERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown pruning method {name!r}{hint} (choose from {', '.join(list_pruners())})")
    cls = _PRUNERS[name]
    unknown = options.keys() - {f.name for f in fields(cls)}
    if unknown:
        raise ValueError(f"pruning method {name!r} has no option {', '.join(sorted(unknown))}")
    return cls(tokens=tokens, important_ratio=important_ratio, seed=seed, **options)
