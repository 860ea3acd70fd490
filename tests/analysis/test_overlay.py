"""Overlays show which patches were kept."""

import json

import numpy as np
import pytest
from PIL import Image

from llava.analysis import overlay


def test_kept_patches_are_sharp_and_framed_and_the_others_gray():
    rng = np.random.RandomState(0)
    crop = Image.fromarray(rng.randint(0, 256, (56, 56, 3), dtype=np.uint8))
    kept, important = np.array([1, 14]), np.array([True, False])
    shown = overlay.shade(crop, 4, kept, important, scale=4)  # patches of 56 pixels
    array = np.asarray(shown).astype(int)
    sharp = np.asarray(crop.resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
    for index, color in ((1, overlay.IMPORTANT), (14, overlay.DIVERSE)):
        row, column = divmod(index, 4)
        inside = (slice(56 * row + 8, 56 * row + 48), slice(56 * column + 8, 56 * column + 48))
        assert (array[inside] == sharp[inside]).all()
        assert tuple(array[56 * row, 56 * column + 20]) == color
    for index in set(range(16)) - {1, 14}:
        row, column = divmod(index, 4)
        patch = array[56 * row + 8 : 56 * row + 48, 56 * column + 8 : 56 * column + 48]
        assert (patch.max(-1) == patch.min(-1)).all() and patch.min() > 100  # gray and pale


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.RandomState(1).randint(0, 256, (90, 160, 3), dtype=np.uint8)).save(path)
    return path


def run(capsys, *arguments):
    code = overlay.main([str(a) for a in arguments])
    return code, capsys.readouterr()


def test_one_image(photo, tmp_path, capsys):
    output = tmp_path / "out.png"
    code, printed = run(capsys, "--model", "tests/data/model/ckpt_llava15s", "--image", photo, "--tokens", 16,
                     "--output", output)  # fmt: skip
    assert code == 0
    document = json.loads(printed.out.splitlines()[-1])
    assert document["output"] == str(output)
    (panel,) = document["panels"]
    assert (panel["kept"], panel["important"], panel["method"]) == (16, 8, "vispruner")
    colors = {color for _, color in Image.open(output).convert("RGB").getcolors(1 << 24)}
    assert {overlay.IMPORTANT, overlay.DIVERSE} <= colors


def test_contact_sheet_and_anyres(photo, tmp_path, capsys):
    model = "tests/data/model/ckpt_llava16s"
    code, printed = run(capsys, "--model", model, "--image", photo, photo, "--tokens", 16, 4,
                     "--method", "random", "vispruner", "--output", tmp_path / "sheet.jpg")  # fmt: skip
    assert code == 0
    panels = json.loads(printed.out.splitlines()[-1])["panels"]
    assert len(panels) == 2 * 2 * 2
    assert {panel["kept"] for panel in panels} == {5 * 16, 5 * 4}  # five crops, each with its own budget


@pytest.mark.parametrize("arguments, expected", [
    (["--image", "nowhere.png"], "nowhere.png"),
    (["--image", __file__, "--output", "x.gif"], ".png"),
    (["--image", __file__, "--method", "nonsense"], "nonsense"),
    (["--image", __file__, "--method", "fastv"], "'fastv' prunes inside the language model"),
])  # fmt: skip
def test_invalid_arguments_are_refused_before_loading(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        overlay.main(arguments)
    assert stopped.value.code == 2 and expected in capsys.readouterr().err


def test_an_unreadable_image_is_named(tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    code, printed = run(
        capsys, "--model", "tests/data/model/ckpt_llava15s", "--image", broken, "--output", tmp_path / "o.png"
    )
    assert code == 1 and "broken.jpg" in printed.err and "Traceback" not in printed.err
