"""What `peftkit doctor` looks at: software, processor, accelerators, sources, disk.

Called by `cli.doctor`; imports torch and bitsandbytes inside the checks that ask them.
"""

import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "evaluate")
BF16_FEATURES = ("avx512_bf16", "amx_bf16", "bf16")
"""Flags of /proc/cpuinfo under which bf16 is faster than float32 (`bf16` on ARM)."""
HUB = "https://huggingface.co"
HUB_TIMEOUT_SECONDS = 3.0
OFFLINE_WORDS = ("1", "ON", "YES", "TRUE")
LOW_DISK_BYTES = 5_000_000_000
NO_DISK_BYTES = 500_000_000


@dataclass(frozen=True)
class Check:
    """One line of the report; `advice` says what to do and is empty where all is well."""

    state: Literal["ok", "warn", "fail"]
    name: str
    found: str
    advice: str = ""


def run_checks() -> list[Check]:
    """Every check, in the order of the report; one that breaks is a failed line, not the end."""
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("python", check_python),
        *((name, lambda name=name: check_library(name)) for name in LIBRARIES),
        ("threads", check_threads),
        ("bf16 on CPU", check_cpu_bf16),
        ("GPUs", check_gpus),
        ("4-bit backend", check_bitsandbytes),
        ("mirror", check_mirror),
        ("Hub", check_hub),
        ("registry", check_registry),
        ("disk", check_disk),
    ]
    return [_guarded(name, check) for name, check in checks]


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # a broken install may fail at import in any way
        text = " ".join(str(error).split())
        return Check("fail", name, f"{type(error).__name__}: {text}", "install it again")


def check_python() -> Check:
    """Which interpreter answers; one that is too old could not import this."""
    return Check("ok", "python", f"{platform.python_version()} ({sys.executable})")


def check_library(name: str) -> Check:
    """Installed, and in which version."""
    try:
        return Check("ok", name, version(name))
    except PackageNotFoundError:
        return Check("fail", name, "not installed", f"pip install {name}")


def check_threads() -> Check:
    """Torch's threads against the cores that this process may use."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    found = f"{threads} of {cores or 1} cores"
    if threads * 2 <= (cores or 1):
        return Check("warn", "threads", found, "unset OMP_NUM_THREADS, or set it to the cores")
    return Check("ok", "threads", found)


def cpu_features() -> list[str]:
    """Those of `BF16_FEATURES` that the processor has; empty where /proc does not tell."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.is_file() else ""
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    flags = next(lines, "").split()
    return [feature for feature in BF16_FEATURES if feature in flags]


def check_cpu_bf16() -> Check:
    """Whether `bf16` makes a run on this processor faster or slower."""
    features = cpu_features()
    if features:
        found = f"{', '.join(features)}: advisable"
        return Check("ok", "bf16 on CPU", found, "--mixed_precision bf16 trains faster here")
    return Check("warn", "bf16 on CPU", "no support", "on the CPU train with mixed precision 'no'")


def check_gpus() -> Check:
    """Accelerators that torch can use."""
    import torch

    if not torch.accelerator.is_available():
        return Check("ok", "GPUs", "none: runs use the CPU")
    count = torch.accelerator.device_count()
    if not torch.cuda.is_available():
        return Check("ok", "GPUs", f"{count} {torch.accelerator.current_accelerator()}")
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
    return Check("ok", "GPUs", f"{', '.join(names)} ({bf16})")


def check_bitsandbytes() -> Check:
    """Quantise and dequantise one block, which is what QLoRA needs of the backend."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.linspace(-1, 1, 64, device=device)
    packed, state = quantize_4bit(values, quant_type="nf4")
    error = float((dequantize_4bit(packed, state) - values).abs().max())
    if error > 0.2:
        found = f"{device}: NF4 is off by {error:.2f}"
        return Check("fail", "4-bit backend", found, "install bitsandbytes again")
    return Check("ok", "4-bit backend", f"bitsandbytes on {device}")


def check_mirror() -> Check:
    """The folder of $PEFTKIT_MIRROR, if one is named."""
    root = os.environ.get("PEFTKIT_MIRROR")
    if not root:
        return Check("ok", "mirror", "none: PEFTKIT_MIRROR is not set")
    if not Path(root).is_dir():
        return Check("fail", "mirror", f"{root}: no such folder", "correct PEFTKIT_MIRROR")
    kinds = [kind for kind in ("models", "datasets") if (Path(root) / kind).is_dir()]
    if not kinds:
        advice = "it needs models/<org>/<name> or datasets/<org>/<name>"
        return Check("fail", "mirror", f"{root}: neither models nor datasets", advice)
    return Check("ok", "mirror", f"{root}: {' and '.join(kinds)}")


def check_hub() -> Check:
    """Whether the Hub answers, directly; proxies and tokens are left to the Hub's own client."""
    offline = [key for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if _is_on(key)]
    if offline:
        return Check("ok", "Hub", f"not asked: {', '.join(offline)} is set")
    address = urlsplit(os.environ.get("HF_ENDPOINT") or HUB)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), HUB_TIMEOUT_SECONDS).close()
    except OSError as error:
        advice = "name a mirror in PEFTKIT_MIRROR, or rely on the recipe's `offline:`"
        return Check("warn", "Hub", f"{address.hostname}: {error}", advice)
    return Check("ok", "Hub", f"{address.hostname} answers")


def _is_on(key: str) -> bool:
    return os.environ.get(key, "").upper() in OFFLINE_WORDS


def check_registry() -> Check:
    """Whether deltas can be written to the registry, or its folder be made."""
    from peftkit.registry import default_root, root_problem

    root = default_root()
    if problem := root_problem(root):
        advice = "name a folder that can be written in PEFTKIT_REGISTRY"
        return Check("fail", "registry", f"{root}: {problem}", advice)
    return Check("ok", "registry", f"{root}{'' if root.exists() else ' (made when needed)'}")


def check_disk() -> Check:
    """Free space where the registry lies."""
    from peftkit.registry.root import default_root, nearest_existing

    free = shutil.disk_usage(nearest_existing(default_root())).free
    found = f"{free / 1e9:.1f} GB free"
    if free < NO_DISK_BYTES:
        return Check("fail", "disk", found, "free some: a run would not fit")
    if free < LOW_DISK_BYTES:
        return Check("warn", "disk", found, "enough for adapters, tight for full checkpoints")
    return Check("ok", "disk", found)
