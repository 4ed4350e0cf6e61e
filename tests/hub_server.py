"""A stand-in for the Hugging Face hub: the part of its protocol that huggingface_hub speaks to push and to load.

Repositories of models with branches and commits, tokens with rights, large files by git-lfs. It takes one file a commit
or all, as the hub does, and refuses what the hub refuses, by the same status and error codes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import yaml

LICENCES = ("apache-2.0", "mit", "cc-by-4.0", "other")
Files = dict[str, bytes]


@dataclass
class Repository:
    """One repository: branches -> their commits, oldest first, each an oid and the files as they are then."""

    private: bool
    branches: dict[str, list[tuple[str, Files]]] = field(default_factory=lambda: {"main": []})
    messages: list[str] = field(default_factory=list)

    def at(self, revision: str) -> tuple[str, Files] | None:
        """The commit that a branch's or a commit's name stands for."""
        if revision in self.branches:
            return (self.branches[revision] or [("0" * 40, {})])[-1]
        every = [commit for commits in self.branches.values() for commit in commits]
        return next((commit for commit in every if commit[0] == revision), None)


class Hub:
    """What is there, who may do what, and what is out of order.

    ``tokens``: token -> what ``whoami`` says. ``broken``: the first words of paths -> the status that they answer with.
    ``asked``: method and path of every request, in order.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: Files = {}
        self.broken: dict[str, int] = {}
        self.asked: list[str] = []
        self.tokens = {
            "hf_write": person("ada", "write", "lovelace-lab"),
            "hf_read": person("ada", "read"),
        }

    def files(self, repository: str, revision: str = "main") -> Files:
        found = self.repositories[repository].at(revision)
        assert found is not None
        return found[1]


def person(name: str, role: str, *organisations: str) -> dict:
    return {
        "type": "user",
        "name": name,
        "orgs": [{"name": one} for one in organisations],
        "auth": {"accessToken": {"role": role}},
    }


