"""Image loaders for worker processes: one that ends its process, one that returns a blank image."""

from __future__ import annotations

import multiprocessing
import os

import torch

from llava.mm_utils import load_image


def load(path):
    if "deadly" in str(path) and multiprocessing.parent_process() is not None:
        os._exit(9)
    return load_image(path)


def blank(image):
    return (torch.zeros(3, 2, 2), (2, 2)), None
