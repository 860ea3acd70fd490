"""Vision tower features of the training clips, computed once and stored on disk.

The store has one row (8, 257, 384) bfloat16 per clip, [CLS] first in every frame. Frames are encoded one by
one: the temporal attention of the bundled video tower adds nothing, and its frame code is added when features
are read (`llava.tiny.video_tower`).
"""

from __future__ import annotations

import io
import multiprocessing
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from llava.paths import cache_folder
from llava.tiny.cache_key import CLIP_SOURCES, source_key
from llava.tiny.tower import PREPROCESSOR, fetch
from llava.tiny.world.clips import Clip, draw_clip
from llava.video_files import frame_indices

FRAMES, PLACES, WIDTH = 8, 257, 384
_LAYERS = 11  # up to the select layer -2 of 12


def clip_feature_folder() -> Path:
    """Return the cache folder of the features that the present source code computes."""
    return cache_folder() / "tiny" / f"clips-{source_key(*CLIP_SOURCES)}"


def training_frames(clip: Clip) -> list[Image.Image]:
    """Draw the frames that the model sees, with the losses of a compressed file."""
    rs = np.random.RandomState([clip.seed & 0xFFFFFFFF, 5])
    frames = []
    for index in frame_indices(clip.length, FRAMES):
        file = io.BytesIO()
        clip.frame(index).save(file, "JPEG", quality=int(rs.randint(50, 86)))
        frames.append(Image.open(file).convert("RGB"))
    return frames


def normalized(frames: list[Image.Image]) -> torch.Tensor:
    """Return frames as (F, 3, 224, 224) float32 by the mean and deviation of DINOv2."""
    mean, deviation = (torch.tensor(PREPROCESSOR[key])[:, None, None] for key in ("image_mean", "image_std"))
    pixels = torch.from_numpy(np.stack([np.array(frame) for frame in frames])).permute(0, 3, 1, 2)
    return (pixels.float() / 255 - mean) / deviation


class ClipFeatures:
    """Memory-mapped features of the clips with seeds ``0 .. count - 1``; `done` marks complete rows."""

    def __init__(self, folder: Path, count: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.count = count
        self.data = self._map(folder / "features.bin", (count, FRAMES, PLACES, WIDTH), np.int16)
        self.done = self._map(folder / "done.bin", (count,), np.uint8)

    @staticmethod
    def _map(path: Path, shape: tuple[int, ...], dtype: type) -> np.memmap:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not path.exists() or path.stat().st_size < size:
            with open(path, "ab") as handle:
                handle.truncate(size)  # existing rows are kept
        return np.memmap(path, dtype, "r+", shape=shape)

    def read(self, row: int) -> torch.Tensor:
        """Return the features of one clip, (8, 257, 384) float32."""
        return torch.from_numpy(self.data[row].copy()).view(torch.bfloat16).float()


def fill_clips(folder: Path, count: int, worker: int, workers: int) -> None:
    """Compute the missing rows of one worker, in order."""
    from transformers import Dinov2Model

    torch.set_num_threads(1)
    store, parent = ClipFeatures(folder, count), multiprocessing.parent_process()
    model = Dinov2Model.from_pretrained(fetch(), attn_implementation="sdpa").eval()
    layers = model.encoder.layer[:_LAYERS]
    for row in range(worker, count, workers):
        if store.done[row]:
            continue
        if parent is not None and not parent.is_alive():
            return
        with torch.inference_mode():
            hidden = model.embeddings(normalized(training_frames(draw_clip(row))))
            for layer in layers:
                hidden = layer(hidden)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        store.data[row] = hidden.to(torch.bfloat16).view(torch.int16).numpy()
        store.done[row] = 1


def prepare_clips(count: int, workers: int = 1) -> ClipFeatures:
    """Return the features of `count` clips, computing missing rows in `workers` processes.

    Raises:
        RuntimeError: A worker stopped early.
    """
    folder = clip_feature_folder()
    store = ClipFeatures(folder, count)
    if store.done.all():
        return store
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=fill_clips, args=(folder, count, k, workers)) for k in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if not store.done.all():
        missing = int((store.done == 0).sum())
        raise RuntimeError(
            f"{folder}: {missing} of {count} clips have no features. A worker stopped early. Run the same "
            "command again to resume."
        )
    return store
