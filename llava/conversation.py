"""Turn a conversation into a prompt with one of LLaVA's eighteen templates.

    conv = conv_templates["vicuna_v1"].copy()
    conv.append_message(conv.roles[0], "<image>\\nWhat is this?")
    conv.append_message(conv.roles[1], None)
    prompt = conv.get_prompt()

Templates are shared: copy before appending. `llava.mm_utils.tokenizer_image_token` makes the ids of a prompt,
`llava.model.checkpoint.config.conversation_for` chooses the template that a checkpoint was trained with.
"""

import base64
import dataclasses
from collections.abc import Sequence
from enum import Enum, auto
from io import BytesIO
from typing import TYPE_CHECKING, Any

from llava.constants import DEFAULT_IMAGE_TOKEN

if TYPE_CHECKING:
    from PIL import Image


class SeparatorStyle(Enum):
    """How turns are joined."""

    SINGLE = auto()  # one separator after the system prompt and after every turn
    TWO = auto()  # one after a question, another after an answer
    MPT = auto()  # role + text + separator; the roles bring their own line break
    PLAIN = auto()  # no roles (pretraining on captions)
    LLAMA_2 = auto()  # [INST] ... [/INST]
    CHATML = auto()  # <|im_start|>role, line break, text, <|im_end|>, line break


