"""What the tests of `sources` and of `hub` start from."""

import pytest


@pytest.fixture
def sealed(monkeypatch, tmp_path):
    """No Hub, empty caches, an empty working directory and no mirror."""
    import datasets
    from huggingface_hub import constants

    work = tmp_path / "far/below/work"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.delenv("PEFTKIT_MIRROR", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
