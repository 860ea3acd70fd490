"""Vocabulary of the synthetic dataset: objects, themes, colors, words, and how often each object appears.

Objects of a theme appear together and some objects are popular, so that POPE's adversarial and popular
negatives are meaningful.
"""

from __future__ import annotations

import numpy as np

THEMES = {
    "farm": ("dog", "cat", "horse", "cow", "sheep", "pig", "chicken", "rabbit"),
    "wild": ("elephant", "giraffe", "lion", "zebra", "bear", "owl", "turtle", "penguin"),
    "street": ("car", "bus", "bicycle", "truck", "train", "airplane", "boat", "motorcycle"),
    "kitchen": ("apple", "banana", "pizza", "cake", "bread", "carrot", "pear", "hamburger"),
    "home": ("chair", "clock", "book", "umbrella", "guitar", "camera", "telephone", "key"),
}
SPRITES = tuple(name for names in THEMES.values() for name in names)
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
COLORS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (250, 215, 40),
    "green": (44, 150, 60),
    "blue": (40, 90, 220),
    "purple": (140, 60, 180),
    "pink": (245, 130, 190),
    "black": (25, 25, 25),
}
WORDS = (
    "STOP",
    "OPEN",
    "EXIT",
    "TAXI",
    "CAFE",
    "BANK",
    "SALE",
    "ZOO",
    "BUS",
    "HOTEL",
    "FIRE",
    "GAS",
    "MILK",
    "SHOP",
    "PARK",
    "FOOD",
    "HELP",
    "LOVE",
    "STAR",
    "HOME",
)
OBJECTS = SPRITES + SHAPES
# A few sprites appear often and most rarely: weights are 1 / (3 + rank) over a fixed shuffle.
_ORDER = np.random.RandomState(20241218).permutation(len(SPRITES))
POPULARITY = np.zeros(len(SPRITES))
POPULARITY[_ORDER] = 1.0 / (3.0 + np.arange(len(SPRITES)))
POPULARITY /= POPULARITY.sum()
