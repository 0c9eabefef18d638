"""A stand-in for the Hugging Face hub on the loopback address: serves folders as model repositories."""

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

REPOSITORY = r"(?P<repository>[^/]+/[^/]+)"
FILE = re.compile(rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<name>.+)")
API = re.compile(rf"/api/models/{REPOSITORY}(/(?P<kind>revision|tree)/(?P<revision>[^/]+))?")


class Request(NamedTuple):
    """What was asked of the hub."""

    method: str
    path: str
    range: str | None  # header of a download that continues
    token: str | None


@dataclass
class Hub:
    """A running hub. The tests add repositories and faults, and look at `requests`."""

    repositories: dict[str, dict[str, Path]] = field(default_factory=dict)  # {id: {commit: folder}}; the last is main
    requests: list[Request] = field(default_factory=list)
    gated: dict[str, str] = field(default_factory=dict)  # {id: the token that may read it}
    breaks: dict[str, int] = field(default_factory=dict)  # {file: bytes after which its next download breaks off}
    delays: dict[str, float] = field(default_factory=dict)  # {end of a path: seconds before it is answered}

    def __post_init__(self):
        handler = type("Handler", (Answer,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = "http://{}:{}".format(*self.server.server_address)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """From here on nothing listens at this address."""
        self.server.shutdown()
        self.server.server_close()

    def asked(self, name: str, method: str = "GET") -> list[Request]:
        """The requests for a file, in their order."""
        return [r for r in self.requests if r.method == method and r.path.endswith(f"/{name}")]


class Answer(BaseHTTPRequestHandler):
    """Answers one connection."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing on stderr."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        """Answers a request for a file or about a repository, as the hub would."""
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization")
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range"), token))
        time.sleep(next((delay for end, delay in self.hub.delays.items() if path.endswith(end)), 0))
        found = FILE.fullmatch(path) or API.fullmatch(path)
        if found is None:
            return self.reply(200 if path == "/" else 404, b"")

        # as on the hub: who may not read a repository does not learn whether it exists
        values = found.groupdict()
        repository = values["repository"]
        commits = self.hub.repositories.get(repository)
        if repository in self.hub.gated and token != f"Bearer {self.hub.gated[repository]}":
            return self.reply(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        if commits is None:
            return self.reply(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        commit = [*commits][-1] if values["revision"] in (None, "main") else values["revision"]
        if commit not in commits:
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if "name" in values:
            return self.send_file(commit, commits[commit] / values["name"])
        return self.describe(values, commit, commits[commit])

    def describe(self, values: dict[str, Any], commit: str, folder: Path) -> None:
        """Answers with a description of a repository, or with the list of its files."""
        files = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": etag(p)} for p in folder.iterdir()]
        names = [{"rfilename": file["path"]} for file in files]
        info = {"id": values["repository"], "sha": commit, "siblings": names, "private": False}
        content = json.dumps(files if values["kind"] == "tree" else info).encode()
        self.reply(200, content, {"Content-Type": "application/json"})

    def send_file(self, commit: str, path: Path) -> None:
        """Answers with a file, or the rest of it; breaks off if the test says so."""
        headers = {"X-Repo-Commit": commit}
        if not path.is_file():
            return self.reply(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        content, status = path.read_bytes(), 200
        headers |= {"ETag": f'"{etag(path)}"', "Accept-Ranges": "bytes"}
        if start := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, total = 206, len(content)
            content = content[int(start[1]) :]
            headers["Content-Range"] = f"bytes {start[1]}-{total - 1}/{total}"
        stop = self.hub.breaks.pop(path.name, None) if self.command == "GET" else None
        return self.reply(status, content, headers, stop)

    def reply(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, stop: int | None = None
    ) -> None:
        """Sends an answer; with `stop` only so many bytes of it, and then closes the connection."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:stop])
        if stop is not None:
            self.close_connection = True


def etag(path: Path) -> str:
    """What identifies the content of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
