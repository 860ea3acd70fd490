"""Order of the tokens of an image that was cut into crops, checked on whole grids drawn by hand."""

from __future__ import annotations

import math
import random
import warnings

import pytest
import torch

from helpers.checkpoints import NEXT, load, write
from helpers.golden_methods import merged_layout
from helpers.golden_model import golden_image
from llava.mm_utils import get_anyres_image_grid_shape, process_images
from llava.model.anyres import NEWLINE, shrunk_grid, token_layout, unpadded_window

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ALL = torch.arange(4)  # 2 x 2 patches per crop


def layout(indices, protocol, merge="spatial_unpad", size=(8, 8), grid=(2, 2), **kwargs):
    return token_layout(indices, 2, protocol, merge, size, grid, **kwargs).tolist()


def test_paper_stitches_in_raster_order():
    """Base first, then row by row across tiles; nothing cut, no newline."""
    raster = [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11, 12, 13, 16, 17, 14, 15, 18, 19]
    assert layout(ALL.repeat(5, 1), "paper") == raster
    assert layout(ALL.repeat(5, 1), "paper", size=(8, 1)) == raster  # padding counts like everything else
    assert layout(ALL.repeat(5, 1), "paper", merge="flat") == raster


def test_paper_with_kept_tokens():
    kept = torch.tensor([[1, 2], [1, 3], [0, 2], [0, 1], [0, 3]])
    # stitched places (row, column): tile 1 (0,1) (1,1), tile 2 (0,2) (1,2), tile 3 (2,0) (2,1), tile 4 (2,2)
    # (3,3)
    assert layout(kept, "paper") == [0, 1, 2, 4, 3, 5, 6, 7, 8, 9]


def test_llava_closes_every_row():
    got = layout(ALL.repeat(5, 1), "llava")
    n = NEWLINE
    assert got == [0, 1, 2, 3, 4, 5, 8, 9, n, 6, 7, 10, 11, n, 12, 13, 16, 17, n, 14, 15, 18, 19, n]


def test_llava_cuts_padding_and_keeps_newlines_of_empty_rows():
    kept = torch.tensor([[0], [0], [1], [3], [2]])  # places: (0,0) (0,3) (3,1) (3,2)
    n = NEWLINE
    assert layout(kept, "llava") == [0, 1, 2, n, n, n, 3, 4, n]
    assert layout(kept, "llava", size=(8, 4)) == [0, n, n]  # rows 1 and 2 remain
    assert layout(kept, "llava", size=(4, 8)) == [0, n, n, n, 3, 4, n]  # columns 1 and 2 remain


def test_other_merge_types():
    assert layout(ALL.repeat(5, 1), "llava", merge="flat") == list(range(20))
    assert layout(ALL.repeat(5, 1), "llava", merge="spatial") == layout(ALL.repeat(5, 1), "paper")


def test_one_crop():
    one = ALL[None]
    assert layout(one, "llava") == [0, 1, 2, 3, NEWLINE]
    assert layout(one, "llava", as_crops=False) == layout(one, "paper") == [0, 1, 2, 3]
    assert layout(one, "llava", merge="flat") == [0, 1, 2, 3]


def test_no_tokens():
    none = torch.empty(5, 0, dtype=torch.int64)
    assert layout(none, "paper") == []
    assert layout(none, "llava") == [NEWLINE] * 4


def test_mistakes():
    with pytest.raises(ValueError, match="4 crops do not fit anyres protocol 'paper'.*1 \\+ 2 x 2"):
        layout(ALL.repeat(4, 1), "paper")
    with pytest.raises(ValueError, match="image_sizes: missing"):
        layout(ALL.repeat(5, 1), "llava", size=None)


@pytest.mark.parametrize(
    ("size", "tokens"),
    [((336, 336), 1176), ((640, 480), 2340), ((480, 640), 2352), ((1000, 300), 2182), ((123, 457), 1200),
     ((50, 40), 1076)],
)  # fmt: skip
def test_counts_of_llava_next(size, tokens):
    """Unpruned LLaVA-1.6 at 336 px, 24 x 24 patches per crop."""
    columns, rows = get_anyres_image_grid_shape(size, PINPOINTS, 336)
    indices = torch.arange(576).repeat(1 + columns * rows, 1)
    assert len(token_layout(indices, 24, "llava", "spatial_unpad", size, (columns, rows))) == tokens
    assert (
        len(token_layout(torch.arange(576).repeat(5, 1), 24, "paper", "spatial_unpad", size, (2, 2))) == 2880
    )


def test_window():
    assert unpadded_window(48, 48, (640, 480)) == (6, 42, 0, 48)
    assert unpadded_window(48, 48, (480, 640)) == (0, 48, 6, 42)


@pytest.mark.parametrize("name", ["land640x480", "tall123x457", "square336"])
def test_pruning_in_llavas_protocol(golden, name):
    """Kept tokens in the padding are cut, every row keeps its newline, and the count says so."""
    g = golden("16s")
    model = g.model
    side = model.get_vision_tower().num_patches_per_side
    model.set_pruner("vispruner", 20, anyres="llava")
    vision = g.vision(name)
    tokens = model.visual_tokens(vision)
    crops = len(vision.features)
    grid = model._grid(crops, vision.image_size)
    top, bottom, left, right = unpadded_window(grid[1] * side, grid[0] * side, vision.image_size)
    inside = 0
    for tile, kept in enumerate(tokens.kept.indices[1:]):
        row, column = tile // grid[0] * side + kept // side, tile % grid[0] * side + kept % side
        inside += int(((row >= top) & (row < bottom) & (column >= left) & (column < right)).sum())
    assert tokens.count == 20 + inside + (bottom - top)
    newline = (tokens.embeds == model.model.image_newline).all(1)
    assert int(newline.sum()) == bottom - top and bool(newline[-1])
    everything = model.visual_tokens(vision, pruner=None)
    assert everything.count == 64 + (bottom - top) * (right - left + 1)


