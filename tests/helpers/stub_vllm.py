"""A local stand-in for a vLLM server with --enable-mm-embeds: reads requests as vLLM does, answers with our
model.

It follows vLLM's documentation: content parts become one text with a line per image, the chat template makes
the prompt, every `<image>` is replaced by as many placeholders as its embeddings have rows, and the rows
enter the language model there. No code of the client is used.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jinja2
import torch

from llava.mm_utils import tokenizer_image_token
from llava.model.decode import Decoding, Row, generate

PLACEHOLDER = 32000
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: {{ messages[0]['content'] }} ASSISTANT:"
)


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class StubVllm:
    """A server at `url`.

    Attributes:
        asked: Bodies of the chat requests; `shapes`: shapes of the embeddings in each; `busy`: most at once.
        fault: Called with the number of a chat request; returns an HTTP status, "html", "close", seconds to
            wait before the answer, or None.
    """

    def __init__(self, model: Any, tokenizer: Any, **settings: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.name = settings.pop("name", "llava")
        self.template = settings.pop("template", VICUNA)
        self.mm_embeds = settings.pop("mm_embeds", True)
        self.returns_ids = settings.pop("returns_ids", True)
        self.fault: Callable[[int], Any] = settings.pop("fault", lambda number: None)
        assert not settings, settings
        self.asked: list[dict[str, Any]] = []
        self.shapes: list[list[tuple[int, ...]]] = []
        self.embeds: list[list[torch.Tensor]] = []
        self.keys: list[str | None] = []
        self.busy = self._now = 0
        self._lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("model", self.name) != self.name:
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        (message,) = body["messages"]
        content, text, embeds = message["content"], None, []
        if isinstance(content, str):
            text = content
        else:
            for part in content:
                if part["type"] == "text":
                    text = part["text"]
                    continue
                if not self.mm_embeds:
                    raise Refused(400, "You must set `--enable-mm-embeds` to input `image_embeds`")
                raw = base64.b64decode(part["image_embeds"], validate=True)
                embeds.append(torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu").to_dense())
        self.shapes.append([tuple(one.shape) for one in embeds])
        if len(embeds) == 1:
            if embeds[0].ndim != 3 or len(embeds[0]) != 1:
                raise Refused(400, f"embeddings of shape {tuple(embeds[0].shape)}")
            embeds = [embeds[0][0]]
        width = self.model.config.hidden_size
        if any(one.ndim != 2 or one.shape[1] != width for one in embeds):
            raise Refused(400, f"embeddings of shapes {self.shapes[-1]}")
        self.embeds.append(embeds)
        turn = {"role": message["role"], "content": "<image>\n" * len(embeds) + text}
        prompt = jinja2.Template(self.template).render(messages=[turn], add_generation_prompt=True)
        ids = tokenizer_image_token(prompt, self.tokenizer)
        if not body.get("add_special_tokens", False):
            ids = ids[1:]
        assert body["top_k"] == -1 and body["repetition_penalty"] == 1.0 and body["temperature"] == 0
        row = Row(tuple(ids), tuple(embeds) or None)
        with self._lock:
            decoding = Decoding(body["max_completion_tokens"])
            (said,) = generate(self.model, self.tokenizer, [row], decoding)
        lengths = iter([len(one) for one in embeds])
        expanded = [part for one in ids for part in ([PLACEHOLDER] * next(lengths) if one < 0 else [one])]
        text = self.tokenizer.decode(said, skip_special_tokens=True)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        document = {"model": self.name, "choices": [choice], "usage": {"prompt_tokens": len(expanded)}}
        if self.returns_ids and body.get("return_token_ids"):
            ended = [] if len(said) == body["max_completion_tokens"] else [self.tokenizer.eos_token_id]
            choice["token_ids"], document["prompt_token_ids"] = [*said, *ended], expanded
        return document


def _handler(outer: StubVllm) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/v1/models":
                return self._send(404, {"detail": "Not Found"})
            self._send(200, {"object": "list", "data": [{"id": outer.name}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                return self._send(404, {"detail": "Not Found"})
            with outer._lock:
                number = len(outer.asked)
                outer.asked.append(body)
                outer.keys.append(self.headers.get("Authorization"))
                outer._now += 1
                outer.busy = max(outer.busy, outer._now)
            try:
                fault = outer.fault(number)
                if fault == "close":
                    self.connection.close()
                elif fault == "html":
                    self._send(200, "<!doctype html><title>Login</title>")
                elif isinstance(fault, int):
                    self._send(fault, {"error": {"message": "scripted"}})
                else:
                    time.sleep(fault or 0)
                    self._send(200, outer.chat(body))
            except Refused as error:
                self._send(error.status, {"error": {"message": str(error), "code": error.status}})
            finally:
                with outer._lock:
                    outer._now -= 1

        def _send(self, status: int, document: Any) -> None:
            content = (document if isinstance(document, str) else json.dumps(document)).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # the client has gone
                pass

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextmanager
def stub_vllm(model: Any, tokenizer: Any, **settings: Any) -> Iterator[StubVllm]:
    """Run a StubVllm inside the block."""
    stub = StubVllm(model, tokenizer, **settings)
    thread = threading.Thread(target=stub.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.server.shutdown()
        stub.server.server_close()
        thread.join()
