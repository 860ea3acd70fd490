"""The synthetic dataset: labelled images drawn from integer seeds, and questions about them.

    image, scene = world.draw(7)                        # RGB image and its labels
    python -m llava.tiny.world --output sheet.png       # contact sheet

`vocabulary` lists the objects, `background` and `foreground` paint, `scenes` composes an image, `questions`
asks about a scene and `mixtures` samples training questions. Independent of models and benchmark files.
"""

from .scenes import DEVELOPMENT, HELD_OUT, SIDE, WORLDS, Scene, SceneObject, draw
from .vocabulary import COLORS, OBJECTS, SHAPES, SPRITES, THEMES, WORDS

__all__ = [
    "COLORS",
    "DEVELOPMENT",
    "HELD_OUT",
    "OBJECTS",
    "SHAPES",
    "SIDE",
    "SPRITES",
    "THEMES",
    "WORDS",
    "WORLDS",
    "Scene",
    "SceneObject",
    "draw",
]
