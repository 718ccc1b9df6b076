"""The server against friends and foes: every answer is JSON or the page, none is a 500."""

import asyncio
import base64
import contextlib
import gc
import http.client
import json
import os
import pickle
import re
import socket
import struct
import threading
import zlib
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from latentprior.explorer.requests import Refused
from latentprior.explorer.work import Bodies, Worker

pytest.importorskip("uvicorn")
from uvicorn.server import ServerState

from latentprior.explorer.guard import Protocol, is_loopback, is_ours


def call(server, method, path, body=None, headers=None, kind="application/json"):
    """Status, headers, body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    given = {} if body is None else {"Content-Type": kind}
    if isinstance(body, (dict, list)):
        body = json.dumps(body).encode()
    try:
        connection.request(method, path, body, {**given, **(headers or {})})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def refused(server, status, *args, **options):
    """The message of an answer that must have this status."""
    found, headers, body = call(server, *args, **options)
    assert found == status, body
    assert headers["Content-Type"] == "application/json"
    (message,) = json.loads(body).items()
    assert message[0] == "error"
    return message[1]


def raw(server, data, wait=10.0):
    """Everything that comes back for these bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        parts = []
        while block := connection.recv(1 << 16):
            parts.append(block)
    return b"".join(parts)


def resident(name):
    """Bytes that the kernel counts for this process under a name: ``VmRSS`` now, ``VmHWM`` at most."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)[1]) << 10


RESET = Path("/proc/self/clear_refs")


@contextlib.contextmanager
def most_memory(extra):
    """Fail where memory rises above what it is now by more than ``extra`` bytes, for however short a while."""
    if not os.access(RESET, os.W_OK):
        # The peak is forgotten on Linux alone; elsewhere only the answers are judged.
        yield
        return
    gc.collect()
    # A peak from before would hide any below it.
    RESET.write_text("5")
    before = resident("VmRSS")
    assert resident("VmHWM") < before + (8 << 20)
    yield
    assert resident("VmHWM") - before < extra


@pytest.mark.skipif(not os.access(RESET, os.W_OK), reason="the peak of memory can be forgotten on Linux alone")
def test_the_guard_of_memory_sees_a_short_rise_below_an_old_peak():
    del (old := [bytearray(b"1") * (300 << 20)])[:]
    with most_memory(100 << 20):
        bytearray(b"1") * (50 << 20)
    with pytest.raises(AssertionError), most_memory(100 << 20):
        bytearray(b"1") * (150 << 20)
    assert not old


def png(width, height, rows=None):
    """A grey PNG whose header names a size, and rows of its own."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + bytes(width) for _ in range(height)) if rows is None else rows
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_page_and_its_headers(model_server):
    for path, kind in (("/", "text/html"), ("/script.js", "text/javascript"), ("/style.css?x=1", "text/css")):
        status, headers, body = call(model_server, "GET", path)
        assert status == 200
        assert headers["Content-Type"].startswith(kind)
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert "Python" not in headers["Server"]
        assert int(headers["Content-Length"]) == len(body) > 500


def test_info_says_what_can_be_asked(model_server, prior_server):
    found, points = (json.loads(call(server, "GET", "/api/info")[2]) for server in (model_server, prior_server))
    assert found["kind"] == "model"
    assert found["image_shape"] == [1, 8, 8]
    assert found["classes"] == list(range(10))
    assert set(found["tilts"]) == {"towards", "brightness", "class"}
    assert points["kind"] == "prior"
    assert set(points["tilts"]) == {"towards"}
    assert len(points["points"]) == 400


def test_every_action_answers(model_server, prior_server):
    pytest.importorskip("PIL")
    for server, shown in ((model_server, "image"), (prior_server, "point")):
        status, _, body = call(server, "POST", "/api/sample", {"n": 4, "seed": 1, "stage": 0})
        assert status == 200
        items = json.loads(body)["items"]
        assert [set(item) for item in items] == [{"z", "log_prob", shown}] * 4
        walk = {"start": items[0]["z"], "end": items[1]["z"], "n": 3}
        assert call(server, "POST", "/api/walk", walk)[0] == 200
        tilt = {"property": "towards", "z": items[0]["z"], "strength": 1, "n": 2}
        assert call(server, "POST", "/api/tilt", tilt)[0] == 200
    status, _, body = call(prior_server, "POST", "/api/score", {"z": items[0]["z"]})
    assert status == 200
    assert 0 < json.loads(body)["p_value"] <= 1
    picture = base64.b64decode(json.loads(body_of(model_server))["items"][0]["image"].partition(",")[2])
    status, _, body = call(model_server, "POST", "/api/score", picture, kind="image/png")
    assert status == 200
    assert json.loads(body)["reconstruction"].startswith("data:image/png")


