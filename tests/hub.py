"""A small hub on the loopback, with the routes of the Hugging Face hub that huggingface_hub uses to read a model.

huggingface_hub reads its settings when it is imported: what asks this hub runs in a process of its own, see `run`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


class Hub:
    """Serves folders as repositories: `repositories["owner/name"] = folder`.

    `requests` are the paths asked for. Of a file from a hub that `is_slow` the second half never comes; one that
    `drips` sends a byte now and then; one that `is_silent` answers nothing. `etag` and `commit_id` replace the true
    ones.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Path] = {}
        self.requests: list[str] = []
        self.is_slow = False
        self.drips = False
        self.is_silent = False
        self.etag = ""
        self.commit_id = ""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                path = unquote(urlparse(self.path).path)
                hub.requests.append(path)
                if hub.is_silent:
                    hub.closed.wait()
                status, headers, data = hub.respond(path)
                begin = 0
                if (wanted := self.headers.get("Range")) and status == 200:
                    begin = int(wanted.removeprefix("bytes=").split("-")[0])
                    status, headers["Content-Range"] = 206, f"bytes {begin}-{len(data) - 1}/{len(data)}"
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data) - begin))
                self.end_headers()
                if body:
                    with contextlib.suppress(ConnectionError):  # who asked has gone
                        self.send(headers, data, begin)

            def send(self, headers: dict[str, str], data: bytes, begin: int) -> None:
                if hub.is_slow and "ETag" in headers:
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    hub.closed.wait()
                    return
                while hub.drips and "ETag" in headers and not hub.closed.wait(0.05):
                    self.wfile.write(data[:1])
                self.wfile.write(data[begin:])

        self.closed = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()

    def commit(self, name: str) -> str:
        return self.commit_id or hashlib.sha1(name.encode()).hexdigest()

    def respond(self, path: str) -> tuple[int, dict[str, str], bytes]:
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self.model("/".join(parts[2:4]), parts[4:])
        name = "/".join(parts[:2])
        if name not in self.repositories or parts[2:3] != ["resolve"]:
            return self.missing("RepoNotFound")
        file = self.repositories[name] / "/".join(parts[4:])
        if not file.is_file():
            return self.missing("EntryNotFound")
        data = file.read_bytes()
        headers = {"X-Repo-Commit": self.commit(name), "ETag": f'"{self.etag or hashlib.sha256(data).hexdigest()}"'}
        return 200, headers | {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}, data

    def model(self, name: str, rest: list[str]) -> tuple[int, dict[str, str], bytes]:
        if name not in self.repositories:
            return self.missing("RepoNotFound")
        folder = self.repositories[name]
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        kind = {"Content-Type": "application/json"}
        if rest[:1] == ["tree"]:
            sizes = [{"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "0" * 40} for f in files]
            return 200, kind, json.dumps(sizes).encode()
        info = {"id": name, "modelId": name, "sha": self.commit(name), "private": False, "tags": [], "downloads": 0}
        return 200, kind, json.dumps(info | {"siblings": [{"rfilename": file} for file in files]}).encode()

    def missing(self, code: str) -> tuple[int, dict[str, str], bytes]:
        return 404, {"X-Error-Code": code, "X-Error-Message": code, "Content-Type": "application/json"}, b"{}"


def run(code: str, hub: Hub, cache: Path, *, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """A program in a process whose hub is this one, and whose cache and current folder is `cache`."""
    process = start(code, hub, cache, offline=offline)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def start(code: str, hub: Hub, cache: Path, *, offline: bool = False) -> subprocess.Popen[str]:
    """As `run`, without waiting for its end."""
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    if offline:
        settings["HF_HUB_OFFLINE"] = "1"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | settings
    program = [sys.executable, "-c", textwrap.dedent(code)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(program, env=environment, cwd=cache, **pipes)  # type: ignore[call-overload, no-any-return]
