"""Rules to share: those that ship with the package, files and folders, and repositories of the Hugging Face hub.

A shared rule is a folder with ``rule.safetensors`` (numbers, kind and configuration: nothing is pickled) and a model
card ``README.md``. The hub is asked only for a name ``user/repo`` that is no local path.
"""

from __future__ import annotations

import copy
from pathlib import Path

from dynlm.lazy import optional
from dynlm.optim.base import Rule
from dynlm.optim.learned import Learned
from dynlm.optim.library import load_rule, make_rule
from dynlm.optim.registry import untrained
from dynlm.optim.sharing import FILE, REPO, line
from dynlm.types import InputError

SHIPPED = {
    "general": Path(__file__).with_name("pretrained") / "general.safetensors",
    "reader": Path(__file__).parents[1] / "shipped" / "wikipedia" / "rules" / "gated.safetensors",
}
"""files of the rules that ship: ``general`` trains any module, ``reader`` is what the model that ships reads with"""


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
    path = SHIPPED.get(name) or Path(name_or_path)
    try:
        path = path / FILE if path.is_dir() else path
        exists = path.is_file()
    except OSError:  # a name that no file system holds
        exists = False
    if not exists and isinstance(name_or_path, str) and REPO.fullmatch(name) and path.name != FILE:
        path, exists = _download(name), True
    if not exists:
        known = ", ".join([*SHIPPED, *untrained()])
        short = name if len(name) <= 80 else f"{name[:80]}…"
        raise InputError(f"no rule {short!r}: give a file, a folder with {FILE}, user/repo, or one of {known}")
    rule, made = load_rule(path)
    rule.made = made
    return rule


def load_learned(name_or_path: str | Path, kind: str, settings: dict[str, float]) -> Learned:
    """Load the φ of a learned rule, over the RMS rule of these settings.

    Raises:
        InputError: as :func:`load`, or a rule of another kind.
    """
    rule = load(name_or_path)
    if not isinstance(rule, Learned) or rule.name != kind:
        raise InputError(f"{name_or_path} is a rule {rule.name!r}: expected φ of a learned rule {kind!r}")
    return rule.restarted_at(settings)


def resolve(rule: str | Path | Rule) -> Rule:
    """A frozen copy of a rule, a hand-made one by its name (``sgd``, ``adam``, ``rms``), or what ``load`` finds."""
    if not isinstance(rule, Rule):
        rule = load(rule)
    return copy.deepcopy(rule).cpu().eval().requires_grad_(False)


def _download(repo_id: str) -> Path:
    """Return the rule's file in the hub's cache, downloaded where it is missing."""
    with optional(f"rule {repo_id!r} of the hub"):
        import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repo_id, FILE))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = f"{type(error).__name__}: {line(error)}"
        raise InputError(
            f"no local path {repo_id!r}, and the hub has no {FILE} of it ({reason}): check both"
        ) from error