def body_of(server):
    return call(server, "POST", "/api/sample", {"n": 1})[2]


@pytest.mark.parametrize(
    "path",
    [
        "/../pyproject.toml", "/..%2f..%2fetc/passwd", "//etc/passwd", "/script.js/../../server.py", "/%00", "/api/",
        "/page/index.html", "/explorer/server.py", "/static", "/" + "a" * 3000,
    ],
)  # fmt: skip
def test_no_path_leads_to_a_file(model_server, path):
    assert refused(model_server, 404, "GET", path)
    assert refused(model_server, 404, "POST", path, {})


def test_wrong_methods(model_server):
    assert "POST" in refused(model_server, 405, "GET", "/api/sample")
    assert "GET" in refused(model_server, 405, "POST", "/api/info", {})
    for method in ("PUT", "DELETE", "OPTIONS", "TRACE", "BREW"):
        refused(model_server, 405, method, "/")
    assert call(model_server, "HEAD", "/")[0] == 405


BAD = {
    "sample": [
        {"n": 0}, {"n": 65}, {"n": -1}, {"n": 10**30}, {"n": 1.5}, {"n": "4"}, {"n": True}, {"n": [4]}, {"n": {}},
        {"seed": -1}, {"seed": 2**53}, {"seed": 0.5}, {"stage": 99}, {"stage": -1}, {"stage": None, "x": 1},
        {"path": "/etc"},
    ],
    "walk": [
        {}, {"start": [0] * 6}, {"start": [0, 0], "end": [0] * 6}, {"start": "abc", "end": [0] * 6},
        {"start": [0, 0, 0, 0, 0, "0"], "end": [0] * 6}, {"start": [0, 0, 0, 0, 0, True], "end": [0] * 6},
        {"start": [0, 0, 0, 0, 0, 1e7], "end": [0] * 6}, {"start": [0, 0, 0, 0, 0, 10**400], "end": [0] * 6},
        {"start": [0] * 6, "end": [0] * 6, "n": 25}, {"start": [0, 0, 0, 0, 0, None], "end": [0] * 6},
        {"start": [[0], 0, 0, 0, 0, 0], "end": [0] * 6},
    ],
    "tilt": [
        {}, {"property": "brightness"}, {"property": "no", "strength": 1}, {"property": ["class"], "strength": 1},
        {"property": "brightness", "strength": 5.1}, {"property": "brightness", "strength": "1"},
        {"property": "class", "strength": 1}, {"property": "class", "strength": 1, "class": 10},
        {"property": "towards", "strength": 1}, {"property": "towards", "strength": -1, "z": [0] * 6},
        {"property": "brightness", "strength": 1, "n": 65},
    ],
}  # fmt: skip


@pytest.mark.parametrize(("action", "body"), [(action, body) for action, bodies in BAD.items() for body in bodies])
def test_wrong_fields(model_server, action, body):
    assert refused(model_server, 400, "POST", f"/api/{action}", body)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"n"', b"\xff\xfe", b'{"seed": NaN}', b'{"seed": Infinity}', b'{"seed": -Infinity}',
        b'{"seed": 1e999}', b"[" * 3000, b'{"a":' * 600, b'{"seed": ' + b"9" * 4000 + b"}", b"n=4",
        pickle.dumps({"n": 4}), b"\0" * 100,
    ],
    ids=lambda body: repr(body[:16]),
)  # fmt: skip
def test_what_is_not_json_of_finite_numbers(model_server, body):
    refused(model_server, 400, "POST", "/api/sample", body)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_latents_are_finite(prior_server, number):
    refused(prior_server, 400, "POST", "/api/score", f'{{"z": [0, 0, 0, 0, 0, {number}]}}'.encode())


def test_extreme_latents_are_answered(model_server, prior_server):
    far = [1e6, -1e6] * 3
    assert call(prior_server, "POST", "/api/score", {"z": far})[0] == 200
    for server in (model_server, prior_server):
        assert call(server, "POST", "/api/walk", {"start": far, "end": [0] * 6})[0] == 200
    tilt = {"property": "towards", "z": far, "strength": 5}
    assert "too far" in refused(prior_server, 400, "POST", "/api/tilt", tilt)


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded", "application/octet-stream"])
def test_content_types_that_any_page_can_send(model_server, kind):
    refused(model_server, 415, "POST", "/api/sample", {"n": 1}, kind=kind)
    refused(model_server, 415, "POST", "/api/score", png(8, 8), kind=kind)


