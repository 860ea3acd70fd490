"""Captured stages give the ids of eager ones: prompts of every form, shared prefixes, doubtful inputs."""

from __future__ import annotations

import copy
import itertools
from contextlib import contextmanager

import pytest
import torch

from helpers.eagerly import eagerly, load_case
from helpers.no_syncs import NoSyncs
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.decode import Decoding, Row, generate, generate_shared
from llava.model.runtime import generation
from llava.model.runtime.generation import padded_rows, window
from llava.model.runtime.stages import bucket, splice_on_device
from llava.model.splice import splice
from llava.pruning import Kept, get_pruner

TEN = Decoding(max_new_tokens=10)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(case, id="-".join(case), marks=pytest.mark.gpu if case[0] == "cuda" else ())
        for case in itertools.product(["cpu", "cuda"], ["ckpt_llava15s", "ckpt_llava16s"], ["sdpa", "eager"])
        if case != ("cuda", "ckpt_llava16s", "eager")  # enough on a GPU, where every test captures
    ],
)
def loaded(request):
    tokenizer, model = load_case(*request.param)
    yield tokenizer, model
    model.set_runtime()


@pytest.fixture
def captured(loaded):
    """The model with captured stages; eager again afterwards."""
    loaded[1].set_runtime(graphs=True)
    yield loaded[1]
    assert not loaded[1].runtime.captured.refused
    loaded[1].set_runtime()


def rows(model, images: int = 3, questions: int = 4) -> list[Row]:
    draw = torch.Generator().manual_seed(0)
    visual = [torch.randn(5 + 6 * n, model.config.hidden_size, generator=draw) for n in range(images)]
    found = []
    for number in range(images * questions):
        image = number * 5 % images
        before = [1, 20, 30, 40] if number != 4 else [1, 50]
        after = torch.randint(3, 600, (1 + number % 7,), generator=draw).tolist()
        found.append(Row((*before, IMAGE_TOKEN_INDEX, *after), visual[image], image))
    return found


def test_rows_have_the_ids_of_generate(loaded, captured):
    tokenizer, model = loaded
    asked = rows(model)
    asked.append(Row((1, 5, 9, 11), None))  # without an image
    two = (asked[0].visual, asked[1].visual)
    asked.append(Row((1, IMAGE_TOKEN_INDEX, 7, IMAGE_TOKEN_INDEX, 8), two))
    expected = eagerly(model, lambda: generate(model, tokenizer, asked, TEN))
    assert generate(model, tokenizer, asked, TEN) == expected
    assert [generate(model, tokenizer, [row], TEN)[0] for row in asked] == expected
    assert len({tuple(ids) for ids in expected}) > 6


@pytest.mark.parametrize("most", [0, 10**6], ids=["suffixes eager", "suffixes captured"])
@pytest.mark.parametrize("cost", [0, 48, 10**6])
def test_shared_prefixes_have_the_ids_of_generate(loaded, captured, cost, most, monkeypatch):
    from llava.model import decode

    tokenizer, model = loaded
    monkeypatch.setattr(decode, "_cost_of_a_group", lambda device: cost)
    monkeypatch.setattr(generation, "_MOST_OF_SUFFIXES", most)
    for asked in (rows(model), rows(model, 1, 5), rows(model)[3:9]):
        expected = eagerly(model, lambda asked=asked: generate(model, tokenizer, asked, TEN))
        assert generate_shared(model, tokenizer, asked, TEN) == expected


def test_answers_end_and_batches_shrink(loaded, captured):
    tokenizer, model = loaded
    decoding, asked = Decoding(max_new_tokens=40), rows(model)
    first = generate(model, tokenizer, asked, decoding)
    before = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = [first[0][3], first[5][7], first[2][0], 2]
        expected = eagerly(model, lambda: generate(model, tokenizer, asked, decoding))
        assert generate(model, tokenizer, asked, decoding) == expected
        assert generate_shared(model, tokenizer, asked, decoding) == expected
        assert len(set(map(len, expected))) > 2
    finally:
        model.generation_config.eos_token_id = before


def test_long_answers_need_more_windows(loaded, captured):
    tokenizer, model = loaded
    decoding, asked = Decoding(max_new_tokens=150), rows(model)[:3]
    expected = eagerly(model, lambda: generate(model, tokenizer, asked, decoding))
    assert generate(model, tokenizer, asked, decoding) == expected


