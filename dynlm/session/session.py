"""A session: a base model with everything that reading needs, from a run directory, as shipped, or given.

A shipped folder, such as ``dynlm/shipped/wikipedia``, is laid out as a run directory; ``scripts/ship`` makes it from
one. ``light`` loads an LSTM of ``dynlm train`` without transformers, which alone takes seconds to import.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

import torch
from torch import nn

from dynlm.claim import recover
from dynlm.data.spacing import Spacing, spaced_whole
from dynlm.data.tokenizers import Tokenizer, load_tokenizer, tokenize
from dynlm.evaluation.cache import CacheConfig, CachedReader, load_cache
from dynlm.evaluation.mixture import MixedReader, load_mixture
from dynlm.evaluation.stateless import StatelessScorer
from dynlm.files import Json, read_json, read_tensors, require_layout
from dynlm.inner import InnerLoop, ReadConfig, Scorer
from dynlm.lazy import optional
from dynlm.methods import STATELESS, STATIC, Method
from dynlm.models.core import LSTMScorer, is_lstm, load_lstm
from dynlm.models.params import adapted_parameters
from dynlm.optim.base import Prior, Rule
from dynlm.optim.general import General
from dynlm.optim.handmade import Static
from dynlm.optim.hub import load
from dynlm.optim.library import load_rule
from dynlm.optim.registry import made_by, trained
from dynlm.optim.sharing import fingerprint
from dynlm.priors import make_priors
from dynlm.runs import Run
from dynlm.session.prior import read_prior
from dynlm.settings import Positive, build, check
from dynlm.stamps import Stamp, fingerprint_files, read_stamped, unfinished
from dynlm.types import Article, InputError, TokenizedArticle

SHIPPED = Path(__file__).parents[1] / "shipped"
DEFAULT_MODEL = "wikipedia"
KIT = "kit.json"  # beside a shipped run: {"spacing": of what its model was trained on, "home": see Session.home}
RULES = {"article": ("gated", "rms"), "never": ("rms", "gated")}
"""by ``read.reset``: the first that the run holds is read with; in a long stream a learned rule gains less"""
log = logging.getLogger("dynlm")
Mixed = TypeVar("Mixed", bound=MixedReader)


class StartRecord(TypedDict):
    """What a learned start says of itself; it holds more."""

    config: Json
    best_step: int


class Session:
    """A base model, its tokenizer, prior, reading settings and rules.

    Args:
        model: any module that ``scorer`` makes a scorer of.
        scorer: makes a scorer of the model, or of its copy.
        priors: of the adapted weights, or a function that measures them when they are first needed.
        config: how articles are read.
        run: the run directory that the model belongs to, whose rules are read from there.
    """

    spacing: Spacing = "none"
    """of the text that the model was trained on"""
    home: float | None = None
    """static's nats per token on validation text of the kind that the model was trained on, where that is known"""
    carry = "state"
    """what the model sees of the text before a segment: its own recurrent state, or as context.carry of a run"""

    def __init__(
        self,
        model: nn.Module,
        scorer: Callable[[Any], Scorer],
        tokenizer: Tokenizer,
        priors: Sequence[Prior] | Callable[[], Sequence[Prior]],
        config: ReadConfig,
        *,
        source: str = "",
        run: Run | None = None,
        stamp: Stamp | None = None,
    ) -> None:
        self.model, self.scorer, self.tokenizer, self.config = model, scorer, tokenizer, config
        self._priors, self.source, self.run, self.stamp = priors, source, run, stamp

    def __repr__(self) -> str:
        rules = ", ".join(["static", *self.held()])
        return f"Session({self.source!r}, {type(self.model).__name__}, rules: {rules})"

    @cached_property
    def priors(self) -> Sequence[Prior]:
        """θ0 and its static RMS, of each adapted tensor."""
        return self._priors() if callable(self._priors) else self._priors

    @property
    def still(self) -> Sequence[Prior]:
        """The priors of a reader that learns nothing: θ0 alone where its static RMS is not known yet."""
        if "priors" in vars(self) or not callable(self._priors):
            return self.priors
        adapted = adapted_parameters(self.model, self.config.params)
        return make_priors(adapted, [torch.ones_like(a.matrix_RC) for a in adapted])

    @cached_property
    def score(self) -> Scorer:
        """The scorer of the model itself."""
        return self.scorer(self.model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def held(self) -> list[str]:
        """Return the names of the rules and caches that the run holds."""
        return self.run.rules() if self.run else []

    def rule(self, name: str = "") -> Rule:
        """Return a rule by name; without one gated, or else rms; in a stream rms, or else gated.

        Raises:
            InputError: a rule that is not there, one of another model, a file that holds no whole rule.
        """
        chosen = name or next((rule for rule in RULES[self.config.reset] if rule in self.held()), "")
        if chosen in (STATIC, STATELESS):
            return Static()
        if chosen not in self.held() or self.run is None:
            raise InputError(self._without(chosen or "rms"))
        path = self.run.rule(chosen)
        rule, made = load_rule(path)
        self._require_own(path, made)
        return rule

    def _without(self, rule: str) -> str:
        """Return what is wrong where a rule is missing, and what to do."""
        make = f"run `dynlm {made_by(Method.parse(rule).rule)}` with this run directory first"
        advice = f"{self.run.rule(rule)} does not exist: {make}" if self.run else "tune one with dynlm.tune"
        held = f" (it holds {', '.join(self.held())})" if self.held() else ""
        return f"{self.source} has no rule {rule!r}{held}: {advice}"

    def reader(self, rule: Rule, config: ReadConfig | None = None, priors: Sequence[Prior] | None = None) -> InnerLoop:
        """Return a reader of the model itself with ``rule``."""
        return InnerLoop(self.model, self.score, rule.to(self.device), priors or self.priors, config or self.config)

    def method(self, name: str) -> InnerLoop:
        """Return the reader of a method: RULE, or RULE@START with a start of ``learn-start``.

        ``cache`` and METHOD+cache put a neural cache beside static reading or beside METHOD; METHOD+mix weighs what
        trained weights, adapted weights and cache predict; ``stateless`` is static reading that carries nothing from
        segment to segment.

        Raises:
            InputError: a method whose rule, cache or start is not there or belongs to another model.
        """
        method = Method.parse(name)
        if method.mix:
            mixed, path = self.mixed(method, MixedReader), self.read_out(name)
            mixed.mixture = load_mixture(path, mixed.still is not None, mixed.cache is not None).to(self.device)
            return mixed
        if method.cache:
            return CachedReader.beside(self.method(str(method.inner)), self._cache(name))
        rule = self.rule(str(replace(method, start="")))
        priors = self._started(rule, method.start) if method.start else self.priors
        score = StatelessScorer(self.score) if method.rule == STATELESS else self.score
        return InnerLoop(self.model, score, rule.to(self.device), priors, self.config)

    def mixed(self, method: Method, kind: type[Mixed]) -> Mixed:
        """Return a reader of what ``method`` mixes, without the mixture's network."""
        inner = method.inner
        cache = self._cache(str(inner)) if inner.cache else None
        return kind.over(self.method(str(replace(inner, cache=False))), self.scorer, cache)

    def _cache(self, name: str) -> CacheConfig:
        return load_cache(self.read_out(name))

    def read_out(self, name: str) -> Path:
        """Return the file of a cache or mixture, after it is seen to be one of this model.

        Raises:
            InputError: it is not there, or belongs to another model.
        """
        path = self._file("rule", name, f"tune --tune.rules {name}")
        self._require_own(path, read_tensors(path)[1].get("made", {}))
        return path

    def _file(self, kind: Literal["rule", "start"], name: str, command: str) -> Path:
        if self.run is None:
            raise InputError(f"{self.source} is no run directory: {name!r} comes from `dynlm {command}` in one")
        return self.run.require(getattr(self.run, kind)(name), command)

    def _started(self, rule: Rule, start: str) -> list[Prior]:
        """Return the priors of a learned start; ``rule`` becomes what was learned together with it."""
        path = self._file("start", start, "learn-start")
        tensors, made = read_tensors(path)
        self._require_own(path, made)
        check(StartRecord, made, str(path))
        layout = {prior.name: prior.theta0 for prior in self.priors}
        if any(key.startswith("rule.") for key in tensors):
            layout |= {f"rule.{name}": value for name, value in rule.state_dict().items()}
        require_layout(path, tensors, layout, advice=": learn it again")
        phi = {key.removeprefix("rule."): value for key, value in tensors.items() if key.startswith("rule.")}
        if phi and rule.name in trained():  # learned together with this start
            rule.load_state_dict(phi)
        return [p._replace(theta0=tensors[p.name].to(p.theta0)) for p in self.priors]

    def _require_own(self, path: Path, made: Json) -> None:
        """Refuse a rule, cache or start that says that it was made with another base model; note an unfinished one."""
        if self.stamp:
            self.stamp.require_own(path, made)
        if made.get("finished", True) is not True:
            log.warning(unfinished(path, "learn-optimizer" if path.stem == General.name else "meta-train"))

    def spaced(self, article: Article) -> Article:
        """Return an article in the spacing that the model was trained on."""
        return replace(article, text=spaced_whole(article.text)) if self.spacing == "wikitext" else article

    def tokenize(self, articles: Iterable[Article]) -> list[TokenizedArticle]:
        """Return articles as token ids, in the model's spacing; words and bytes are those of the articles as given."""
        return [
            replace(tokens, n_words=article.n_words, n_bytes=article.n_bytes)
            for article in articles
            for tokens in tokenize(self.tokenizer, [self.spaced(article)])
        ]

    def fingerprints(self, rule: Rule) -> Json:
        """Return the fingerprints of θ0 and of ``rule``."""
        return {"model": model_fingerprint(self.still, self.model), "rule": fingerprint(rule)}


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


def open_run(run: Run) -> tuple[Json, Stamp]:
    """Return (settings, stamp) of a run directory, after its tokenizer and model are seen to be those it was made with.

    Raises:
        InputError: no run directory, one without a trained model, or one whose files do not fit together.
    """
    if not run.path.is_dir():
        raise InputError(f"run directory {run.path} does not exist: `dynlm train` makes one", setting="run")
    recover(run)
    settings, stamp = read_stamped(run.require(run.recipe, "train"))
    for name, folder in (("tokenizer", run.tokenizer), ("model", run.model)):
        found = fingerprint_files(run.require(folder, "train"))
        stamp.require(name, found, str(folder), "put back the one that belongs to the run, or train again")
    if not stamp.finished:
        log.warning(unfinished(run.model, "train"))
    return settings, stamp


def load_session(
    path: str | Path = "", reset: Literal["article", "never"] = "article", *, light: bool = False
) -> Session:
    """Return the session of a run directory, of a shipped model by its name, or of the default one.

    Raises:
        InputError: a directory that is no finished run, files that do not fit together.
    """
    name = str(path)
    if not name or (name in shipped_models() and not Path(name).is_dir()):
        path, name = SHIPPED / (name or DEFAULT_MODEL), f"shipped {name or DEFAULT_MODEL}"
    run = Run(path)
    settings, stamp = open_run(run)
    model, scorer, params, carry = _load_model(run, settings, light)
    config = replace(build(ReadConfig, settings.get("read", {}), f"{run.recipe}: read"), reset=reset, params=params)
    adapted = adapted_parameters(model, config.params)
    tensors, measured = read_prior(run.require(run.prior, "tune"), adapted)
    own = stamp.fingerprints["model"]
    if measured.get("model", own) != own:
        raise InputError(f"{run.prior} belongs to another model: run `dynlm tune` again")
    priors = make_priors(adapted, tensors)
    session = Session(model, scorer, load_tokenizer(run.tokenizer), priors, config, source=name, run=run, stamp=stamp)
    session.spacing, session.home = _known(run)
    session.carry = carry
    return session


def shipped_models() -> list[str]:
    """Return the names of the models that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/recipe.json"))


def is_run(source: str | Path) -> bool:
    """Return whether ``source`` is a run directory or the name of a shipped model."""
    return not str(source) or (Path(source) / "recipe.json").is_file() or str(source) in shipped_models()


def loaded_rule(rule: str | Rule, session: Session) -> str | Rule:
    """Return the rule itself where its name is none of the session's: a file, a folder, or a name of the hub."""
    if isinstance(rule, Rule) or rule in ("", "static", *session.held()):
        return rule
    if not Path(rule).exists() and "/" not in rule:
        return rule  # the session says what it holds
    return load(rule)


class Known(TypedDict, total=False):
    """What ``kit.json`` says."""

    spacing: Spacing
    home: Positive | None


def _known(run: Run) -> tuple[Spacing, float | None]:
    """Return (spacing, home) of a kit, from its own file or from what training wrote down."""
    path = run.path / KIT
    told = check(Known, read_json(path), str(path)) if path.is_file() else {}
    return told.get("spacing", "none"), told.get("home", best_validation(run))


def best_validation(run: Run) -> float | None:
    """Return the lowest validation loss that `dynlm train` logged, in nats per token; None without one."""
    try:
        lines = run.log("train").read_text(encoding="utf-8").splitlines()
        best = min(float(json.loads(line)["valid"]) for line in lines)
    except (OSError, ValueError, TypeError, KeyError):  # no log, an empty one, or one that ends within a line
        return None
    return best if 0 < best < math.inf else None


def _load_model(
    run: Run, settings: Json, light: bool
) -> tuple[nn.Module, Callable[[Any], Scorer], tuple[str, ...], str]:
    """Return a run's model, what makes it a scorer, the globs of what is adapted, and what it carries."""
    folder = run.require(run.model, "train")
    params = build(ReadConfig, settings.get("read", {}), f"{run.recipe}: read").params
    recurrent = is_lstm(folder)
    if light and recurrent:
        return load_lstm(folder), LSTMScorer, params, Session.carry
    with optional("a model of transformers"):
        from dynlm.models.causal import scorer_for  # seconds of imports
        from dynlm.models.context import ContextConfig
        from dynlm.models.lora import LoraSettings
        from dynlm.models.ready import load_base

    context = build(ContextConfig, settings.get("context", {}), f"{run.recipe}: context")
    lora = build(LoraSettings, settings.get("lora", {"rank": 0}), f"{run.recipe}: lora")
    model, params = load_base(folder, lora, params, "cuda" if torch.cuda.is_available() else "cpu")
    carry = Session.carry if recurrent else context.carry
    return model, lambda model: scorer_for(model, context), params, carry
