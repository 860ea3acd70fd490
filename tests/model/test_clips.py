"""Clips through a model: order, budgets, every method, prompts, generation."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from PIL import Image

from helpers.video_llava import FRAMES, IDS, PATCHES, WIDTH, clip, load, picture, write_all
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import media_tags, process_images
from llava.model.clips import frame_budgets, join_frame_tags
from llava.model.features import as_media_list
from llava.model.image_processor import LanguageBindProcessor
from llava.model.vision_store import VisionStore
from llava.pruning import get_pruner, list_pruners

TOTAL = 19  # of 32 patches: 2 3 2 2 3 2 2 3 per frame
IMAGE_IDS = torch.tensor([[1, 292, -200, 554, 13]])
TEXT_IDS = torch.tensor([[1, 292, 554, 13]])
# by what they read that LanguageBind's towers do not have, or cannot do over several frames
REFUSED = {"cdpruner": "text encoder", "tome": "cannot merge patches"}
METHODS = [name for name in list_pruners() if get_pruner(name).acts_in == "image"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory):
    return load(write_all(tmp_path_factory.mktemp("model")))


@pytest.fixture
def model(whole):
    whole.set_pruner(clip_budget="frame", positions="contiguous")
    return whole


def greedy(model, ids, **kwargs) -> list[list[int]]:
    return model.generate(ids, do_sample=False, max_new_tokens=4, **kwargs).tolist()


# --- order -----------------------------------------------------------------------------------------------
@torch.no_grad()
def test_pictures_and_clips_keep_their_order(model) -> None:
    media = [picture(1), clip(1), clip(2), picture(2)]
    found = model.encode_images(media)
    assert [len(one) for one in found] == [PATCHES] + [PATCHES + 1] * 16 + [PATCHES]
    alone = [part for one in media for part in model.encode_images([one])]
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))


@torch.no_grad()
def test_unpruned_frames_begin_with_cls(model) -> None:
    pixels = clip(1).transpose(0, 1)
    features, _, cls = model.get_video_tower()(pixels, [FRAMES], cues=("cls",))
    (vision,) = model.encode_vision([clip(1)])
    assert torch.equal(vision.features, torch.cat([cls[:, None], features], 1))
    tokens = model.visual_tokens(vision)
    assert torch.equal(tokens.embeds, model.model.mm_projector(vision.features.flatten(0, 1)))
    assert tokens.lengths == (PATCHES + 1,) * FRAMES and tokens.kept.indices.shape == (1, FRAMES * PATCHES)


def test_forms_of_images() -> None:
    one, many = clip()[None], torch.stack([clip(1), clip(2)])
    assert as_media_list(clip(), FRAMES)[1] == [True] and as_media_list(one, FRAMES)[1] == [True]
    assert as_media_list(many, FRAMES)[1] == [True, True]
    assert as_media_list(picture(), FRAMES)[1] == [False]
    pictures = torch.stack([picture(1), picture(2), picture(3)])
    assert as_media_list(pictures, FRAMES)[1] == [False] * 3
    assert torch.equal(as_media_list(one, FRAMES)[0][0], clip().transpose(0, 1))
    for wrong, message in (
        ([clip(frames=4)], r"images\[0\]: a clip of 4 frames, but the video tower takes exactly 8"),
        ([picture(), clip(frames=16)], r"images\[1\]: a clip of 16 frames"),
        ([clip().transpose(0, 1)], r"images\[0\]: expected a picture \(3, H, W\) or a clip"),
        ([None], r"images\[0\]: .* got NoneType"),
        ("clip", "expected a tensor or a list of tensors, got str"),
    ):
        with pytest.raises(ValueError, match=message):
            as_media_list(wrong, FRAMES)


# --- budgets ---------------------------------------------------------------------------------------------
def test_budgets_of_frames_add_up() -> None:
    assert frame_budgets(455, 8) == [56, *[57] * 7]
    assert frame_budgets(227, 8) == [28, 28, 29, 28, 28, 29, 28, 29]
    assert frame_budgets(114, 8) == [14, 14, 14, 15, 14, 14, 14, 15]
    for tokens in range(0, 300, 7):
        assert sum(frame_budgets(tokens, 8)) == tokens
        assert max(frame_budgets(tokens, 8)) - min(frame_budgets(tokens, 8)) <= 1


@pytest.mark.parametrize("name", ["vispruner", "fastervlm", "random", "divprune"])
@torch.no_grad()
def test_a_frame_is_pruned_as_if_it_were_alone(model, name) -> None:
    (vision,) = model.encode_vision([clip(4)], cues=get_pruner(name).cues)
    pruner = get_pruner(name, tokens=TOTAL)
    model.set_pruner(pruner, clip_budget="total")
    tokens = model.visual_tokens(vision)
    assert list(tokens.lengths) == frame_budgets(TOTAL, FRAMES)
    kept = tokens.kept.indices[0].split(tokens.lengths)
    for frame, budget in enumerate(tokens.lengths):
        one = slice(frame, frame + 1)
        row = vision.features[one, 1:]
        cues = {cue: model.model.mm_projector(row) for cue in pruner.cues if cue == "projected"}
        alone = replace(pruner, tokens=budget).keep(
            row, vision.attention[one], [vision.keys[frame]], cues=cues
        )
        assert (kept[frame] - frame * PATCHES).tolist() == alone.indices[0].tolist()
    projected = model.model.mm_projector(vision.features[:, 1:].flatten(0, 1))
    torch.testing.assert_close(tokens.embeds, projected[tokens.kept.indices[0]])


@pytest.mark.parametrize("name", ["vispruner", "fastervlm"])
@torch.no_grad()
def test_one_budget_over_the_clip_is_one_row_of_all_patches(model, name) -> None:
    (vision,) = model.encode_vision([clip(4)])
    pruner = get_pruner(name, tokens=TOTAL)
    model.set_pruner(pruner, clip_budget="clip")
    tokens = model.visual_tokens(vision)
    row = vision.features[:, 1:].reshape(1, -1, WIDTH)
    attention = vision.attention.transpose(0, 1).reshape(1, 4, -1)
    assert torch.equal(tokens.kept.indices, pruner.keep(row, attention).indices)
    assert sum(tokens.lengths) == tokens.count == TOTAL and len(tokens.lengths) == FRAMES
    assert [len(part) for part in tokens.parts] == list(tokens.lengths)


@torch.no_grad()
def test_what_stays_the_same_is_paid_once(model) -> None:
    """In a clip that stands still, one budget over the clip keeps more places than a share per frame."""
    (vision,) = model.encode_vision([clip(4)])
    vision.features = vision.features[:1].expand(FRAMES, -1, -1).clone()
    vision.attention = vision.attention[:1].expand(FRAMES, -1, -1).clone()
    # every patch in every frame is a candidate; only copies of what is kept already are left
    pruner = get_pruner("vispruner", tokens=PATCHES, important_ratio=0.0)
    model.set_pruner(pruner, clip_budget="clip")
    over_all = set((model.visual_tokens(vision).kept.indices[0] % PATCHES).tolist())
    model.set_pruner(pruner, clip_budget="total")
    per_frame = set((model.visual_tokens(vision).kept.indices[0] % PATCHES).tolist())
    assert len(over_all) > len(per_frame)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_every_method(model, name) -> None:
    """Methods that the tower can serve prune clips to the exact total; others say what is missing."""
    pruner = get_pruner(name, tokens=TOTAL)
    media = [clip(5), picture(5)]
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            model.check_pruner(pruner)
        return
    model.check_pruner(pruner)
    model.set_pruner(pruner, clip_budget="total")
    tokens, of_picture = (model.visual_tokens(one) for one in model.encode_vision(media))
    if name == "none":
        assert tokens.count == FRAMES * (PATCHES + 1)
        return
    assert tokens.lengths == tuple(frame_budgets(TOTAL, FRAMES))
    assert tokens.count == TOTAL and torch.isfinite(tokens.embeds).all()
    assert of_picture.count == PATCHES and of_picture.lengths is None
    model.set_pruner(pruner, clip_budget="frame")
    assert model.visual_tokens(model.encode_vision(media[:1])[0]).lengths == (PATCHES,) * FRAMES
    model.set_pruner(pruner, clip_budget="clip")
    (vision,) = model.encode_vision(media[:1])
    try:
        assert model.visual_tokens(vision).count == TOTAL
    except ValueError as error:
        assert "which has no row per patch" in str(error) or "no place, and so no frame" in str(error)


@torch.no_grad()
def test_all_patches_are_not_the_unpruned_clip(model) -> None:
    (vision,) = model.encode_vision([clip(1)])
    model.set_pruner("fastervlm", tokens=PATCHES)
    tokens = model.visual_tokens(vision)
    assert tokens.lengths == (PATCHES,) * FRAMES
    assert torch.equal(tokens.embeds, model.model.mm_projector(vision.features[:, 1:].flatten(0, 1)))
    model.set_pruner("fastervlm", tokens=0)
    assert model.visual_tokens(vision).lengths == (0,) * FRAMES


def test_adaptive_methods_choose_per_frame(model) -> None:
    (vision,) = model.encode_vision([clip(1)], cues=get_pruner("prumerge").cues)
    tokens = model.visual_tokens(vision, get_pruner("prumerge"))
    assert sum(tokens.lengths) == tokens.count and min(tokens.lengths) >= 1


def test_settings_that_are_refused(model) -> None:
    with pytest.raises(ValueError, match="clip_budget: 'frames' is unknown. Choose one of frame, total"):
        model.set_pruner("vispruner", tokens=8, clip_budget="frames")
    model.set_pruner("vispruner", tokens=8, positions="original")
    with pytest.raises(ValueError, match="positions: 'original' is set, which is not defined for clips"):
        model.encode_images([clip()])


# --- prompts and answers ---------------------------------------------------------------------------------
def test_tags() -> None:
    assert media_tags([True], {}) == "<image>" * 8
    assert media_tags([False, True], {}) == "<image>" * 9
    found = media_tags([True, False], {"mm_use_im_start_end": True})
    assert found == f"<vid_start>{'<image>' * 8}<vid_end><im_start><image><im_end>"
    assert media_tags([], {}) == ""


def test_joined_tags() -> None:
    tag = IMAGE_TOKEN_INDEX
    assert join_frame_tags([1, *[tag] * 9, 5], [8, 1]) == [1, tag, tag, 5]
    assert join_frame_tags([1, tag, 3, *[tag] * 8], [1, 8]) == [1, tag, 3, tag]
    assert join_frame_tags([1, tag, 3, tag], [2]) is None
    with pytest.raises(ValueError, match=r"3 <image> tag\(s\), but the images and clips have 8"):
        join_frame_tags([tag] * 3, [8])


@pytest.mark.parametrize("budget", ["frame", "total", "clip"])
@torch.no_grad()
def test_answers_do_not_depend_on_the_batch(model, budget) -> None:
    model.set_pruner("vispruner", tokens=TOTAL, clip_budget=budget)
    ids = torch.zeros(3, 12, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, one in enumerate((IDS, TEXT_IDS, IMAGE_IDS)):
        ids[row, -one.shape[1] :], mask[row, -one.shape[1] :] = one[0], 1
    found = greedy(model, ids, attention_mask=mask, images=[clip(7), picture(7)])
    alone = [
        greedy(model, IDS, images=[clip(7)])[0],
        greedy(model, TEXT_IDS)[0],
        greedy(model, IMAGE_IDS, images=[picture(7)])[0],
    ]
    for one, other in zip(found, alone, strict=True):
        assert one[: len(other)] == other


@torch.no_grad()
def test_one_tag_for_the_whole_clip_gives_the_same_answer(model) -> None:
    model.set_pruner("vispruner", tokens=TOTAL, clip_budget="total")
    tokens = model.visual_tokens(model.encode_vision([clip(7)])[0])
    ids = torch.tensor([join_frame_tags(IDS[0].tolist(), [FRAMES])])
    logits = model(IDS, visual=list(tokens.parts)).logits
    assert torch.equal(model(ids, visual=[tokens.embeds]).logits, logits)
    assert torch.equal(model(IDS, images=[clip(7)]).logits, logits)
    assert greedy(model, ids, visual=[tokens.embeds]) == greedy(model, IDS, images=[clip(7)])


@pytest.mark.parametrize(
    ("ids", "images"),
    [(IDS, [picture()]), (IMAGE_IDS, [clip()]), (TEXT_IDS, [clip()]), (IDS, [clip(), clip(1)])],
)
def test_other_numbers_of_tags_are_refused(model, ids, images) -> None:
    tags = int((ids == IMAGE_TOKEN_INDEX).sum())
    have = sum(8 if one.ndim == 4 else 1 for one in images)
    with pytest.raises(ValueError, match=rf"{tags} <image> tag\(s\), but {have} image\(s\)"):
        greedy(model, ids, images=images)


@torch.no_grad()
def test_long_prompts_are_cut_on_the_right(model) -> None:
    before = model.config.tokenizer_model_max_length
    model.config.tokenizer_model_max_length = 30  # the clip has 40 tokens
    try:
        with pytest.warns(UserWarning, match="tokenizer_model_max_length=30: truncated on the right"):
            found = greedy(model, IDS, images=[clip(7)])
        embeds = torch.cat([model.get_input_embeddings()(IDS[0, :2]), *model.encode_images([clip(7)])])[:30]
        assert (
            found
            == model.generate(
                inputs_embeds=embeds[None],
                attention_mask=torch.ones(1, 30),
                max_new_tokens=4,
                do_sample=False,
            ).tolist()
        )
    finally:
        model.config.tokenizer_model_max_length = before


@pytest.mark.parametrize("name", ["fastv", "vtw"])
@torch.no_grad()
def test_methods_inside_the_language_model_take_a_clip_as_one_block(model, name) -> None:
    pruner = get_pruner(name, tokens=None if name == "vtw" else PATCHES)
    try:
        model.set_pruner(pruner)
    except ValueError:
        pytest.skip(f"{name} needs another budget")
    found = greedy(model, IDS, images=[clip(7)])
    tokens = model.visual_tokens(model.encode_vision([clip(7)])[0])
    assert tokens.count == FRAMES * (PATCHES + 1)
    ids = torch.cat([IDS, TEXT_IDS.new_tensor([[554]])], 1)
    assert len(found[0]) >= 1 and greedy(model, ids, images=[clip(7)])
    spaced = torch.tensor([[1, *[t for _ in range(FRAMES) for t in (IMAGE_TOKEN_INDEX, 13)]]])
    with pytest.raises(ValueError, match="text stands between the <image> tags of a clip"):
        greedy(model, spaced, images=[clip(7)])


@torch.no_grad()
def test_deferred_tokens_are_the_same(model) -> None:
    model.set_pruner("vispruner", tokens=TOTAL, clip_budget="total")
    visions = model.encode_vision([picture(1), clip(1), picture(2)])
    for one, vision in zip(model.visual_tokens_deferred(visions), visions, strict=True):
        assert torch.equal(one.embeds, model.visual_tokens(vision).embeds)


def test_encoded_clips_are_stored(model, tmp_path) -> None:
    processor = model.get_vision_tower().image_processor
    store = VisionStore(tmp_path, 1 << 30, model, processor)
    (vision,) = model.encode_vision([clip(1)])
    store.put("clip", vision)
    found = store.get("clip")
    assert found.is_clip and torch.equal(found.features, vision.features)
    other = VisionStore(tmp_path, 1 << 30, model, processor).folder
    weight = model.get_video_tower().layers()[0].temporal_embedding
    weight.data[0, 0, 0] += 1
    try:
        assert VisionStore(tmp_path, 1 << 30, model, processor).folder != other
    finally:
        weight.data[0, 0, 0] -= 1


# --- pixels ----------------------------------------------------------------------------------------------
def test_clips_and_pictures_in_one_list() -> None:
    processor = LanguageBindProcessor(28)
    image = Image.new("RGB", (40, 60), (255, 0, 0))
    both = process_images([[image] * 8, image], processor, {"image_aspect_ratio": "pad"})
    assert [tuple(one.shape) for one in both] == [(3, 8, 28, 28), (3, 28, 28)]
    assert process_images([[image] * 8], processor, {"image_aspect_ratio": "pad"}).shape == (1, 3, 8, 28, 28)
    with pytest.raises(ValueError, match=r"expected one size, got sizes \[\(28, 28\), \(40, 60\)\]"):
        process_images([[image, Image.new("RGB", (28, 28))]], processor, {})
    with pytest.raises(ValueError, match="a clip, but this model takes only images"):
        process_images([[image] * 8], object(), {"image_aspect_ratio": "pad"})


def test_thin_media_keep_their_center() -> None:
    processor = LanguageBindProcessor(28)
    image = Image.new("RGB", (3, 300))
    assert processor.preprocess(image)["pixel_values"].shape == (1, 3, 28, 28)
    assert processor.preprocess_clip([image] * 2).shape == (3, 2, 28, 28)


def test_no_warnings_in_a_usual_run(model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        greedy(model, IDS, images=[clip(3)])


@torch.no_grad()
def test_half_precision(tmp_path) -> None:
    model = load(write_all(tmp_path), dtype="bfloat16", tower_dtype="float32")
    assert model.get_video_tower().dtype == torch.float32
    model.set_pruner("vispruner", tokens=TOTAL, clip_budget="total")
    tokens = model.visual_tokens(model.encode_vision([clip(1)])[0])
    assert tokens.count == TOTAL and tokens.embeds.dtype == torch.bfloat16
    model.get_video_tower().to(torch.bfloat16)
    assert greedy(model, IDS, images=[clip(1)])


@torch.no_grad()
def test_copies_of_a_model_are_apart(model) -> None:
    other = copy.deepcopy(model)
    other.set_pruner("vispruner", tokens=TOTAL, clip_budget="clip")
    assert model.clip_budget == "frame"
    assert torch.equal(other.encode_vision([clip(1)])[0].features, model.encode_vision([clip(1)])[0].features)
