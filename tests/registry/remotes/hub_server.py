"""The part of the Hub's API that huggingface_hub uses to push, pull and open a repository.

A stand-in: it was written from the client's source, the Hub itself was never asked.
"""

import base64
import hashlib
import json
import re

import yaml
from loopback import Reply, Server

LFS_SUFFIX = ".safetensors"


def refusal(status, code, message=""):
    headers = {"X-Error-Code": code, "X-Error-Message": message or code}
    return Reply(status, b"{}", headers)


def commit_of(number):
    return f"{number:040x}"


class HubServer(Server):
    """Repositories: name → branch or commit → path → bytes. Large files lie on another host."""

    def __init__(self):
        super().__init__()
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.large: dict[str, bytes] = {}
        self.tokens: set[str] | None = None
        """Those that may do everything; None lets all in."""
        self.commits = 0
        self.storage = Storage(self.large)

    def __enter__(self):
        self.storage.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.storage.__exit__(*error)

    def answer(self, ask):
        token = ask.headers.get("authorization", "").removeprefix("Bearer ")
        if self.tokens is not None and token not in self.tokens:
            return refusal(401, "RepoNotFound", "Invalid username or password.")
        for pattern, action in ROUTES:
            if match := re.fullmatch(pattern, ask.path):
                return action(self, ask, **match.groupdict())
        return Reply(404)

    def create(self, ask):
        named = ask.json()
        name = f"{named['organization']}/{named['name']}"
        if name in self.repositories:
            known = {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            return Reply.of(known, 409)
        self.repositories[name] = {}
        self._commit(name, "main", {".gitattributes": b""})
        return Reply.of({"url": f"{self.url}/{name}"})

    def validate(self, ask):
        front = ask.json()["content"].split("---\n")[1]
        return Reply.of({} if isinstance(yaml.safe_load(front), dict) else {"errors": ["no"]})

    def branch(self, ask, name, branch):
        branches = self.repositories[name]
        if branch in branches:
            return Reply.of({"error": "exists"}, 409)
        branches[branch] = branches["main"]
        return Reply(201)

    def info(self, ask, name, revision):
        if missing := self._missing(name, revision):
            return missing
        return Reply.of({"id": name, "sha": self._commit_at(name, revision)})

    def paths(self, ask, name, revision):
        files = self.repositories[name][revision]
        wanted = re.findall(r"paths=([^&]+)", ask.body.decode())
        found = [{"type": "file", "path": p, "size": 1, "oid": "0"} for p in wanted if p in files]
        return Reply.of(found)

    def preupload(self, ask, name, revision):
        files = self.repositories[name][revision]

        def told(path):
            large = path.endswith(LFS_SUFFIX)
            oid = files[path] and _oid(files[path], large=large) if path in files else None
            mode = "lfs" if large else "regular"
            return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

        return Reply.of({"files": [told(file["path"]) for file in ask.json()["files"]]})

    def batch(self, ask, name):
        objects = [{**wanted, **self._upload(wanted["oid"])} for wanted in ask.json()["objects"]]
        return Reply.of({"transfer": "basic", "objects": objects})

    def _upload(self, oid):
        if oid in self.large:
            return {}
        verify = {"href": f"{self.url}/verify"}
        return {"actions": {"upload": {"href": f"{self.storage.url}/{oid}"}, "verify": verify}}

    def verify(self, ask):
        return Reply(200 if ask.json()["oid"] in self.large else 404)

    def commit(self, ask, name, revision):
        files = dict(self.repositories[name][revision])
        for line in ask.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        commit = self._commit(name, revision, files)
        return Reply.of({"commitUrl": f"{self.url}/{name}/commit/{commit}", "commitOid": commit})

    def resolve(self, ask, name, revision, path):
        if missing := self._missing(name, revision):
            return missing
        data = self.repositories[name][revision].get(path)
        headers = {"X-Repo-Commit": self._commit_at(name, revision)}
        if data is None:
            return Reply(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
        large = path.endswith(LFS_SUFFIX)
        headers["ETag"] = f'"{_oid(data, large=large)}"'
        if not large:
            return Reply(200, data, headers)
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": headers["ETag"]}
        place = f"{self.storage.url}/{hashlib.sha256(data).hexdigest()}"
        return Reply(302, headers={**headers, "Location": place})

    def _missing(self, name, revision):
        if name not in self.repositories:
            return refusal(404, "RepoNotFound")
        if revision not in self.repositories[name]:
            return refusal(404, "RevisionNotFound")
        return None

    def _commit(self, name, branch, files):
        self.commits += 1
        commit = commit_of(self.commits)
        self.repositories[name][branch] = self.repositories[name][commit] = files
        return commit

    def _commit_at(self, name, revision):
        files = self.repositories[name][revision]
        known = self.repositories[name].items()
        return next(c for c, held in known if held is files and re.fullmatch("[0-9a-f]{40}", c))


class Storage(Server):
    """Where large files lie: another host, to which no token may go."""

    def __init__(self, large):
        super().__init__("localhost")
        self.large = large

    def answer(self, ask):
        oid = ask.path.strip("/")
        if ask.method == "PUT":
            if hashlib.sha256(ask.body).hexdigest() != oid:
                return Reply(400)
            self.large[oid] = ask.body
            return Reply(200)
        return Reply(200, self.large[oid], {"ETag": f'"{oid}"'})


def _oid(data, *, large):
    if large:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
ROUTES = [
    (r"/api/repos/create", HubServer.create),
    (r"/api/validate-yaml", HubServer.validate),
    (r"/verify", HubServer.verify),
    (rf"/api/models/{_NAME}/branch/(?P<branch>.+)", HubServer.branch),
    (rf"/api/models/{_NAME}/revision/(?P<revision>.+)", HubServer.info),
    (rf"/api/models/{_NAME}/paths-info/(?P<revision>.+)", HubServer.paths),
    (rf"/api/models/{_NAME}/preupload/(?P<revision>.+)", HubServer.preupload),
    (rf"/api/models/{_NAME}/commit/(?P<revision>.+)", HubServer.commit),
    (rf"/{_NAME}.git/info/lfs/objects/batch", HubServer.batch),
    (rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", HubServer.resolve),
]
