"""A vLLM server as the language model: pruned visual tokens out, answers back.

    server = VllmServer.connect("http://localhost:8000")     # vllm serve MODEL --enable-mm-embeds
    replies = server.generate([Prompt("What is this?", row)], Decoding(max_new_tokens=16), stops={2})

Tower, projector and pruning run here; the server gets the visual tokens of an image as a content part of type
`image_embeds` and runs the language model only. A prompt of the server must be the one that the local model
would have got, token by token: the ids that the server returns are compared with it. No real vLLM server has
been tried; the format is that of its documentation (`return_token_ids`, `--enable-mm-embeds`: version 0.11 or
newer).
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.endpoint import EndpointError, JsonEndpoint
from llava.model.decode import Decoding, Row, until_stop

_TIMEOUT, _ATTEMPTS = (
    300.0,
    5,
)  # seconds for an answer, which may wait for others; requests until it is given up
_OF_ONE_QUESTION = {400, 413, 422}  # statuses that refuse a single question once another one was answered
_NO_EMBEDS = ("embed", "enable-mm-embeds")
TEMPLATE = "python -m llava.integrations.vllm_client --print-template {conv_mode} > {conv_mode}.jinja"


@dataclass(frozen=True)
class Prompt:
    """A question and its prompt.

    Attributes:
        text: The user's turn without image placeholders; the server adds one line per image before it.
        row: The whole prompt as the local model would get it.
        seed: Of sampled answers.
    """

    text: str
    row: Row
    seed: int | None = None


@dataclass(frozen=True)
class Reply:
    """An answer of the server: its text, and its token ids where the server returns them."""

    text: str
    ids: tuple[int, ...] | None = None


def encode_embeds(embeds: Tensor) -> str:
    """Return a tensor as vLLM reads it: base64 of `torch.save`, dense, with its own storage only."""
    buffer = io.BytesIO()
    torch.save(embeds.detach().cpu().contiguous().clone(), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def content_of(text: str, images: Sequence[Tensor]) -> str | list[dict[str, Any]]:
    """Return the content of the user's message.

    Args:
        images: (K, D) visual tokens of every image. A single one is sent as (1, K, D), several as (K, D)
        each.
    """
    if not images:
        return text
    several = len(images) > 1
    tensors = [one if several else one[None] for one in images]
    parts = [{"type": "image_embeds", "image_embeds": encode_embeds(one)} for one in tensors]
    return [*parts, {"type": "text", "text": text}]


def chat_template(conv_mode: str) -> str:
    """Return a Jinja template, for `vllm serve --chat-template`, that makes the prompts of one of LLaVA's.

    Of conversations with one turn. The server adds the first token (`add_special_tokens`).

    Raises:
        ValueError: Unknown conversation template.
    """
    if conv_mode not in conv_templates:
        raise ValueError(
            f"{conv_mode}: unknown conversation template. Choose from {', '.join(conv_templates)}."
        )
    conversation, mark = conv_templates[conv_mode].copy(), "\0"
    conversation.append_message(conversation.roles[0], mark)
    conversation.append_message(conversation.roles[1], None)
    before, after = (json.dumps(part, ensure_ascii=False) for part in conversation.get_prompt().split(mark))
    # Escapes of JSON are those of a string in Jinja, except \uXXXX, which json.dumps writes for no text here.
    return "{{ " + before + " }}{{ messages[0]['content'] }}{{ " + after + " }}"


class VllmServer:
    """A model of an OpenAI-compatible server that takes visual tokens.

    Args:
        endpoint: Address that ends in /v1.
        model: Name of the model there; None if the server does not list its models.
        conv_mode: Conversation template of the prompts, named in errors.
        concurrency: Most requests at the same time.
    """

    def __init__(
        self, endpoint: JsonEndpoint, model: str | None, conv_mode: str = "vicuna_v1", concurrency: int = 64
    ) -> None:
        self.endpoint, self.model, self.conv_mode = endpoint, model, conv_mode
        self.concurrency = concurrency
        self.failure: EndpointError | None = None  # what ended the run
        self._answered = False  # before the first answer, a refusal is about the server, not about a question

    @classmethod
    def connect(cls, url: str, model: str | None = None, **options: Any) -> VllmServer:
        """Return a server of this address, and its only model if none is named.

        Args:
            url: With or without /v1. A key is read from OPENAI_API_KEY; local servers need none.
            model: Name of the model; then nothing is asked yet.
            options: `conv_mode` and `concurrency`.

        Raises:
            EndpointError: No such server, or it has several models.
        """
        address = url.rstrip("/")
        address += "" if address.endswith("/v1") else "/v1"
        key = os.environ.get("OPENAI_API_KEY")
        endpoint = JsonEndpoint(address, key, attempts=_ATTEMPTS, timeout=_TIMEOUT)
        return cls(endpoint, model or only_model(endpoint), **options)

    def generate(
        self, prompts: Sequence[Prompt], decoding: Decoding, stops: Collection[int] = ()
    ) -> list[Reply | str | EndpointError]:
        """Ask for all answers, at most `concurrency` at a time.

        Args:
            stops: Ids that end an answer.

        Returns:
            A reply per prompt, or a reason why the server refused that prompt, or the error that ends the
            run: then no further prompt is sent, and prompts without an answer have that error.
        """
        found: list[Reply | str | EndpointError] = []
        rest = list(prompts)
        while rest and not self._answered:  # alone: it shows whether the server understands the requests
            found.append(self._ask(rest.pop(0), decoding, stops))
            if self.failure is not None:
                return [*found, *[self.failure] * len(rest)]
        pool = ThreadPoolExecutor(max(1, min(self.concurrency, len(rest))), thread_name_prefix="requests")
        try:
            futures = [pool.submit(self._ask, prompt, decoding, stops) for prompt in rest]
            return found + [future.result() for future in futures]
        except BaseException:
            self.endpoint.stopped.set()  # Ctrl-C: no retries
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def check(self) -> None:
        """Raise the error that ended the run, if there is one."""
        if self.failure is not None:
            raise self.failure

    def _ask(self, prompt: Prompt, decoding: Decoding, stops: Collection[int]) -> Reply | str | EndpointError:
        if self.failure is not None:
            return self.failure
        try:
            document = self.endpoint.request("/chat/completions", self._body(prompt, decoding, stops))
            reply, ids, count = self._read(document, set(stops))
            wrong = prompt_difference(prompt.row, ids, count)
        except EndpointError as error:
            if error.status in _OF_ONE_QUESTION and self._answered:
                return str(error)
            return self._end(self._explained(error))
        if wrong is not None:
            wrong = f"{wrong}. The server has another chat template or tokenizer than this checkpoint"
            if self._answered:
                return wrong
            command = TEMPLATE.format(conv_mode=self.conv_mode)
            return self._end(
                f"{self.endpoint.base_url}: {wrong}. Serve the same checkpoint, with --chat-template "
                f"{self.conv_mode}.jinja; {command} writes that file."
            )
        if ids is None and count is None and not self._answered:
            warning = (
                "the server returns neither the ids nor the length of its prompts, so that its chat template"
            )
            print(f"warning: {self.endpoint.base_url}: {warning} cannot be checked", file=sys.stderr)
        self._answered = True
        return reply

    def _end(self, message: str) -> EndpointError:
        """Keep the first error that ends the run, and end the retries of other requests."""
        self.failure = self.failure or EndpointError(message)
        self.endpoint.stopped.set()
        return self.failure

    def _body(self, prompt: Prompt, decoding: Decoding, stops: Collection[int]) -> dict[str, Any]:
        """Return the request. Every sampling setting is given, as vLLM fills in generation_config.json."""
        sample = decoding.temperature > 0
        body = {
            "messages": [{"role": "user", "content": content_of(prompt.text, prompt.row.images)}],
            "max_completion_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p if sample and decoding.top_p is not None else 1.0,
            "top_k": decoding.top_k if sample else -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": sorted(stops),
            "add_special_tokens": True,
            "return_token_ids": True,
        }
        body |= {"seed": prompt.seed} if sample and prompt.seed is not None else {}
        return body if self.model is None else {"model": self.model, **body}

    def _read(self, document: Any, stops: set[int]) -> tuple[Reply, list[int] | None, int | None]:
        """Return the reply, the ids of its prompt and their number, as far as the server gives them."""
        try:
            choice = document["choices"][0]
            text, ids = choice["message"]["content"], choice.get("token_ids")
            prompt_ids = document.get("prompt_token_ids")
            count = (document.get("usage") or {}).get("prompt_tokens")
            if not isinstance(text, str | None):
                raise TypeError(f"content is a {type(text).__name__}")
            lists = [
                [int(one) for one in given] if given is not None else None for given in (ids, prompt_ids)
            ]
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise EndpointError(
                f"{self.endpoint.base_url}: the reply is not an OpenAI chat completion ({error}). Use the "
                "address of a vLLM server."
            ) from error
        said = None if lists[0] is None else tuple(until_stop(lists[0], stops))
        return Reply(text or "", said), lists[1], count

    def _explained(self, error: EndpointError) -> str:
        """Return the text of an error with what to do about it."""
        text = str(error).rstrip(".")
        fix = "Check that the server runs. Answers so far are kept; run the same command again to resume."
        if error.status in (401, 403):
            fix = "Set OPENAI_API_KEY to the server's --api-key."
        elif error.status == 404:
            fix = f"The server has no model {self.model!r} or no chat endpoint.{self._models()}"
        elif error.status in _OF_ONE_QUESTION and any(word in text.lower() for word in _NO_EMBEDS):
            fix = "Start the server with --enable-mm-embeds, and with the same checkpoint as --model."
        elif error.status is not None:
            fix = "Start vLLM 0.11 or newer with --enable-mm-embeds and the checkpoint of --model."
        elif "not JSON" in text or "not an OpenAI" in text:
            fix = ""
        return f"{text}. {fix}".strip()

    def _models(self) -> str:
        try:
            names = model_names(self.endpoint)
        except EndpointError:
            return " It is not a vLLM server; use the address of one."
        return f" Set --server-model to one of {', '.join(names)}."


def model_names(endpoint: JsonEndpoint) -> list[str]:
    """Return the names of a server's models. Raises EndpointError."""
    document = endpoint.request("/models")
    try:
        return [str(one["id"]) for one in document["data"]]
    except (LookupError, TypeError) as error:
        raise EndpointError(
            f"{endpoint.base_url}/models: the reply is not a list of models ({error!r}). Use the address of "
            "a vLLM server."
        ) from error


