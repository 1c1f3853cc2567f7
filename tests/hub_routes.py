"""What the Hub of ``hub_server.py`` holds, and the endpoints that show and change it.

``HubServer`` and the connection behind it are in ``hub_server.py``; here is no network.
"""

import base64
import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any
from urllib.parse import parse_qs, urlencode

LFS_SUFFIXES = (".bin", ".gguf", ".npz", ".onnx", ".pt", ".pth", ".safetensors")
LFS_THRESHOLD = 10 * 1024 * 1024  # bytes; anything larger is LFS, whatever its name
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()

# (method, path, what the caller must be allowed to, endpoint). {repo} is two segments of the path, {path} any number,
# all else one, which arrives quoted. "storage" stands for a signed URL of the storage host: like S3, it takes no token.
ROUTES = (
    ("GET", "/api/whoami-v2", "log in", "whoami"),
    ("POST", "/api/validate-yaml", None, "validate_yaml"),
    ("POST", "/api/repos/create", "log in", "create_repo"),
    ("GET", "/api/models/{repo}", "read", "model_info"),
    ("GET", "/api/models/{repo}/revision/{rev}", "read", "model_info"),
    ("GET", "/api/models/{repo}/refs", "read", "list_refs"),
    ("GET", "/api/models/{repo}/commits/{rev}", "read", "list_commits"),
    ("GET", "/api/models/{repo}/tree/{rev}", "read", "list_tree"),
    ("GET", "/api/models/{repo}/tree/{rev}/{path}", "read", "list_tree"),
    ("POST", "/api/models/{repo}/paths-info/{rev}", "read", "paths_info"),
    ("GET", "/{repo}/resolve/{rev}/{path}", "read", "resolve"),
    ("POST", "/api/models/{repo}/{kind}/{rev}", "write", "create_ref"),
    ("DELETE", "/api/models/{repo}/{kind}/{rev}", "write", "delete_ref"),
    ("POST", "/api/models/{repo}/preupload/{rev}", "write", "preupload"),
    ("POST", "/{repo}.git/info/lfs/objects/batch", "write", "lfs_batch"),
    ("POST", "/{repo}.git/info/lfs/objects/verify", "write", "lfs_verify"),
    ("POST", "/api/models/{repo}/commit/{rev}", "write", "commit"),
    ("PUT", "/storage/{repo}/{oid}", "storage", "store_object"),
    ("GET", "/storage/{repo}/{oid}", "storage", "fetch_object"),
)
_SEGMENTS = {"repo": "[^/]+/[^/]+?", "path": ".+", "kind": "branch|tag"}
PATTERNS = [
    re.compile(re.sub(r"{(\w+)}", lambda m: f"(?P<{m[1]}>{_SEGMENTS.get(m[1], '[^/]+')})", r[1])) for r in ROUTES
]


class File:
    """The content of a file; git holds it itself, or an LFS pointer to it."""

    def __init__(self, data: bytes, *, lfs: bool = False):
        self.data = data
        self.sha256 = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        in_git = pointer if lfs else data
        self.git_oid = hashlib.sha1(b"blob %d\0" % len(in_git) + in_git).hexdigest()
        self.etag = self.sha256 if lfs else self.git_oid  # what the client compares, and names its cached file by
        self.lfs = {"size": len(data), "pointerSize": len(pointer)} if lfs else None


@dataclass(frozen=True)
class Commit:
    """``files`` is the whole tree after the commit; ``parent`` is None for the first."""

    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, File] = field(repr=False)


