"""PEFT without torch's compiler, and the environment as it was."""

import subprocess
import sys

import pytest

SCRIPT = """
import os, sys
from peftkit.modeling.libraries import import_peft
import_peft()
loaded = [name in sys.modules for name in ("peft", "bitsandbytes", "torch._inductor.compile_fx")]
print(*loaded, os.environ.get("TORCHDYNAMO_DISABLE"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("value", [None, "0"])
def test_peft_is_imported_without_the_compiler_and_nothing_else_changes(value, monkeypatch):
    if value:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", value)
    said = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert said.stdout == f"True True False {value}\n", said.stderr
