"""Remotes of the registry: OCI registries and the Hugging Face Hub.

Called by the CLI; sits on the store. Importing this package loads no library of the network.
"""

from peftkit.registry.remotes.transfer import Pushed, pull, push

__all__ = ["Pushed", "pull", "push"]
