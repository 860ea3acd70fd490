"""What the values of a JSON document must be, and where a document differs.

Each benchmark declares the fields of its files and their types once, as a `Shape`. Independent of files.
"""

from __future__ import annotations

import math
import reprlib
from typing import Any

# What a JSON value must be: a type (a bool is not an int, an int is a float, a float is finite), a tuple of
# shapes of which one must fit, a frozenset of strings, [shape] for a list, {"key": shape, "key?": shape} for
# an object with required and optional keys, or {str: shape} for an object with any keys.
Shape = Any

ID = (int, str)
TEXT = (str, int, float, type(None))  # written as text wherever it is used
_MISSING = object()
_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
_NAMES |= {list: "a list", dict: "an object"}


def mismatch(value: Any, shape: Shape) -> str | None:
    """Return where and how a JSON value differs from its shape, e.g. ".answers[3] is 5, ..."; else None."""
    kind = type(value)
    if isinstance(shape, type):
        if shape is object or kind is shape and (kind is not float or math.isfinite(value)):
            return None
        if shape is float and kind is int and abs(value) < 2**63:
            return None
    elif isinstance(shape, tuple):
        if kind in shape and kind is not float:
            return None
        found = [mismatch(value, one) for one in shape]
        if None in found:
            return None
        objects = [one for one in found if one and one[0] in ".:"]
        if kind is dict and objects:  # the one whose keys are there
            return next((one for one in objects if one[0] == "."), objects[-1])
    elif isinstance(shape, frozenset):
        if kind is str and value in shape:
            return None
    elif isinstance(shape, list):
        if kind is list:
            for place, part in enumerate(value):
                if found := mismatch(part, shape[0]):
                    return f"[{place}]{found}"
            return None
    elif kind is dict:
        if str in shape:
            for key, part in value.items():
                if found := mismatch(part, shape[str]):
                    return f"[{reprlib.repr(key)}]{found}"
            return None
        for key, part in shape.items():
            name = key if key in value or key[-1] != "?" else key[:-1]
            inside = value.get(name, _MISSING)
            if inside is _MISSING:
                if name is key:
                    return f": missing key {key!r}"
            elif type(inside) is not part or part is float:  # most values need no call
                if found := mismatch(inside, part):
                    return f".{name}{found}"
        return None
    return f" is {reprlib.repr(value)}, expected {_expected(shape)}"


def _expected(shape: Shape) -> str:
    if isinstance(shape, tuple):
        return " or ".join(map(_expected, shape))
    if isinstance(shape, frozenset):
        return " or ".join(map(repr, sorted(shape)))
    return _NAMES[shape if isinstance(shape, type) else type(shape)]
