"""A recipe: every setting of a run, typed, from the defaults, a TOML file and flags, in that order."""

from __future__ import annotations

import dataclasses
import glob
import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, cast

import tyro

from dynlm.data.articles import DataConfig
from dynlm.data.tokenizers import TokenizerConfig
from dynlm.files import why_unreadable
from dynlm.inner import ReadConfig
from dynlm.kept import FLAGS, Call
from dynlm.labs.fewshot.trial import FewShotConfig
from dynlm.labs.general.train import GeneralMetaConfig
from dynlm.meta.outer import OuterConfig
from dynlm.meta.train import MetaConfig
from dynlm.meta.tune import TuneConfig
from dynlm.methods import MethodName, RuleName
from dynlm.models.context import ContextConfig
from dynlm.models.lora import LoraSettings
from dynlm.models.lstm import ModelConfig
from dynlm.models.train import TrainConfig
from dynlm.runs import Run
from dynlm.settings import Count, Seed, Settings, Whole, build
from dynlm.stamps import read_stamped
from dynlm.types import InputError

PACKAGE = Path(__file__).parents[1]
SHIPPED = (PACKAGE / "recipes", PACKAGE.parent / "recipes")  # in a wheel, in a checkout


@dataclass(frozen=True)
class PriorConfig(Settings):
    """The static RMS of the gradient, measured on training text."""

    tokens: Count = 65536
    """training tokens it is measured on, from the first articles of the train split"""


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """Reading held-out articles with several methods."""

    methods: tuple[MethodName, ...] = ()
    """methods to read with; without any, static, stateless and every rule that the run holds. static is the baseline of
    every gain; others are taken from the run's rules: RULE, RULE#SEED of another seed, RULE@METHOD from a learned
    start; cache is static with a neural cache, RULE+cache another method with one (tune.rules takes these names);
    stateless is static, its hidden state dropped before each segment"""
    split: Literal["train", "meta", "valid", "test"] = "valid"
    """split to read"""
    max_articles: Whole = 0
    """read only the first so many; 0 reads all"""
    gate_articles: Whole = 8
    """record what each rule's COPY, UPDATE and FLUSH do while it reads the first so many; 0 records nothing"""


@dataclass(frozen=True)
class AuditConfig(Settings):
    """Checking that every method of a run reads without leaks."""

    quick: Annotated[bool, tyro.conf.arg(aliases=["--quick"])] = False
    """read short excerpts only: a tenth of the time, and blind to what happens only after some segments"""


@dataclass(frozen=True)
class ReportConfig(Settings):
    """The report of an evaluation."""

    format: Annotated[str, tyro.conf.arg(aliases=["--format"])] = ""
    """its figures as files too, for papers: any of png, svg, pdf, as in png,svg"""
    table: Annotated[Literal["", "markdown", "latex", "csv"], tyro.conf.arg(aliases=["--table"])] = ""
    """print the results as a table to paste"""
    articles: tuple[str, ...] = ()
    """titles of the articles that are shown token by token; without any, those with the most, middle and least gain"""


@dataclass(frozen=True)
class PlanConfig(Settings):
    """Predicting what meta-training takes."""

    memory: Whole = 0
    """MiB that it may take; 0 is what the machine has available"""


@dataclass(frozen=True)
class StartConfig(Settings):
    """Learning a start θ0 of the base model from which a rule reads better."""

    method: Literal["fomaml", "reptile", "joint", "maml"] = "fomaml"
    """joint is plain training on the same text, the control"""
    rule: RuleName = "gated"
    """rule of the run that reads in the inner loop"""
    segments: Count = 48
    """segments read of each training article"""
    seed: Seed = 0
    outer: OuterConfig = field(default_factory=lambda: OuterConfig(steps=600, tasks=2, lr=5e-4, validate_every=100))


