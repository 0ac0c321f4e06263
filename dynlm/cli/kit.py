"""What ``dynlm read`` reads with: a base model, its tokenizer, prior and rule, from a run directory or as shipped.

The shipped folder ``dynlm/shipped/wikitext2`` is laid out as a run directory; ``scripts/ship`` makes it from one. An
LSTM of ``dynlm train`` is loaded without transformers, which alone takes seconds to import; any other model the run's
``model`` folder holds goes through :mod:`dynlm.models.causal`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from dynlm.adapt import ReadConfig, Reader, Scorer, make_priors
from dynlm.claim import recover
from dynlm.cli.terminal import tell
from dynlm.data.spacing import Spacing
from dynlm.data.tokenizers import Tokenizer, load_tokenizer
from dynlm.methods import Method
from dynlm.models.light import LightLSTM, is_light, load_light
from dynlm.models.params import Adapted, adapted_parameters
from dynlm.optim.base import Prior, Rule
from dynlm.optim.handmade import Static
from dynlm.optim.hub import fingerprint
from dynlm.optim.library import load_rule
from dynlm.optim.registry import made_by
from dynlm.runs import Json, Run, read_json, read_tensors, require_layout
from dynlm.settings import Positive, build, check
from dynlm.stamps import Stamp, fingerprint_files, read_stamped, unfinished
from dynlm.types import InputError

SHIPPED = Path(__file__).parents[1] / "shipped"
DEFAULT_MODEL = "wikitext2"
KIT = "kit.json"  # beside a shipped run: {"spacing": of what its model was trained on, "home": see Kit.home}
RULES = ("gated", "rms")  # the first that the run holds


@dataclass(frozen=True)
class Kit:
    """Model, rule and what belongs to them. ``scorer`` makes a scorer of a model or of its copy."""

    model: nn.Module
    scorer: Callable[[Any], Scorer]
    tokenizer: Tokenizer
    rule: Rule
    priors: Sequence[Prior]
    config: ReadConfig
    source: str
    spacing: Spacing = "none"
    """what the model was trained on"""
    home: float | None = None
    """static's nats per token on validation text of the kind that the model was trained on, where that is known"""
    carry: str = "state"
    """what the model sees of the text before a segment: its own recurrent state, or as context.carry of a run"""

    def readers(self) -> tuple[Reader, Reader]:
        """(static, adapted): the frozen one reads with a copy of the model, the other one with a copy of the rule."""
        frozen = copy.deepcopy(self.model)
        static = Reader(frozen, self.scorer(frozen), Static(), self.priors, self.config)
        rule = copy.deepcopy(self.rule)
        return static, Reader(self.model, self.scorer(self.model), rule, self.priors, self.config)

    def fingerprints(self) -> Json:
        """Of θ0 and of the rule."""
        return {"model": model_fingerprint(self.priors, self.model), "rule": fingerprint(self.rule)}

    def memory_of(self) -> Json:
        """What a saved memory must agree with."""
        return self.fingerprints() | {"carry": self.carry}


def model_fingerprint(priors: Sequence[Prior], model: nn.Module | None = None) -> str:
    """SHA-256, 16 digits, over names, shapes and values of the adapted weights θ0, and of ``model``'s other ones."""
    tensors = [(prior.name, prior.theta0) for prior in priors]
    if model is not None:
        adapted = {id(a.parameter) for a in adapted_parameters(model, [prior.name for prior in priors])}
        tensors += [(name, p) for name, p in model.named_parameters() if id(p) not in adapted]
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_kit(run_path: str, rule_name: str, reset: Any) -> Kit:
    """The kit of a run directory, or of the shipped model where ``run_path`` is empty.

    Raises:
        InputError: a directory that is no finished run, a rule that it does not hold, files that do not fit together.
    """
    run = Run(run_path or SHIPPED / DEFAULT_MODEL)
    if not run.path.is_dir():
        raise InputError(f"run directory {run.path} does not exist: `dynlm train` makes one, or leave --run out")
    recover(run)
    settings, stamp = read_stamped(run.require(run.recipe, "train"))
    for name, folder in (("tokenizer", run.tokenizer), ("model", run.model)):
        found = fingerprint_files(run.require(folder, "train"))
        stamp.require(name, found, str(folder), "put back the one that belongs to the run, or train again")
    if not stamp.finished:
        tell(unfinished(run.model, "train"))
    model, scorer, params, carry = _load_model(run, settings)
    config = replace(build(ReadConfig, settings.get("read", {}), f"{run.recipe}: read"), reset=reset, params=params)
    adapted = adapted_parameters(model, config.params)
    tensors, measured = read_prior(run.require(run.prior, "tune"), adapted)
    own = stamp.fingerprints["model"]
    if measured.get("model", own) != own:
        raise InputError(f"{run.prior} belongs to another model: run `dynlm tune` again")
    priors = make_priors(adapted, tensors)
    tokenizer, rule = load_tokenizer(run.tokenizer), _load_rule(run, rule_name, stamp)
    name = run_path or f"shipped {DEFAULT_MODEL}"
    spacing, home = _known(run)
    return Kit(model, scorer, tokenizer, rule.requires_grad_(False), priors, config, name, spacing, home, carry)