def test_preprocessing_follows_the_protocol(golden):
    """process_images reads config.anyres_protocol; a mixture of the two is refused."""
    g = golden("16s")
    llava = g.pixels(("square336",))
    g.model.set_pruner("vispruner", 4)
    paper = g.pixels(("square336",))
    assert llava[0].shape[0] == 3 and paper[0].shape[0] == 5
    with pytest.raises(ValueError, match="3 crops do not fit anyres protocol 'paper'"):
        g.model.encode_images(llava, [golden_image("square336").size])


# --- anyres_max_N ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("height", "width", "most", "shape"),
    [
        (16, 16, 4, None),  # exactly 4 tiles of 8 x 8
        (16, 19, 4, None),  # t = 1.09
        (16, 24, 4, (13, 19)),  # t = sqrt(6 / 4) = 1.22
        (8, 40, 4, (7, 35)),  # t = 1.118
        (40, 40, 1, (8, 8)),
    ],
)
def test_the_grid_of_anyres_max(height, width, most, shape):
    assert shrunk_grid(height, width, most, 8) == shape


def max_model(tmp_path, most, **config):
    """LLaVA-1.6 with image_aspect_ratio anyres_max_N, and pixels of one image."""
    settings = {"image_aspect_ratio": f"anyres_max_{most}", **config}
    model = load(write(tmp_path / f"max{most}", source=NEXT, config=settings))
    return model, process_images(
        [golden_image("land640x480")], model.get_vision_tower().image_processor, model.config
    )


def test_anyres_max_resizes_what_is_more_than_its_tiles(tmp_path):
    size = golden_image("land640x480").size
    model, pixels = max_model(tmp_path, 1)
    (vision,) = model.encode_vision(pixels, [size])
    found = model.visual_tokens(vision).embeds
    plain = load(write(tmp_path / "plain", source=NEXT))
    embeds = plain.visual_tokens(plain.encode_vision(pixels, [size])[0]).embeds
    newline = (embeds == plain.model.image_newline).all(1)
    height = int(newline.sum())
    grid = embeds[64:][~newline[64:]].view(height, -1, 64)  # after the base crop's 8 x 8
    times = math.sqrt(grid.shape[0] * grid.shape[1] / 64)
    assert times > 1.1
    shape = int(grid.shape[0] // times), int(grid.shape[1] // times)
    small = torch.nn.functional.interpolate(grid.permute(2, 0, 1)[None], size=shape, mode="bilinear")[0]
    rows = torch.cat([small.permute(1, 2, 0), plain.model.image_newline.expand(shape[0], 1, -1)], 1)
    assert torch.equal(found, torch.cat([embeds[:64], rows.flatten(0, 1)]))
    assert torch.equal(max_model(tmp_path, 9)[0].visual_tokens(vision).embeds, embeds)


def test_anyres_max_under_pruning(tmp_path):
    """The paper's protocol is that of anyres; under llava nothing is resized, which is said once."""
    size = golden_image("land640x480").size
    model, pixels = max_model(tmp_path, 1)
    plain = load(write(tmp_path / "plain", source=NEXT))
    for protocol in ("paper", "llava"):
        for one in (model, plain):
            one.set_pruner("vispruner", 8, anyres=protocol)
        pixels = process_images(
            [golden_image("land640x480")], model.get_vision_tower().image_processor, model.config
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = [model.encode_images(pixels, [size])[0] for _ in range(2)]
        assert torch.equal(found[0], plain.encode_images(pixels, [size])[0])
        said = [str(one.message) for one in caught if "anyres_max_1" in str(one.message)]
        assert len(said) == (protocol == "llava")


def test_merged_tokens_follow_the_grid_of_patches_crop_by_crop():
    """The base image's tokens as they are, patches of the tiles in raster order, [CLS] tokens, the others."""
    places = [torch.tensor(row) for row in ([-1, 3, -2], [-1, 0, -2], [-1, 2, -2], [-1, 1, -2], [-1, 3, -2])]
    base, patches = [(0, 0), (0, 1), (0, 2)], [(1, 1), (2, 1), (3, 1), (4, 1)]
    others = [(crop, column) for column in (0, 2) for crop in range(1, 5)]
    assert merged_layout(places, 2, (2, 2)) == base + patches + others


@pytest.mark.parametrize("crops", [1, 5])
def test_a_pool_of_all_crops_is_ordered_like_its_patches(crops):
    side, patches = 3, 9
    kept = torch.tensor([sorted(random.Random(crops).sample(range(crops * patches), 7))])
    grid = None if crops == 1 else (2, 2)
    every = torch.arange(patches).expand(crops, -1)
    whole = token_layout(every, side, "paper", "flat", grid=grid).tolist()
    want = [place for place in whole if place in kept[0].tolist()]
    found = token_layout(kept, side, "paper", "flat", grid=grid, crops=crops)
    assert kept[0][found].tolist() == want
