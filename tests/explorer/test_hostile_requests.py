"""Bytes that no browser sends: each is answered with 4xx in one line, or closed, in silence, and the server goes on."""

import contextlib
import io
import itertools
import json
import pickle
import random
import resource
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("uvicorn")
HOST = b"Host: localhost"
TYPE = b"Content-Type: application/json"
ASK = b'{"n": 1}'
LENGTH = b"Content-Length: %d" % len(ASK)


def talk(server, data, wait=10.0, end=True):
    """Everything that comes back for these bytes until the server closes; a hang is a ``TimeoutError``."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as connection:
        connection.sendall(data)
        if end:
            connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def request(*lines, start=b"POST /api/sample HTTP/1.1", body=ASK):
    return b"\r\n".join([start, *lines, b"", body])


def ask(*lines, start=b"POST /api/sample HTTP/1.1", body=ASK):
    """A request that would be answered, but for further lines."""
    return request(HOST, TYPE, *lines, start=start, body=body)


def upload(body, path=b"/api/score", kind=b"image/png"):
    lines = (HOST, b"Content-Type: " + kind, b"Content-Length: %d" % len(body))
    return request(*lines, start=b"POST " + path + b" HTTP/1.1", body=body)


def status_of(answer):
    """Status of an answer that is whole, and the only one on its connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    assert first.startswith(b"HTTP/1.1 "), answer[:80]
    headers = dict(line.lower().split(b": ", 1) for line in lines)
    assert headers[b"connection"] == b"close"
    assert headers[b"x-content-type-options"] == b"nosniff"
    assert int(headers[b"content-length"]) == len(body), answer[:80]
    return int(first.split()[1])


def refused(server, data, *statuses, **options):
    """The message of an answer with one of these statuses."""
    answer = talk(server, data, **options)
    assert status_of(answer) in statuses, answer
    (pair,) = json.loads(answer.partition(b"\r\n\r\n")[2]).items()
    assert pair[0] == "error"
    assert 0 < len(pair[1]) < 200
    assert "\n" not in pair[1]
    return pair[1]


@pytest.fixture(autouse=True)
def silent_and_alive(model_server, capfd):
    """Whatever came, nothing is written to the terminal and the next request is answered."""
    yield
    assert status_of(talk(model_server, ask(LENGTH))) == 200
    assert capfd.readouterr() == ("", "")


def test_the_requests_below_are_answered_before_they_are_spoilt(model_server):
    assert status_of(talk(model_server, ask(LENGTH))) == 200
    assert status_of(talk(model_server, ask(LENGTH).replace(b"\r\n", b"\n"))) == 200
    assert status_of(talk(model_server, ask(LENGTH).replace(b"HTTP/1.1", b"HTTP/1.0"))) == 200
    assert status_of(talk(model_server, ask(LENGTH, b"X: \xff\xfe"))) == 200
    assert status_of(talk(model_server, ask(LENGTH, b"X: " + b"y" * 30_000))) == 200


LINES = [
    b"GET /", b"GET / HTTP/0.9", b"GET / HTTP/2.0", b"GET / HTTP/1.", b"GET / HTTP/1.1.1", b"GET / HTTP/1.10",
    b"GET / HTTP/1.\xb2", b"GET / http/1.1", b"GET / HTTX/1.1", b"GET / x HTTP/1.1", b"GET  / HTTP/1.1",
    b" GET / HTTP/1.1", b"GET / HTTP/1.1 ", b"GET\t/\tHTTP/1.1", b"GET\xa0/\xa0HTTP/1.1", b"GET\x0c/\x85HTTP/1.1",
    b"G\0T / HTTP/1.1", b"GET /\0 HTTP/1.1", b"GET /\xff HTTP/1.1", b"G(T / HTTP/1.1", b"/ HTTP/1.1", b"GET", b"",
    b"GET / HTTP/1.1\rHost: localhost", b"PRI * HTTP/2.0", b"\x16\x03\x01\x02\0\x01", b"GET / HTTP/" + b"1" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=lambda line: repr(line[:30]))
def test_first_lines(model_server, line):
    """HTTP/0.9 too: its answers have no headers, which keep the page from being framed."""
    refused(model_server, request(HOST, start=line, body=b""), 400)


