"""Conversation templates against rendered references, and the parts a web page uses."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from llava.conversation import SeparatorStyle, conv_templates, default_conversation

PROMPTS = Path(__file__).parent / "data/model/prompts.json"
GOLDEN = json.loads(PROMPTS.read_text(encoding="utf-8"))["templates"]
Q1 = "<image>\nWhat is shown in this image?"
A1 = "A photo of a red circle."
Q2 = "Is there a dog in the image? Please answer yes or no."


def converse(name, *texts):
    conv = conv_templates[name].copy()
    for i, text in enumerate(texts):
        conv.append_message(conv.roles[i % 2], text)
    return conv


def test_the_names_are_those_of_the_reference():
    assert set(conv_templates) == set(GOLDEN)
    assert len(conv_templates) == 18
    assert default_conversation is conv_templates["vicuna_v1"]


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_template(name):
    golden, conv = GOLDEN[name], conv_templates[name]
    for field in ("sep", "sep2", "system", "version", "offset"):
        assert getattr(conv, field) == golden[field], field
    assert conv.sep_style is SeparatorStyle[golden["sep_style"]]
    assert list(conv.roles) == golden["roles"]
    assert len(conv.messages) == golden["n_builtin_messages"]
    assert converse(name, Q1, None).get_prompt() == golden["turn1"]["prompt"]
    if "error" in golden["turn2"]:
        with pytest.raises(ValueError, match=r"Turn 2 of a plain template.*vicuna_v1"):
            converse(name, Q1, A1, Q2, None).get_prompt()
    else:
        assert converse(name, Q1, A1, Q2, None).get_prompt() == golden["turn2"]["prompt"]


def test_copies_are_independent_of_the_template():
    conv = converse("v0", "hello")
    conv.messages[0][1] = "changed"
    assert len(conv_templates["v0"].messages) == 2
    assert conv_templates["v0"].messages[0][1] != "changed"


def test_llama_2_complains_about_wrong_turns():
    conv = conv_templates["llama_2"].copy()
    conv.append_message(conv.roles[1], "I start")
    with pytest.raises(ValueError, match="Turn 1 is from 'ASSISTANT'"):
        conv.get_prompt()
    with pytest.raises(ValueError, match="first message"):
        converse("llama_2", None).get_prompt()


@pytest.mark.parametrize("text", ["What is it?", "What is it?\n<image>", "<image>\nWhat is it?"])
def test_an_image_in_the_first_message_comes_first(text):
    image = Image.new("RGB", (8, 6))
    assert (
        converse("vicuna_v1", (text, image, "Pad"), None)
        .get_prompt()
        .endswith("USER: <image>\nWhat is it? ASSISTANT:")
    )
    assert (
        converse("v1_mmtag", (text, image, "Pad"), None)
        .get_prompt()
        .endswith(" USER: <Image><image></Image> ASSISTANT: Received.</s>USER: What is it? ASSISTANT:")
    )


@pytest.mark.parametrize(
    ("mode", "size", "expected"),
    [
        ("Pad", (100, 40), (100, 100)),
        ("Resize", (100, 40), (336, 336)),
        ("Default", (100, 40), (100, 40)),
        ("Crop", (2688, 1344), (1344, 672)),
        ("Default", (1000, 3000), (448, 1344)),
        ("Default", (5000, 1), (1344, 1)),
    ],
)
def test_images_of_a_conversation(mode, size, expected):
    conv = converse("v0", ("look", Image.new("RGB", size, "red"), mode), "I see.", "no image", None)
    (image,) = conv.get_images(return_pil=True)
    assert image.size == expected
    (encoded,) = conv.get_images()
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == expected


def test_unknown_image_mode():
    conv = converse("vicuna_v1", ("look", Image.new("RGB", (4, 4)), "Stretch"))
    with pytest.raises(ValueError, match="'Stretch'.*Pad"):
        conv.get_images()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "I;16", "F"])
def test_uploaded_images_of_every_mode_are_shown(mode):
    """Padding needs RGB for its color, and JPEG cannot hold alpha."""
    conv = converse("vicuna_v1", ("look", Image.new(mode, (6, 4)), "Pad"), None)
    assert conv.get_images(return_pil=True)[0].mode == "RGB"
    assert "data:image/jpeg;base64," in conv.to_gradio_chatbot()[0][0]


def test_gradio_pairs_and_dict_leave_out_the_templates_examples():
    conv = converse("v0", ("<image>\nlook", Image.new("RGB", (4, 4)), "Pad"), "I see.", "And now?", None)
    first, second = conv.to_gradio_chatbot()
    assert first[0].startswith('<img src="data:image/jpeg;base64,') and first[0].endswith("look")
    assert first[1] == "I see." and second == ["And now?", None]
    assert json.loads(json.dumps(conv.dict()))["messages"][2] == ["Human", "<image>\nlook"]
