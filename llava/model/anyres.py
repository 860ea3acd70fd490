"""Order of an image's visual tokens when it was cut into crops (LLaVA-NeXT). Pure functions on indices.

Crop 0 is the whole image squashed to a square, crops 1.. are the tiles of a grid, row by row. There are two
protocols. `paper`, which VisPruner's published results use: base tokens, then the kept tokens of all tiles in
raster order of the stitched grid; nothing is removed, no newline is added. `llava`, LLaVA-NeXT's own: the
padding that made the image fit its grid is removed, and an `image_newline` ends every stitched row. With
`anyres_max_N`, a grid of clearly more than N tiles is then resized to about N tiles (`shrunk_grid`).
"""

from __future__ import annotations

import torch
from torch import Tensor

PROTOCOLS = ("paper", "llava")
NEWLINE = -1
_SHRINK_ABOVE = 1.1  # of LLaVA-NeXT


def has_newlines(protocol: str, merge_type: str, crops: int, as_crops: bool) -> bool:
    """Return whether an image's tokens contain image_newlines."""
    spatial = merge_type.startswith("spatial") and "unpad" in merge_type
    return protocol == "llava" and spatial and (crops > 1 or as_crops)


def token_layout(
    indices: Tensor,
    side: int,
    protocol: str,
    merge_type: str,
    image_size: tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    as_crops: bool = True,
    crops: int | None = None,
) -> Tensor:
    """Return the final order of the kept tokens of one image.

    Merged tokens are in `indices` by the places they stand for; those of the tiles that have no place
    (CLS_PLACE, NO_PLACE) come after all others, crop by crop. The base image's tokens keep their order.

    Args:
        indices: (crops, K) kept places per crop, patches ascending; or (1, K) of all crops together, patch p
            of crop c being c * side**2 + p, with `crops`.
        side: patches along a crop's side.
        protocol: "paper" or "llava".
        merge_type: the checkpoint's `mm_patch_merge_type`.
        image_size: (width, height) in pixels; needed for protocol "llava".
        grid: (columns, rows) of tiles; needed for more than one crop.
        as_crops: False for a plain batch of images, which is never merged.
        crops: number of crops, if `indices` is of all crops together.

    Returns:
        (L,) int64, positions in `indices.flatten()`, `NEWLINE` for an image_newline: on CPU if there are any
        (`has_newlines`), and otherwise where the indices are, without a device sync.

    Raises:
        ValueError: the number of crops does not fit the grid, or an argument is missing.
    """
    rows, kept = indices.shape
    crops = rows if crops is None else crops
    newlines = has_newlines(protocol, merge_type, crops, as_crops)
    if newlines and crops == 1:
        return torch.cat([torch.arange(kept), torch.tensor([NEWLINE])])
    if newlines:
        indices = indices.cpu()  # which patches are padding decides the number of tokens
    device = indices.device
    place = torch.arange(rows * kept, device=device)
    if crops == 1:
        return place
    if protocol == "llava" and not merge_type.startswith("spatial"):  # flat: crop after crop
        return place
    if protocol == "llava" and image_size is None:
        raise ValueError(
            f"image_sizes: missing, but needed to merge {crops} crops and remove their padding. Pass "
            "image_sizes=[(width, height), ...] of the original images."
        )
    if grid is None or crops != 1 + grid[0] * grid[1]:
        raise ValueError(
            f"images: {crops} crops do not fit anyres protocol {protocol!r}"
            + (f", which expects 1 + {grid[0]} x {grid[1]}" if grid else "")
            + ". Preprocess with the model's current config: process_images(..., model.config)."
        )
    columns, height = grid[0], grid[1] * side
    if rows == crops:
        crop, patch = place // kept, indices.flatten()
    else:
        crop, patch = indices.flatten() // side**2, indices.flatten() % side**2
    tile = crop - 1  # -1: the base image
    row = torch.where(tile < 0, tile, tile // columns * side + patch // side)
    column = torch.where(tile < 0, place, tile % columns * side + patch % side)
    unplaced = (patch < 0) & (tile >= 0)
    row = torch.where(unplaced, height - patch, row)  # after the grid: CLS_PLACE is -1, NO_PLACE -2
    column = torch.where(unplaced, place, column)
    width = max(columns * side, rows * kept) + 1  # one more for the newline's column
    if newlines:
        top, bottom, left, right = unpadded_window(height, columns * side, image_size)
        inside = (row >= top) & (row < bottom) & (column >= left) & (column < right) | (tile < 0) | unplaced
        row, column, place = row[inside], column[inside], place[inside]
        ends = torch.arange(top, bottom, device=device)
        row = torch.cat([row, ends])
        column = torch.cat([column, torch.full_like(ends, width - 1)])
        place = torch.cat([place, torch.full_like(ends, NEWLINE)])
    return place[(row * width + column).argsort()]


def shrunk_grid(height: int, width: int, most: int, side: int) -> tuple[int, int] | None:
    """Return the (height, width) that a grid of patches is resized to under `anyres_max_N`, None if it stays.

    Args:
        height, width: of the grid without padding, in patches.
        most: N, the tiles whose patches are kept in number.
        side: patches along a crop's side.
    """
    times = (height * width / (most * side**2)) ** 0.5
    return (int(height // times), int(width // times)) if times > _SHRINK_ABOVE else None


def unpadded_window(height: int, width: int, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return (top, bottom, left, right) of the image on its padded canvas of height x width patches.

    image_size: (width, height) of the image in pixels. Rounding is LLaVA-NeXT's, so token counts are equal.
    """
    original_width, original_height = image_size
    if original_width / original_height > width / height:
        shown = int(original_height * (width / original_width))
        margin = (height - shown) // 2
        return margin, height - margin, 0, width
    shown = int(original_width * (height / original_height))
    margin = (width - shown) // 2
    return 0, height, margin, width - margin
