"""What uvicorn and Starlette leave open: foreign hosts and sites, slow clients, errors as JSON with safe headers."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import re
import socket
from collections.abc import Mapping
from typing import Any

import h11
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .requests import Refused

__all__ = [
    "HEADERS",
    "MAX_HEAD_BYTES",
    "Guard",
    "Protocol",
    "error_response",
    "is_loopback",
    "is_ours",
    "json_response",
]

# The limits are generous for a browser on the same machine; the tests of hostile requests hold with them.
REQUEST_SECONDS = 20.0
"""The time that a whole request may take to arrive."""
ANSWER_SECONDS = 30.0
"""The time that a client may take to read an answer."""
LINGER_SECONDS = 2.0
"""The least time that a refused client may go on sending, so that it can read why it was refused."""
LINGER_BYTES = 32 << 20
"""What a refused client may still send: four of the largest uploads."""
MAX_HEAD_BYTES = 1 << 16
"""The size of the first line and the headers together; the limit of Python's ``http.server`` for one line."""
MAX_HEADERS = 100
"""The number of headers; the limit of Python's ``http.client``."""
HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::[0-9]*)?")
HEADERS = [
    ("Server", "latentprior"),
    ("Connection", "close"),
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
]
"""The headers of every answer. Each connection carries one request, so that none can hide behind another."""


def json_response(content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return an answer that holds one JSON object of finite numbers."""
    return Response(json.dumps(content, allow_nan=False), status, headers, "application/json")


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return the answer to a request that failed, ``{"error": message}``."""
    return json_response({"error": message}, status, headers)


def is_loopback(host: str) -> bool:
    """Return whether an IP address without brackets, or a name, is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_ours(named: str, host: str) -> bool:
    """Return whether a request whose header ``Host`` is ``named`` can have been meant for a server on ``host``.

    A page whose name was made to point to this machine (DNS rebinding) still sends its own name. A server that is open
    to other machines may be called by any IP address, as rebinding needs a name.
    """
    parts = HOST.fullmatch(named)
    if parts is None:
        return False
    name = (parts[1] or parts[2] or "").lower()
    if is_loopback(name) or name == host.lower():
        return True
    if is_loopback(host):
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == socket.gethostname().lower()
    return True


class Guard:
    """ASGI middleware that refuses what neither the page nor a program of the user can have sent.

    ``app`` answers the other requests, each with one message ``http.response.body``.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app, self._host = app, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        app = self._app
        try:
            _check(scope, self._host)
        except Refused as refused:
            app = error_response(refused.status, refused.message, refused.headers)
        left = scope["state"]["deadline"] - asyncio.get_running_loop().time()
        await app(scope, *_lingering(receive, send, max(left, LINGER_SECONDS)))


def _check(scope: Scope, host: str) -> None:
    headers = Headers(scope=scope)
    if scope["http_version"] not in ("1.0", "1.1"):
        raise Refused(400, "the first line must be METHOD PATH HTTP/1.1")
    size = len(scope["raw_path"]) + sum(len(name) + len(value) for name, value in headers.raw)
    if len(headers.raw) > MAX_HEADERS or size > MAX_HEAD_BYTES:
        raise Refused(431, f"a request may have {MAX_HEADERS} headers, of {MAX_HEAD_BYTES:,} bytes together")
    if scope["method"] not in ("GET", "POST"):
        raise Refused(405, "GET and POST are the methods known here", {"Allow": "GET, POST"})
    for name in ("host", "origin", "sec-fetch-site", "content-type", "content-length"):
        if len(headers.getlist(name)) > 1:
            raise Refused(400, f"the header {name} must be given once")
    named = headers.get("host", "")
    if not is_ours(named, host):
        raise Refused(421, "the header Host does not name this server")
    # Escapes are decoded in "path"; no path here needs any.
    if scope["path"].encode() != scope["raw_path"]:
        raise Refused(404, "there is nothing of this name")
    # A link to the page itself may stand on any site.
    if scope["path"] == "/":
        return
    own = f"http://{named.lower()}"
    site = headers.get("sec-fetch-site", "none")
    if headers.get("origin", own).rstrip("/").lower() != own or site not in ("same-origin", "none"):
        raise Refused(403, "requests from other sites are refused")


def _lingering(receive: Receive, send: Send, seconds: float) -> tuple[Receive, Send]:
    """Read the rest of a request after its answer: closing over unread bytes would reset the connection."""
    ended = False

    async def read() -> Message:
        nonlocal ended
        message = await receive()
        ended = not message.get("more_body", False)
        return message

    async def drain() -> None:
        left = LINGER_BYTES
        while not ended and left > 0:
            left -= len((await read()).get("body", b""))

    async def write(message: Message) -> None:
        if message["type"] == "http.response.body":
            await send({**message, "more_body": True})
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(drain(), seconds)
            message = {"type": "http.response.body"}
        await send(message)

    return read, write


class Protocol(H11Protocol):
    """uvicorn's HTTP with deadlines, and with errors that have the form and the headers of all others.

    uvicorn waits for a request for as long as a client likes to send it, and for a client to read an answer.
    ``request.state.deadline`` is the time of the event loop by which a request must have arrived.
    """

    _timer: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time that a request may take."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "deadline": self.loop.time() + REQUEST_SECONDS}
        self._timer = self.loop.call_later(REQUEST_SECONDS, self._close_without_request)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read a part of a request; what follows an error is thrown away."""
        if self.conn.their_state is not h11.ERROR:
            super().data_received(data)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Answer a client that sends no more: uvicorn takes it for one that has left."""
        if self.conn.their_state is not h11.ERROR:
            self.send_400_response("")
        return bool(self.cycle)

    def on_response_complete(self) -> None:
        """Start the time that the client may take to read the answer."""
        super().on_response_complete()
        self._abort_in(ANSWER_SECONDS)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP; where only the body is not, end the body and let the application answer."""
        if self.cycle:
            self.cycle.more_body = False
            self.cycle.message_event.set()
            return
        body = b'{"error": "this is no HTTP/1.1 request, or its headers are too long or cut off"}'
        headers = [*HEADERS, ("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.write_eof()
        self._abort_in(LINGER_SECONDS)

    def _close_without_request(self) -> None:
        if not self.cycle:
            self.transport.close()

    def _abort_in(self, seconds: float) -> None:
        self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self.transport.abort)