@pytest.mark.parametrize("method", [b"get", b"PUT", b"OPTIONS", b"CONNECT", b"TRACE", b"_get", b"A" * 60_000])
def test_methods(model_server, method):
    refused(model_server, request(HOST, start=method + b" / HTTP/1.1", body=b""), 405)
    refused(model_server, request(HOST, start=method + b" * HTTP/1.1", body=b""), 405)


def test_a_head_without_a_body(model_server):
    head, _, body = talk(model_server, request(HOST, start=b"HEAD / HTTP/1.1", body=b"")).partition(b"\r\n\r\n")
    assert head.split()[1] == b"405"
    assert body == b""


PATHS = [
    "/../../etc/passwd", "/..%2f..%2fetc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%252f..%252fetc/passwd",
    "/..%c0%af..%c0%afetc/passwd", "/%u002e%u002e/etc/passwd", "/..\\..\\etc\\passwd", "/..%5c..%5cetc%5cpasswd",
    "/....//....//etc/passwd", "//etc/passwd", "/./script.js", "/script.js%00.html", "/script.js/",
    "/%73cript.js", "/script.js;x", "/api/info#x", "/API/info", "file:///etc/passwd", "http://evil.example/",
    "http://localhost/api/info", "*", "etc/passwd", "/explorer/page/index.html", "/api/sample/../info",
    "/" + "%2e%2e/" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:30])
def test_paths(model_server, path):
    assert "nothing of this name" in refused(model_server, ask(LENGTH, start=f"POST {path} HTTP/1.1".encode()), 404)
    refused(model_server, request(HOST, start=f"GET {path} HTTP/1.1".encode(), body=b""), 404)


def test_a_path_that_is_too_long(model_server):
    refused(model_server, request(HOST, start=b"GET /" + b"a" * 70_000 + b" HTTP/1.1", body=b""), 400, 431)


HEADS = [
    b"no colon", b"Spaced : x", b"Bad name: x", b": x", b"X: a\0b", b"X: a\rContent-Length: 1", b"\xff: x",
    b" Folded: x", b"X(: x", b"Transfer-Encoding : chunked", b"\x0bX: y",
]  # fmt: skip


@pytest.mark.parametrize("line", HEADS, ids=repr)
def test_header_lines(model_server, line):
    """Where a line is read as another's end or as the head's, what follows it would go unseen."""
    refused(model_server, ask(LENGTH, line), 400)
    refused(model_server, ask(LENGTH, line, b"Origin: http://evil.example"), 400)
    refused(model_server, request(line, HOST, TYPE, LENGTH), 400)


@pytest.mark.parametrize("line", [b"X: a\r\n folded", b"X: a\r\n\tfolded"], ids=repr)
def test_folded_lines_hide_nothing(model_server, line):
    """A folded line goes on with the value before it (RFC 9112, section 5.2), and what follows is seen."""
    assert status_of(talk(model_server, ask(LENGTH, line))) == 200
    refused(model_server, ask(LENGTH, line, b"Origin: http://evil.example"), 403)
    refused(model_server, ask(LENGTH, b"Origin: http://localhost\r\n .evil.example"), 403)
    refused(model_server, request(HOST + b"\r\n .evil.example", TYPE, LENGTH), 421)
    refused(model_server, ask(LENGTH + b"\r\n 0"), 400)


def test_header_floods(model_server):
    refused(model_server, ask(LENGTH, *[b"X: y"] * 200), 431)
    # Where the end of the head has not come with the rest of it, h11 refuses it, by 400.
    refused(model_server, ask(LENGTH, b"X: " + b"y" * 65_000, b"X: " + b"y" * 1000), 400, 431)
    refused(model_server, ask(LENGTH, b"X" * 70_000), 400, 431)
    # Five megabytes, no line of which is too long.
    refused(model_server, ask(LENGTH, *[b"X: " + b"y" * 60_000] * 90), 400, 431)


