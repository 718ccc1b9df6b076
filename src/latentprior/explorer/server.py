"""The page and its JSON over HTTP, by Starlette on uvicorn."""

from __future__ import annotations

import asyncio
import socket
import traceback
from collections.abc import Awaitable, Callable
from importlib import resources

from ..errors import LatentPriorError, MissingExtraError
from .explorer import Explorer
from .requests import Refused, max_json_bytes, parse
from .uploads import MAX_BYTES, TYPES, read_picture
from .work import Bodies, Worker

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.routing import Route
except ImportError:
    raise MissingExtraError("the explorer", "explore") from None
from .guard import HEADERS, MAX_HEAD_BYTES, Guard, Protocol, error_response, is_loopback, json_response

__all__ = ["Server", "is_loopback"]

MAX_CONNECTIONS = 256
"""Requests on more connections than this are refused."""
STOP_SECONDS = 2
"""The time that a server which stops gives to requests that it has begun to answer."""
PAGE = {
    "/": ("text/html", ("explorer/page/index.html",)),
    "/script.js": ("text/javascript", ("explorer/page/script.js",)),
    "/style.css": ("text/css", ("report/style.css", "explorer/page/style.css")),
}


class Server:
    """Serves the page of one :class:`~latentprior.explorer.explorer.Explorer`; port 0 takes a free one.

    Raises :class:`OSError` if the address cannot be listened on.
    """

    def __init__(self, explorer: Explorer, host: str = "127.0.0.1", port: int = 7860) -> None:
        self.explorer, self.host = explorer, host
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self._socket = socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)
        self.port: int = self._socket.getsockname()[1]
        self._worker = Worker()
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                Guard(_application(explorer, self._worker), host),
                loop="asyncio",
                http=Protocol,
                ws="none",
                lifespan="off",
                # What clients do wrong is not for the terminal; defects are printed by the application.
                log_config=None,
                log_level="critical",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                headers=HEADERS,
                backlog=MAX_CONNECTIONS,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=STOP_SECONDS,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            )
        )

    @property
    def url(self) -> str:
        """The address of the page."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/"

    def serve(self) -> None:
        """Answer requests until :meth:`stop` is called or, in the main thread, Ctrl-C or SIGTERM comes.

        The signal then reaches the handler that was set before.
        """
        try:
            self._uvicorn.run(sockets=[self._socket])
        finally:
            self.close()

    def stop(self) -> None:
        """Let :meth:`serve` return soon; any thread may ask for it."""
        self._uvicorn.should_exit = True

    def close(self) -> None:
        """Stop listening, and wait for what the model is computing."""
        self._socket.close()
        self._worker.close()


def _application(explorer: Explorer, worker: Worker) -> Starlette:
    routes = [Route(path, _page(kind, files), methods=["GET"]) for path, (kind, files) in PAGE.items()]
    routes.append(Route("/api/info", json_response(explorer.info), methods=["GET"]))
    action = _action(explorer, worker)
    routes += [Route(f"/api/{name}", action, methods=["POST"]) for name in ("sample", "walk", "score", "tilt")]
    app = Starlette(
        routes=routes, exception_handlers=dict.fromkeys((Refused, LatentPriorError, HTTPException, Exception), _failed)
    )
    app.router.redirect_slashes = False
    return app


def _page(kind: str, files: tuple[str, ...]) -> Response:
    root = resources.files(__package__.rpartition(".")[0])
    return Response(b"".join((root / name).read_bytes() for name in files), media_type=kind)


def _action(explorer: Explorer, worker: Worker) -> Callable[[Request], Awaitable[Response]]:
    json_bytes = max_json_bytes(explorer.dim)
    bodies = Bodies(8 * max(MAX_BYTES, json_bytes))

    async def answer(request: Request) -> Response:
        name = request.url.path.removeprefix("/api/")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        shape = explorer.image_shape if name == "score" else None
        kinds = ("application/json",) if shape is None else tuple(TYPES)
        if kind not in kinds:
            raise Refused(415, f"the content type must be {' or '.join(kinds)}")
        body = await _body(request, bodies, json_bytes if shape is None else MAX_BYTES)
        # A request waits for the model only when all of it has arrived: slow clients keep nobody out.
        if shape is not None:
            return await worker.run(lambda: json_response(explorer.score_image(read_picture(body, kind, shape))))
        fields = parse(body)
        return await worker.run(lambda: json_response(getattr(explorer, name)(fields)))

    return answer


async def _body(request: Request, bodies: Bodies, max_bytes: int) -> bytes:
    if "transfer-encoding" in request.headers or "content-length" not in request.headers:
        raise Refused(411, "give the length of the body, once, in Content-Length")
    length = int(request.headers["content-length"])
    if length > max_bytes:
        raise Refused(413, f"the body has {length:,} bytes; {max_bytes:,} are the most")
    left = request.state.deadline - asyncio.get_running_loop().time()
    try:
        body = await asyncio.wait_for(bodies.read(request.stream()), left)
    except asyncio.TimeoutError:
        raise Refused(408, "the request took too long to arrive") from None
    except ClientDisconnect:
        body = b""
    if len(body) < length:
        raise Refused(400, "the body ended early")
    return body


async def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, Refused):
        return error_response(error.status, error.message, error.headers)
    if isinstance(error, LatentPriorError):
        return error_response(400, str(error))
    if isinstance(error, HTTPException) and error.status_code == 405:
        method = "GET" if request.method == "POST" else "POST"
        return error_response(405, f"send {method} to {request.url.path}", {"Allow": method})
    if isinstance(error, HTTPException):
        return error_response(404, "there is nothing of this name")
    traceback.print_exception(error)
    return error_response(500, "a defect: the terminal of the server says more")
