"""A picture reader that takes its process down with it, unless that is the main one."""

from __future__ import annotations

import multiprocessing
import os

from llava.mm_utils import load_image


def load(path):
    if "deadly" in str(path) and multiprocessing.parent_process() is not None:
        os._exit(9)
    return load_image(path)
