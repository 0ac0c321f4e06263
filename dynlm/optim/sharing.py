"""Rules to give away: their files, a model card, the Hugging Face hub. Nothing is pickled."""

from __future__ import annotations

import hashlib
import re
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dynlm.files import Json, write_tensors, write_text
from dynlm.lazy import optional
from dynlm.types import InputError

if TYPE_CHECKING:
    from dynlm.optim.base import Rule

FILE = "rule.safetensors"
REPO = re.compile(r"[\w.-]+/[\w.-]+")


def rule_config(rule: Rule) -> dict[str, Any]:
    """Return the configuration of a rule, where it has one."""
    return asdict(rule.config) if rule.config else {}


def save_rule(rule: Rule, path: Path, made: Json | None = None) -> None:
    """Write a rule; ``made`` tells how it was found (objective, trials, steps, …)."""
    write_tensors(path, rule.state_dict(), {"kind": rule.name, "config": rule_config(rule), "made": made or {}})


def save_pretrained(rule: Rule, folder: str | Path, made: Json | None = None, license: str = "apache-2.0") -> Path:
    """Write ``rule.safetensors`` and a model card into ``folder``; returns the rule's file.

    Args:
        rule: any rule.
        folder: made where it does not exist.
        made: how the rule was found (recipe, steps, seed, …), which stands in both; None: as it was loaded.
        license: of the rule, as the hub writes it.

    Raises:
        InputError: a place that cannot be written.
    """
    path, made = Path(folder) / FILE, rule.made if made is None else made
    save_rule(rule, path, made)
    write_text(Path(folder) / "README.md", model_card(rule, made, license))
    return path


def push_to_hub(rule: Rule, repo_id: str, made: Json | None = None, license: str = "apache-2.0") -> str:
    """Upload a rule as ``user/repo``, which is made where it does not exist; returns the address of the commit.

    Args:
        rule: any rule.
        repo_id: ``user/repo``.
        made: how the rule was found, as for :func:`save_pretrained`.
        license: of the rule, as the hub spells it.

    Raises:
        InputError: a name of another form, or a hub that refuses or does not answer.
    """
    with optional("the hub"):
        import huggingface_hub

    if not REPO.fullmatch(repo_id):
        raise InputError(f"{repo_id!r} is not the name of a hub repository: write it as user/repo")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(rule, folder, made, license)
        try:
            api = huggingface_hub.HfApi()
            api.create_repo(repo_id, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload rule"))
        except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
            raise InputError(
                f"cannot upload to {repo_id} ({line(error)}): check the name, login and network"
            ) from error


def model_card(rule: Rule, made: Json, license: str) -> str:
    """Return a short ``README.md`` for the hub: license, what the rule is, how it was made, how to use it."""
    how = [f"- {key}: {value}" for key, value in made.items()] or ["- not recorded"]
    lines = [
        "---",
        f"license: {license}",
        "library_name: dynlm",
        "tags:",
        "- learned-optimizer",
        "---",
        "",
        f"# A learned optimizer of kind `{rule.name}`",
        "",
        f"An update rule of dynlm with {sum(p.numel() for p in rule.parameters())} meta-parameters "
        f"(`{fingerprint(rule)}`) and {rule.n_slots * max(rule.slot_width, 1)} state numbers a weight.",
        "",
        "## How it was made",
        "",
        *how,
        "",
        "## Use",
        "",
        "```python",
        "from dynlm import LearnedOptimizer",
        "",
        'optimizer = LearnedOptimizer(model.parameters(), rule="THIS FOLDER OR user/repo")',
        "```",
    ]
    return "\n".join(lines) + "\n"


def fingerprint(rule: Rule) -> str:
    """Kind and a hash of configuration and φ: equal where two rules compute the same."""
    digest = hashlib.sha256(repr((rule.name, rule_config(rule))).encode())
    for name, tensor in rule.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{rule.name}-{digest.hexdigest()[:16]}"


def line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
