"""A judge on localhost that speaks OpenAI's chat completions over real HTTP and follows a given rule."""

import json
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

_SHOWN = re.compile(r"# Answer A\n(.*)\n\n# Answer B\n(.*)\n\n# Your verdict", re.DOTALL)
Rule = Callable[[str, str], str]
"""The answers as shown, A and B -> the judge's reply."""
DRIP = b" "
"""A reply that never ends: this byte again and again."""
_DRIP_S = 0.05


class ScriptedJudge:
    """Counts what it was asked. `hold_after`: then it never answers.

    `faults`: the first replies: HTTP statuses; or bytes of a reply with status 200; or DRIP, one that never ends.
    """

    def __init__(self, rule: Rule, faults: tuple[int | bytes, ...] = (), hold_after: int | None = None) -> None:
        self.asked: list[str] = []
        self.answered: list[str] = []
        self._faults, self._lock, self.held, self._end = (
            list(faults),
            threading.Lock(),
            threading.Event(),
            threading.Event(),
        )
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                status, reply = judge.reply(body, rule, hold_after)
                content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content) if content != DRIP else 1 << 20))
                self.send_header("retry-after", "0")
                self.end_headers()
                with suppress(BrokenPipeError, ConnectionResetError):  # who asked was killed
                    self.wfile.write(content)
                    while content == DRIP and not judge._end.wait(_DRIP_S):
                        self.wfile.write(content)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def reply(self, body: dict[str, Any], rule: Rule, hold_after: int | None) -> tuple[int, dict[str, Any] | bytes]:
        text = body["messages"][-1]["content"]
        with self._lock:
            if self._faults:
                fault = self._faults.pop(0)
                return (200, fault) if isinstance(fault, bytes) else (fault, {"error": {"message": "busy"}})
            self.asked.append(text)
            hold = hold_after is not None and len(self.asked) > hold_after
            if not hold:
                self.answered.append(text)
        if hold:
            self.held.set()
            self._end.wait()
        shown = _SHOWN.search(text)
        assert shown is not None, text
        message = {"role": "assistant", "content": rule(shown[1], shown[2])}
        return 200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": {}}

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._server.shutdown()
        self._server.server_close()
