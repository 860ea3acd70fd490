"""The calls other programs make, as they write them (lmms-eval's `llava` wrapper, LLaVA's scripts)."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys

import torch

import llava
from helpers.golden_model import DATA, golden_image


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
