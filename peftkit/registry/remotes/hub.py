"""Deltas on the Hugging Face Hub, through huggingface_hub.

Called by `transfer`. A repository holds the delta's own files, so that PEFT opens it, a model card,
`manifest.json` (the info), and `oci-manifest.json`, from which every byte is verified.
Reading goes through `web`, which bounds a body before it is kept; writing through `HfApi`, under a
client with timeouts.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from peftkit.errors import RegistryError
from peftkit.registry.digests import FileDigest
from peftkit.registry.layout import MAX_DOCUMENT_BYTES
from peftkit.registry.reading import Contents, StoredDelta
from peftkit.registry.remotes.address import HubAddress
from peftkit.registry.remotes.card import model_card
from peftkit.registry.remotes.failures import chain, contained, plain
from peftkit.registry.remotes.guard import Guard
from peftkit.registry.remotes.hub_client import guarded_client
from peftkit.registry.remotes.web import at_most, body_of, exactly, guarded_session
from peftkit.registry.tensors import DELTA_FILES
from peftkit.registry.versions import INFO_LINK, MANIFEST_LINK

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from requests import Response, Session

CARD = "README.md"

_OWN_FILES = frozenset().union(*DELTA_FILES.values())


@contextmanager
def open_hub(address: HubAddress) -> "Iterator[HubRemote]":
    """The remote at an address; its connections end with the block.

    Raises:
        RegistryError: the Hub is switched off.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise RegistryError(f"{address}: HF_HUB_OFFLINE is set; unset it to reach the Hub")
    guard = Guard(address, constants.ENDPOINT)
    with guarded_session(guard) as session:
        yield HubRemote(address, guard, session)


class HubRemote:
    """One revision of one repository."""

    def __init__(self, address: HubAddress, guard: Guard, session: "Session") -> None:
        from huggingface_hub import constants

        self.address = address
        self._guard = guard
        self._session = session
        self._endpoint = constants.ENDPOINT
        self._revision = address.revision or constants.DEFAULT_REVISION

    def manifest(self) -> bytes:
        """The bytes of the OCI manifest; what is read after it is of the same commit.

        Raises:
            RegistryError: unreachable, unknown, or too large.
        """
        with self._get(MANIFEST_LINK) as response:
            answers = (*response.history, response)
            commits = [a.headers["X-Repo-Commit"] for a in answers if "X-Repo-Commit" in a.headers]
            self._revision = commits[0] if commits else self._revision
            where = f"{self.address}: {MANIFEST_LINK}"
            return at_most(self._body(response), MAX_DOCUMENT_BYTES, where=where)

    def blob(self, name: str, expected: FileDigest) -> bytes:
        """The verified bytes of the file `name`.

        Raises:
            RegistryError: unreachable, missing, or other bytes than expected.
        """
        with self._get(name) as response:
            return exactly(self._body(response), expected, where=f"{self.address}: {name}")

    def send(self, stored: StoredDelta, contents: Contents) -> str:
        """Send everything as one commit; makes the repository and the branch if need be.

        Returns:
            The address of the commit.

        Raises:
            RegistryError: unreachable or refused; the repository is as it was, or new and empty.
        """
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._endpoint)
        files = {**contents.files, INFO_LINK: contents.info, MANIFEST_LINK: contents.manifest}
        files[CARD] = model_card(stored, self.address).encode()
        with guarded_client(self._guard), self._contained():
            api.create_repo(self.address.repository, exist_ok=True)
            if self.address.revision:
                api.create_branch(self.address.repository, branch=self._revision, exist_ok=True)
            commit = self._commit(api, files, message=f"Push {stored} with peftkit")
        return str(HubAddress(self.address.repository, commit))

    def _commit(self, api: "HfApi", files: dict[str, bytes], *, message: str) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        repository, others = self.address.repository, sorted(_OWN_FILES - files.keys())
        # Files of another kind of delta would be opened in place of these.
        stale = api.get_paths_info(repository, others, revision=self._revision)
        # As streams: huggingface_hub would send bytes through Xet, past the guard and the timeouts.
        operations = [CommitOperationAdd(name, io.BytesIO(data)) for name, data in files.items()]
        commit = api.create_commit(
            repository,
            [*operations, *(CommitOperationDelete(file.path) for file in stale)],
            commit_message=message,
            revision=self._revision,
        )
        return str(commit.oid)

    def _get(self, name: str) -> "Response":
        from huggingface_hub import constants, get_token, hf_hub_url

        with contained(self.address):
            url = hf_hub_url(
                self.address.repository, name, revision=self._revision, endpoint=self._endpoint
            )
            token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            response = self._session.get(url, headers=headers, stream=True)
        if response.status_code == 200:
            return response
        code = response.headers.get("X-Error-Code")
        raise RegistryError(self._refusal(response.status_code, code, name=name))

    def _body(self, response: "Response") -> Iterator[bytes]:
        with contained(self.address):
            yield from body_of(response)

    @contextmanager
    def _contained(self) -> Iterator[None]:
        """Give the Hub's refusals peftkit's words."""
        from huggingface_hub.errors import HfHubHTTPError

        with contained(self.address):
            try:
                yield
            except Exception as error:  # the client wraps its own errors in several libraries'
                for cause in chain(error):
                    if isinstance(cause, HfHubHTTPError):
                        code = cause.response.headers.get("X-Error-Code")
                        status = cause.response.status_code
                        said = self._refusal(status, code, detail=plain(cause.server_message or ""))
                        raise RegistryError(said) from error
                raise

    def _refusal(
        self, status: int, code: str | None, *, name: str | None = None, detail: str = ""
    ) -> str:
        answer = f"HTTP {status}{f', {detail}' if detail else ''}"
        login = "log in with `hf auth login`"
        if code == "GatedRepo":
            said = f"gated ({answer}); ask for access on its page, then {login}"
        elif code == "RepoNotFound":
            said = f"no such repository, or a private one ({answer}); check the name, or {login}"
        elif code == "RevisionNotFound":
            said = f"no revision '{self._revision}' ({answer}); check the address"
        elif code == "EntryNotFound" and name == MANIFEST_LINK:
            said = f"not a delta, it has no {MANIFEST_LINK} ({answer})"
        elif code == "EntryNotFound":
            said = f"{name} is missing ({answer}); push it again or pull another"
        elif status in (401, 403):
            said = f"authentication needed ({answer}); {login}, with a token that may do this"
        else:
            said = f"the Hub refused ({answer}); try again later"
        return f"{self.address}: {said}"
