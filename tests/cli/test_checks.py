"""`doctor`: each check finds its planted fault."""

import json
import os
import socket
from collections import namedtuple
from pathlib import Path

import pytest

from peftkit.cli import checks, main
from peftkit.cli.checks import Check

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKIT_REGISTRY", str(tmp_path / "registry"))
    return tmp_path / "registry"


@pytest.mark.parametrize("state", ["ok", "warn", "fail"])
def test_doctor_fails_only_where_a_check_does(state, monkeypatch, capsys):
    monkeypatch.setattr(checks, "run_checks", lambda: [Check(state, "disk", "x", "do this")])
    code = int(state == "fail")
    assert main(["doctor"]) == code
    assert capsys.readouterr().out.splitlines()[1].split() == [state, "disk", "x", "do", "this"]
    assert main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == [
        {"state": state, "name": "disk", "found": "x", "advice": "do this"}
    ]


def test_every_check_has_its_line(root, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = checks.run_checks()
    names = [check.name for check in found]
    assert len(names) == len(set(names))
    expected = {"python", "torch", "peft", "threads", "bf16 on CPU", "GPUs", "4-bit backend"}
    assert expected | {"mirror", "Hub", "registry", "disk"} <= set(names)
    assert all(check.advice for check in found if check.state != "ok")


def test_a_check_that_breaks_is_a_failed_line(monkeypatch):
    def broken():
        raise OSError("libcudart is\nmissing")

    monkeypatch.setattr(checks, "check_bitsandbytes", broken)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    expected = Check("fail", "4-bit backend", "OSError: libcudart is missing", "install it again")
    assert expected in checks.run_checks()


def test_a_missing_library_is_named():
    assert checks.check_library("no-such-thing") == Check(
        "fail", "no-such-thing", "not installed", "pip install no-such-thing"
    )


def test_too_few_threads_are_noticed(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert checks.check_threads().state == "warn"
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    assert checks.check_threads() == Check("ok", "threads", "8 of 8 cores")


@pytest.mark.parametrize(
    ("flags", "features"),
    [
        ("flags : fpu avx512_bf16 amx_bf16", ["avx512_bf16", "amx_bf16"]),
        ("Features : fp bf16", ["bf16"]),
        ("flags : fpu avx512f", []),
        ("", []),
    ],
)
def test_bf16_is_advised_where_the_processor_has_it(flags, features, monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda _: f"processor : 0\n{flags}\n")
    assert checks.cpu_features() == features
    assert checks.check_cpu_bf16().state == ("ok" if features else "warn")


def test_a_backend_that_gets_numbers_wrong_fails(monkeypatch):
    monkeypatch.setattr("bitsandbytes.functional.dequantize_4bit", lambda packed, state: 9.0)
    assert checks.check_bitsandbytes().state == "fail"


def test_mirror_states(tmp_path, monkeypatch):
    monkeypatch.delenv("PEFTKIT_MIRROR", raising=False)
    assert checks.check_mirror().state == "ok"
    monkeypatch.setenv("PEFTKIT_MIRROR", str(tmp_path / "none"))
    assert checks.check_mirror().found == f"{tmp_path / 'none'}: no such folder"
    monkeypatch.setenv("PEFTKIT_MIRROR", str(tmp_path))
    assert checks.check_mirror().state == "fail"
    (tmp_path / "models").mkdir()
    assert checks.check_mirror() == Check("ok", "mirror", f"{tmp_path}: models")


def test_hub_states(monkeypatch):
    for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(key, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        assert checks.check_hub() == Check("ok", "Hub", "127.0.0.1 answers")
    assert checks.check_hub().state == "warn"
    monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    assert checks.check_hub() == Check("ok", "Hub", "not asked: HF_HUB_OFFLINE is set")


def test_registry_states(root, monkeypatch):
    assert checks.check_registry() == Check("ok", "registry", f"{root} (made when needed)")
    root.mkdir()
    assert checks.check_registry() == Check("ok", "registry", str(root))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert checks.check_registry().found == f"{root}: {root} is not writable"
    root.rmdir()
    root.touch()
    assert checks.check_registry().found == f"{root}: {root} is not a folder"


@pytest.mark.parametrize(("free", "state"), [(10**11, "ok"), (10**9, "warn"), (10**8, "fail")])
def test_disk_states(free, state, root, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**12, 0, free))
    assert checks.check_disk().state == state