def test_lengths(model_server):
    large = b" " * (64 << 10)
    assert "bytes" in refused(model_server, 413, "POST", "/api/sample", large)
    refused(model_server, 413, "POST", "/api/score", bytes((8 << 20) + 1), kind="image/png")
    start = b"POST /api/sample HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for lines, status in (
        (b"Content-Length: -1", b"400"),
        (b"Content-Length: 1_0", b"400"),
        (b"Content-Length: " + b"9" * 30, b"400"),
        (b"Content-Length: 999999999999", b"413"),
        (b"Content-Length: 2\r\nContent-Length: 1", b"400"),
        (b"Transfer-Encoding: chunked", b"411"),
        (b"X: y", b"411"),
        (b"Content-Length: 50", b"400"),
    ):
        answer = raw(model_server, start + lines + b"\r\n\r\n{}")
        assert answer.split()[1] == status, (lines, answer)
        assert b'{"error": ' in answer


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"A" * 70000, b"GET / HTTP/9.9\r\n\r\n", b"\0\0\0\0\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", b"GET / HTTP/1.1\r\nX: " + b"y" * 70000, b"GET /\r\n", b"",
        b"GET / HTTP/1.1\r\n\r\n", b"POST /api/sample HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    ],
    ids=lambda data: repr(data[:16]),
)  # fmt: skip
def test_what_is_not_http(model_server, data, capfd):
    answer = raw(model_server, data)
    assert b" 200 " not in answer.split(b"\n")[0]
    assert b" 500 " not in answer.split(b"\n")[0]
    assert call(model_server, "GET", "/api/info")[0] == 200
    assert capfd.readouterr().err == ""


PICTURES = {
    "bomb": (png(60000, 60000, b"\0" * 1000), 413),
    "large": (png(4200, 4200, b"\0" * 1000), 413),
    "truncated": (png(8, 8)[:-30], 400),
    "short": (png(100, 100, b"\0" * 5), 400),
    "text": (b"<svg onload=alert(1)>", 400),
    "pickle": (pickle.dumps({"z": [1, 2, 3]}), 400),
    "empty": (b"", 400),
    "gif": (b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", 400),
    "nothing": (png(0, 0), 400),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_harm(model_server, name, capfd):
    pytest.importorskip("PIL")
    body, status = PICTURES[name]
    refused(model_server, status, "POST", "/api/score", body, kind="image/png")
    assert capfd.readouterr().err == ""


def test_a_picture_is_what_its_type_says(model_server):
    pytest.importorskip("PIL")
    assert call(model_server, "POST", "/api/score", png(9, 8), kind="image/png")[0] == 200
    refused(model_server, 400, "POST", "/api/score", png(9, 8), kind="image/jpeg")


def test_a_compressed_bomb_of_text_is_refused(model_server):
    """A chunk of text that would open to 200 MB."""
    pytest.importorskip("PIL")
    text = b"Comment\0\0" + zlib.compress(bytes(200 << 20), 9)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    picture = png(8, 8)
    with most_memory(100 << 20):
        refused(model_server, 400, "POST", "/api/score", picture[:33] + chunk + picture[33:], kind="image/png")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "8.8.8.8", "", "[::2]"]
)
def test_names_that_are_not_ours(model_server, host):
    for path in ("/", "/api/info"):
        refused(model_server, 421, "GET", path, headers={"Host": host})
    refused(model_server, 421, "POST", "/api/sample", {"n": 1}, headers={"Host": host})


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1:1", "[::1]:80", "127.0.0.9"])
def test_names_that_are(model_server, host):
    assert call(model_server, "GET", "/api/info", headers={"Host": host})[0] == 200


def test_other_sites_are_refused(model_server):
    own = f"http://localhost:{model_server.port}"
    host = {"Host": own.removeprefix("http://")}
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        refused(model_server, 403, "POST", "/api/sample", {"n": 1}, headers={**host, **headers})
        refused(model_server, 403, "GET", "/api/info", headers={**host, **headers})
    assert call(model_server, "POST", "/api/sample", {"n": 1}, headers={**host, "Origin": own})[0] == 200
    # A link to the page itself may stand anywhere.
    assert call(model_server, "GET", "/", headers={**host, "Sec-Fetch-Site": "cross-site"})[0] == 200


def test_hosts_of_a_server_that_is_open(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "Box")
    assert all(is_ours(host, "0.0.0.0") for host in ("192.168.0.7:7860", "localhost", "box:80", "[fe80::1]:1"))
    assert not any(is_ours(host, "0.0.0.0") for host in ("evil.example", "", "box.evil.example:80"))
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("example.org")