@dataclass
class Repo:
    """``refs`` holds name -> commit id for each kind; ``objects`` are the LFS files received, sha256 -> bytes."""

    id: str
    private: bool
    refs: dict[str, dict[str, str]] = field(default_factory=lambda: {"branch": {}, "tag": {}})
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def find(self, revision: str) -> Commit:
        """The commit that a branch, a tag, or a commit id of at least 7 digits names."""
        oid = {**self.refs["tag"], **self.refs["branch"]}.get(revision.removeprefix("refs/heads/"), revision)
        for commit in self.commits.values():
            if len(oid) >= 7 and commit.id.startswith(oid):
                return commit
        raise Refused(404, f"Invalid rev id: {revision}", code="RevisionNotFound")

    def history(self, revision: str) -> list[Commit]:
        """The commit and its ancestors, the newest first."""
        commits = [self.find(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def add_commit(self, branch: str, files: Mapping[str, File], title: str, message: str, author: str) -> Commit:
        """Move ``branch`` to a new commit; no two commits have the same id or date."""
        parent = self.refs["branch"].get(branch)
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(1_700_000_000 + len(self.commits)))
        tree = sorted((path, file.git_oid) for path, file in files.items())
        oid = hashlib.sha1(repr((self.id, parent, title, message, author, date, tree)).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, message, author, date, files)
        self.refs["branch"][branch] = oid
        return self.commits[oid]


class Refused(Exception):
    """An error answer; ``code`` is the ``X-Error-Code`` by which the client picks its exception."""

    def __init__(self, status: int, reason: str, *, code: str | None = None, **body: Any):
        super().__init__(reason)
        self.status, self.body = status, {"error": reason, **body}
        self.headers = {"X-Error-Message": reason} | ({"X-Error-Code": code} if code else {})


class Endpoints:
    """One method an endpoint; ``ROUTES`` says when each is called, under the lock of the Hub.

    An endpoint finds the request in ``parts`` (of the path), ``query``, ``body``, ``token`` and ``repo``. It returns
    the body of the answer, sent as JSON unless it is bytes, and may set ``status`` and ``out``, the headers.
    """

    hub: Any  # the ``HubServer``
    route: str
    parts: dict[str, str]
    query: dict[str, str]
    body: bytes
    token: Any
    repo: Any
    status: int
    out: dict[str, str]

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    @property
    def found(self) -> Commit:
        return self.repo.find(self.parts.get("rev", "main"))

    def check_write(self, repo_id: str) -> None:
        if self.token.role != "write" or not self.token.owns(repo_id):
            raise Refused(403, f"{self.token.user} cannot write to {repo_id} with a token of role {self.token.role}")

    def whoami(self) -> Any:
        orgs = [{"type": "org", "name": name} for name in self.token.orgs]
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": self.token.role}}
        return {"type": "user", "name": self.token.user, "orgs": orgs, "auth": access}

    def validate_yaml(self) -> Any:
        """That the front matter of a card is there and ends; the real Hub reads the YAML too."""
        lines = self.json["content"].splitlines()
        if lines[:1] != ["---"]:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        if "---" not in lines[1:]:
            raise Refused(400, "Invalid metadata", errors=[{"message": "no closing ---"}], warnings=[])
        return {"errors": [], "warnings": []}

    def create_repo(self) -> Any:
        repo_id = f"{self.json.get('organization') or self.token.user}/{self.json['name']}"
        url = f"{self.hub.url}/{repo_id}"
        self.check_write(repo_id)
        if self.json.get("type", "model") != "model":
            raise Refused(400, f"only models are served, got {self.json['type']}")
        if repo_id in self.hub.repos:
            raise Refused(409, "You already created this model repo", url=url)
        repo = self.hub.repos[repo_id] = Repo(repo_id, private=self.json.get("visibility") == "private")
        repo.add_commit("main", {".gitattributes": File(GIT_ATTRIBUTES)}, "initial commit", "", "system")
        return {"url": url}

    def list_refs(self) -> Any:
        def listed(kind: str, folder: str) -> list[dict[str, str]]:
            refs = sorted(self.repo.refs[kind].items())
            return [{"name": name, "ref": f"{folder}/{name}", "targetCommit": oid} for name, oid in refs]

        branches, tags = listed("branch", "refs/heads"), listed("tag", "refs/tags")
        return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}

    def create_ref(self) -> Any:
        """A branch is named by the path and starts at ``startingPoint``; a tag is named by the body."""
        kind, name, start = self.parts["kind"], self.parts["rev"], self.json.get("startingPoint", "main")
        if kind == "tag":
            name, start = self.json["tag"], name
        if name in self.repo.refs[kind]:
            raise Refused(409, f"Reference already exists: {name}")
        self.repo.refs[kind][name] = self.repo.find(start).id
        return {}

    def delete_ref(self) -> Any:
        kind, name = self.parts["kind"], self.parts["rev"]
        if (kind, name) == ("branch", "main"):
            raise Refused(403, "main cannot be deleted")
        if self.repo.refs[kind].pop(name, None) is None:
            raise Refused(404, f"Invalid rev id: {name}", code="RevisionNotFound")
        return {}

    def preupload(self) -> Any:
        answers = []
        there = self.found.files[".gitignore"].data.decode() if ".gitignore" in self.found.files else ""
        ignored = self.json.get("gitIgnore", there).split()
        for file in self.json["files"]:
            binary = b"\0" in base64.b64decode(file["sample"])
            lfs = binary or file["size"] > LFS_THRESHOLD or file["path"].endswith(LFS_SUFFIXES)
            ignore = any(fnmatch(file["path"], pattern) for pattern in ignored)
            answers.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": ignore})
            if file["path"] in self.found.files:  # the client skips what it has itself
                answers[-1]["oid"] = self.found.files[file["path"]].etag
        return {"files": answers}

    def lfs_batch(self) -> Any:
        verify = {"href": f"{self.hub.url}/{self.repo.id}.git/info/lfs/objects/verify"}
        objects = [{"oid": asked["oid"], "size": asked["size"]} for asked in self.json["objects"]]
        for wanted in objects:
            if wanted["oid"] not in self.repo.objects:  # no actions means that it is stored
                upload = {"href": f"{self.hub.storage_url}/storage/{self.repo.id}/{wanted['oid']}"}
                wanted["actions"] = {"upload": upload, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    def store_object(self) -> Any:
        if hashlib.sha256(self.body).hexdigest() != self.parts["oid"]:
            raise Refused(400, f"{len(self.body)} bytes came whose sha256 is not {self.parts['oid']}")
        self.repo.objects[self.parts["oid"]] = self.body
        return b""

    def lfs_verify(self) -> Any:
        if len(self.repo.objects.get(self.json["oid"], b"")) != self.json["size"]:
            raise Refused(404, f"no object {self.json['oid']} of {self.json['size']} bytes")
        return {}

    def commit(self) -> Any:
        """All of the operations, in their order, or none."""
        branch = self.parts["rev"]
        header, *operations = [json.loads(line) for line in self.body.split(b"\n") if line]
        if "create_pr" in self.query or branch not in self.repo.refs["branch"]:
            raise Refused(404, f"not a branch: {branch}, or a pull request", code="RevisionNotFound")
        if not self.found.id.startswith(header["value"].get("parentCommit", "")):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(self.found.files)
        for operation in operations:
            self.apply(operation["key"], operation["value"], files)
        title, message = header["value"]["summary"], header["value"]["description"]
        oid = self.repo.add_commit(branch, files, title, message, self.token.user).id
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{self.repo.id}/commit/{oid}"}

    def apply(self, key: str, value: Mapping[str, Any], files: dict[str, File]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = File(base64.b64decode(value["content"], validate=True))
        elif key == "lfsFile":
            if value["oid"] not in self.repo.objects:
                raise Refused(400, f"{path} points to an LFS object that was not uploaded: {value['oid']}")
            files[path] = File(self.repo.objects[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            folder = f"{path.rstrip('/')}/"
            gone = [name for name in files if (name == path if key == "deletedFile" else name.startswith(folder))]
            if not gone:
                raise Refused(404, f"A file with this name doesn't exist: {path}", code="EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise Refused(400, f"unknown operation: {key}")

    def model_info(self) -> Any:
        siblings = []
        for path, file in sorted(self.found.files.items()):
            lfs = {"lfs": {"sha256": file.sha256, **file.lfs}} if file.lfs else {}
            blob = {"size": len(file.data), "blobId": file.git_oid, **lfs} if "blobs" in self.query else {}
            siblings.append({"rfilename": path, **blob})
        named = {"id": self.repo.id, "modelId": self.repo.id, "author": self.repo.id.split("/")[0]}
        state = {"private": self.repo.private, "gated": False, "disabled": False, "tags": [], "siblings": siblings}
        return {**named, **state, "sha": self.found.id, "lastModified": self.found.date}

    def list_commits(self) -> Any:
        listed = []
        for c in self.repo.history(self.parts["rev"]):
            authors = [{"user": c.author}]
            listed.append({"id": c.id, "title": c.title, "message": c.message, "date": c.date, "authors": authors})
        return self.paged(listed)

    def entries(self) -> list[dict[str, Any]]:
        """Every file and every folder of the revision, by path."""
        listed = {}
        for path, file in self.found.files.items():
            listed[path] = {"type": "file", "oid": file.git_oid, "size": len(file.data), "path": path}
            if file.lfs:
                listed[path]["lfs"] = {"oid": file.sha256, **file.lfs}
            for end in [match.start() for match in re.finditer("/", path)]:
                oid = hashlib.sha1(f"{self.found.id} {path[:end]}".encode()).hexdigest()
                listed[path[:end]] = {"type": "directory", "oid": oid, "size": 0, "path": path[:end]}
        return [listed[path] for path in sorted(listed)]

    def list_tree(self) -> Any:
        folder = self.parts["path"] + "/" if "path" in self.parts else ""
        inside = [entry for entry in self.entries() if entry["path"].startswith(folder)]
        if folder and not inside:
            raise Refused(404, f"{folder} does not exist", code="EntryNotFound")
        deep = self.query.get("recursive") == "true"
        return self.paged([entry for entry in inside if deep or "/" not in entry["path"][len(folder) :]])

    def paged(self, items: list[Any]) -> Any:
        start = int(self.query.get("cursor", 0))
        stop = start + self.hub.page_size
        if stop < len(items):
            query = urlencode({**self.query, "cursor": stop})
            self.out["Link"] = f'<{self.hub.url}{self.route}?{query}>; rel="next"'
        return items[start:stop]

    def paths_info(self) -> Any:
        wanted = parse_qs(self.body.decode())["paths"]
        return [entry for entry in self.entries() if entry["path"] in wanted]

    def resolve(self) -> Any:
        self.out["X-Repo-Commit"] = self.found.id
        file = self.found.files.get(self.parts["path"])
        if file is None:
            raise Refused(404, "Entry not found", code="EntryNotFound")
        self.out["ETag"] = f'"{file.etag}"'
        if not file.lfs:
            return self.ranged(file.data)
        self.out |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
        self.status, self.out["Location"] = 302, f"{self.hub.storage_url}/storage/{self.repo.id}/{file.sha256}"
        return b""

    def fetch_object(self) -> Any:
        self.out["ETag"] = f'"{self.parts["oid"]}"'
        return self.ranged(self.repo.objects[self.parts["oid"]])

    def ranged(self, data: bytes) -> bytes:
        """All of ``data``, or the one range asked for (RFC 9110, section 14)."""
        self.out |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None or not (asked[1] or asked[2]):
            return data
        start = int(asked[1]) if asked[1] else max(0, len(data) - int(asked[2]))
        stop = min(len(data), int(asked[2]) + 1) if asked[1] and asked[2] else len(data)
        if start >= stop:
            raise Refused(416, f"no bytes {asked[0]} in {len(data)}")
        self.status, self.out["Content-Range"] = 206, f"bytes {start}-{stop - 1}/{len(data)}"
        return data[start:stop]
