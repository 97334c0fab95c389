"""The part of an OCI registry that push and pull use, kept in memory."""

import hashlib
import re

from loopback import Reply, Server

ROUTE = re.compile(r"/v2/(.+?)/(blobs/uploads|blobs|manifests)/(.*)")


def digest_of(data):
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def refusal(status, code, **headers):
    errors = [{"code": code, "message": code.lower().replace("_", " ")}]
    return Reply.of({"errors": errors}, status, **headers)


class OciServer(Server):
    def __init__(self, host="127.0.0.1"):
        super().__init__(host)
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        self.upload_location = "/v2/{repository}/blobs/uploads/here"

    def answer(self, ask):
        match = ROUTE.fullmatch(ask.path)
        if match is None:
            return Reply(404)
        repository, what, selector = match.groups()
        if what == "manifests":
            return self._manifest(ask, f"{repository}:{selector}", repository)
        if what == "blobs":
            data = self.blobs.get(selector)
            return Reply(200, data) if data is not None else refusal(404, "BLOB_UNKNOWN")
        if ask.method == "POST":
            location = self.upload_location.format(repository=repository)
            return Reply(202, headers={"Location": location})
        return self._store(ask)

    def _store(self, ask):
        digest = ask.query["digest"]
        if digest_of(ask.body) != digest:
            return refusal(400, "DIGEST_INVALID")
        self.blobs[digest] = ask.body
        return Reply(201)

    def _manifest(self, ask, key, repository):
        if ask.method == "PUT":
            digest = digest_of(ask.body)
            self.manifests[key] = self.manifests[f"{repository}:{digest}"] = ask.body
            return Reply(201, headers={"Docker-Content-Digest": digest})
        data = self.manifests.get(key)
        if data is None:
            return refusal(404, "MANIFEST_UNKNOWN")
        return Reply(200, data, {"Docker-Content-Digest": digest_of(data)})
