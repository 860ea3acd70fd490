"""JSON over HTTP with retries: what the judge and a vLLM server have in common.

    endpoint = JsonEndpoint("http://localhost:8000/v1")
    endpoint.request("/models")                        # GET
    endpoint.request("/chat/completions", {"model": ...})  # POST

Replies 408, 409, 425, 429 and 5xx, time-outs and connection errors are retried with a delay that doubles;
other statuses are refused at once. urllib is used, because one request with retries does not justify another
dependency. Independent of what is asked.
"""

from __future__ import annotations

import http.client
import json
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

_TRANSIENT = {408, 409, 425, 429}  # and 5xx
_LONGEST = 60.0  # seconds that a server's Retry-After may ask for
_SHOWN = 300  # characters of a server's message in an error


class EndpointError(OSError):
    """A request without a usable reply.

    Attributes:
        status: HTTP status of a request that was refused, None if there was no answer or not a JSON reply.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class JsonEndpoint:
    """An HTTP server that takes and returns JSON. Can be used by several threads.

    Attributes:
        base_url: Address before the path of a request.
        key: Sent as a bearer token.
        attempts: Requests until the endpoint is given up.
        seconds: Delay after the first failure; it doubles with each further one.
        timeout: Seconds to wait for a reply.
        stopped: Set to end all retries at once.
    """

    base_url: str
    key: str | None = None
    attempts: int = 6
    seconds: float = 1.0
    timeout: float = 120.0
    stopped: threading.Event = field(default_factory=threading.Event)

    def request(self, path: str, body: Any = None) -> Any:
        """Send a request and return the document of the reply.

        Args:
            path: Appended to the base address.
            body: JSON value to post; None for GET.

        Raises:
            EndpointError: The request was refused, there was no answer, or the answer is not JSON.
        """
        address, headers = self.base_url.rstrip("/") + path, {}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        try:
            request = urllib.request.Request(address, data, headers)
        except ValueError as error:
            raise EndpointError(f"{address}: not an address ({error}). Use http://HOST:PORT/v1.") from error
        reason, delay = "", 0.0
        for attempt in range(self.attempts):
            if self.stopped.wait(delay):
                break
            delay = self.seconds * 2**attempt
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    content = response.read()
            except urllib.error.HTTPError as error:
                reason = f"{error.code}: {_message(error)}"
                if error.code not in _TRANSIENT and error.code < 500:
                    raise EndpointError(f"{address}: request rejected ({reason})", error.code) from error
                delay = max(delay, _retry_after(error))
                continue
            except (OSError, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__
                continue
            try:
                return json.loads(content)
            except (ValueError, RecursionError) as error:
                start = content[:40].decode(errors="replace").strip()
                raise EndpointError(
                    f"{address}: the reply is not JSON (it starts with {start!r}). Another server answers at "
                    "this address; set that of the API, which often ends in /v1."
                ) from error
        raise EndpointError(
            f"{address}: no answer after {self.attempts} attempts ({reason}). Check the address and "
            "that the server runs, then retry."
        )


def _message(error: urllib.error.HTTPError) -> str:
    """Return the server's message, as OpenAI's or FastAPI's error document has it, else its text."""
    try:
        text = error.read(100_000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return error.reason
    try:
        document = json.loads(text)
        found = document.get("error", document) if isinstance(document, dict) else document
        if isinstance(found, dict):
            found = found.get("message") or found.get("detail") or text
        text = str(found)
    except (ValueError, RecursionError):
        pass
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Return the seconds of the header Retry-After; 0 if there are none."""
    text = (error.headers or {}).get("Retry-After") or ""
    return min(float(text), _LONGEST) if text.strip().isdecimal() else 0.0
