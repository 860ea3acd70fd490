"""A local chat endpoint with scripted replies that records its requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StubJudge:
    """Endpoint at `url`; `asked` is the request bodies, `reply(body)` returns text or an HTTP status."""

    def __init__(self, reply: Callable[[dict[str, Any]], str | int]) -> None:
        self.reply, self.asked, self.headers = reply, [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                outer.headers.append(dict(self.headers))
                said = outer.reply(body)
                status = said if isinstance(said, int) else 200
                choice = {"message": {"role": "assistant", "content": said}}
                document = {"error": "scripted"} if status != 200 else {"model": "stub", "choices": [choice]}
                content = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@contextmanager
def stub_judge(reply: Callable[[dict[str, Any]], str | int]) -> Iterator[StubJudge]:
    """Run a StubJudge inside the block."""
    judge = StubJudge(reply)
    thread = threading.Thread(target=judge.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        judge.server.shutdown()
        judge.server.server_close()
        thread.join()
