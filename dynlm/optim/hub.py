"""Rules to share: those that ship with the package, files and folders, and repositories of the Hugging Face hub.

A shared rule is a folder with ``rule.safetensors`` (numbers, kind and configuration: nothing is pickled) and a model
card ``README.md``. The hub is asked only for a name ``user/repo`` that is no local path.
"""

from __future__ import annotations

import copy
import hashlib
import re
import tempfile
from pathlib import Path

import torch

from dynlm import runs
from dynlm.optim.base import Rule
from dynlm.optim.library import load_rule, make_rule, rule_config, save_rule
from dynlm.optim.registry import untrained
from dynlm.types import InputError

PRETRAINED = Path(__file__).with_name("pretrained")
FILE = "rule.safetensors"
REPO = re.compile(r"[\w.-]+/[\w.-]+")


def load(name_or_path: str | Path) -> Rule:
    """Load a rule: one that ships, a file or folder that :func:`save_pretrained` wrote, a run's, or one of the hub.

    Hand-made rules go by their names too (``sgd``, ``adam``, ``rms``, your own). How a rule was made is its ``made``.

    Raises:
        InputError: nothing of this name, a file that holds no rule, or a hub that does not answer.
    """
    if not isinstance(name_or_path, str | Path):
        raise InputError(f"a rule is loaded by name or path, not from {type(name_or_path).__name__} {name_or_path!r}")
    name = str(name_or_path)
    if name in untrained():
        return make_rule(name)
    path = PRETRAINED / f"{name}.safetensors" if name in shipped() else Path(name_or_path)
    try:
        path = path / FILE if path.is_dir() else path
        exists = path.is_file()
    except OSError:  # a name that no file system holds
        exists = False
    if not exists and isinstance(name_or_path, str) and REPO.fullmatch(name) and path.name != FILE:
        path, exists = _download(name), True
    if not exists:
        known = ", ".join([*shipped(), *untrained()])
        short = name if len(name) <= 80 else f"{name[:80]}…"
        raise InputError(f"no rule {short!r}: give a file, a folder with {FILE}, user/repo, or one of {known}")
    rule, made = load_rule(path)
    rule.made = made
    return rule


def resolve(rule: str | Path | Rule) -> Rule:
    """A frozen copy of a rule, a hand-made one by its name (``sgd``, ``adam``, ``rms``), or what ``load`` finds."""
    if not isinstance(rule, Rule):
        rule = load(rule)
    return copy.deepcopy(rule).cpu().eval().requires_grad_(False)


def shipped() -> list[str]:
    """Names of the rules that come with the package."""
    return sorted(path.stem for path in PRETRAINED.glob("*.safetensors"))


def save_pretrained(rule: Rule, folder: str | Path, made: runs.Json | None = None, license: str = "apache-2.0") -> Path:
    """Write ``rule.safetensors`` and a model card into ``folder``; returns the rule's file.

    ``made`` says how the rule was found (recipe, steps, seed, …) and stands in both; None: as it was loaded.
    """
    path, made = Path(folder) / FILE, rule.made if made is None else made
    save_rule(rule, path, made)
    runs.write_text(Path(folder) / "README.md", model_card(rule, made, license))
    return path


def push_to_hub(rule: Rule, repo_id: str, made: runs.Json | None = None, license: str = "apache-2.0") -> str:
    """Upload a rule as ``user/repo``, which is made where it does not exist; returns the address of the commit.

    Raises:
        InputError: a name of another form, or a hub that refuses or does not answer.
    """
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
                f"cannot upload to {repo_id} ({_line(error)}): check the name, login and network"
            ) from error


def model_card(rule: Rule, made: runs.Json, license: str) -> str:
    """A short ``README.md`` for the hub: license, what the rule is, how it was made, how to use it."""
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


def _download(repo_id: str) -> Path:
    """The rule's file in the hub's cache, downloaded where it is missing."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repo_id, FILE))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = f"{type(error).__name__}: {_line(error)}"
        raise InputError(
            f"no local path {repo_id!r}, and the hub has no {FILE} of it ({reason}): check both"
        ) from error


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