TYPES = [
    b"multipart/form-data; boundary*=a; boundary*0=b", b"multipart/x; boundary*" + b"9" * 5000 + b"=x",
    b"multipart/x; boundary*=none'en'%ff", b"message/rfc822", b"message/delivery-status", b"multipart/mixed",
    b"text/plain;charset=" + b"x" * 1000, b"application/json/json", b"application", b";", b"application/x-npy",
]  # fmt: skip


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: repr(kind[:40]))
def test_content_types_that_parsers_of_mail_look_into(model_server, kind):
    refused(model_server, request(HOST, LENGTH, b"Content-Type: " + kind), 415)
    # On a request that has no body as well.
    lines = (HOST, b"Content-Type: " + kind)
    assert status_of(talk(model_server, request(*lines, start=b"GET /api/info HTTP/1.1", body=b""))) == 200


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        *(([b"Content-Length: " + n], 400) for n in (b"", b"-1", b"+8", b"8 8", b"8,9", b"0x8", b"8.0", b"\xb2")),
        *(([b"Content-Length: " + n], 400) for n in (b"1e1", b"9" * 21, b"9" * 5000, b"0" * 19)),
        *(([b"Content-Length: " + n], 413) for n in (b"9" * 18, b"9" * 20, b"1000000")),
        ([b"Content-Length: 9"], 400),
        ([LENGTH, b"content-length: 1"], 400),
        ([], 411),
        *(([LENGTH, b"Transfer-Encoding:" + x], 400) for x in (b"", b" identity", b"\tx, chunked", b" \x0bchunked")),
        ([LENGTH, b"Transfer-Encoding: chunked"], 411),
        ([b"Transfer-Encoding: chunked", LENGTH], 411),
        ([b"Transfer-Encoding: chunked"], 411),
        ([LENGTH, TYPE], 400),
        ([LENGTH, b"Origin: http://localhost", b"Origin: http://evil.example"], 400),
        ([LENGTH, b"Sec-Fetch-Site: none", b"Sec-Fetch-Site: cross-site"], 400),
    ],
    ids=repr,
)  # fmt: skip
def test_lengths_and_headers_given_twice(model_server, lines, status):
    refused(model_server, ask(*lines), status)


@pytest.mark.parametrize("lines", [[LENGTH, LENGTH], [LENGTH + b", 8"]], ids=repr)
def test_one_length_given_twice_is_one_length(model_server, lines):
    """RFC 9110, section 8.6; what comes after it is no second request."""
    second = request(HOST, start=b"GET /api/info HTTP/1.1", body=b"")
    assert status_of(talk(model_server, ask(*lines) + second)) == 200


@pytest.mark.parametrize(
    "body",
    [
        b"0\r\n\r\n",
        b"8\r\n" + ASK + b"\r\n0\r\n\r\n",
        b"-1\r\n",
        b"ffffffffffffffff\r\n",
        b"8;x=" + b"y" * 5000 + b"\r\n",
    ],
)
def test_chunks_are_not_read(model_server, body):
    refused(model_server, ask(b"Transfer-Encoding: chunked", body=body), 411)


def test_one_request_a_connection(model_server):
    """What comes after a request, or is smuggled in its body, is never answered: ``status_of`` sees one answer."""
    second = request(HOST, start=b"GET /api/info HTTP/1.1", body=b"")
    for first in (ask(LENGTH), ask(LENGTH, b"Connection: keep-alive"), ask(LENGTH, b"Connection: x, keep-alive")):
        assert status_of(talk(model_server, first + second)) == 200
    refused(model_server, ask(LENGTH, b"Transfer-Encoding: chunked", body=b"0\r\n\r\n" + second), 411)
    smuggled = request(HOST, b"Content-Length: %d" % len(second), start=b"GET /nothing HTTP/1.1", body=second)
    refused(model_server, smuggled * 20, 404)


@pytest.mark.parametrize("kept", [4, 30, 60, -len(ASK) - 2, -len(ASK), -1])
def test_requests_that_are_cut_off(model_server, kept):
    refused(model_server, ask(LENGTH)[:kept], 400)


@pytest.mark.parametrize(
    "host",
    [b"evil.example", b"[::1]evil.example", b"[::1", b"::1", b"localhost:http", b"localhost:80:80", b"localhost evil",
     b"evil@localhost", b"localhost@evil", b"localhost.evil.example", b"l\xf6calhost", b"localhost/", b"[", b"]", b":",
     b"127.1", b"2130706433", b"0x7f000001", b"0.0.0.0", b"127.0.0.1.nip.example:80", b"localhost,localhost", b"%"],
)  # fmt: skip
def test_hosts_of_other_names(model_server, host):
    """A foreign name that was made to point here is what a browser sends as Host."""
    refused(model_server, request(b"Host: " + host, TYPE, LENGTH), 421)
    refused(model_server, request(b"Host: " + host, start=b"GET / HTTP/1.1", body=b""), 421)


