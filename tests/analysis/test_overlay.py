"""Overlays show which patches were kept."""

import json

import numpy as np
import pytest
from PIL import Image

from llava.analysis import overlay
from llava.pruning import list_pruners


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
    (["--image", __file__, "--method", "visionzip", "--ratio", "2"], "--ratio"),
    (["--answers", "a", "b", "--question-file", "q", "--question", "x"], "--question: the answers' metadata"),
])  # fmt: skip
def test_invalid_arguments_are_refused_before_loading(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        overlay.main(arguments)
    assert stopped.value.code == 2 and expected in capsys.readouterr().err


def test_merged_patches_have_one_color_and_an_outline():
    crop = Image.fromarray(np.random.RandomState(0).randint(0, 256, (56, 56, 3), dtype=np.uint8))
    groups = np.full(16, -1)
    groups[[0, 1, 15]], groups[[5, 6]] = 7, 3
    nothing = np.zeros(0, np.int64)
    shown = overlay.shade(crop, 4, nothing, nothing.astype(bool), 4, groups)
    array = np.asarray(shown).astype(int)
    small = np.asarray(crop.resize((4, 4), Image.Resampling.BOX)).reshape(-1, 3)

    def middle(index):
        row, column = divmod(index, 4)
        return array[56 * row + 8 : 56 * row + 48, 56 * column + 8 : 56 * column + 48].mean((0, 1))

    for members in ([0, 1, 15], [5, 6]):
        hue = small[members].mean(0) - small[members].mean()
        for index in members:
            np.testing.assert_allclose(middle(index) - middle(index).mean(), 0.75 * hue, atol=2)
    is_line = (array == overlay.MERGED).all(2)
    assert is_line[30, 0] and not is_line[30, 56]  # patches 0 and 1 are one token
    assert is_line[30, 112] and is_line[84, 56] and not is_line[84, 112]
    assert is_line[200, 223] and is_line[223, 200] and not is_line[150, 30]


def test_every_method_is_drawn_or_named(photo, tmp_path, capsys):
    """Of several methods, those that the model cannot run are left out with the reason."""
    output = tmp_path / "all.png"
    names = list_pruners()
    code, printed = run(capsys, "--model", "tests/data/model/ckpt_llava15s", "--image", photo, "--tokens", 40,
                        "--method", *names, "--output", output, "--question", "Is it red?")  # fmt: skip
    assert code == 0
    document = json.loads(printed.out.splitlines()[-1])
    left_out = {one["method"]: one["reason"] for one in document["unavailable"]}
    drawn = {one["method"]: one for one in document["panels"]}
    assert sorted([*drawn, *left_out]) == names and left_out.keys() <= {"cdpruner"}
    assert all(reason in printed.err for reason in left_out.values())
    assert drawn["downsample"]["merged"] > 0 and drawn["visionzip"]["unplaced"] == 1
    assert drawn["fastv"]["kept"] == 40 and drawn["vtw"]["kept"] == 0
    colors = {color for _, color in Image.open(output).convert("RGB").getcolors(1 << 24)}
    assert {overlay.IMPORTANT, overlay.DIVERSE, overlay.MERGED} <= colors


def test_a_method_that_the_model_cannot_run_is_named(photo, tmp_path, capsys):
    given = ["--model", "tests/data/model/ckpt_llava15s", "--image", photo, "--output", tmp_path / "no.png"]
    code, printed = run(capsys, *given, "--method", "tome", "--tokens", 1)
    assert code == 1 and "tome: tokens: got 1" in printed.err and "--method: none" in printed.err
    assert "Traceback" not in printed.err and not (tmp_path / "no.png").exists()


def test_an_unreadable_image_is_named(tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    code, printed = run(
        capsys, "--model", "tests/data/model/ckpt_llava15s", "--image", broken, "--output", tmp_path / "o.png"
    )
    assert code == 1 and "broken.jpg" in printed.err and "Traceback" not in printed.err
