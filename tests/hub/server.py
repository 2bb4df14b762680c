"""A Hub in memory: the part of the Hub's HTTP protocol that its client needs to push and pull models."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


@dataclass(frozen=True)
class File:
    """A file of a commit. Large files are stored apart from the repository (LFS), and have another kind of hash."""

    data: bytes
    large: bool = False

    @property
    def oid(self) -> str:
        if self.large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    def described(self, path: str) -> dict[str, Any]:
        about = {"type": "file", "path": path, "oid": self.oid, "size": len(self.data)}
        return about | {"lfs": {"oid": self.oid, "size": len(self.data), "pointerSize": 130}} if self.large else about


@dataclass(frozen=True)
class Commit:
    """A state of a repository: path -> file."""

    oid: str
    files: dict[str, File]
    parent: str | None
    title: str
    author: str


@dataclass
class Repo:
    """A model repository: its commits, and the refs that point to them, such as `refs/heads/main`."""

    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    _numbers: itertools.count = field(default_factory=itertools.count)

    def commit(self, ref: str, files: dict[str, File], title: str, author: str) -> Commit:
        parent = self.refs.get(ref)
        oid = hashlib.sha1(f"{self.name} {next(self._numbers)}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, files, parent, title, author)
        self.refs[ref] = oid
        return self.commits[oid]

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a full reference or a hash."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if revision in self.commits:
            return self.commits[revision]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits, from the last to the first."""
        commits = [self.at(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits


class HubError(Exception):
    """An answer that the client turns into an exception of a class that `code` selects."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, {"X-Error-Message": message, **(headers or {})}
        if code is not None:
            self.headers["X-Error-Code"] = code


class ConnectionCut(Exception):
    """The answer breaks off in its middle, though its header announces all of it."""


class LocalHub:
    """
    Repositories of models, served at `url` inside a `with` block. Large files have another address, as on the Hub.

    Args:
        users (`dict[str, list[str]]`): user name -> organisations. A user's token is `hf_` and the name.

    `before_request(method, path)` is called before the answer to every request, and may raise [`HubError`] or
    [`ConnectionCut`]. `ranges` are the requested parts of large files.
    """

    def __init__(self, users: dict[str, list[str]]) -> None:
        self.users = users
        self.repos: dict[str, Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.ranges: list[str] = []
        self.before_request: Callable[[str, str], None] = lambda method, path: None

    def __enter__(self) -> LocalHub:
        self._servers = []
        for _ in range(2):
            server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
            self._servers.append(server)
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        return self

    def __exit__(self, *_: Any) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def owns(self, user: str | None, name: str) -> bool:
        """Whether `user` may write to the repository, and read it when it is private."""
        owner = name.split("/")[0]
        return user is not None and (owner == user or owner in self.users[user])

    def repo(self, name: str, user: str | None, *, write: bool = False) -> Repo:
        repo = self.repos.get(name)
        if repo is None or (repo.private and not self.owns(user, name)):
            # The answers for missing and private repositories are equal, so that they reveal nothing.
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise HubError(401, "Invalid username or password.")
        if write and not self.owns(user, name):
            raise HubError(403, f"Forbidden: you don't have write access to {name}")
        return repo


ROUTES: list[tuple[str, re.Pattern[str], Callable]] = []


def route(method: str, pattern: str) -> Callable[[Callable], Callable]:
    """Makes the decorated method answer requests for paths like `pattern`, with its named groups as arguments."""

    def register(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


NAME = r"(?P<name>[^/]+/[^/]+)"
MODEL = f"/api/models/{NAME}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body of an answer are two writes; without this, the second waits for the first's confirmation.
    disable_nagle_algorithm = True
    hub: LocalHub

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        # The body is always read, since a rest of it would be taken for the beginning of the next request.
        self.body = self._read_body()
        self.cut = False
        try:
            try:
                self.hub.before_request(self.command, self.path)
            except ConnectionCut:
                self.cut = True
            for method, pattern, function in ROUTES:
                match = pattern.fullmatch(url.path)
                if match and method == {"HEAD": "GET"}.get(self.command, self.command):
                    function(self, **{name: value and unquote(value) for name, value in match.groupdict().items()})
                    return
            raise HubError(404, f"no such page: {self.command} {url.path}")
        except HubError as error:
            self.send(error.status, {"error": error.message}, error.headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.cut:
            self.close_connection = True
            body = body[: len(body) // 2]
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Logs no requests."""

    @property
    def user(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = header.removeprefix("Bearer hf_")
        if user not in self.hub.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def repo(self, name: str, *, write: bool = False) -> Repo:
        return self.hub.repo(name, self.user, write=write)

    @route("GET", "/api/agent-harnesses")
    def agents(self) -> None:
        self.send(200, {})

    @route("POST", "/api/repos/create")
    def create(self) -> None:
        asked = json.loads(self.body)
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        if not self.hub.owns(self.user, name):
            raise HubError(403, f"You don't have the rights to create a model under the namespace of {name}")
        # The client reads the name from `url`, even if the repository exists already.
        answer = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.repos:
            self.send(409, answer, {"X-Error-Message": "You already created this model repo"})
            return
        repo = self.hub.repos[name] = Repo(name, private=asked.get("visibility") == "private")
        repo.commit("refs/heads/main", {".gitattributes": File(b"")}, "initial commit", self.user)
        self.send(200, answer)

    # Pushing

    @route("POST", "/api/validate-yaml")
    def validate_card(self) -> None:
        header = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        try:
            yaml.safe_load(header[1] if header else "")
        except yaml.YAMLError as error:
            self.send(400, {"errors": [{"message": str(error)}], "warnings": []})
        else:
            self.send(200, {"errors": [], "warnings": []})

    @route("POST", f"{MODEL}/preupload/(?P<revision>[^/]+)")
    def choose_storage(self, name: str, revision: str) -> None:
        files = self.repo(name, write="create_pr" not in self.query).at(revision).files
        answers = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            large = path.endswith(".safetensors") or b"\0" in base64.b64decode(asked["sample"])
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": files[path].oid} if path in files else {}))
        self.send(200, {"files": answers})

    @route("POST", f"/{NAME}.git/info/lfs/objects/batch")
    def announce_large_files(self, name: str) -> None:
        self.repo(name)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.large_files:
                answer["actions"] = {"upload": {"href": f"{self.hub.storage_url}/{asked['oid']}"}}
            objects.append(answer)
        self.send(200, {"transfer": "basic", "objects": objects})

    @route("POST", f"{MODEL}/commit/(?P<revision>[^/]+)")
    def commit(self, name: str, revision: str) -> None:
        proposed = "create_pr" in self.query
        repo, user = self.repo(name, write=not proposed), self.user
        if user is None:
            raise HubError(401, "Invalid username or password.")
        with repo.lock:
            base = repo.at(revision)
            ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
            files, title = dict(base.files), ""
            for line in self.body.splitlines():
                operation = json.loads(line)
                value = operation["value"]
                if operation["key"] == "header":
                    title = value["summary"]
                    if value.get("parentCommit", base.oid) != base.oid:
                        raise HubError(412, "A commit has happened since. Please refresh and try again.")
                elif operation["key"] == "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]))
                elif operation["key"] == "lfsFile":
                    files[value["path"]] = File(self.hub.large_files[value["oid"]], large=True)
                elif operation["key"] == "deletedFile":
                    del files[value["path"]]
            answer = {}
            if proposed:
                number = 1 + sum(other.startswith("refs/pr/") for other in repo.refs)
                ref = f"refs/pr/{number}"
                repo.refs[ref] = base.oid
                answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
            oid = repo.commit(ref, files, title, user).oid
        self.send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, **answer})

    @route("POST", f"{MODEL}/branch/(?P<branch>[^/]+)")
    def create_branch(self, name: str, branch: str) -> None:
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        self._create_ref(self.repo(name, write=True), f"refs/heads/{branch}", start)

    @route("POST", f"{MODEL}/tag/(?P<revision>[^/]+)")
    def create_tag(self, name: str, revision: str) -> None:
        self._create_ref(self.repo(name, write=True), f"refs/tags/{json.loads(self.body)['tag']}", revision)

    def _create_ref(self, repo: Repo, ref: str, revision: str) -> None:
        if ref in repo.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        repo.refs[ref] = repo.at(revision).oid
        self.send(200, {})

    @route("POST", rf"{MODEL}/discussions/(?P<number>\d+)/merge")
    def merge(self, name: str, number: str) -> None:
        repo = self.repo(name, write=True)
        proposed = repo.at(f"refs/pr/{number}")
        repo.commit("refs/heads/main", proposed.files, proposed.title, str(self.user))
        self.send(200, {})

    # Pulling

    @route("GET", f"{MODEL}(?:/revision/(?P<revision>[^/]+))?")
    def about(self, name: str, revision: str | None) -> None:
        commit = self.repo(name).at(revision or "main")
        files = [{"rfilename": path} for path in sorted(commit.files)]
        self.send(200, {"id": name, "sha": commit.oid, "private": self.repo(name).private, "siblings": files})

    @route("GET", f"{MODEL}/tree/(?P<revision>[^/]+)")
    def list_files(self, name: str, revision: str) -> None:
        files = self.repo(name).at(revision).files
        self.send(200, [file.described(path) for path, file in sorted(files.items())])

    @route("GET", f"/{NAME}/resolve/(?P<revision>refs/pr/[^/]+|[^/]+)/(?P<path>.+)")
    def fetch(self, name: str, revision: str, path: str) -> None:
        commit = self.repo(name).at(revision)
        file = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.oid}
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        if file.large:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
            self.send(302, b"", {**headers, "Location": f"{self.hub.storage_url}/{file.oid}"})
        else:
            self.send(200, file.data, {**headers, "ETag": f'"{file.oid}"'})

    # Large files

    @route("PUT", r"/(?P<oid>\w{64})")
    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "the content is not what was announced")
        self.hub.large_files[oid] = self.body
        self.send(200)

    @route("GET", r"/(?P<oid>\w{64})")
    def fetch_large(self, oid: str) -> None:
        if "Authorization" in self.headers:
            raise HubError(400, "a token was sent to the storage of large files")
        data, asked = self.hub.large_files[oid], re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked is None:
            self.send(200, data)
        else:  # The client goes on at the byte at which an answer broke off.
            self.hub.ranges.append(asked[0])
            start = int(asked[1])
            self.send(206, data[start:], {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"})
