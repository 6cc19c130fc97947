"""A Hugging Face Hub in one process: enough of its HTTP interface for the real clients, kept in memory.

Repositories have commits, branches, private visibility and large files; tokens have a user and may be read-only.
"""

import base64
import fnmatch
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE_FILES = ("*.safetensors", "*.parquet", "*.bin", "*.onnx", "*.png", "*.jpg")
DATE = "2025-01-01T00:00:00.000Z"


class HttpError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


@dataclass(frozen=True)
class Blob:
    data: bytes
    large: bool

    @property
    def etag(self) -> str:
        if self.large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        lfs = {"lfs": {"oid": self.etag, "size": len(self.data), "pointerSize": 130}} if self.large else {}
        return {"type": "file", "oid": self.etag[:40], "size": len(self.data), "path": path, **lfs}


@dataclass
class Repo:
    kind: str  # "model", "dataset" or "space"
    id: str
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        sha = hashlib.sha1(f"{self.id} {len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HttpError(404, "Revision not found", "RevisionNotFound")
        return sha

    def info(self, revision: str) -> dict[str, Any]:
        sha = self.resolve(revision)
        files = self.commits[sha]
        header = re.match(rb"---\n(.*?)\n---", files["README.md"].data, re.DOTALL) if "README.md" in files else None
        card = yaml.safe_load(header[1]) if header else {}
        return {
            "id": self.id,
            "sha": sha,
            "private": self.private,
            "siblings": [{"rfilename": path} for path in sorted(files)],
            "cardData": card,
            "tags": card.get("tags", []),
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "author": self.id.split("/")[0],
            "lastModified": DATE,
            "createdAt": DATE,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
        }


class Hub(ThreadingHTTPServer):
    """Serves on a free loopback port from `start` to `stop`; `tokens` maps a token to (user, may write)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.clear()
        self.lock = threading.RLock()
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def clear(self) -> None:
        """Forgets all repositories and requests."""
        self.tokens = {"owner": ("me", True), "reader": ("me", False), "stranger": ("them", True)}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []

    def start(self) -> "Hub":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def files(self, repo_id: str, *, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[kind, repo_id]
        return {path: blob.data for path, blob in repo.commits[repo.resolve(revision)].items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Hub

    def do(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.server.requests.append(f"{self.command} {self.path}")
        try:
            with self.server.lock:
                for method, pattern, route in ROUTES:
                    match = re.fullmatch(pattern, url.path)
                    if match and self.command in method.split():
                        route(self, **{k: unquote(v) for k, v in match.groupdict(default="").items()})
                        return
            raise HttpError(404, f"No route for {self.command} {url.path}")
        except HttpError as error:
            self.reply({"error": str(error)}, status=error.status, headers=error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def reply(self, content: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def user(self, *, write: bool = False, namespace: str | None = None) -> str | None:
        """The name behind the token; None without one, where reading suffices."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.tokens:
            raise HttpError(401, "Invalid credentials in Authorization header")
        user, may_write = self.server.tokens.get(token, (None, False))
        if write and user is None:
            raise HttpError(401, "Invalid username or password.")
        if write and not (may_write and namespace == user):
            raise HttpError(403, f"You don't have the rights to write under the namespace {namespace!r}")
        return user

    def repo(self, kind: str, repo_id: str, *, write: bool = False) -> Repo:
        repo = self.server.repos.get((kind.removesuffix("s") or "model", repo_id))
        namespace = repo_id.split("/")[0]
        if repo is None or (repo.private and self.user() != namespace):
            raise HttpError(404, "Repository not found", "RepoNotFound")
        self.user(write=write, namespace=namespace)
        return repo

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise HttpError(401, "Invalid username or password.")
        role = "write" if self.server.tokens[self.headers["Authorization"].removeprefix("Bearer ")][1] else "read"
        token = {"displayName": "test", "role": role}
        self.reply({"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token", "accessToken": token}})

    def create(self) -> None:
        wanted = json.loads(self.body)
        kind = wanted.get("type", "model")
        namespace = wanted.get("organization") or self.user()
        self.user(write=True, namespace=namespace)
        repo_id = f"{namespace}/{wanted['name']}"
        url = f"{self.server.endpoint}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        exists = (kind, repo_id) in self.server.repos
        if not exists:
            private = wanted.get("visibility") == "private" or wanted.get("private") is True
            self.server.repos[kind, repo_id] = Repo(kind, repo_id, private)
        answer = {"url": url, "name": repo_id, "id": repo_id}
        self.reply(
            answer | ({"error": "You already created this repo"} if exists else {}), status=409 if exists else 200
        )

    def delete(self) -> None:
        wanted = json.loads(self.body)
        kind = wanted.get("type", "model")
        repo = self.repo(kind, f"{wanted.get('organization') or self.user()}/{wanted['name']}", write=True)
        del self.server.repos[kind, repo.id]
        self.reply({})

    def validate_yaml(self) -> None:
        header = re.match(r"---\r?\n(.*?)\r?\n---", json.loads(self.body)["content"], re.DOTALL)
        try:
            valid = header is not None and isinstance(yaml.safe_load(header[1]), dict)
        except yaml.YAMLError:
            valid = False
        errors = [] if valid else [{"message": "the card's metadata is no YAML mapping"}]
        self.reply({"errors": errors, "warnings": []}, status=200 if valid else 400)

    def info(self, kind: str, id: str, revision: str = "") -> None:
        self.reply(self.repo(kind, id).info(revision or "main"))

    def branch(self, kind: str, id: str, branch: str) -> None:
        repo = self.repo(kind, id, write=True)
        if branch in repo.branches:
            raise HttpError(409, "Reference already exists")
        repo.branches[branch] = repo.resolve(json.loads(self.body or b"{}").get("startingPoint", "main"))
        self.reply({})

    def tree(self, kind: str, id: str, revision: str, path: str = "") -> None:
        repo = self.repo(kind, id)
        files = repo.commits[repo.resolve(revision)]
        prefix = f"{path}/" if path else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = _listing(files, prefix, recursive=recursive)
        if path and not entries:
            raise HttpError(404, f"{path} does not exist", "EntryNotFound")
        self.reply(entries)

    def preupload(self, kind: str, id: str, revision: str) -> None:
        repo = self.repo(kind, id, write=True)
        there = repo.commits[repo.resolve(revision)]
        answers = []
        for file in json.loads(self.body)["files"]:
            large = any(fnmatch.fnmatch(file["path"], pattern) for pattern in LARGE_FILES)
            mode = "lfs" if large or file["size"] > 10_000_000 else "regular"
            oid = there[file["path"]].etag if file["path"] in there else None
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply({"files": answers})

    def large_batch(self, kind: str, id: str) -> None:
        self.repo(kind, id, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.server.endpoint}/large/{wanted['oid']}"}
            verify = {"href": f"{self.server.endpoint}/large-verify"}
            missing = wanted["oid"] not in self.server.large
            objects.append(wanted | ({"actions": {"upload": upload, "verify": verify}} if missing else {}))
        self.reply({"transfer": "basic", "objects": objects})

    def large_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HttpError(400, "the content does not have the hash that was announced")
        self.server.large[oid] = self.body
        self.reply(b"")

    def large_verify(self) -> None:
        wanted = json.loads(self.body)
        if len(self.server.large.get(wanted["oid"], b"")) != wanted["size"]:
            raise HttpError(400, "the object was not uploaded")
        self.reply({})

    def commit(self, kind: str, id: str, revision: str) -> None:
        repo = self.repo(kind, id, write=True)
        if revision not in repo.branches:
            raise HttpError(404, "Revision not found", "RevisionNotFound")
        files = dict(repo.commits[repo.branches[revision]])
        message = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, repo.branches[revision]):
                    raise HttpError(412, "The branch has moved since the parent commit")
            elif key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), large=False)
            elif key == "lfsFile":
                files[value["path"]] = Blob(self.server.large[value["oid"]], large=True)
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                files = {path: blob for path, blob in files.items() if not path.startswith(value["path"])}
        sha = repo.commit(revision, files, message)
        url = f"{self.server.endpoint}/{repo.id}/commit/{sha}"
        self.reply({"success": True, "commitOid": sha, "commitUrl": url, "pullRequestUrl": None})

    def resolve(self, kind: str, id: str, revision: str, path: str) -> None:
        repo = self.repo(kind, id)
        sha = repo.resolve(revision)
        blob = repo.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha}
        if blob is None:
            raise HttpError(404, f"{path} does not exist", "EntryNotFound", headers)
        headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if blob.large:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            self.reply(blob.data, headers=headers)
            return
        size = len(blob.data)
        first, last = (int(wanted[1]), int(wanted[2] or size)) if wanted[1] else (size - int(wanted[2]), size)
        if first >= size:
            raise HttpError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
        part = blob.data[first : last + 1]
        self.reply(
            part, status=206, headers=headers | {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{size}"}
        )


def _listing(files: dict[str, Blob], prefix: str, *, recursive: bool) -> list[dict[str, Any]]:
    entries, folders = [], set()
    for path, blob in files.items():
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        if recursive or len(parts) == 1:
            entries.append(blob.entry(path))
        depth = len(parts) if recursive else min(len(parts), 2)
        folders |= {prefix + "/".join(parts[:i]) for i in range(1, depth)}
    entries += [
        {"type": "directory", "oid": hashlib.sha1(f.encode()).hexdigest(), "size": 0, "path": f} for f in folders
    ]
    return sorted(entries, key=lambda entry: entry["path"])


_REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"
_FILES = r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("DELETE", r"/api/repos/delete", Handler.delete),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("GET", _REPO, Handler.info),
    ("GET", _REPO + r"/revision/(?P<revision>[^/]+)", Handler.info),
    ("POST", _REPO + r"/branch/(?P<branch>[^/]+)", Handler.branch),
    ("GET", _REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", Handler.tree),
    ("POST", _REPO + r"/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", _REPO + r"/commit/(?P<revision>[^/]+)", Handler.commit),
    ("POST", _FILES + r"\.git/info/lfs/objects/batch", Handler.large_batch),
    ("PUT", r"/large/(?P<oid>[0-9a-f]+)", Handler.large_upload),
    ("POST", r"/large-verify", Handler.large_verify),
    ("GET HEAD", _FILES + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