@dataclasses.dataclass
class Conversation:
    """A system prompt, two roles and the messages so far.

    A message is `[role, content]`; content is a text, None (the turn to be generated, always the last), or a
    tuple `(text, PIL image, mode)` with mode "Crop", "Resize", "Pad" or "Default" for the web page. The first
    `offset` messages are examples of the template.
    """

    system: str
    roles: Sequence[str]
    messages: Sequence[Sequence[Any]]
    offset: int
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False

    def get_prompt(self) -> str:
        """Return the prompt as text.

        Raises:
            ValueError: the messages do not fit the template; the message says which turn and why.
        """
        turns = [(role, _text(content)) for role, content in self._with_image_first()]
        style = self.sep_style
        if style is SeparatorStyle.SINGLE:
            return (
                self.system
                + self.sep
                + "".join(f"{role}: {text}{self.sep}" if text else f"{role}:" for role, text in turns)
            )
        if style is SeparatorStyle.TWO:
            ends = (self.sep, self.sep2)
            return (
                self.system
                + self.sep
                + "".join(
                    f"{role}: {text}{ends[i % 2]}" if text else f"{role}:"
                    for i, (role, text) in enumerate(turns)
                )
            )
        if style is SeparatorStyle.MPT:
            return (
                self.system
                + self.sep
                + "".join(f"{role}{text}{self.sep}" if text else role for role, text in turns)
            )
        if style is SeparatorStyle.CHATML:
            system = f"{self.system}{self.sep}\n" if self.system else ""
            return system + "".join(
                f"{role}\n{text}{self.sep}\n" if text else f"{role}\n" for role, text in turns
            )
        if style is SeparatorStyle.LLAMA_2:
            return self._llama_2(turns)
        if style is SeparatorStyle.PLAIN:
            return self._plain(turns)
        raise ValueError(f"sep_style: {style!r} is unknown. Use a member of SeparatorStyle.")

    def _llama_2(self, turns: list[tuple[str, str | None]]) -> str:
        prompt = ""
        for i, (role, text) in enumerate(turns):
            if role != self.roles[i % 2]:
                raise ValueError(
                    f"Turn {i + 1} is from {role!r}, but this template alternates {self.roles[0]!r} and "
                    f"{self.roles[1]!r}. Append messages in this order."
                )
            if i == 0 and not text:
                raise ValueError("Turn 1 is empty, but this template needs a first message. Append one.")
            if not text:
                continue
            if i % 2:
                prompt += f" {text} {self.sep2}"
                continue
            if i == 0 and self.system:
                text = f"<<SYS>>\n{self.system}\n<</SYS>>\n\n{text}"
            prompt += f"{self.sep}[INST] {text} [/INST]"
        # The tokenizer adds the first <s>, so the text must not start with it.
        return prompt.removeprefix(self.sep)

    def _plain(self, turns: list[tuple[str, str | None]]) -> str:
        ends = (self.sep, self.sep2)
        prompt = self.system
        for i, (_, text) in enumerate(turns):
            if text and ends[i % 2] is None:
                raise ValueError(
                    f"Turn {i + 1} of a plain template is an answer. Plain templates are for pretraining on "
                    "captions and have only one turn. Use another template, such as vicuna_v1."
                )
            prompt += f"{text}{ends[i % 2]}" if text else ""
        return prompt

    def _with_image_first(self) -> list[Sequence[Any]]:
        """Return the messages, the first with `<image>` where the template expects it if it has an image."""
        messages = list(self.messages)
        if not messages or not isinstance(messages[0][1], tuple):
            return messages
        role, content = messages[0]
        question = content[0].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if "mmtag" not in self.version:
            return [(role, f"{DEFAULT_IMAGE_TOKEN}\n{question}"), *messages[1:]]
        image = [(self.roles[0], f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"), (self.roles[1], "Received.")]
        return [*image, (role, question), *messages[1:]]

    def append_message(self, role: str, message: Any) -> None:
        """Add a turn; `message=None` opens the turn that the model will generate."""
        self.messages.append([role, message])

    def _image_messages(self) -> list[tuple[int, tuple]]:
        """Return (position after the offset, content) of the user's turns that have an image."""
        turns = enumerate(self.messages[self.offset :])
        return [(i, content) for i, (_, content) in turns if i % 2 == 0 and isinstance(content, tuple)]

    def process_image(
        self,
        image: "Image.Image",
        image_process_mode: str,
        return_pil: bool = False,
        image_format: str = "PNG",
        max_len: int = 1344,
        min_len: int = 672,
    ) -> "Image.Image | str":
        """Convert an uploaded image to RGB, pad or resize it, limit its sides, and encode it as base64 text.

        Raises:
            ValueError: unknown `image_process_mode`.
        """
        from llava.image_files import to_rgb
        from llava.mm_utils import classical_resize, expand2square

        image = to_rgb(image)
        if image_process_mode == "Pad":
            image = expand2square(image, (122, 116, 104))
        elif image_process_mode == "Resize":
            image = classical_resize(image, (336, 336))
        elif image_process_mode not in ("Default", "Crop"):
            raise ValueError(
                f"image_process_mode: {image_process_mode!r} is unknown. Use Crop, Resize, Pad or Default."
            )
        if max(image.size) > max_len:
            short, long = min(image.size), max(image.size)
            shortest = min(max_len * short / long, min_len, short)
            longest = int(shortest * long / short)
            shortest = max(int(shortest), 1)
            size = (longest, shortest) if image.width > image.height else (shortest, longest)
            image = classical_resize(image, size)
        if return_pil:
            return image
        buffer = BytesIO()
        image.save(buffer, format=image_format)
        return base64.b64encode(buffer.getvalue()).decode()

    def get_images(self, return_pil: bool = False) -> list:
        """Return the images of the conversation, as PIL images or base64 PNG text."""
        return [self.process_image(image, mode, return_pil) for _, (_, image, mode) in self._image_messages()]

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """Return pairs [question, answer] for a chat page, with images as inline HTML."""
        pairs: list[list[str | None]] = []
        for i, (_, content) in enumerate(self.messages[self.offset :]):
            if i % 2:
                pairs[-1][1] = _text(content)
                continue
            if isinstance(content, tuple):
                text, image, mode = content
                data = self.process_image(image, "Default", image_format="JPEG")
                tag = f'<img src="data:image/jpeg;base64,{data}" alt="user upload image" />'
                content = tag + text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
            pairs.append([content, None])
        return pairs

    def copy(self) -> "Conversation":
        """Return an independent conversation; images are shared."""
        return dataclasses.replace(self, messages=[list(message) for message in self.messages])

    def dict(self) -> dict[str, Any]:
        """Return what a server sends and logs, as JSON without images."""
        return {
            "system": self.system,
            "roles": self.roles,
            "messages": [[role, _text(content)] for role, content in self.messages],
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }


def _text(content: Any) -> str | None:
    return content[0] if isinstance(content, tuple) else content


# System prompts, word for word as the released models were trained with them.
_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_USER = _HUMAN.replace("human", "user")
_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to "
    "understand the visual content that the user provides, and assist the user with a variety of tasks "
    "using natural language.The visual content will be provided with the following format: <Image>visual "
    "content</Image>."
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while "
    "being safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, "
    "or illegal content. Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
    "something not correct. If you don't know the answer to a question, please don't share false "
    "information."
)
_EXAMPLE_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"
_EXAMPLE_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of "
    "time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other "
    "hand, are finite and will eventually be depleted, such as coal, oil, and natural gas. Here are some "
    "key differences between renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy "
    "sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than "
    "non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, and other "
    "negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have "
    "lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote "
    "locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different "
    "situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social instability.\n"
)
_LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that "
    "the user provides, and assist the user with a variety of tasks using natural language."
)
_MPT = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest "
    "answers."
)