class _RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "", **more: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.said = {"error": message, "errors": [{"message": message}], **more}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            for start, status in self.hub.broken.items():
                if path.startswith(start):
                    raise _RefusedError(status, "out of order")
            said = self._resolve(path) if "/resolve/" in path else self._api(path, body)
        except _RefusedError as refused:
            self._send(refused.status, refused.said, refused.code)
        else:
            if said is not None:
                self._send(200, said)

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, said: object, code: str = "") -> None:
        data = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", str(said))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _who(self, needed: bool = True) -> dict:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.hub.tokens and (needed or token):
            raise _RefusedError(401, "Invalid username or password.")
        return self.hub.tokens.get(token, {})

    def _may_write(self, name: str) -> None:
        who = self._who()
        own = [who["name"], *(one["name"] for one in who["orgs"])]
        if name.partition("/")[0] not in own or who["auth"]["accessToken"]["role"] == "read":
            raise _RefusedError(403, f"You don't have the rights to write to {name}")

    def _repository(self, name: str) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._who(needed=False)):
            raise _RefusedError(404 if self._who(needed=False) else 401, "Repository not found", "RepoNotFound")
        return found

    def _resolve(self, path: str) -> None:
        name, _, rest = path.strip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        commit = self._repository(name).at(revision)
        if commit is None:
            raise _RefusedError(404, "Invalid rev id", "RevisionNotFound")
        if file not in commit[1]:
            raise _RefusedError(404, "Entry not found", "EntryNotFound")
        data = commit[1][file]
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit[0])
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _api(self, path: str, body: bytes) -> object:
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            return self._who()
        if path == "/api/validate-yaml":
            return _validated(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            self._may_write(f"{parts[0]}/{parts[1].removesuffix('.git')}")
            return self._batch(json.loads(body)["objects"])
        if parts[0] == "large":
            if hashlib.sha256(body).hexdigest() != parts[1]:
                raise _RefusedError(400, "other bytes than those announced")
            self.hub.large[parts[1]] = body
            return {}
        if parts[:2] == ["api", "models"] and len(parts) == 6:
            return self._model("/".join(parts[2:4]), parts[4], parts[5], body)
        raise _RefusedError(404, f"this stand-in does not know {path}")

    def _create(self, asked: dict) -> object:
        name = f"{asked['organization']}/{asked['name']}"
        self._may_write(name)
        if name in self.hub.repositories:
            raise _RefusedError(409, "You already created this model repo", url=f"{self._self}/{name}")
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(bool(private))
        return {"url": f"{self._self}/{name}"}

    @property
    def _self(self) -> str:
        return f"http://{self.headers['Host']}"

    def _batch(self, objects: list[dict]) -> object:
        actions = [
            {**one, "actions": {"upload": {"href": f"{self._self}/large/{one['oid']}"}}}
            if one["oid"] not in self.hub.large
            else one
            for one in objects
        ]
        return {"transfer": "basic", "objects": actions}

    def _model(self, name: str, verb: str, revision: str, body: bytes) -> object:
        repository = self._repository(name)
        if verb == "revision":
            return {"id": name, "sha": (repository.at(revision) or ("",))[0]}
        self._may_write(name)
        if verb == "branch":
            if revision in repository.branches:
                raise _RefusedError(409, f"Reference already exists: {revision}")
            repository.branches[revision] = list(repository.branches["main"])
            return {}
        if revision not in repository.branches:
            raise _RefusedError(404, "Invalid rev id", "RevisionNotFound")
        if verb == "preupload":
            asked = json.loads(body)["files"]
            return {"files": [_preupload(one["path"], (repository.at(revision) or ("", {}))[1]) for one in asked]}
        assert verb == "commit", verb
        return self._commit(name, repository, revision, [json.loads(line) for line in body.splitlines()])

    def _commit(self, name: str, repository: Repository, revision: str, lines: list[dict]) -> object:
        before = repository.branches[revision]
        files = dict(before[-1][1]) if before else {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                assert line["key"] == "deletedFile", line
                del files[value["path"]]
        oid = hashlib.sha1(repr((len(before), revision, sorted(files.items()))).encode()).hexdigest()
        before.append((oid, files))
        return {"success": True, "commitOid": oid, "commitUrl": f"{self._self}/{name}/commit/{oid}"}


def _preupload(path: str, there: Files) -> dict:
    """How a file goes up, as the .gitattributes say that the hub makes, and the checksum of the one that is there."""
    large = path.endswith((".safetensors", ".pt", ".bin"))
    told = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
    if path not in there:
        return told
    data = there[path]
    blob = b"blob %d\0" % len(data) + data
    return {**told, "oid": hashlib.sha256(data).hexdigest() if large else hashlib.sha1(blob).hexdigest()}


def _validated(content: str) -> object:
    head = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else None
    wrong = []
    if head is not None and not isinstance(head, dict):
        wrong = ["the head is no mapping"]
    elif head and head.get("license", "other") not in LICENCES:
        wrong = [f'"license" must be one of {LICENCES}']
    if wrong:
        raise _RefusedError(400, *wrong)
    return {"errors": [], "warnings": []}


@contextmanager
def serving(monkeypatch, folder: Path) -> Iterator[Hub]:
    """The hub, with nobody logged in, for all that huggingface_hub does meanwhile; its cache is below ``folder``."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    endpoint = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name in ("HF_HUB_OFFLINE", "FS_PLUGINS_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    changed = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(folder / "hub-cache"),
        "HF_TOKEN_PATH": str(folder / "token"),
        "HF_STORED_TOKENS_PATH": str(folder / "tokens"),
        "HF_HUB_DISABLE_XET": True,  # that is another protocol, of which this is no stand-in
    }
    for name, value in changed.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    _fresh_sessions()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        _fresh_sessions()


def _fresh_sessions() -> None:
    """Sessions that were made offline stay so."""
    from huggingface_hub import utils

    if hasattr(utils, "reset_sessions"):  # huggingface_hub 0
        utils.reset_sessions()