def only_model(endpoint: JsonEndpoint) -> str:
    """Return the name of a server's only model.

    Raises:
        EndpointError: There is no such server, or it has none or several.
    """
    try:
        names = model_names(endpoint)
    except EndpointError as error:
        if error.status == 404:
            raise EndpointError(f"{error}. Not a vLLM server; use the address of one.", 404) from error
        if error.status in (401, 403):
            raise EndpointError(f"{error}. Set OPENAI_API_KEY to the server's --api-key.") from error
        raise
    if len(names) != 1:
        listed = ", ".join(names) or "none"
        raise EndpointError(
            f"{endpoint.base_url}: the server has several models or none ({listed}). Set "
            "--server-model to one of them."
        )
    return names[0]


def prompt_difference(row: Row, ids: Sequence[int] | None, count: int | None) -> str | None:
    """Return how the server's prompt differs from the local one; None if it does not, or cannot be known.

    Args:
        row: The local prompt; every image stands for as many tokens as it has.
        ids: Token ids of the server's prompt, in which an image may have any placeholder.
        count: Number of tokens of the server's prompt, used without `ids`.
    """
    lengths = iter([len(one) for one in row.images])
    expected: list[int | None] = []
    for token in row.ids:
        expected += [None] * next(lengths) if token == IMAGE_TOKEN_INDEX else [token]
    if ids is None:
        if count is None or count == len(expected):
            return None
        return f"the server's prompt has {count} tokens, expected {len(expected)}"
    for place, (theirs, ours) in enumerate(zip(ids, expected, strict=False)):
        if ours is not None and theirs != ours:
            return f"token {place} of the server's prompt is {theirs}, expected {ours}"
    if len(ids) != len(expected):
        return f"the server's prompt has {len(ids)} tokens, expected {len(expected)}"
    return None