def _vicuna_v0(system: str, version: str = "Unknown", messages: Sequence = ()) -> Conversation:
    roles = ("Human", "Assistant")
    return Conversation(system, roles, messages, len(messages), SeparatorStyle.SINGLE, "###", version=version)


def _vicuna_v1(system: str, version: str = "v1") -> Conversation:
    return Conversation(system, ("USER", "ASSISTANT"), (), 0, SeparatorStyle.TWO, " ", "</s>", version)


def _llama_2(system: str, sep: str = "<s>") -> Conversation:
    return Conversation(system, ("USER", "ASSISTANT"), (), 0, SeparatorStyle.LLAMA_2, sep, "</s>", "llama_v2")


def _im_start(system: str, style: SeparatorStyle, version: str) -> Conversation:
    end = "\n" if style is SeparatorStyle.MPT else ""
    roles = (f"<|im_start|>user{end}", f"<|im_start|>assistant{end}")
    return Conversation(f"<|im_start|>system\n{system}", roles, (), 0, style, "<|im_end|>", version=version)


_EXAMPLE = (("Human", _EXAMPLE_QUESTION), ("Assistant", _EXAMPLE_ANSWER))

conv_vicuna_v0 = _vicuna_v0(_HUMAN, messages=_EXAMPLE)
conv_vicuna_v1 = _vicuna_v1(_USER)
conv_llama_2 = _llama_2(_LLAMA_2)
conv_mistral_instruct = _llama_2("", sep="")
conv_chatml_direct = _im_start("Answer the questions.", SeparatorStyle.MPT, "mpt")
conv_llava_plain = Conversation("", ("", ""), (), 0, SeparatorStyle.PLAIN, "\n")
conv_llava_v0 = _vicuna_v0(_HUMAN)
conv_llava_v0_mmtag = _vicuna_v0(_MMTAG, "v0_mmtag")
conv_llava_v1 = _vicuna_v1(_HUMAN)
conv_llava_v1_mmtag = _vicuna_v1(_MMTAG, "v1_mmtag")
conv_llava_llama_2 = _llama_2(_LLAVA_LLAMA_2)
conv_mpt = _im_start(_MPT, SeparatorStyle.MPT, "mpt")
conv_qwen = _im_start("You are a helpful assistant.", SeparatorStyle.CHATML, "qwen")

default_conversation = conv_vicuna_v1
conv_templates = {
    "default": conv_vicuna_v0,
    "v0": conv_vicuna_v0,
    "v1": conv_vicuna_v1,
    "vicuna_v1": conv_vicuna_v1,
    "llama_2": conv_llama_2,
    "mistral_instruct": conv_mistral_instruct,
    "chatml_direct": conv_chatml_direct,
    "mistral_direct": conv_chatml_direct,
    "plain": conv_llava_plain,
    "v0_plain": conv_llava_plain,
    "llava_v0": conv_llava_v0,
    "v0_mmtag": conv_llava_v0_mmtag,
    "llava_v1": conv_llava_v1,
    "v1_mmtag": conv_llava_v1_mmtag,
    "llava_llama_2": conv_llava_llama_2,
    "mpt": conv_mpt,
    "qwen_1_5": conv_qwen,
    "qwen_2": conv_qwen,
}

# part of a checkpoint's name -> template; the first match is used
_TEMPLATE_OF_NAME = {
    "llama-2": "llava_llama_2",
    "mistral": "mistral_instruct",
    "v1.6-34b": "chatml_direct",
    "v1": "llava_v1",
    "mpt": "mpt",
}


def template_for_name(name: str) -> str:
    """Choose the conversation template by a checkpoint's name, as LLaVA's demos do without --conv-mode.

    `llava.model.checkpoint.config.conversation_for` reads config.json instead and is more reliable.
    """
    name = name.lower()
    for part, template in _TEMPLATE_OF_NAME.items():
        if part in name:
            return template
    return "llava_v0"
