"""The calls other programs make, as they write them (lmms-eval's `llava` wrapper, LLaVA's scripts)."""

from __future__ import annotations

import copy
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import llava
from helpers.golden_model import CHECKPOINT, DATA, golden_image
from llava.model.splice import ContextLimits


def test_lmms_eval_wrapper(monkeypatch):
    """Load, tokenise, pad, generate: float16 images, float32 model, settings from the environment."""
    from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    monkeypatch.setenv("VISPRUNER_TOKENS", "16")
    path = str(DATA / "ckpt_llava15s")
    name = get_model_name_from_path(path)
    tokenizer, model, processor, max_length = load_pretrained_model(
        path, None, name, device_map="cpu", multimodal=True, attn_implementation="sdpa"
    )
    model.eval()
    model.tie_weights()
    model.to("cpu")
    assert max_length > 0 and model.pruner.tokens == 16
    visuals = [golden_image("land640x480"), golden_image("tall123x457")]
    images = process_images(visuals, processor, model.config)
    images = (
        [i.to(dtype=torch.float16) for i in images]
        if isinstance(images, list)
        else images.to(dtype=torch.float16)
    )
    rows = []
    for question in ("What is this?", "Is there a dog in it? Answer yes or no."):
        conversation = conv_templates["vicuna_v1"].copy()
        conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question}")
        conversation.append_message(conversation.roles[1], None)
        prompt = conversation.get_prompt()
        rows.append(tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt"))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    flipped = torch.nn.utils.rnn.pad_sequence([r.flip(0) for r in rows], batch_first=True, padding_value=pad)
    input_ids = flipped.flip(1)
    kwargs = {
        "do_sample": False, "temperature": 0, "top_p": None, "num_beams": 1, "max_new_tokens": 5, "use_cache":
        True, "pad_token_id": pad,
    }  # fmt: skip
    sizes = [v.size for v in visuals]
    out = model.generate(
        input_ids, attention_mask=input_ids.ne(pad), images=images, image_sizes=sizes, **kwargs
    )
    assert out.shape == (2, 5)
    texts = tokenizer.batch_decode(out, skip_special_tokens=True)
    assert len(texts) == 2 and all(isinstance(t, str) for t in texts)
    for i, row in enumerate(rows):
        alone = model.generate(row[None], images=images[i : i + 1], image_sizes=sizes[i : i + 1], **kwargs)
        assert alone[0].tolist() == out[i].tolist()


def test_signature():
    """Names and order of the first arguments are LLaVA's."""
    names = list(inspect.signature(llava.load_pretrained_model).parameters)
    assert names[:7] == [
        "model_path", "model_base", "model_name", "load_8bit", "load_4bit", "device_map", "device",
    ]  # fmt: skip
    ours = [
        "attn_implementation",
        "visual_token_num",
        "important_ratio",
        "method",
        "dtype",
        "tower_dtype",
        "anyres",
    ]
    assert set(ours) <= set(names)


def test_llava_names():
    from llava.model import LlavaConfig, LlavaLlamaForCausalLM, LlavaMistralConfig, LlavaMistralForCausalLM

    assert (
        llava.LlavaLlamaForCausalLM is LlavaLlamaForCausalLM
        and LlavaLlamaForCausalLM.config_class is LlavaConfig
    )
    assert (LlavaConfig.model_type, LlavaMistralConfig.model_type) == ("llava_llama", "llava_mistral")
    assert LlavaMistralForCausalLM.config_class is LlavaMistralConfig
    assert set(llava.__all__) <= set(dir(llava)) and all(hasattr(llava, n) for n in llava.__all__)


def test_import_is_light():
    """`import llava` and `import llava.model` load neither torch nor transformers."""
    code = "import sys, llava, llava.model; sys.exit(len({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_model_can_be_copied(golden):
    model = golden("15s").model
    model.set_pruner("vispruner", 8)
    twin = copy.deepcopy(model)
    twin.set_pruner("vispruner", 4)
    image = torch.zeros(1, 3, 336, 336)
    assert len(model.encode_images(image)[0]) == 8 and len(twin.encode_images(image)[0]) == 4


def test_parts_llava_users_reach_for(golden):
    model = golden("15s").model
    tower = model.get_vision_tower()
    assert tower is model.get_model().vision_tower and tower.is_loaded
    assert model.get_model().mm_projector[0].in_features == tower.hidden_size == model.config.mm_hidden_size
    assert (tower.num_patches, tower.num_patches_per_side, tower.select_layer) == (64, 8, -2)
    assert tower.image_processor.crop_size["height"] == 336
    assert model.device == tower.device == torch.device("cpu") and model.dtype == tower.dtype == torch.float32


# --- the preset "published" against the loop of LLaVA's evaluation scripts -------------------------------

QUESTIONS = ["What is shown?", "Is there a dog in it?", "Describe it.", "Why?", "How many are there?"]


def answers_of_llavas_loop(checkpoint: str, images: dict[str, Path], tokens: int | None) -> dict[str, str]:
    """Ask one question at a time as LLaVA's `model_vqa_loader`: half-precision pixels, float32 tower."""
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    tokenizer, model, processor, _ = load_pretrained_model(
        checkpoint,
        None,
        "llava",
        device="cpu",
        tower_dtype="float32",
        visual_token_num=tokens,
        anyres="paper",
    )
    found = {}
    for name, path in images.items():
        image = Image.open(path).convert("RGB")
        pixels = process_images([image], processor, model.config)[0]
        for question in QUESTIONS:
            conversation = conv_templates["vicuna_v1"].copy()
            conversation.append_message(conversation.roles[0], f"<image>\n{question}")
            conversation.append_message(conversation.roles[1], None)
            prompt = conversation.get_prompt()
            ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
            with torch.inference_mode():
                out = model.generate(
                    ids[None],
                    images=pixels[None].to(dtype=torch.float16),
                    image_sizes=[image.size],
                    do_sample=False,
                    temperature=0,
                    top_p=None,
                    num_beams=1,
                    max_new_tokens=8,
                    use_cache=True,
                )
            found[f"{name} {question}"] = tokenizer.batch_decode(out, skip_special_tokens=True)[0].strip()
    return found


@pytest.mark.parametrize("tokens", [None, 16])
@pytest.mark.parametrize("key", ["15s", "16s"])
def test_published_equals_llavas_loop_question_by_question(tmp_path, key, tokens):
    from llava.eval import model_vqa_loader

    images = {name: tmp_path / f"{name}.png" for name in ("land640x480", "tall123x457", "small50x40")}
    for name, path in images.items():
        golden_image(name).save(path)
    asked = [
        {"question_id": f"{name} {text}", "image": path.name, "text": text}
        for name, path in images.items()
        for text in QUESTIONS
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    checkpoint = str(DATA / CHECKPOINT[key])
    arguments = f"--model-path {checkpoint} --question-file {tmp_path}/q.jsonl --image-folder {tmp_path} "
    arguments += f"--answers-file {tmp_path}/a.jsonl --max_new_tokens 8 --device cpu --workers 0 "
    arguments += f"--conv-mode vicuna_v1 --preset published --visual_token_num {tokens or 'none'}"
    assert model_vqa_loader.main(arguments.split()) == 0
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").open()]
    assert {row["question_id"]: row["text"] for row in rows} == answers_of_llavas_loop(
        checkpoint, images, tokens
    )
    made = rows[0]["metadata"]
    assert (made["preset"], made["tower_dtype"], made["anyres"]) == ("published", "float32", "paper")
    if key == "16s":
        assert {row["metadata"]["visual_tokens"] for row in rows} == {5 * (tokens or 64)}


def test_published_and_exact_differ_in_pixels(golden, monkeypatch):
    exact, pixels = golden("15s").model, golden("15s").pixels(("land640x480",))
    rounded = pixels.half()
    assert not torch.equal(rounded.float(), pixels)
    published = llava.load_pretrained_model(str(DATA / CHECKPOINT["15s"]), device="cpu", preset="published")[
        1
    ]
    monkeypatch.setenv("VISPRUNER_PRESET", "published")
    by_environment = llava.load_pretrained_model(str(DATA / CHECKPOINT["15s"]), device="cpu")[1]

    def features(model, images):
        with torch.inference_mode():
            return model.encode_vision(images)[0].features

    of_a_client = features(exact, rounded)
    assert not torch.equal(features(exact, pixels), of_a_client)
    assert torch.equal(features(published, pixels), of_a_client)
    assert torch.equal(features(published, rounded), of_a_client)
    assert torch.equal(features(by_environment, pixels), of_a_client)
    assert published.anyres == by_environment.anyres == "paper" and exact.anyres == "llava"


# --- prompts that do not fit, settings of the checkpoint ------------------------------------------------


@pytest.fixture
def limited(golden):
    """A golden model whose config can be changed for one test."""
    model = copy.deepcopy(golden("15s").model)
    return golden("15s").tokenizer, model


IDS = torch.tensor([[1, 292, -200, 554, 13]])  # 4 text tokens and 64 visual ones
IMAGE = torch.zeros(1, 3, 336, 336)


def test_generate_refuses_a_prompt_that_does_not_fit(limited):
    model = limited[1]
    ask = {"images": IMAGE, "do_sample": False, "max_new_tokens": 2}
    model.config.tokenizer_model_max_length = 68
    assert model.generate(IDS, **ask).shape == (1, 2)
    model.config.tokenizer_model_max_length = 67
    with pytest.raises(ValueError, match="68 tokens, tokenizer_model_max_length in config.json is 67"):
        model.generate(IDS, **ask)
    with pytest.raises(ValueError, match="tokenizer_model_max_length"):
        model(IDS, images=IMAGE)
    with pytest.warns(UserWarning, match="truncated on the right"):  # training cuts, as in LLaVA
        assert model(IDS, images=IMAGE, labels=IDS).logits.shape[1] == 67
    model.config.tokenizer_model_max_length = None
    model.config.max_position_embeddings = 68
    with pytest.raises(ValueError, match="no position for an answer: max_position_embeddings.* is 68"):
        model.generate(IDS, **ask)
    assert model(IDS, images=IMAGE).logits.shape[1] == 68
    model.config.max_position_embeddings = 67
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(IDS, images=IMAGE)


def test_an_answer_past_the_last_position_is_a_warning(limited, recwarn):
    model = limited[1]
    ask = {"images": IMAGE, "do_sample": False, "max_new_tokens": 5, "eos_token_id": 639}
    model.config.max_position_embeddings = 73
    model.generate(IDS, **ask)
    assert not [one for one in recwarn if "last position" in str(one.message)]
    model.config.max_position_embeddings = 72
    with pytest.warns(UserWarning, match="68 tokens of the prompt and 5 new ones.*at most 4 new tokens"):
        model.generate(IDS, **ask)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        (None, 68),
        ({"type": "linear", "factor": 2.0}, 136),
        ({"rope_type": "dynamic", "factor": 1.5}, 102),
        ({"rope_type": "llama3", "factor": 8.0}, 68),  # writes the stretched length itself
        ({"rope_type": "default", "rope_theta": 10000.0}, 68),
    ],
)
def test_stretched_positions_count(rope, limit):
    config = {"max_position_embeddings": 68, "rope_scaling": rope, "tokenizer_model_max_length": 1e30}
    assert ContextLimits.of(config).positions == limit
    assert ContextLimits.of(config).refuse(limit - 1) is None and ContextLimits.of(config).refuse(limit)
    with pytest.raises(ValueError, match="config.json: tokenizer_model_max_length is '2048'"):
        ContextLimits.of({"tokenizer_model_max_length": "2048"})


def test_top_p_none_switches_the_checkpoints_off_as_in_llava(limited):
    model = limited[1]

    def draw(**kwargs):
        torch.manual_seed(0)
        ask = {"images": IMAGE, "do_sample": True, "temperature": 1.0, "max_new_tokens": 8}
        return model.generate(IDS, **ask, **kwargs)[0].tolist()

    plain = draw()
    for name, value in (("top_p", 0.01), ("min_p", 0.99), ("top_k", 1), ("repetition_penalty", 9.0)):
        setattr(model.generation_config, name, value)
        assert draw() != plain, "transformers' rule: what is not given is the checkpoint's"
        assert draw(**{name: None}) == plain or name == "top_k"
        setattr(model.generation_config, name, None)