def test_a_row_that_is_not_finite_is_none_and_harms_no_later_row(loaded, captured):
    tokenizer, model = loaded
    asked = rows(model)
    broken = Row(asked[1].ids, torch.full_like(asked[1].visual, float("nan")), "broken")
    expected = generate(model, tokenizer, asked, TEN)
    mixed = generate(model, tokenizer, [asked[0], broken, asked[2]], TEN)
    assert mixed == [expected[0], None, expected[2]]
    assert generate(model, tokenizer, asked, TEN) == expected
    assert generate_shared(model, tokenizer, [*asked, broken, broken], TEN) == [*expected, None, None]
    assert generate_shared(model, tokenizer, asked, TEN) == expected


def prompt(length: int = 9) -> torch.Tensor:
    draw = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 600, (1, length), generator=draw)
    ids[:, 4] = IMAGE_TOKEN_INDEX
    return ids


def pixels(model, images: int = 1) -> torch.Tensor:
    side = model.get_vision_tower().image_size
    return torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tokens", [None, 4])
def test_generate_of_the_model_gives_the_same(loaded, captured, tokens):
    model = loaded[1]
    model.set_pruner(None, tokens=tokens)
    ids, images = torch.cat([prompt(), prompt()]), pixels(model, 2)
    ids[1, 6:] = 7
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    for kwargs in ({}, {"attention_mask": mask}, {"eos_token_id": [2, 5]}, {"temperature": 0, "top_p": None}):
        given = {"images": images, "max_new_tokens": 6, "do_sample": False, **kwargs}
        if kwargs.get("temperature") == 0:
            given.pop("do_sample")
        expected = eagerly(model, lambda given=given: model.generate(ids, **given))
        found = model.generate(ids, **given)
        assert torch.equal(found, expected) and found.dtype == expected.dtype
    assert len(model.runtime.captured) > 2
    single = model.generate(ids[:1], images=images[:1], max_new_tokens=6, do_sample=False)
    assert torch.equal(
        single[0],
        eagerly(model, lambda: model.generate(ids[:1], images=images[:1], max_new_tokens=6, do_sample=False))[
            0
        ],
    )


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 2},
        {"repetition_penalty": 1.3},
        {"return_dict_in_generate": True},
        {"min_new_tokens": 3},
        {"output_scores": True, "return_dict_in_generate": True},
        {"bad_words_ids": [[5]]},
        {"num_return_sequences": 1},
    ],
    ids=str,
)
def test_other_searches_are_those_of_transformers(loaded, captured, kwargs):
    model = loaded[1]
    model.set_pruner(None, tokens=4)
    given = {"images": pixels(model), "max_new_tokens": 5, "do_sample": False, **kwargs}
    expected = eagerly(model, lambda: model.generate(prompt(), **given))
    found = model.generate(prompt(), **given)
    of = (lambda x: x) if isinstance(found, torch.Tensor) else (lambda x: x.sequences)
    assert torch.equal(of(found), of(expected)) and type(found) is type(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids.index_fill_(1, torch.tensor([5]), IMAGE_TOKEN_INDEX), "image"),
        (lambda ids: ids.index_fill_(1, torch.tensor([4]), 9), "image"),
        (lambda ids: ids.index_fill_(1, torch.tensor([2]), -7), "-7"),
    ],
)
def test_wrong_prompts_get_the_error_of_the_careful_way(loaded, captured, change, message):
    model, ids = loaded[1], prompt()
    change(ids)
    with pytest.raises(ValueError, match=message):
        model.generate(ids, images=pixels(model), max_new_tokens=2, do_sample=False)


def test_images_that_are_not_finite_get_the_error_of_the_careful_way(loaded, captured):
    model = loaded[1]
    model.set_pruner(None, tokens=4)
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.generate(prompt(), images=pixels(model) * float("nan"), max_new_tokens=2, do_sample=False)


def test_doubtful_tokens_are_pruned_with_care(loaded, captured):
    """A black image: its tokens differ only by position; equal ones need the careful way."""
    model = loaded[1]
    tower = model.get_vision_tower()
    model.set_pruner(None, tokens=4)
    embedding = tower._inner.embeddings.position_embedding
    before = embedding.weight.data.clone()
    try:
        embedding.weight.data[1:] = 0  # in place: graphs see it
        images = torch.zeros_like(pixels(model))
        vision = model.encode_vision(images)
        with torch.no_grad():
            (found,) = model.visual_tokens_deferred(model.encode_vision(images))
        assert bool(found.doubt)
        expected = model.visual_tokens(vision[0])
        given = {"images": images, "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(
            model.generate(prompt(), **given), eagerly(model, lambda: model.generate(prompt(), **given))
        )
        assert expected.count == found.count
    finally:
        embedding.weight.data.copy_(before)


