"""Names of the pruning methods: lower-case, and the same in code, command lines, answer files and tables.

Other packages add methods by entry points of the group "vispruner.methods", which name a `Pruner` subclass:

    [project.entry-points."vispruner.methods"]
    norm = "my_package.norm:LargestNorm"
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points

from .base import Pruner

ENTRY_POINTS = "vispruner.methods"
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
    """Return all names, sorted, with those of other installed packages."""
    _add_installed()
    return sorted(_PRUNERS)


@functools.cache
def _add_installed() -> None:
    """Register the methods of other packages, once. One that cannot be used is left out, with a warning."""
    for point in entry_points(group=ENTRY_POINTS):
        try:
            _add_entry_point(point)
        except Exception as error:  # of a foreign module, which may raise anything
            package = "" if point.dist is None else f" of package {point.dist.name!r}"
            warnings.warn(
                f"pruning method {point.name!r}{package} is not available: {point.value}: "
                f"{type(error).__name__}: {error}. Update or uninstall the package.",
                stacklevel=4,
            )


def _add_entry_point(point: EntryPoint) -> None:
    cls = point.load()
    if not (isinstance(cls, type) and issubclass(cls, Pruner)):
        raise TypeError(f"expected a subclass of llava.pruning.Pruner, got {cls!r}")
    if _PRUNERS.get(point.name) is not cls:
        register_pruner(point.name)(cls)


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
        _add_installed()
    if name not in _PRUNERS:
        near = get_close_matches(str(name).lower(), _PRUNERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown pruning method {name!r}{hint} (choose from {', '.join(list_pruners())})")
    cls = _PRUNERS[name]
    unknown = options.keys() - {f.name for f in fields(cls)}
    if unknown:
        raise ValueError(f"pruning method {name!r} has no option {', '.join(sorted(unknown))}")
    return cls(tokens=tokens, important_ratio=important_ratio, seed=seed, **options)