class Known(TypedDict, total=False):
    """What ``kit.json`` says."""

    spacing: Spacing
    home: Positive | None


def read_prior(path: Path, adapted: Sequence[Adapted]) -> tuple[list[Tensor], Json]:
    """The static RMS of each adapted parameter, and how it was measured.

    Raises:
        InputError: numbers of other parameters, or that no RMS can be.
    """
    tensors, measured = read_tensors(path)
    layout = {a.name: a.matrix_RC for a in adapted}
    require_layout(path, tensors, layout, least=0.0, advice=": run `dynlm tune` again, with the same read.params")
    return [tensors[a.name].to(a.matrix_RC) for a in adapted], measured


def _known(run: Run) -> tuple[Spacing, float | None]:
    """(spacing, home) of a kit, from its own file or from what training wrote down."""
    path = run.path / KIT
    told = check(Known, read_json(path), str(path)) if path.is_file() else {}
    return told.get("spacing", "none"), told.get("home", best_validation(run))


def best_validation(run: Run) -> float | None:
    """The lowest validation loss that `dynlm train` logged, in nats per token; None without one."""
    try:
        lines = run.log("train").read_text(encoding="utf-8").splitlines()
        best = min(float(json.loads(line)["valid"]) for line in lines)
    except (OSError, ValueError, TypeError, KeyError):  # no log, an empty one, or one that ends within a line
        return None
    return best if 0 < best < math.inf else None


def _load_model(run: Run, settings: Json) -> tuple[nn.Module, Callable[[Any], Scorer], tuple[str, ...], str]:
    """A run's model, what makes it a scorer, the globs of what is adapted, and what it carries."""
    folder = run.require(run.model, "train")
    params = build(ReadConfig, settings.get("read", {}), f"{run.recipe}: read").params
    if is_light(folder):
        return load_light(folder), _itself, params, Kit.carry
    from dynlm.cli.adopt import load_base  # seconds of imports
    from dynlm.models.causal import scorer_for
    from dynlm.models.context import ContextConfig
    from dynlm.models.lora import LoraSettings

    context = build(ContextConfig, settings.get("context", {}), f"{run.recipe}: context")
    lora = build(LoraSettings, settings.get("lora", {"rank": 0}), f"{run.recipe}: lora")
    model, params = load_base(folder, lora, params)
    return model, lambda model: scorer_for(model, context), params, context.carry


def _itself(model: LightLSTM) -> Scorer:
    return model


def _load_rule(run: Run, name: str, stamp: Stamp) -> Rule:
    held = run.rules()
    chosen = name or next((rule for rule in RULES if rule in held), "")
    if chosen == "static":
        return Static()
    command = made_by(Method.parse(chosen or RULES[-1]).rule)
    if chosen not in held:
        there = f"it holds {', '.join(held)}" if held else f"run `dynlm {command}` with it first"
        raise InputError(f"{run.path} has no rule {chosen or RULES[-1]!r}: {there}")
    rule, made = load_rule(run.rule(chosen))
    stamp.require_own(run.rule(chosen), made)
    if made.get("finished", True) is not True:
        tell(unfinished(run.rule(chosen), command))
    return rule
