"""The page and its JSON over HTTP, by the standard library alone.

Every request costs a bounded share of threads, time and memory: connections, bytes, seconds to send a request, bodies
that arrive at once, places in the line for the model. Requests that a foreign page could make a browser send are
refused.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import json
import re
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.client import HTTPMessage
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import resources
from typing import Any

from ..errors import LatentPriorError
from .explorer import Explorer
from .requests import Fields, Refused, most_bytes, parse
from .uploads import MOST_BYTES, TYPES, read_picture
from .work import Bodies, Worker

__all__ = ["Server", "is_loopback"]

CONNECTIONS = 256
"""Most connections that have a thread; more wait in the listening queue."""
REQUEST_SECONDS, ANSWER_SECONDS, LINGER_SECONDS = 20.0, 30.0, 2.0
MOST_HEAD = 1 << 16
"""Most bytes of a request's headers."""
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(TOKEN + rb" [!-~]+ HTTP/1\.[0-9]\r?\n")
HEADER_LINE = re.compile(TOKEN + rb":[^\0\r\n]*\r?\n")
HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]]*))(?::[0-9]*)?")
PAGE = {
    "/": ("text/html; charset=utf-8", ("explorer/page/index.html",)),
    "/script.js": ("text/javascript; charset=utf-8", ("explorer/page/script.js",)),
    "/style.css": ("text/css; charset=utf-8", ("report/style.css", "explorer/page/style.css")),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether a host is this machine as seen by itself alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Server(socketserver.ThreadingMixIn, HTTPServer):
    """Serves one :class:`Explorer`; ``port`` 0 takes a free one. Raises ``OSError`` where it cannot listen."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_port = False
    request_queue_size = CONNECTIONS

    def __init__(self, explorer: Explorer, host: str = "127.0.0.1", port: int = 7860, *, places: int = 16) -> None:
        self.explorer, self.host = explorer, host
        self.worker = Worker(places)
        self.bodies = Bodies(8 * max(MOST_BYTES, most_bytes(explorer.dim)))
        self.pages = {path: (kind, _page(files)) for path, (kind, files) in PAGE.items()}
        self.info = _json(explorer.info)
        self._connections = threading.BoundedSemaphore(CONNECTIONS)
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        super().__init__((host, port), Handler)

    @property
    def url(self) -> str:
        """Address of the page."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        """Bind without the look-up of a name that HTTPServer makes."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, self.server_address[1]

    def is_ours(self, host: str) -> bool:
        """Whether a request that names ``host`` can have been meant for this server.

        A page whose name was made to point here (DNS rebinding) still sends its own name.
        """
        parts = HOST.fullmatch(host)
        if parts is None:
            return False
        name = (parts[1] or parts[2] or "").lower()
        if is_loopback(name) or name == self.host.lower():
            return True
        if is_loopback(self.host):
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name == socket.gethostname().lower()
        return True

    def serve(self) -> None:
        """Answer until an exception, a signal's say, reaches the caller.

        Requests are accepted in a thread of their own: a signal raises in the main one, and never amid a request.
        """
        accepting = threading.Thread(target=self.serve_forever, name="latentprior-requests", daemon=True)
        try:
            accepting.start()
            accepting.join()
        finally:
            if accepting.is_alive():
                self.shutdown()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection a thread if there is one to spare, or else close it."""
        if not self._connections.acquire(timeout=1.0):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._connections.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, then free the thread's place."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep silent about clients that left; anything else is a defect."""
        if not isinstance(sys.exc_info()[1], OSError):
            traceback.print_exc()

    def close(self) -> None:
        """Stop listening, and wait for what the model is at."""
        self.server_close()
        self.worker.close()


class _Headers(HTTPMessage):
    """Headers alone: the parser, made for mail, would else look for the parts of a multipart body in them."""

    def get_content_type(self) -> str:
        return "text/plain"


class Handler(BaseHTTPRequestHandler):
    """One request a connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    MessageClass = _Headers
    # What an answer needs even where nothing could be read.
    command, requestline, request_version = "", "", protocol_version
    raw_requestline: bytes

    def setup(self) -> None:
        """Read from a stream that ends at a deadline, however slowly bytes drip in."""
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_Timed(self.connection, REQUEST_SECONDS))

    def finish(self) -> None:
        """Let the client read its answer: closing over unread bytes would reset the connection."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            rest, left = _Timed(self.connection, LINGER_SECONDS), 4 * MOST_BYTES
            buffer = bytearray(1 << 16)
            while left > 0 and (n := rest.readinto(buffer)):
                left -= n
        super().finish()

    def parse_request(self) -> bool:
        """Read the head; one that is too long, cut off, or that others might read otherwise, is refused."""
        if not REQUEST_LINE.fullmatch(self.raw_requestline):
            self.send_error(400, "the first line must be METHOD PATH HTTP/1.1")
            return False
        head = bytearray()
        while (line := self.rfile.readline(MOST_HEAD + 1 - len(head))) not in (b"\r\n", b"\n"):
            head += line
            if len(head) > MOST_HEAD:
                self.send_error(431, f"the headers have more than {MOST_HEAD:,} bytes")
                return False
            if not HEADER_LINE.fullmatch(line):
                self.send_error(400, "every header must be one line, NAME: VALUE, and an empty line must end them")
                return False
        stream, self.rfile = self.rfile, io.BytesIO(head + line)
        try:
            return super().parse_request()
        finally:
            self.rfile = stream

    def do_GET(self) -> None:
        """The page's files and ``/api/info``."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """``/api/sample``, ``walk``, ``score`` and ``tilt``."""
        self._answer(self._post)

    def _get(self) -> tuple[str, bytes]:
        path = self._path()
        if path == "/api/info":
            return "application/json", self.server.info
        if path in self._actions():
            raise Refused(405, f"send POST to {path}", {"Allow": "POST"})
        try:
            return self.server.pages[path]
        except KeyError:
            raise Refused(404, "there is nothing of this name") from None

    def _post(self) -> tuple[str, bytes]:
        path = self._path()
        if path == "/api/info" or path in self.server.pages:
            raise Refused(405, f"send GET to {path}", {"Allow": "GET"})
        action = self._actions().get(path)
        if action is None:
            raise Refused(404, "there is nothing of this name")
        kind = self._header("Content-Type", "").partition(";")[0].strip().lower()
        pictures = path == "/api/score" and self.server.explorer.model is not None
        if kind not in (TYPES if pictures else ("application/json",)):
            known = " or ".join(TYPES) if pictures else "application/json"
            raise Refused(415, f"the content type must be {known}")
        body = self._body(MOST_BYTES if pictures else most_bytes(self.server.explorer.dim))
        # Not before all has arrived: a client that sends slowly would keep the others out.
        with self.server.worker.place():
            if pictures:
                return "application/json", self.server.worker(lambda: _json(self._scored(body, kind)))
            fields = parse(body)
            return "application/json", self.server.worker(lambda: _json(action(fields)))

    def _actions(self) -> Mapping[str, Callable[[Fields], dict[str, Any]]]:
        explorer = self.server.explorer
        return {
            "/api/sample": explorer.sample,
            "/api/walk": explorer.walk,
            "/api/score": explorer.score,
            "/api/tilt": explorer.tilt,
        }

    def _scored(self, body: bytes, kind: str) -> dict[str, Any]:
        explorer = self.server.explorer
        assert explorer.image_shape is not None
        return explorer.score_image(read_picture(body, kind, explorer.image_shape))

    def _path(self) -> str:
        """The path asked for, if the request may have come from our own page or a program of the user."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self.server.is_ours(hosts[0].strip()):
            raise Refused(421, "the Host header does not name this server")
        path = self.path.partition("?")[0]
        if path != "/":
            own = f"http://{hosts[0].strip().lower()}"
            foreign = self._header("Origin", own).rstrip("/").lower() != own
            if foreign or self._header("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
                raise Refused(403, "requests from other sites are refused")
        return path

    def _header(self, name: str, default: str) -> str:
        values = self.headers.get_all(name) or [default]
        if len(values) > 1:
            raise Refused(400, f"the header {name} must be given once")
        return str(values[0])

    def _body(self, most: int) -> bytes:
        lengths = self.headers.get_all("Content-Length") or []
        if "Transfer-Encoding" in self.headers or len(lengths) != 1:
            raise Refused(411, "give the length of the body, once, in Content-Length")
        if not (lengths[0].isascii() and lengths[0].isdigit()) or len(lengths[0]) > 18:
            raise Refused(400, "Content-Length is not a number")
        length = int(lengths[0])
        if length > most:
            raise Refused(413, f"the body has {length:,} bytes; {most:,} are the most")
        body = self.server.bodies.read(self.rfile, length)
        if len(body) < length:
            raise Refused(400, "the body ended early")
        return body

    def _answer(self, work: Callable[[], tuple[str, bytes]]) -> None:
        try:
            kind, body = work()
            self._send(200, kind, body)
        except Refused as refused:
            self._send(refused.status, "application/json", _json({"error": refused.message}), refused.headers)
        except TimeoutError:
            self._send(408, "application/json", _json({"error": "the request took too long to arrive"}))
        except ConnectionError:
            pass
        except LatentPriorError as error:
            self._send(400, "application/json", _json({"error": str(error)}))
        except Exception:
            traceback.print_exc()
            self._send(500, "application/json", _json({"error": "a defect: the terminal of the server says more"}))

    def _send(self, status: int, kind: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.settimeout(ANSWER_SECONDS)
            self.send_response(status)
            everything = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close"}
            for name, value in {**everything, **HEADERS, **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is not even HTTP, or of an unknown method, as every other error."""
        if code == HTTPStatus.NOT_IMPLEMENTED:
            code, message = 405, "GET and POST are the methods known here"
        said = message or HTTPStatus(code).phrase
        self._send(code, "application/json", _json({"error": said}), {"Allow": "GET, POST"} if code == 405 else None)

    def version_string(self) -> str:
        """Name in the header ``Server``: no versions."""
        return "latentprior"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the terminal quiet."""


class _Timed(io.RawIOBase):
    """Bytes of a socket until a deadline, after which reading raises ``TimeoutError``."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection, self._end = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


def _page(files: tuple[str, ...]) -> bytes:
    root = resources.files(__package__.rpartition(".")[0])
    return b"".join((root / name).read_bytes() for name in files)


def _json(found: Mapping[str, Any]) -> bytes:
    return json.dumps(found, allow_nan=False).encode()