@pytest.mark.parametrize(
    "line",
    [b"Origin: null", b"Origin:", b"Origin: http://localhost.evil.example", b"Origin: https://localhost",
     b"Origin: http://localhost:1", b"Origin: http://localhost@evil.example", b"Origin: http://127.0.0.1",
     b"Origin: file://", b"Sec-Fetch-Site: same-site", b"Sec-Fetch-Site: cross-site", b"Sec-Fetch-Site:"],
)  # fmt: skip
def test_other_sites(model_server, line):
    assert "other sites" in refused(model_server, ask(LENGTH, line), 403)
    refused(model_server, request(HOST, line, start=b"GET /api/info HTTP/1.1", body=b""), 403)


JSONS = [
    b"[" * 4000, b'{"n":' * 800, b'{"n": ' + b"[" * 1000 + b"]" * 1000 + b"}", b'{"n": NaN}', b'{"n": -Infinity}',
    b'{"n": ' + b"9" * 4200 + b"}", b'{"n": ' + b"9" * 4400 + b"}", b'{"n": 1e400}', b'{"n": 1.0}', b'{"n": "1"}',
    b'{"n": true}', b'{"n": null}', b'{"n": 1, "n": 0}', b'{"__class__": "os.system"}', b'{"n": 1}{"n": 1}', b"1",
    b'""', b'{"\\ud800": 1}', b'{"n": "\\u0000"}', b"\xef\xbb\xbf" + ASK, ASK.decode().encode("utf-16"),
    b'{"n": 1\xff}', b"\0", b"{'n': 1}", b"{n: 1}", b'{"n": 01}', b'{"n": 0x1}', b'{"n": 1,}',
    pickle.dumps({"n": 1}), b"n=1", b"<n>1</n>",
]  # fmt: skip


@pytest.mark.parametrize("body", JSONS, ids=lambda body: repr(body[:30]))
def test_json(model_server, body):
    refused(model_server, upload(body, b"/api/sample", b"application/json"), 400)


def test_fields_at_random(model_server):
    """Any value in any field is answered or refused."""
    draws, seen = random.Random(0), set()
    values = [
        0, 1, -1, 2, 24, 10**400, 2**53, 1e6, -1e6, 1e308, 1e-320, -0.0, True, None, "", "towards", "class", "\ud800",
        [], {}, [[]], [0] * 6, [1e6] * 6, [-1e6, 1e6] * 3, [1e-300] * 6, [10**400] * 6, [True] * 6, [None] * 6,
        "x" * 1000,
    ]  # fmt: skip
    whole = {
        "sample": {"n": 1, "seed": 1, "stage": 0},
        "walk": {"start": [0] * 6, "end": [1] * 6, "n": 2},
        "tilt": {"property": "brightness", "strength": 1, "n": 1},
    }
    for action, fields in itertools.islice(itertools.cycle(whole.items()), 90):
        changed = {**fields, draws.choice(list(fields)): draws.choice(values)}
        body = json.dumps(changed).encode()
        answer = talk(model_server, upload(body, f"/api/{action}".encode(), b"application/json"), wait=30)
        assert status_of(answer) in (200, 400, 413), (changed, answer)
        seen.add((action, status_of(answer)))
    assert {(action, status) for action in whole for status in (200, 400)} <= seen


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, rows, extra=b""):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg(extra=b""):
    image = pytest.importorskip("PIL.Image").new("RGB", (16, 16), (1, 2, 3))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()[:2] + extra + buffer.getvalue()[2:]


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (pickle.dumps([1]), b"image/png", 400),
        (npy(np.array([{}], dtype=object)), b"image/png", 400),
        (npy(np.zeros((8, 8), np.uint8)), b"image/jpeg", 400),
        (png(8, 8, bytes(72)), b"image/jpeg", 400),
        (png(8, 8, bytes(72)), b"image/svg+xml", 415),
        (png(8, 8, bytes(72)), b"application/octet-stream", 415),
        (b'--x\r\nContent-Disposition: form-data; name="f"\r\n\r\n', b"multipart/form-data; boundary=x", 415),
        (b"--x" * 100_000, b"multipart/form-data; boundary=" + b"x" * 70, 415),
        # Pillow warns of the first and refuses the second.
        (png(10_000, 10_000, bytes(100)), b"image/png", 413),
        (png(60_000, 60_000, bytes(100)), b"image/png", 413),
        (png(1 << 31, 1, bytes(100)), b"image/png", 413),
        (bytes((8 << 20) + 1), b"image/png", 413),
    ],
    ids=["pickle", "objects", "npy", "png", "svg", "bytes", "form", "boundaries", "bomb", "larger", "widest", "long"],
)
def test_uploads(model_server, body, kind, status):
    pytest.importorskip("PIL")
    refused(model_server, upload(body, kind=kind), status)


