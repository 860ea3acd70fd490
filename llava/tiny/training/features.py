"""Vision tower features of the training images, computed once and stored on disk.

The store has one row (576, 384) bfloat16 per image and one byte per image that marks its row as complete, so
an interrupted run resumes. Its folder is keyed by the source code that shapes the features. Patches are
labelled with the object that covers their center, for the auxiliary loss of training only.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from llava.paths import cache_folder
from llava.tiny import world
from llava.tiny.cache_key import FEATURE_SOURCES, source_key
from llava.tiny.tower import PREPROCESSOR, fetch

PATCH, GRID, WIDTH = 14, 24, 384
PATCHES = GRID * GRID
SELECT_LAYER = -2


def feature_folder() -> Path:
    """Return the cache folder of the features that the present source code computes."""
    return cache_folder() / "tiny" / f"features-{source_key(*FEATURE_SOURCES)}"


def pixels(image: Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
    """Pad an image to a square of the mean color and normalize it.

    Returns:
        (3, 336, 336) float32, and the offset (x, y) of the image in the square.
    """
    mean = torch.tensor(PREPROCESSOR["image_mean"])[:, None, None]
    deviation = torch.tensor(PREPROCESSOR["image_std"])[:, None, None]
    side = max(image.size)
    offset = (side - image.width) // 2, (side - image.height) // 2
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in PREPROCESSOR["image_mean"]))
    square.paste(image, offset)
    array = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
    return (array - mean) / deviation, offset


def patch_labels(scene: world.Scene) -> np.ndarray:
    """Label every patch with the object at its center; an object wins over a sign.

    Returns:
        (576,) int64 indices into `world.OBJECTS + world.WORDS`, -1 for background.
    """
    width, height = scene.size
    side = max(width, height)
    x0, y0 = (side - width) // 2, (side - height) // 2
    centers = np.arange(GRID) * PATCH + PATCH / 2
    labels = np.full((GRID, GRID), -1, np.int64)
    names = world.OBJECTS + world.WORDS
    for item in sorted(scene.objects, key=lambda item: item.kind != "word"):
        left, top, right, bottom = item.box
        rows = (centers > top + y0) & (centers < bottom + y0)
        columns = (centers > left + x0) & (centers < right + x0)
        labels[np.ix_(rows, columns)] = names.index(item.name)
    return labels.reshape(-1)


def load_tower(dtype: torch.dtype = torch.float32):
    """Load the bundled tower up to the select layer, as a function (B, 3, 336, 336) -> (B, 576, 384)."""
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(fetch(), attn_implementation="sdpa", dtype=dtype).eval()
    layers = model.encoder.layer[: len(model.encoder.layer) + 1 + SELECT_LAYER]

    @torch.inference_mode()
    def encode(batch: torch.Tensor) -> torch.Tensor:
        hidden = model.embeddings(batch.to(dtype))
        for layer in layers:
            hidden = layer(hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return hidden[:, 1:]

    return encode


class FeatureStore:
    """Memory-mapped features of the images with seeds ``first .. first + count - 1``.

    Rows can be written in any order; `done` marks complete ones.
    """

    def __init__(self, folder: Path, count: int, first: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self.count, self.first = count, first
        self.data = self._map(folder / f"features-{first}.bin", (count, PATCHES, WIDTH), np.int16)
        self.done = self._map(folder / f"done-{first}.bin", (count,), np.uint8)

    @staticmethod
    def _map(path: Path, shape: tuple[int, ...], dtype) -> np.memmap:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not path.exists() or path.stat().st_size < size:
            with open(path, "ab") as handle:
                handle.truncate(size)  # existing rows are kept: a larger count only adds rows
        return np.memmap(path, dtype, "r+", shape=shape)

    def write(self, row: int, features: torch.Tensor) -> None:
        """Store the features (576, 384) of one image and mark the row as complete."""
        self.data[row] = features.to(torch.bfloat16).view(torch.int16).numpy()
        self.done[row] = 1

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """Return the features of some rows, (len(rows), 576, 384) float32."""
        return torch.from_numpy(self.data[rows]).view(torch.bfloat16).float()


def fill(store: FeatureStore, worker: int = 0, workers: int = 1, quiet: bool = False) -> None:
    """Compute the missing rows of one worker."""
    from tqdm import tqdm

    rows = [row for row in range(worker, store.count, workers) if not store.done[row]]
    if not rows:
        return
    encode, parent = load_tower(), multiprocessing.parent_process()
    for row in tqdm(rows, desc="encoding images", unit="image", disable=quiet):
        if parent is not None and not parent.is_alive():
            return  # the parent process has ended: stop too
        image, _ = world.draw(store.first + row)
        store.write(row, encode(pixels(image)[0][None])[0])


def _worker(folder: Path, count: int, first: int, worker: int, workers: int) -> None:
    torch.set_num_threads(1)
    fill(FeatureStore(folder, count, first), worker, workers, quiet=worker > 0)


def prepare(count: int, first: int = 0, workers: int = 1, folder: Path | None = None) -> FeatureStore:
    """Return the features of `count` images, computing missing rows in `workers` processes.

    Raises:
        RuntimeError: A worker stopped early.
    """
    folder = folder or feature_folder()
    store = FeatureStore(folder, count, first)
    if not store.done.all():
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_worker, args=(folder, count, first, k, workers)) for k in range(workers)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if not store.done.all():
            missing = int((store.done == 0).sum())
            raise RuntimeError(
                f"{folder}: {missing} of {count} images have no features. A worker stopped early. "
                "Run the same command again to resume."
            )
    return store
