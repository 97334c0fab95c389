"""The verbs below `adapters` that keep the store: verify, gc, diff, export, import.

Called by `cli.app`; imports the registry inside each verb, and torch only for `diff` and `import`.
"""

from pathlib import Path
from typing import Annotated

import typer

from peftkit.cli.adapters import Name
from peftkit.cli.output import JsonFlag, megabytes, note, print_json, print_pairs, print_table
from peftkit.errors import RegistryError


def add_to(group: typer.Typer) -> None:
    """Register the verbs below `adapters`."""
    example = "Example: peftkit adapters"
    group.command("verify", epilog=f"{example} verify")(verify)
    group.command("gc", epilog=f"{example} gc --dry-run")(gc)
    group.command("diff", epilog=f"{example} diff lora-sst2@v1 lora-sst2@v2")(diff)
    group.command("export", epilog=f"{example} export lora-sst2 -o lora-sst2.tar")(export)
    group.command("import", epilog=f"{example} import lora-sst2.tar")(import_)


def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="All where none is given.")
    ] = None,
) -> None:
    """Hash every file.

    Compares each version with what its manifest says, and names what is changed, missing or stray.
    """
    from peftkit.registry import Registry, default_root

    registry = Registry(default_root())
    listing = registry.ls()
    chosen = names or [f"{row['name']}@{row['version']}" for row in listing.rows]
    problems = [] if names else list(listing.problems)
    for name in chosen:
        try:
            registry.verify(registry.find(name))
        except RegistryError as error:
            problems.extend(error.problems)
        else:
            print(f"{name} is whole")
    if problems:
        raise RegistryError(problems)
    if not chosen:
        note(f"no deltas in {default_root()}")


def gc(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Free what nothing needs.

    Deletes blobs of removed versions and what crashed saves left behind; never what a version or a
    save in work needs.
    """
    from peftkit.registry import Registry, default_root

    found = Registry(default_root()).gc(dry_run=dry_run)
    for line in (*(f"blob sha256:{sha256}" for sha256 in found.blobs), *map(str, found.leftovers)):
        print(line)
    verb = "would free" if dry_run else "freed"
    note(f"{verb} {megabytes(found.freed_bytes)}")


def diff(first: Name, second: Name, *, as_json: JsonFlag = False) -> None:
    """Compare two deltas.

    Which of their facts differ, and how far their tensors are apart.
    """
    from peftkit.registry import Registry, default_root
    from peftkit.registry.diff import compare

    found = compare(Registry(default_root()), first, second)
    if as_json:
        print_json({"facts": found.facts, "tensors": found.tensors, "summary": found.summary})
        return
    if found.facts:
        print_table(["fact", first, second], [[k, str(a), str(b)] for k, a, b in found.facts])
    print_pairs([(key, str(value)) for key, value in found.summary.items()])


def export(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="name, or name@v2.")],
    *,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="New file.")],
) -> None:
    """Write deltas to one file.

    An OCI layout in a tar, which `peftkit adapters import` and OCI tools read.
    """
    from peftkit.registry import Registry, default_root
    from peftkit.registry.archive import export_archive

    for stored in export_archive(Registry(default_root()), names, output):
        print(f"{stored} written to {output}")


def import_(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="What `export` wrote.")],
    *,
    save_as: Annotated[
        str | None, typer.Option("--save-as", metavar="NAME", help="Another name for it.")
    ] = None,
) -> None:
    """Take deltas from a file.

    Each becomes the next version of its name; its bytes are verified and no code in it runs.
    """
    from peftkit.registry import Registry, default_root
    from peftkit.registry.archive import import_archive

    for stored in import_archive(Registry(default_root()), source, save_as=save_as):
        print(f"{stored} {stored.digest}")
