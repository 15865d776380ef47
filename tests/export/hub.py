"""A stand-in for the hub's API on this machine: it makes repositories and takes commits, and remembers them."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

OWNER_TOKEN = "hf_" + "t" * 20  # of nobody


class Hub:
    """What was sent, by repository.

    Attributes:
        created: Bodies of the requests that made repositories.
        files: Contents by path, of the repository's last state.
        messages: Of the commits.
        agents: What the client says it is, request by request.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.created, self.files, self.messages, self.agents = [], {}, [], []


@contextmanager
def standing_in(monkeypatch):
    """The hub's client talks to this machine within this context."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for key in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.hub.url)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.hub.url)
    template = f"{server.hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        _, _, path = self.path.partition("/resolve/main/")
        content = self.server.hub.files.get(path)
        found = {"ETag": '"1"', "X-Repo-Commit": "0" * 40} if content is not None else {"X-Error-Code": "EntryNotFound"}
        self._reply(200 if content is not None else 404, b"", found, length=len(content or b""))

    def do_GET(self):
        self._reply(404, b"{}", {})

    def do_POST(self):
        hub, body = self.server.hub, self.rfile.read(int(self.headers["Content-Length"]))
        hub.agents.append(self.headers["User-Agent"])
        if self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {OWNER_TOKEN}":
            self._reply(401, b'{"error": "Invalid credentials"}', {})
        elif self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self._json({"url": f"{hub.url}/me/digits"})
        elif "/preupload/" in self.path:
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for each in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.messages.append(value["summary"])
                elif line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
            self._json({"commitUrl": f"{hub.url}/me/digits/commit/{'1' * 40}", "commitOid": "1" * 40})
        else:
            self._reply(404, b"{}", {})

    def _json(self, value):
        self._reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _reply(self, status, content, headers, length=None):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content) if length is None else length)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass
