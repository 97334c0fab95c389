"""Importing PEFT, and bitsandbytes with it, without torch's compiler.

Called wherever the first of them is needed; imports neither at its top.
"""

import os
import sys
from threading import Lock

import torch

_IMPORTING = Lock()
_SWITCH = "TORCHDYNAMO_DISABLE"


def import_peft() -> None:
    """Import PEFT, and bitsandbytes if it is there, in three seconds and 45 MiB less.

    bitsandbytes compiles functions as it is imported, and thereby loads torch's compiler. Only
    devices that it has no kernels of its own for call them: neither a CPU nor CUDA does.
    """
    with _IMPORTING:
        if "bitsandbytes" in sys.modules or torch.backends.mps.is_available():
            return
        before = os.environ.get(_SWITCH)
        os.environ[_SWITCH] = "1"
        try:
            import peft  # noqa: F401
        finally:
            os.environ.pop(_SWITCH)
            if before is not None:
                os.environ[_SWITCH] = before
