"""The Hugging Face hub on this machine: as much of its HTTP interface as pushing and loading a folder takes."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_tests"

Files = dict[str, bytes]


@dataclass
class Repository:
    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Files, branch: str, message: str) -> str:
        digest = hashlib.sha1(repr((len(self.commits), sorted(files), message)).encode()).hexdigest()
        self.commits[digest] = files
        self.branches[branch] = digest
        self.messages.append(message)
        return digest

    def at(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)

    @property
    def files(self) -> Files:
        return self.commits[self.branches["main"]]


@dataclass
class FakeHub:
    repositories: dict[str, Repository] = field(default_factory=dict)
    downloads: list[str] = field(default_factory=list)
    url: str = ""

    def add(self, name: str, files: Files, private: bool = False) -> Repository:
        made = self.repositories[name] = Repository(private)
        made.commit(files, "main", "first")
        return made


@contextlib.contextmanager
def serve() -> Iterator[FakeHub]:
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            try:
                found = self._route(path, body)
            except _Refused as refused:
                self._send(refused.status, json.dumps({"error": refused.code}).encode(), {"X-Error-Code": refused.code})
                return
            if isinstance(found, tuple):
                blob, commit = found
                etag = hashlib.sha1(blob).hexdigest()
                self._send(200, blob, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
            else:
                self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

        do_GET = do_HEAD = do_POST = _answer

        def _send(self, status: int, blob: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(blob)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(blob)

        def _known(self, name: str, write: bool = False) -> Repository:
            allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            repository = hub.repositories.get(name)
            if repository is None or (repository.private and not allowed):
                raise _Refused(404 if allowed else 401, "RepoNotFound")
            if write and not allowed:
                raise _Refused(403, "Forbidden")
            return repository

        def _route(self, path: str, body: bytes) -> Any:
            if path == "/api/validate-yaml":
                return {}
            if path == "/api/repos/create":
                return self._create(json.loads(body))
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
                self._known(found[1], write=True)
                files = json.loads(body)["files"]
                return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
                repository = self._known(found[1], write=True)
                repository.branches.setdefault(found[2], repository.branches["main"])
                return {}
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
                return self._commit(found[1], found[2], [json.loads(line) for line in body.splitlines()])
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
                repository = self._known(found[1])
                files = repository.commits[self._revision(repository, found[2])]
                return [{"type": "file", "path": k, "size": len(v), "oid": "0" * 40} for k, v in files.items()]
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                repository = self._known(found[1])
                commit = self._revision(repository, found[2] or "main")
                siblings = [{"rfilename": name} for name in repository.commits[commit]]
                return {"id": found[1], "sha": commit, "siblings": siblings}
            if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                repository = self._known(found[1])
                commit = self._revision(repository, found[2])
                if found[3] not in repository.commits[commit]:
                    raise _Refused(404, "EntryNotFound")
                if self.command == "GET":
                    hub.downloads.append(found[3])
                return repository.commits[commit][found[3]], commit
            raise _Refused(404, "no such address")

        def _revision(self, repository: Repository, revision: str) -> str:
            commit = repository.at(revision)
            if commit is None:
                raise _Refused(404, "RevisionNotFound")
            return commit

        def _create(self, wanted: dict[str, Any]) -> Any:
            name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise _Refused(401, "Unauthorized")
            if name not in hub.repositories:
                private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
                hub.add(name, {".gitattributes": b""}, private)
            return {"url": f"{hub.url}/{name}"}

        def _commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> Any:
            repository = self._known(name, write=True)
            files = dict(repository.commits[self._revision(repository, branch)])
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            request = "refs/pr/1" if "create_pr=1" in self.path else branch
            oid = repository.commit(files, request, lines[0]["value"]["summary"])
            url = f"{hub.url}/{name}"
            return {"commitUrl": f"{url}/commit/{oid}", "commitOid": oid, "pullRequestUrl": f"{url}/discussions/1"}

    return Handler
