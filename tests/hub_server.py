"""A Hugging Face Hub in a thread: as much of its HTTP API as the real `huggingface_hub` client uses without Xet.

    with HubServer() as hub:
        subprocess.run(command, env=os.environ | hub.environment(home))
        hub.repos["user/name"].files["config.json"]

Repositories hold one branch, main, and keep every commit. Files from `LARGE` bytes on go the way of Git LFS, and are
downloaded by a redirect, as on the real one. Everything but reading needs the token.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_ThisIsTheTokenOfTheTests00000000"
USER = "user"
LARGE = 1 << 16
NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Commit:
    """A commit: `files` is everything that the repository held after it."""

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """A repository's commits, the oldest first."""

    commits: list[Commit] = field(default_factory=list)

    def add(self, message: str, files: dict[str, bytes]) -> Commit:
        """A new commit that leaves the repository with these files."""
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, files))
        return self.commits[-1]

    @property
    def files(self) -> dict[str, bytes]:
        """What main holds."""
        return self.commits[-1].files

    def at(self, revision: str) -> Commit | None:
        """The commit of a branch or id."""
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid == revision), None)


class HubServer:
    """The server. Entered, it listens on `url`, and on `storage`: large files lie on another host, as on the real one.

    Attributes:
        repos: name -> repository.
        requests: (method, path, whether with the token) of each request so far.
        failures: (method, pattern of the path) -> status to answer with instead.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, bool]] = []
        self.failures: dict[tuple[str, str], int] = {}
        self.lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        # Other names: a client follows redirects within a host while it asks for a file's metadata.
        self.url, self.storage = (
            f"http://{host}:{server.server_address[1]}"
            for host, server in zip(("127.0.0.1", "localhost"), self._servers, strict=True)
        )
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables under which a new process talks to this server only, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN": TOKEN,
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }


class _Handler(BaseHTTPRequestHandler):
    """Routes a request to the method that `ROUTES` names."""

    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def _route(self) -> None:
        hub, path = self.server_hub, unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        hub.requests.append((self.command, path, authorized))
        for (method, pattern), status in hub.failures.items():
            if method == self.command and re.search(pattern, path):
                return self._json({"error": f"status {status} on purpose"}, status)
        for method, pattern, handler, public in ROUTES:
            if self.command in method.split() and (match := re.fullmatch(pattern, path)):
                if not (public or authorized):
                    return self._error(401, "Invalid credentials in Authorization header")
                with hub.lock:
                    return getattr(self, handler)(**match.groupdict())
        return self._error(404, f"no such route: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = _route

    # Answers ----------------------------------------------------------------------------------------------------

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _error(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._json({"error": message}, status, headers)

    def _found(self, repo: str, revision: str) -> Commit | None:
        """A commit; after None the error is sent."""
        if repo not in self.server_hub.repos:
            self._error(404, "Repository not found", "RepoNotFound")
            return None
        if (commit := self.server_hub.repos[repo].at(revision)) is None:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # Writing ----------------------------------------------------------------------------------------------------

    def _whoami(self) -> None:
        self._json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        taken = name in self.server_hub.repos
        if not taken:
            repo = self.server_hub.repos.setdefault(name, Repo())
            repo.add("initial commit", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        answer = {"url": f"{self.server_hub.url}/{name}", "name": name, "id": name}
        self._json(answer | ({"error": "You already created this model repo"} if taken else {}), 409 if taken else 200)

    def _validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        try:
            valid = not content.startswith("---\n") or isinstance(yaml.safe_load(content.split("---\n")[1]), dict)
        except yaml.YAMLError:
            valid = False
        errors = [] if valid else [{"message": "the metadata is no mapping"}]
        self._json({"errors": errors, "warnings": []}, 200 if valid else 400)

    def _preupload(self, repo: str, revision: str) -> None:
        if (commit := self._found(repo, revision)) is None:
            return
        answer = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            mode = "lfs" if asked["size"] >= LARGE or path.endswith(".safetensors") else "regular"
            oid = {"oid": _oid(path, commit.files[path])} if path in commit.files else {}
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | oid)
        self._json({"files": answer, "commitOid": commit.oid})

    def _lfs_batch(self, repo: str) -> None:
        if self._found(repo, "main") is None:
            return
        objects = []
        hosts = {"upload": self.server_hub.storage, "verify": self.server_hub.url}
        for asked in json.loads(self.body)["objects"]:
            oid = asked["oid"]
            new = oid not in self.server_hub.large
            actions = {name: {"href": f"{url}/lfs/{name}/{oid}"} for name, url in hosts.items()}
            objects.append(asked | ({"actions": actions} if new else {}))
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "the content isn't that of its SHA-256")
        self.server_hub.large[oid] = self.body
        return self._send(b"")

    def _lfs_verify(self, oid: str) -> None:
        size = len(self.server_hub.large.get(oid, b""))
        self._json({}, 200 if size == json.loads(self.body)["size"] else 422)

    def _commit(self, repo: str, revision: str) -> None:
        if (before := self._found(repo, revision)) is None:
            return
        files, message = dict(before.files), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server_hub.large[value["oid"]]
            else:
                return self._error(400, f"unknown operation {entry['key']}")
        oid = self.server_hub.repos[repo].add(message, files).oid
        url = f"{self.server_hub.url}/{repo}/commit/{oid}"
        return self._json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    # Reading ----------------------------------------------------------------------------------------------------

    def _info(self, repo: str) -> None:
        if commit := self._found(repo, "main"):
            siblings = [{"rfilename": path} for path in sorted(commit.files)]
            self._json({"id": repo, "modelId": repo, "sha": commit.oid, "private": False, "siblings": siblings})

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        if (commit := self._found(repo, revision)) is None:
            return
        commit_header = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", **commit_header}
            return self._json({"error": "Entry not found"}, 404, headers)
        content = commit.files[path]
        oid = _oid(path, content)
        if not _is_large(path, content):
            return self._send(content, 200, {"ETag": f'"{oid}"', **commit_header})
        linked = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        location = {"Location": f"{self.server_hub.storage}/lfs/download/{oid}"}
        self.server_hub.large[oid] = content
        return self._send(b"", 302, {**linked, **location, **commit_header})

    def _lfs_download(self, oid: str) -> None:
        content = self.server_hub.large[oid]
        self._send(content, 200, {"ETag": f'"{oid}"'})


def _is_large(path: str, content: bytes) -> bool:
    return len(content) >= LARGE or path.endswith(".safetensors")


def _oid(path: str, content: bytes) -> str:
    """What the Hub knows a file by: SHA-256 of a large one, Git's blob id of others."""
    if _is_large(path, content):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# Methods, path, handler, and whether it goes without the token.
ROUTES = (
    ("GET", r"/api/whoami-v2", "_whoami", False),
    ("POST", r"/api/repos/create", "_create", False),
    ("POST", r"/api/validate-yaml", "_validate_yaml", True),
    ("POST", rf"/api/models/{NAME}/preupload/(?P<revision>[^/]+)", "_preupload", False),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", "_lfs_batch", False),
    ("PUT", r"/lfs/upload/(?P<oid>\w+)", "_lfs_upload", True),
    ("POST", r"/lfs/verify/(?P<oid>\w+)", "_lfs_verify", False),
    ("POST", rf"/api/models/{NAME}/commit/(?P<revision>[^/]+)", "_commit", False),
    ("GET", rf"/api/models/{NAME}", "_info", True),
    ("GET HEAD", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "_resolve", True),
    ("GET HEAD", r"/lfs/download/(?P<oid>\w+)", "_lfs_download", True),
)
