"""``dynlm env``: versions, platform and what dynlm found on this machine, to paste into a bug report."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from dynlm.compiler import find_compiler
from dynlm.files import Json
from dynlm.provenance import processor, units

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
        "processor": processor(),
        "processor features": ", ".join(units()) or "none known",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "compiler": find_compiler() or "none: updates run in torch, several times slower",
        "DYNLM_KERNEL": os.environ.get("DYNLM_KERNEL", "auto"),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