@pytest.mark.parametrize("tokens", [None, 4])
def test_from_image_to_first_token_nothing_waits_for_the_device(loaded, captured, tokens, monkeypatch):
    """The first run captures; the second is what users feel. The first look is that of `answer`."""
    model = loaded[1]
    model.set_pruner(None, tokens=tokens, anyres="paper")
    given = {"images": pixels(model), "max_new_tokens": 2, "do_sample": False}
    model.generate(prompt(), **given)
    answer, reached = generation.answer, []
    looks = no_looks(model.device)

    def watched(*args, **kwargs):
        looks.__exit__(None, None, None)
        reached.append(1)
        return answer(*args, **kwargs)

    monkeypatch.setattr("llava.model.runtime.answers.answer", watched)
    ids = prompt().to(model.device)
    looks.__enter__()
    model.generate(ids, **given)
    assert reached == [1]


@contextmanager
def no_looks(device):
    """Raise an error where the host would wait for the device."""
    if device.type == "cpu":
        with NoSyncs(uploads=True):
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_stages_follow_the_weights(loaded, captured):
    tokenizer, model = loaded
    asked = rows(model)[:2]
    before = generate(model, tokenizer, asked, TEN)
    layer = model.get_model().layers[-1].mlp
    weight = layer.down_proj.weight
    with torch.no_grad():
        weight.neg_()  # in place
        changed = generate(model, tokenizer, asked, TEN)
        assert changed == eagerly(model, lambda: generate(model, tokenizer, asked, TEN)) != before
        weight.neg_()
    hook = layer.register_forward_hook(lambda *_: None)
    assert not model.runtime.decodes(model) if not torch.is_grad_enabled() else True
    with torch.no_grad():
        assert not model.runtime.ready(model)
        hook.remove()
        assert model.runtime.ready(model)
        model.train()
        assert not model.runtime.ready(model)
        model.eval()
    assert not model.runtime.ready(model)  # gradients are wanted
    assert generate(model, tokenizer, asked, TEN) == before


def test_a_copy_of_the_model_has_a_runtime_of_its_own(loaded, captured):
    model = loaded[1]
    other = copy.deepcopy(model)
    assert other.runtime is not model.runtime and other.runtime.graphs


@pytest.mark.parametrize("value", ["0", "1", None])
def test_the_environment_switches_graphs_off(value, monkeypatch):
    from llava.model.runtime import Runtime

    monkeypatch.delenv("VISPRUNER_GRAPHS", raising=False)
    if value is not None:
        monkeypatch.setenv("VISPRUNER_GRAPHS", value)
    assert Runtime(torch.device("cuda")).graphs == (value != "0")
    assert not Runtime(torch.device("cpu")).graphs
    assert not Runtime(torch.device("cuda"), graphs=False).graphs


@pytest.mark.parametrize("seed", range(40))
def test_splicing_on_the_device_is_splicing(seed):
    draw = torch.Generator().manual_seed(seed)
    table = torch.randn(50, 8, generator=draw)
    batch, length = 1 + seed % 3, 3 + seed % 5
    ids = torch.randint(1, 50, (batch, length), generator=draw)
    mask = torch.rand(batch, length, generator=draw) > 0.2
    mask[:, 0] = True
    tags = (torch.rand(batch, length, generator=draw) > 0.6) & mask
    tags[:, 0] = False
    ids[tags] = IMAGE_TOKEN_INDEX
    visual = [
        torch.randn(int(n), 8, generator=draw)
        for n in torch.randint(0, 6, (int(tags.sum()),), generator=draw)
    ]
    expected = splice(ids, mask.long(), None, visual, lambda x: table[x], "right")
    counts = [len(one) for one in visual] or [0]
    stacked = torch.cat([*visual, torch.full((2, 8), float("nan"))])
    width = expected.embeds.shape[1] + seed % 4
    found, lengths, wrong = splice_on_device(
        ids, mask, torch.tensor(counts), stacked, width, len(visual), lambda x: table[x]
    )
    assert not wrong and lengths.tolist() == expected.mask.sum(1).tolist()
    assert torch.equal(found[:, : expected.embeds.shape[1]], expected.embeds)
    assert not found[:, expected.embeds.shape[1] :].any()
    assert splice_on_device(
        ids, mask, torch.tensor([*counts, 3]), stacked, width, len(visual) + 1, lambda x: table[x]
    )[2]


def test_buckets_cover_every_length_with_little_padding():
    for length in range(1, 5000):
        assert length <= bucket(length) < length * 1.07 + 16 and bucket(length) % 16 == 0
        assert window(length) >= length and window(length) % 128 == 0
    assert len({bucket(length) for length in range(1, 4097)}) < 200
    expected = {1: 1, 3: 3, 5: 6, 7: 8, 9: 10, 13: 14, 17: 20, 200: 224, 256: 256, 257: 320}
    assert {n: padded_rows(n) for n in expected} == expected
    assert all(n <= padded_rows(n) <= max(n + 1, 1.25 * n) for n in range(1, 2000))


def test_methods_that_read_crop_ids_are_not_captured(loaded, captured):
    """Their identities come from the host, and a graph would keep those of the first image."""
    model, read = loaded[1], []

    class ById(get_pruner("uniform").__class__):
        def choose(self, features, cues, tokens):
            read.extend(cues.crop_ids)
            shift = int(cues.crop_ids[0], 16) % 7
            kept = super().choose(features, cues, tokens)
            return Kept(((kept.indices + shift) % features.shape[1]).sort(1).values, kept.important)

    pruner = ById(4)
    with torch.no_grad():
        for seed in range(3):
            images = pixels(model) + seed
            vision = model.encode_vision(images)
            expected = model.visual_tokens(vision[0], pruner)
            (found,) = model.visual_tokens_deferred(vision, pruner)
            assert torch.equal(found.kept.indices, expected.kept.indices) and found.doubt is None
    assert len(set(read)) == 3


@pytest.mark.parametrize("anyres", ["paper", "llava"])
@pytest.mark.parametrize("tokens", [None, 4])
def test_deferred_tokens_of_several_images_are_those_of_each(loaded, captured, anyres, tokens):
    """Two images of one size, whose tokens may differ in number without their padding, and one of another."""
    model = loaded[1]
    model.set_pruner(None, tokens=tokens, anyres=anyres)
    side = model.get_vision_tower().image_size
    several = getattr(model.config, "mm_patch_merge_type", None) == "spatial_unpad"
    draw, images, sizes = (
        torch.Generator().manual_seed(5),
        [],
        [(side * 2, side), (side * 2, side), (side, side * 2)],
    )
    for width, height in sizes:
        crops = 1
        if several:
            columns, rows = (2, 2) if anyres == "paper" else _grid(model, (width, height))
            crops = 1 + columns * rows
        images.append(torch.randn(crops, 3, side, side, generator=draw))
    with torch.no_grad():
        visions = model.encode_vision(images, sizes)
        for vision, found in zip(visions, model.visual_tokens_deferred(visions), strict=True):
            expected = model.visual_tokens(vision)
            assert torch.equal(found.embeds, expected.embeds)
            assert torch.equal(found.kept.indices, expected.kept.indices)
        for image, size, vision in zip(images, sizes, visions, strict=True):  # one stage for one image
            (embeds,), doubts = model.image_tokens_deferred([image], [size])
            assert torch.equal(embeds, model.visual_tokens(vision).embeds) and not any(doubts)


def _grid(model, size):
    from llava.mm_utils import get_anyres_image_grid_shape

    return get_anyres_image_grid_shape(
        size, model.config.image_grid_pinpoints, model.get_vision_tower().image_size
    )


def test_sampling_that_the_checkpoint_asks_for_is_not_greedy(loaded, captured, monkeypatch):
    model = loaded[1]
    given = {"images": pixels(model), "max_new_tokens": 8}
    assert model.is_plain_greedy({"max_new_tokens": 8})
    monkeypatch.setattr(model.generation_config, "do_sample", True)
    monkeypatch.setattr(model.generation_config, "temperature", 5.0)
    assert not model.is_plain_greedy({"max_new_tokens": 8})
    torch.manual_seed(1)
    expected = eagerly(model, lambda: model.generate(prompt(), **given))
    torch.manual_seed(1)
    assert torch.equal(model.generate(prompt(), **given), expected)
    assert not torch.equal(model.generate(prompt(), **given), expected)  # other draws