@dataclass(frozen=True)
class Recipe(Call):
    """All settings of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraSettings = field(default_factory=lambda: LoraSettings(rank=0))
    train: TrainConfig = field(default_factory=TrainConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    read: ReadConfig = field(default_factory=ReadConfig)
    context: ContextConfig = field(default_factory=ContextConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    start: StartConfig = field(default_factory=StartConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    fewshot: FewShotConfig = field(default_factory=FewShotConfig)
    general: GeneralMetaConfig = field(default_factory=GeneralMetaConfig)


FIXED_BY_TRAINING = ("data", "tokenizer", "model", "lora")
MADE_WITH = (*FIXED_BY_TRAINING, "read", "context")
"""tables that must be whole in recipe.json: a default would be another run"""


def load_recipe(path: Path) -> Recipe:
    """Return a recipe from a TOML file, which holds only what differs from the defaults.

    Raises:
        InputError: a missing file, text that is not TOML, an unknown key (with the nearest known one), a wrong type.
    """
    if reason := why_unreadable(path):
        raise InputError(f"recipe {path} {reason}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"recipe {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"recipe {path} is not TOML ({error})") from None
    for name in FLAGS:
        if name in values:
            flag = name.replace("_", "-")
            raise InputError(f"recipe {path}: {name!r} is no setting of a recipe: give --{flag} on the command line")
    return cast(Recipe, build(Recipe, values, str(path)))


def find_recipe(name: str) -> Path:
    """Return the path of a recipe: a file, or one that ships, by its name without ``.toml``.

    Raises:
        InputError: neither, with the names of those that ship.
    """
    path = Path(name)
    if path.is_file() or path.suffix == ".toml" or len(path.parts) > 1:
        return path
    known = shipped_recipes()
    if name not in known:
        raise InputError(
            f"recipe {name} does not exist: give a .toml file, or one that ships ({', '.join(sorted(known))})"
        )
    return known[name]


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that ship, by name."""
    return {found.stem: found for folder in SHIPPED for found in sorted(folder.glob("*.toml"))}


def recipe_of_run(path: Path) -> Recipe:
    """Return the settings that a run directory was made with.

    Raises:
        InputError: a file that this version of dynlm did not write, or one that lacks what the model was made with.
    """
    values, _ = read_stamped(path)
    for table in MADE_WITH:
        given, default = values.get(table), getattr(Recipe(), table)
        for f in dataclasses.fields(default):
            if not isinstance(given, dict) or f.name not in given:
                raise InputError(
                    f"{path} lacks {table}.{f.name}: it was changed, or another version of dynlm wrote it: add it "
                    f"there (the default is {getattr(default, f.name)!r}), or train again in another --run"
                )
    return cast(Recipe, build(Recipe, values, str(path)))


def require_same(recipe: Recipe, trained: Recipe) -> None:
    """Data, tokenizer, model and its low-rank weights are fixed once the base model is trained or taken up."""
    for name in FIXED_BY_TRAINING:
        now, then = getattr(recipe, name), getattr(trained, name)
        for f in dataclasses.fields(now):
            a, b = getattr(now, f.name), getattr(then, f.name)
            if a != b:
                raise InputError(
                    f"{name}.{f.name} is {a!r}, but this run's model was made with {b!r}: use another --run"
                )


def require_apart(recipe: Recipe, run: Run) -> None:
    """Refuse a corpus, tokenizer or model that lies where the run's own files are written and replaced.

    Raises:
        InputError: with the setting that names it.
    """
    names = {
        "data.source": os.path.expandvars(recipe.data.source).removeprefix("hf:"),
        "tokenizer.name": recipe.tokenizer.name,
        "model.pretrained": recipe.model.pretrained,
    }
    folder = run.path.resolve()
    for setting, name in names.items():
        for path in map(Path, glob.glob(name, recursive=True) if name else ()):
            if path.resolve().is_relative_to(folder):
                raise InputError(
                    f"{setting} is {name!r}, which lies in the run directory {run.path}, where files are replaced: "
                    f"copy it to another place, or choose another --run"
                )
