"""A stand-in for the Hub's HTTP API on loopback: it accepts one model repository."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What the stand-in has received."""

    url: str
    refuse: bool = False
    repositories: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    token: str | None = None


@contextmanager
def hub(*, refuse: bool = False) -> Iterator[Hub]:
    """Serve the calls of `HfApi.create_repo` and `HfApi.upload_folder` until the block ends."""
    state = Hub(url="", refuse=refuse)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            state.calls.append(self.path)
            state.token = self.headers.get("Authorization")
            if state.refuse:
                return self._answer(403, {"error": "no write access"})
            if self.path == "/api/repos/create":
                given = json.loads(body)
                name = f"{given['organization']}/{given['name']}"
                state.repositories.append(name)
                return self._answer(200, {"url": f"{state.url}/{name}"})
            if self.path == "/api/validate-yaml":
                return self._answer(200, {"errors": [], "warnings": []})
            kind = self.path.split("/")[5]
            if kind == "preupload":
                names = [file["path"] for file in json.loads(body)["files"]]
                rows = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
                return self._answer(200, {"files": rows})
            for line in body.decode().splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    state.files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            repository = "/".join(self.path.split("/")[3:5])
            address = f"{state.url}/{repository}/commit/{'a' * 40}"
            answer = {"commitUrl": address, "commitOid": "a" * 40}
            return self._answer(200, {"success": True, **answer})

        def _answer(self, code: int, values: dict[str, Any]) -> None:
            data = json.dumps(values).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *values: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