def test_pictures_that_pillow_warns_of(model_server):
    """A warning would be an error here, as in every test; elsewhere it would go to the terminal."""
    exif = b"II*\0\x08\0\0\0\xff\xff" + bytes(range(40))
    pictures = [(png(8, 8, bytes(72), chunk(b"eXIf", exif)), b"image/png")]
    for marker, data in ((b"\xff\xe1", b"Exif\0\0" + exif), (b"\xff\xe2", b"MPF\0" + exif)):
        pictures.append((jpeg(marker + struct.pack(">H", len(data) + 2) + data), b"image/jpeg"))
    for body, kind in pictures:
        assert status_of(talk(model_server, upload(body, kind=kind))) == 200


def test_damaged_pictures(model_server):
    draws, seen = random.Random(0), set()
    seeds = ((png(8, 8, bytes(72)), b"image/png"), (jpeg(), b"image/jpeg"))
    for body, kind in itertools.islice(itertools.cycle(seeds), 120):
        damaged = bytearray(body)
        for _ in range(draws.choice((1, 2, 8))):
            damaged[draws.randrange(len(damaged))] = draws.randrange(256)
        status = status_of(talk(model_server, upload(bytes(damaged[: draws.choice((None, None, -9))]), kind=kind)))
        assert status in (200, 400, 413)
        seen.add(status)
    assert {200, 400} <= seen


def drip(connection):
    """Send a byte now and then until the server closes; what it says meanwhile."""
    connection.settimeout(0.05)
    answer = b""
    with connection, contextlib.suppress(ConnectionError):
        while True:
            try:
                block = connection.recv(4096)
            except TimeoutError:
                connection.sendall(b"G")
                continue
            if not block:
                break
            answer += block
    return answer


@pytest.mark.parametrize("steady", [False, True])
def test_slow_clients(model_server, monkeypatch, steady):
    """A part of a request, and then nothing or a byte at a time: closed at the deadline, or told so."""
    monkeypatch.setattr("latentprior.explorer.guard.REQUEST_SECONDS", 0.6)
    whole = request(HOST, TYPE, b"Content-Length: 4000")
    slow = [socket.create_connection(("127.0.0.1", model_server.port), timeout=60) for _ in range(6)]
    ends = [0, 5, 40, len(whole) - len(ASK), len(whole) - 4, len(whole)]
    for connection, end in zip(slow, ends, strict=True):
        connection.sendall(whole[:end])
    with ThreadPoolExecutor(len(slow)) as pool:
        read = drip if steady else lambda connection: b"".join(iter(lambda: connection.recv(4096), b""))
        for answer, end in zip(pool.map(read, slow), ends, strict=True):
            assert answer == b"" if end < len(whole) - len(ASK) else status_of(answer) == 408
    for connection in slow:
        connection.close()


def test_clients_that_leave_at_once(model_server):
    """Reset connections, before and amid a request and before its answer."""
    for end in (0, 10, 100, None):
        for _ in range(5):
            connection = socket.create_connection(("127.0.0.1", model_server.port), timeout=10)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(ask(LENGTH)[:end])
            connection.close()


def resident():
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads what Linux says of memory")
def test_nothing_is_left_behind(model_server):
    """Threads end and memory stays where it was after hundreds of bad requests."""
    bad = [
        b"GET /", ask(LENGTH, b"X: a\0b"), ask(LENGTH)[:60], request(b"Host: evil", TYPE, LENGTH),
        ask(LENGTH, *[b"X: y"] * 200), upload(b"[" * 4000, b"/api/sample", b"application/json"), upload(bytes(1 << 20)),
    ]  # fmt: skip
    for data in bad * 3:
        talk(model_server, data)
    threads, grown = threading.active_count(), []
    for _ in range(3):
        before = resident()
        for data in bad * 50:
            talk(model_server, data)
        grown.append(resident() - before)
    # The uploads alone are 50 MiB a round; an allocator may keep a part of the first one's for the next.
    assert min(grown) < 10 << 20
    late = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < late:
        time.sleep(0.05)
    assert threading.active_count() <= threads
