"""Tower features of training pictures, computed once and kept on disk.

    python -m llava.tiny.features --count 4000 --workers 2

Writes `features.bin` (count, 576, 384) bfloat16 in the training cache folder, with one byte per picture
saying that its row is complete, so an interrupted run goes on. Patches are labelled with the thing whose box
covers their centre (for the auxiliary loss of training, and for nothing else).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import world
from .tower import PREPROCESSOR, fetch

PATCH, GRID, WIDTH = 14, 24, 384
PATCHES = GRID * GRID
SELECT_LAYER = -2


def cache_folder() -> Path:
    """What can be computed again: sub-folder "tiny" of $VISPRUNER_CACHE or ~/.cache/vispruner."""
    return (
        Path(os.environ.get("VISPRUNER_CACHE") or Path.home() / ".cache" / "vispruner").expanduser() / "tiny"
    )


def pixels(image: Image.Image) -> tuple[torch.Tensor, tuple[int, int]]:
    """A picture padded to a square of the mean colour, normalised: ((3, 336, 336) float32, offset (x, y))."""
    mean = torch.tensor(PREPROCESSOR["image_mean"])[:, None, None]
    deviation = torch.tensor(PREPROCESSOR["image_std"])[:, None, None]
    side = max(image.size)
    offset = (side - image.width) // 2, (side - image.height) // 2
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in PREPROCESSOR["image_mean"]))
    square.paste(image, offset)
    array = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
    return (array - mean) / deviation, offset


def patch_labels(scene: world.Scene) -> np.ndarray:
    """(576,) int64: index into `world.THINGS + world.WORDS` of what lies at each patch's centre, or -1.

    Where a sign and a thing overlap, the thing counts.
    """
    width, height = scene.size
    side = max(width, height)
    x0, y0 = (side - width) // 2, (side - height) // 2
    centers = np.arange(GRID) * PATCH + PATCH / 2
    labels = np.full((GRID, GRID), -1, np.int64)
    names = world.THINGS + world.WORDS
    for thing in sorted(scene.things, key=lambda thing: thing.kind != "word"):
        left, top, right, bottom = thing.box
        rows = (centers > top + y0) & (centers < bottom + y0)
        columns = (centers > left + x0) & (centers < right + x0)
        labels[np.ix_(rows, columns)] = names.index(thing.name)
    return labels.reshape(-1)


def load_tower(dtype: torch.dtype = torch.float32):
    """The embedded tower cut behind the select layer, as a function (B, 3, 336, 336) -> (B, 576, 384)."""
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
    """Memory-mapped features of the pictures of seeds ``first .. first + count - 1``.

    Rows are written in any order; `done` marks the complete ones.
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
                handle.truncate(size)  # longer files keep their rows: a larger count only adds
        return np.memmap(path, dtype, "r+", shape=shape)

    def write(self, row: int, features: torch.Tensor) -> None:
        self.data[row] = features.to(torch.bfloat16).view(torch.int16).numpy()
        self.done[row] = 1

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """(len(rows), 576, 384) float32."""
        return torch.from_numpy(self.data[rows]).view(torch.bfloat16).float()


def fill(store: FeatureStore, worker: int = 0, workers: int = 1, quiet: bool = False) -> None:
    """Compute the missing rows of this worker's share."""
    from tqdm import tqdm

    rows = [row for row in range(worker, store.count, workers) if not store.done[row]]
    if not rows:
        return
    encode, parent = load_tower(), multiprocessing.parent_process()
    for row in tqdm(rows, desc="encoding pictures", unit="picture", disable=quiet):
        if parent is not None and not parent.is_alive():
            return  # whoever asked is gone: do not go on unseen
        image, _ = world.draw(store.first + row)
        store.write(row, encode(pixels(image)[0][None])[0])


def _worker(folder: Path, count: int, first: int, worker: int, workers: int) -> None:
    torch.set_num_threads(1)
    fill(FeatureStore(folder, count, first), worker, workers, quiet=worker > 0)


def prepare(count: int, first: int = 0, workers: int = 1, folder: Path | None = None) -> FeatureStore:
    """All features of `count` pictures: those on disk, and the rest computed by `workers` processes."""
    folder = folder or cache_folder()
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
            raise RuntimeError("encoding stopped early; start the same command again to go on")
    return store


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llava.tiny.features", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)
    prepare(args.count, workers=args.workers)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