def test_two_hundred_at_once(model_server, monkeypatch):
    """All are answered, with 200 or 503, in bounded memory."""
    pytest.importorskip("PIL")
    # Slow machines need not send 350 MiB within 20 seconds.
    monkeypatch.setattr("latentprior.explorer.guard.REQUEST_SECONDS", 300.0)
    answers, gate = [], threading.Barrier(200)
    upload = png(8, 8) + bytes(7 << 20)

    def one(i):
        gate.wait()
        if i % 4 == 0:
            got = call(model_server, "POST", "/api/score", upload, kind="image/png")
        elif i % 4 == 1:
            got = call(model_server, "POST", "/api/sample", {"n": 64, "seed": i})
        elif i % 4 == 2:
            got = call(model_server, "POST", "/api/tilt", {"property": "brightness", "strength": 2, "seed": i})
        else:
            got = call(model_server, "GET", "/api/info")
        answers.append((i, got))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(200)]
    # 50 uploads of 7 MiB at once take 490 MiB where nothing bounds them, since each is copied when it has arrived.
    # 16 places hold 112 MiB at most, and what arrives 64; answers and what malloc keeps come on top. 163 were seen.
    with most_memory(370 << 20):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 200
    counts = {}
    for i, (status, headers, _) in answers:
        counts.setdefault(i % 4 == 3, []).append(status)
        if status == 503:
            assert int(headers["Retry-After"]) > 0
    # What needs no model is never sent away.
    assert set(counts[True]) == {200}
    assert set(counts[False]) == {200, 503}
    assert call(model_server, "POST", "/api/sample", {"n": 1})[0] == 200


def test_slow_clients_hold_nobody_up(model_server):
    """More of them than there are places for the model, each with a part of its head or body: others are answered."""
    head = b"POST /api/%b HTTP/1.1\r\nHost: localhost\r\nContent-Type: %b\r\nContent-Length: 4000\r\n\r\n "
    kinds = ((b"sample", b"application/json"), (b"score", b"image/png"))
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", model_server.port)
        slow = [stack.enter_context(socket.create_connection(address, timeout=20)) for _ in range(60)]
        for i, connection in enumerate(slow):
            connection.sendall((head % kinds[i % 2])[: 30 if i % 3 == 0 else None])
        for _ in range(5):
            assert call(model_server, "POST", "/api/sample", {"n": 1})[0] == 200
            assert call(model_server, "GET", "/api/info")[0] == 200
            for connection in slow:
                connection.sendall(b" ")


def test_an_answer_that_nobody_reads_is_given_up(model_server, monkeypatch):
    monkeypatch.setattr("latentprior.explorer.guard.ANSWER_SECONDS", 0.0)

    async def run():
        given_up = asyncio.Event()
        transport = Mock(get_extra_info=lambda name: None, is_closing=lambda: True, abort=given_up.set)
        protocol = Protocol(model_server._uvicorn.config, ServerState(), {})
        protocol.connection_made(transport)
        protocol.on_response_complete()
        await asyncio.wait_for(given_up.wait(), 60)

    asyncio.run(run())


def test_bodies_that_stop_before_their_end_hold_bounded_memory():
    """The one that began first is dropped, so the next is read."""

    async def blocks(queue):
        while block := await queue.get():
            yield block
        yield b""

    async def run():
        bodies, queues = Bodies(100), [asyncio.Queue() for _ in range(3)]
        tasks = [asyncio.create_task(bodies.read(blocks(queue))) for queue in queues]
        for queue, size, held in zip(queues, (60, 30, 64), (60, 90, 94), strict=True):
            queue.put_nowait(bytes(size))
            for _ in range(10):
                await asyncio.sleep(0)
            assert sum(map(len, bodies._arriving.values())) == held
        for i, size in ((2, 0), (1, 34)):
            queues[i].put_nowait(bytes(size))
            queues[i].put_nowait(b"")
            assert len(await tasks[i]) == 64
        queues[0].put_nowait(bytes(4))
        with pytest.raises(Refused, match="busy"):
            await tasks[0]
        assert not bodies._arriving

    asyncio.run(run())


def test_a_defect_is_not_shown_to_the_client(prior_explorer, served, monkeypatch, capfd):
    server = served(prior_explorer)
    monkeypatch.setattr(type(prior_explorer), "sample", lambda *_: 1 / 0)
    assert "ZeroDivision" not in refused(server, 500, "POST", "/api/sample", {"n": 1})
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_worker_refuses_what_waits_too_long():
    worker, free = Worker(places=1, seconds=0.05), threading.Event()

    async def run():
        slow = asyncio.create_task(worker.run(free.wait))
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="busy"):
            await worker.run(free.wait)
        with pytest.raises(Refused, match="no result within"):
            await slow
        free.set()

    asyncio.run(run())
    worker.close()


def test_worker_keeps_no_gradients():
    worker = Worker()
    assert asyncio.run(worker.run(torch.is_grad_enabled)) is False
    worker.close()
