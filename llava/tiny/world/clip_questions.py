"""Questions about clips in the wording of the four video sets: lower case, short answers.

Every `ClipMaker` samples one question about a clip, or returns None if the clip allows none. Independent of
pixels and of files.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .clips import Clip, ClipObject
from .questions import article
from .vocabulary import SHAPES, SPRITES

ClipMaker = Callable[[Clip, np.random.RandomState], tuple[str, str] | None]
ENDS = {"start": 0.0, "end": 1.0}
ACTIONS = {"enters": "enters", "leaves": "leaves", "changes": "changes color", "stays": "stays still"}


def _pick(rs: np.random.RandomState, items: list) -> object:
    return items[rs.randint(len(items))] if items else None


def _absent(clip: Clip, rs: np.random.RandomState) -> str:
    return str(_pick(rs, [name for name in SPRITES + SHAPES if name not in clip.names()]))


def exist(clip: Clip, rs: np.random.RandomState) -> tuple[str, str] | None:
    present = rs.rand() < 0.5
    name = _pick(rs, clip.names()) if present else _absent(clip, rs)
    return f"is there {article(name)} in the video?", "yes" if present else "no"


def exist_at(clip: Clip, rs: np.random.RandomState) -> tuple[str, str] | None:
    """Ask whether something is in the first or last frame; often about what enters or leaves."""
    end = _pick(rs, list(ENDS))
    present = rs.rand() < 0.5
    there = [item.name for item in clip.objects if item.corner(ENDS[end]) is not None]
    gone = [name for name in clip.names() if name not in there]
    if present:
        coming = [name for name in there if name in clip.names("enters") + clip.names("leaves")]
        name = _pick(rs, coming if coming and rs.rand() < 0.5 else there)
    else:
        name = _pick(rs, gone) if gone and rs.rand() < 0.7 else _absent(clip, rs)
    return name and (f"is there {article(name)} at the {end}?", "yes" if present else "no")


def _colored(clip: Clip, changes: bool) -> list[ClipObject]:
    return [item for item in clip.objects if item.color and (item.role == "changes") == changes]


def color(clip: Clip, rs: np.random.RandomState) -> tuple[str, str] | None:
    item = _pick(rs, _colored(clip, False))
    return item and (f"what color is the {item.name}?", item.color)


def color_at(clip: Clip, rs: np.random.RandomState) -> tuple[str, str] | None:
    """Ask for the color that a shape has before or after it changes."""
    item, end = _pick(rs, _colored(clip, True)), _pick(rs, list(ENDS))
    return item and (f"what color is the {item.name} at the {end}?", item.color_at(ENDS[end]))


def _what(role: str, question: str) -> ClipMaker:
    def maker(clip: Clip, rs: np.random.RandomState) -> tuple[str, str] | None:
        names = clip.names(role)
        return (question, names[0]) if len(names) == 1 else None

    maker.__name__ = f"what_{role}"
    return maker


what_moves = _what("moves", "what moves?")
what_enters = _what("enters", "what enters?")
what_leaves = _what("leaves", "what leaves?")
what_changes = _what("changes", "what changes color?")


def direction(clip: Clip, rs: np.random.RandomState) -> tuple[str, str] | None:
    item = _pick(rs, [one for one in clip.objects if one.role == "moves"])
    return item and (f"which way does the {item.name} move?", item.direction)


def action(clip: Clip, rs: np.random.RandomState) -> tuple[str, str] | None:
    """Ask what an object does; the answer has several words, as most of TGIF-QA."""
    roles = list(dict.fromkeys(item.role for item in clip.objects))
    role = _pick(rs, roles)
    item = _pick(rs, [one for one in clip.objects if one.role == role])
    return item and (f"what does the {item.name} do?", ACTIONS.get(role) or f"moves {item.direction}")


MAKERS: dict[ClipMaker, float] = {
    exist: 0.16,
    exist_at: 0.16,
    color: 0.07,
    color_at: 0.12,
    what_moves: 0.08,
    what_enters: 0.08,
    what_leaves: 0.08,
    what_changes: 0.05,
    direction: 0.10,
    action: 0.10,
}


def ask_about(clip: Clip, rs: np.random.RandomState, number: int) -> list[tuple[str, str, str]]:
    """Sample `number` training questions about a clip: (type, question, answer)."""
    makers, weights = zip(*MAKERS.items(), strict=True)
    found: list[tuple[str, str, str]] = []
    while len(found) < number:
        maker = makers[rs.choice(len(makers), p=weights)]
        pair = maker(clip, rs)
        if pair:
            found.append((maker.__name__, *pair))
    return found
