"""A local stand-in for the Hugging Face Hub: the HTTP requests that huggingface_hub makes to write a model repository,
and to read a dataset.

Spoken: model info with blobs, repository creation, metadata validation, preupload, Git LFS (batch, upload, verify) and
commits. Not spoken: Xet, which the client would take for large files where it is not told otherwise.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from ruamel.yaml import YAML

TOKEN = "hf_notASecretButMustNotBeSeen"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: list[str] = field(default_factory=lambda: ["initial commit"])
    card: dict[str, Any] = field(default_factory=dict)
    """Header of a dataset's README.md."""

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


@dataclass
class Hub:
    """What the server holds, and what it was asked."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Git LFS: sha256 -> bytes."""
    requests: list[str] = field(default_factory=list)
    """``METHOD path``, in order."""
    lost: set[str] = field(default_factory=set)
    """Files of datasets that are not served, though they are listed."""
    refusal: tuple[int, dict[str, str]] | None = None
    """Status and headers of the answer to every request that writes."""

    def writes(self) -> list[str]:
        return [line for line in self.requests if not line.startswith("GET")]


def is_lfs(name: str) -> bool:
    return name.endswith(".safetensors")


def sibling(name: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return {"rfilename": name, "size": len(data), "blobId": blob} | ({"lfs": lfs} if is_lfs(name) else {})


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: Any = None, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        for name, value in ((headers or {}) | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def is_known(self) -> bool:
        """Every request but the upload to a signed address carries the token."""
        if self.headers.get("Authorization") == f"Bearer {TOKEN}" or self.path.startswith("/lfs/"):
            return True
        self.answer(401, {"error": "Invalid credentials in Authorization header"})
        return False

    def do_GET(self) -> None:
        self.hub.requests.append(f"GET {self.path}")
        if "/datasets/" in self.path:
            return self.read()
        name = re.sub(r"^/api/models/|\?.*$", "", self.path)
        if not self.is_known():
            return
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        siblings = [sibling(*item) for item in repository.files.items()]
        self.answer(200, {"id": name, "sha": repository.sha, "private": repository.private, "siblings": siblings})

    def read(self) -> None:
        """A dataset's info, tree or file; its name in ``Hub.repositories`` starts with ``datasets/``."""
        info = re.fullmatch(r"/api/(datasets/[^/]+/[^/?]+)(?:/(?:revision|tree)/([^/?]+))?(?:\?.*)?", self.path)
        file = re.fullmatch(r"/(datasets/[^/]+/[^/]+)/resolve/([^/]+)/([^?]+)", self.path)
        name, revision = (info or file).groups()[:2] if info or file else ("", None)
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if revision not in (None, "main", repository.sha):
            return self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        if file:
            return self.send_file(repository, file[3])
        siblings = [sibling(*item) for item in repository.files.items()]
        if "/tree/" in self.path:
            rows = [{"path": each["rfilename"], "size": each["size"], "oid": each["blobId"]} for each in siblings]
            return self.answer(200, [{"type": "file"} | row for row in rows])
        fields = {"id": name.removeprefix("datasets/"), "sha": repository.sha, "private": False, "siblings": siblings}
        self.answer(200, fields | {"cardData": repository.card})

    def send_file(self, repository: Repository, name: str) -> None:
        if name in self.hub.lost:
            return self.answer(404, {"error": "no such entry"}, {"X-Error-Code": "EntryNotFound"})
        data = repository.files[unquote(name)]
        start = int((re.search(r"bytes=(\d+)-", self.headers.get("Range", "")) or ["", "0"])[1])
        self.send_response(206 if start else 200)
        for header, value in {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": repository.sha,
            "Accept-Ranges": "bytes",
            "Content-Length": str(len(data) - start),
            **({"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}),
        }.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[start:])

    def do_HEAD(self) -> None:
        self.hub.requests.append(f"HEAD {self.path}")
        self.read()

    def do_PUT(self) -> None:
        self.hub.requests.append(f"PUT {self.path}")
        data = self.body()
        oid = self.path.removeprefix("/lfs/")
        if hashlib.sha256(data).hexdigest() != oid:
            return self.answer(400, {"error": "another file than announced"})
        self.hub.objects[oid] = data
        self.answer(200)

    def do_POST(self) -> None:
        self.hub.requests.append(f"POST {self.path}")
        data = self.body()
        if not self.is_known():
            return
        if self.hub.refusal:
            status, headers = self.hub.refusal
            said = f"You sent {self.headers['Authorization']}, and that is not enough."
            return self.answer(status, {"error": said}, headers)
        for pattern, act in (
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", self.validate),
            (r"/api/models/(.+)/preupload/main", self.preupload),
            (r"/api/models/(.+)/commit/main", self.commit),
            (r"/(.+)\.git/info/lfs/objects/batch", self.batch),
            (r"/lfs/verify", self.verify),
        ):
            if match := re.fullmatch(pattern, self.path):
                return act(data, *match.groups())
        self.answer(404, {"error": f"nothing at {self.path}"})

    def create(self, data: bytes) -> None:
        asked = json.loads(data)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            return self.answer(409, {"error": "You already created this model repo"})
        self.hub.repositories[name] = Repository(asked["visibility"] == "private")
        self.answer(200, {"url": f"{self.hub.endpoint}/{name}", "name": name})

    def validate(self, data: bytes) -> None:
        fields = YAML(typ="safe", pure=True).load(json.loads(data)["content"].split("---\n")[1])
        wrong = [name for name in ("tags", "widget") if not isinstance(fields.get(name), list)]
        if fields.get("license") == "proprietary" or wrong:
            return self.answer(400, {"errors": [{"message": f'"license" or {wrong} is none of the Hub'}]})
        warnings = [] if "license" in fields else [{"message": "empty or missing license"}]
        self.answer(200, {"errors": [], "warnings": warnings})

    def preupload(self, data: bytes, name: str) -> None:
        there = self.hub.repositories[name].files
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_lfs(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": sibling("x", there[file["path"]])["blobId"] if file["path"] in there else None,
            }
            for file in json.loads(data)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, data: bytes, name: str) -> None:
        def actions(oid: str) -> dict[str, Any]:
            if oid in self.hub.objects:
                return {}
            upload, verify = f"{self.hub.endpoint}/lfs/{oid}", f"{self.hub.endpoint}/lfs/verify"
            return {"actions": {"upload": {"href": upload}, "verify": {"href": verify}}}

        objects = [known | actions(known["oid"]) for known in json.loads(data)["objects"]]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def verify(self, data: bytes) -> None:
        asked = json.loads(data)
        known = self.hub.objects.get(asked["oid"], b"")
        self.answer(200 if len(known) == asked["size"] else 404)

    def commit(self, data: bytes, name: str) -> None:
        repository = self.hub.repositories[name]
        header, *rows = (json.loads(line) for line in data.splitlines())
        if header["value"].get("parentCommit") not in (None, repository.sha):
            return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        for row in rows:
            value = row["value"]
            if row["key"] == "deletedFile":
                del repository.files[value["path"]]
            elif row["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                repository.files[value["path"]] = base64.b64decode(value["content"])
        repository.commits.append(header["value"]["summary"])
        self.answer(200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/main", "commitOid": repository.sha})


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfOneHub", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
