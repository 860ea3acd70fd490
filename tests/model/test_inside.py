"""Decoders with pruning inside: reference cases, a plain version, batches, shared prefixes, cached steps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, MistralConfig

from helpers import oracle_inside as oracle
from helpers.golden_methods_inside import compared
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import inside
from llava.model.decode import Decoding, Row, generate, generate_inside, generate_shared
from llava.pruning import get_pruner

CASES = Path(__file__).parents[1] / "data" / "methods" / "inside"
TOKENIZER = SimpleNamespace(eos_token_id=0, pad_token_id=0)
TEN = Decoding(max_new_tokens=10)

# a method, its settings, and its plain version, for 8 layers and 20 visual tokens
METHODS = {
    "fastv": (get_pruner("fastv", 6, layer=3), oracle.fastv(3, 6)),
    "pyramiddrop": (
        get_pruner("pyramiddrop", layers=[2, 5], ratios=[0.5, 0.2]),
        oracle.pyramiddrop({2: 10, 5: 4}),
    ),
    "sparsevlm": (
        get_pruner("sparsevlm", layers=[1, 4], counts=[9, 3]),
        oracle.sparsevlm({1: 9, 4: 3}),
    ),
    "vtw": (get_pruner("vtw", layer=4), oracle.vtw(4)),
    "dart": (get_pruner("dart", 9, layer=3), None),
}


def tiny(kind: str, kernels: str = "sdpa", **sizes):
    """A random decoder with grouped queries, sharp enough that its answers depend on what it sees."""
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM

    classes = {
        "llama": (LlavaConfig, LlavaLlamaForCausalLM),
        "mistral": (LlavaMistralConfig, LlavaMistralForCausalLM),
    }
    config_class, model_class = classes[kind]
    assert issubclass(config_class, LlamaConfig | MistralConfig)
    given = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "attn_implementation": kernels,
        **({"sliding_window": None} if kind == "mistral" else {}),
    }
    model = model_class(config_class(**{**given, **sizes})).eval()
    draw = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        scale = 1.0 if "embed" in name or "head" in name else 0.3
        weight.data = torch.randn(weight.shape, generator=draw) * scale + ("norm" in name)
    return model


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model(request):
    return tiny(request.param)


def prompts(count: int = 3, images: int = 2) -> list[Row]:
    """Prompts of different lengths about images of different sizes, some text-only."""
    draw = torch.Generator().manual_seed(1)
    visual = [torch.randn(20 - 3 * number, 32, generator=draw) for number in range(images)]
    found = []
    for number in range(count * images):
        after = torch.randint(3, 60, (2 + 3 * (number % 4),), generator=draw).tolist()
        image = number % images
        found.append(Row((1, *[7] * image, IMAGE_TOKEN_INDEX, *after), visual[image], image))
    return found


def test_reference_cases():
    found = list(compared(CASES))
    assert len(found) == 10 and [one for one in found if one[2] is not None] == []


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dart"])
def test_equals_the_plain_version(model, method):
    pruner, rule = METHODS[method]
    draw = torch.Generator().manual_seed(3)
    for words in (1, 9):
        visual = torch.randn(20, 32, generator=draw)
        before, after = [1, 5, 9], torch.randint(3, 60, (words + 1,), generator=draw).tolist()
        row = Row((*before, IMAGE_TOKEN_INDEX, *after), visual)
        original = pruner.positions == "original"
        expected, counts = oracle.answer(model, before, visual.numpy(), after, rule, 6, original)
        assert pruner.visual_per_layer(8, 20) == counts
        (found,) = generate_inside(model, [row], pruner, 6, stops=set())
        assert found == expected


@pytest.mark.parametrize("method", METHODS)
def test_batches_and_shared_prefixes_equal_singles(model, method):
    pruner = METHODS[method][0]
    asked = prompts()
    single = [generate(model, TOKENIZER, [row], TEN, pruner)[0] for row in asked]
    assert generate(model, TOKENIZER, asked, TEN, pruner) == single
    assert generate_shared(model, TOKENIZER, asked, TEN, pruner) == single
    assert generate_shared(model, TOKENIZER, asked[::-1], TEN, pruner) == single[::-1]
    assert len({tuple(ids) for ids in single}) > 3
    text = [Row((1, 9, 4, 30), None), Row((1, 44), None)]
    alone = generate(model, TOKENIZER, text, TEN)
    mixed = [asked[0], text[0], asked[3], text[1]]
    assert generate(model, TOKENIZER, mixed, TEN, pruner) == [single[0], alone[0], single[3], alone[1]]


def test_only_layers_before_the_first_reduction_are_shared(model, monkeypatch):
    seen: list[tuple[int, tuple[int, ...]]] = []
    run = inside.run_decoder_layer

    def watch(layer, hidden, *more):
        seen.append((layer.self_attn.layer_idx, tuple(hidden.shape[:2])))
        return run(layer, hidden, *more)

    monkeypatch.setattr(inside, "run_decoder_layer", watch)
    asked = [row for row in prompts() if row.key == 0]  # one image: 1 + 20 tokens before the question
    inside.prefill(model, asked, get_pruner("fastv", 6, layer=3), share=True)
    longest = max(len(row.ids) - 2 for row in asked)
    first = [(number, (1, 21)) for number in range(3)] + [(number, (3, longest)) for number in range(3)]
    assert seen == first + [(number, (3, 7 + longest)) for number in range(3, 8)]


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm"])
def test_eager_attention_gives_the_same_answers(method):
    pruner, answers = METHODS[method][0], []
    for kernels in ("sdpa", "eager"):
        answers.append(generate(tiny("llama", kernels), TOKENIZER, prompts(), TEN, pruner))
    assert answers[0] == answers[1]


def test_a_budget_that_covers_the_image_changes_nothing(model):
    asked = prompts()
    for pruner in (get_pruner("fastv", 20), get_pruner("sparsevlm", 99), get_pruner("pyramiddrop", None)):
        assert generate(model, TOKENIZER, asked, TEN, pruner) == generate(model, TOKENIZER, asked, TEN)
    some = get_pruner("fastv", 18, layer=3)  # covers the second image, of 17 tokens, only
    run = inside.prefill(model, asked, some)
    assert [len(row) for row in run.reductions] == [1, 0] * 3


def test_an_image_at_the_end_of_a_prompt(model):
    visual = prompts()[0].visual
    rows = [Row((1, 8, IMAGE_TOKEN_INDEX), visual, 0), Row((1, 8, IMAGE_TOKEN_INDEX, 5), visual, 0)]
    for method in METHODS:
        pruner = METHODS[method][0]
        single = [generate(model, TOKENIZER, [row], TEN, pruner)[0] for row in rows]
        assert generate(model, TOKENIZER, rows, TEN, pruner) == single
        assert generate_shared(model, TOKENIZER, rows, TEN, pruner) == single


def test_cached_decoding_equals_a_longer_prompt(model):
    """With what is kept decided by the layer before, a decoding step is a prompt with the token appended."""
    row = prompts()[0]
    pruner = get_pruner("vtw", layer=4)  # what it keeps does not depend on the last token
    said = generate(model, TOKENIZER, [row], TEN, pruner)[0]
    for step in range(3):
        longer = Row((*row.ids, *said[:step]), row.visual)
        assert generate(model, TOKENIZER, [longer], Decoding(1), pruner)[0] == said[step : step + 1]


def test_errors_before_anything_runs(model):
    row, pruner = prompts()[0], METHODS["fastv"][0]
    with pytest.raises(ValueError, match="fastv: prunes inside .* got temperature 0.5 and 1 beams"):
        generate(model, TOKENIZER, [row], Decoding(5, temperature=0.5), pruner)
    two = Row((1, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX, 4), (row.visual, row.visual))
    with pytest.raises(ValueError, match="a prompt has 2 images"):
        generate(model, TOKENIZER, [two], TEN, pruner)
    narrow = tiny("mistral", sliding_window=24)
    with pytest.raises(ValueError, match="sliding_window is 24, and prompt and answer have 33"):
        generate(narrow, TOKENIZER, [row], TEN, pruner)


def test_not_finite_logits_end_their_row_only(model):
    rows = prompts()[:3]
    expected = generate(model, TOKENIZER, rows, TEN, METHODS["fastv"][0])
    broken = Row(rows[1].ids, torch.full_like(rows[1].visual, np.nan), 5)
    found = generate(model, TOKENIZER, [rows[0], broken, rows[2]], TEN, METHODS["fastv"][0])
    assert found == [expected[0], None, expected[2]]


def test_generate_of_the_model(model):
    """`generate(visual=...)` prunes by the model's pruner; `forward` refuses to run without it."""
    rows, pruner = prompts()[:3], METHODS["sparsevlm"][0]
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([[0] * (width - len(row.ids)) + list(row.ids) for row in rows])
    mask = torch.tensor([[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows])
    visual = [row.visual for row in rows]
    given = {"attention_mask": mask, "visual": visual, "max_new_tokens": 10, "do_sample": False}
    plain = model.generate(ids, **given)
    model.set_pruner(pruner)
    try:
        found = model.generate(ids, **given)
        expected = generate(model, TOKENIZER, rows, TEN, pruner)
        for line, want in zip(found.tolist(), expected, strict=True):
            assert (line[: line.index(0)] if 0 in line else line) == want
        assert found.tolist() != plain.tolist()
        assert torch.equal(model.generate(ids, pruner=None, **given), plain)
        assert generate(model, TOKENIZER, rows, TEN) == generate(
            model, TOKENIZER, rows, TEN, get_pruner("none")
        )
        with pytest.raises(ValueError, match="forward: 'sparsevlm' prunes inside the language model"):
            model(ids, attention_mask=mask, visual=visual)
        with pytest.raises(ValueError, match="only greedy search is supported, got .*num_beams"):
            model.generate(ids, **{**given, "num_beams": 2})
        with pytest.raises(ValueError, match="prepare_inputs_labels_for_multimodal: 'sparsevlm'"):
            model.prepare_inputs_labels_for_multimodal(ids, None, mask, None, None, visual)
        text = {"attention_mask": None, "max_new_tokens": 3, "do_sample": False}
        assert model.generate(torch.tensor([[1, 9, 4]]), **text).shape == (1, 3)
    finally:
        model.set_pruner("none")
