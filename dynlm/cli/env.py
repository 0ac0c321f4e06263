"""``dynlm env``: versions, platform and what dynlm found on this machine, to paste into a bug report."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dynlm.compiler import find_compiler
from dynlm.files import Json

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "safetensors", "sentencepiece", "numpy", "peft", "tyro")


def environment() -> Json:
    """Return the facts by name."""
    return {
        "dynlm": version("dynlm"),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "processor features": ", ".join(_features()) or "none known",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "compiler": find_compiler() or "none: updates run in torch, several times slower",
        "DYNLM_KERNEL": os.environ.get("DYNLM_KERNEL", "auto"),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _features() -> list[str]:
    """Return the vector and matrix units that matter for speed."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return [platform.processor()] if platform.processor() else []
    flags = set(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())
    return [
        name for name in ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve") if name in flags
    ]
