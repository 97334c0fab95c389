"""The verbs below `adapters` that speak to other machines: push and pull.

Called by `cli.app`; imports the registry inside each verb, and torch only for `pull`.
"""

from typing import Annotated

import typer

from peftkit.cli.adapters import Name
from peftkit.cli.output import JsonFlag, print_json

Remote = Annotated[
    str,
    typer.Argument(metavar="REMOTE", help="oci://host/repository:tag, or hf://org/name."),
]


def add_to(group: typer.Typer) -> None:
    """Register the verbs below `adapters`."""
    example = "Example: peftkit adapters"
    group.command("push", epilog=f"{example} push lora-sst2@v1 oci://ghcr.io/me/lora-sst2:v1")(push)
    group.command("pull", epilog=f"{example} pull hf://me/lora-sst2 --save-as reviews")(pull)


def push(name: Name, remote: Remote, *, as_json: JsonFlag = False) -> None:
    """Send a delta to a remote.

    An OCI registry (log in with `docker login` or `oras login`) or the Hugging Face Hub (`hf auth
    login`). A tag or branch that is there moves to it.
    """
    from peftkit.registry import Registry, default_root
    from peftkit.registry.remotes import push as push_delta
    from peftkit.registry.summary import summary_of

    pushed = push_delta(Registry(default_root()), name, remote)
    if as_json:
        sent = {"remote": pushed.remote, "pinned": pushed.pinned}
        print_json(summary_of(pushed.stored) | sent)
    else:
        print(f"{pushed.stored} is {pushed.pinned}")


def pull(
    remote: Remote,
    *,
    save_as: Annotated[
        str | None, typer.Option("--save-as", metavar="NAME", help="Another name for it.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Take a delta from a remote.

    It becomes the next version of its name; its bytes are verified and no code in it runs.
    """
    from peftkit.registry import Registry, default_root
    from peftkit.registry.remotes import pull as pull_delta
    from peftkit.registry.summary import summary_of

    stored = pull_delta(Registry(default_root()), remote, save_as=save_as)
    if as_json:
        print_json(summary_of(stored) | {"path": str(stored.path), "remote": remote})
    else:
        print(f"{stored} {stored.digest}")
