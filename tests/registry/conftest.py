"""Folders in memory where there are any: a sweep makes thousands of fsyncs."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

_IN_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def fast_factory(tmp_path_factory):
    """Makes empty folders, which are gone when the module's tests are done."""
    made: list[Path] = []
    usable = _IN_MEMORY.is_dir() and os.access(_IN_MEMORY, os.W_OK)

    def make() -> Path:
        parent = _IN_MEMORY if usable else tmp_path_factory.getbasetemp()
        made.append(Path(tempfile.mkdtemp(prefix="peftkit-", dir=parent)))
        return made[-1]

    yield make
    for folder in made:
        shutil.rmtree(folder)
