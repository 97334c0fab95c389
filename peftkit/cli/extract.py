"""The verb `extract`: a LoRA out of a stored full fine-tune.

Called by `cli.app`; imports torch and the registry inside the verb.
"""

from typing import Annotated

import typer

from peftkit.cli.output import JsonFlag, print_json, print_pairs

Name = Annotated[str, typer.Argument(metavar="NAME", help="name, name@v2 or name@TAG.")]


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command("extract", epilog="Example: peftkit extract full-sst2 --rank 16 --save-as small")(
        extract
    )


def extract(
    name: Name,
    *,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA.")],
    save_as: Annotated[str, typer.Option("--save-as", metavar="NAME", help="Name of the LoRA.")],
    as_json: JsonFlag = False,
) -> None:
    """Make a LoRA of a full fine-tune.

    Keeps the largest singular values of what changed in each linear layer, and the head whole.
    Norms, biases and embeddings have no place in it. Says how much of the change is held.
    """
    from peftkit.merging.extraction import extract as extracted
    from peftkit.registry import Registry, default_root

    found = extracted(Registry(default_root()), name, rank=rank, save_as=save_as)
    if as_json:
        print_json(found.plain())
    else:
        print_pairs(found.pairs())
