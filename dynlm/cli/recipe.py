"""A recipe: every setting of a run, typed, from the defaults, a TOML file and flags, in that order."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_type_hints

import tyro

from dynlm.adapt import ReadConfig
from dynlm.data.articles import DataConfig
from dynlm.data.fewshot import TasksConfig
from dynlm.data.tokenizers import TokenizerConfig
from dynlm.meta.outer import OuterConfig
from dynlm.meta.tasks import GeneralMetaConfig
from dynlm.meta.train import MetaConfig
from dynlm.meta.tune import TuneConfig
from dynlm.models.context import ContextConfig
from dynlm.models.lora import LoraSettings
from dynlm.models.lstm import ModelConfig
from dynlm.models.train import TrainConfig
from dynlm.stamps import read_stamped
from dynlm.types import InputError

PACKAGE = Path(__file__).parents[1]
SHIPPED = (PACKAGE / "recipes", PACKAGE.parent / "recipes")  # in a wheel, in a checkout


@dataclass(frozen=True)
class PriorConfig:
    """The static RMS of the gradient, measured on training text."""

    tokens: int = 65536
    """training tokens it is measured on, from the first articles of the train split"""


@dataclass(frozen=True)
class EvaluateConfig:
    """Reading held-out articles with several methods."""

    methods: tuple[str, ...] = ()
    """methods to read with; without any, static, stateless and every rule that the run holds. static is the baseline of
    every gain; others are taken from the run's rules: RULE, RULE#SEED of another seed, RULE@METHOD from a learned
    start; cache is static with a neural cache, RULE+cache another method with one (tune.rules takes these names);
    stateless is static, its hidden state dropped before each segment"""
    split: str = "valid"
    """split to read"""
    max_articles: int = 0
    """read only the first so many; 0 reads all"""
    gate_articles: int = 8
    """record what each rule's COPY, UPDATE and FLUSH do while it reads the first so many; 0 records nothing"""


@dataclass(frozen=True)
class AuditConfig:
    """Checking that every method of a run reads without leaks."""

    quick: Annotated[bool, tyro.conf.arg(aliases=["--quick"])] = False
    """read short excerpts only: a tenth of the time, and blind to what happens only after some segments"""


@dataclass(frozen=True)
class ReportConfig:
    """The report of an evaluation."""

    format: Annotated[str, tyro.conf.arg(aliases=["--format"])] = ""
    """its figures as files too, for papers: any of png, svg, pdf, as in png,svg"""
    articles: tuple[str, ...] = ()
    """titles of the articles that are shown token by token; without any, those with the most, middle and least gain"""


@dataclass(frozen=True)
class FewShotConfig:
    """Learning a start for few-shot tasks with several methods, and comparing them with a jointly trained start."""

    methods: tuple[str, ...] = ("joint", "maml", "fomaml", "reptile", "reptile-serial", "imaml")
    """methods to compare; joint is the baseline"""
    width: int = 40
    """hidden units of the MLP's two layers (sinusoid), or channels of the four convolutions (characters)"""
    normalise: Literal["batch", "image"] = "batch"
    """characters: statistics over the images scored together (transductive), or over each image alone"""
    inner_lr: float = 0.02
    """learning rate of the inner loop while the start is learned (maml, fomaml, reptile)"""
    inner_steps: int = 8
    """updates on the support while the start is learned (maml, fomaml)"""
    proximal: float = 1.0
    """imaml: λ, the pull of the inner loop towards θ0"""
    proximal_lr: float = 0.01
    """imaml: learning rate of the inner loop while the start is learned"""
    proximal_steps: int = 32
    """imaml: updates that solve the proximal problem while the start is learned"""
    reptile_steps: int = 32
    """reptile: updates on minibatches of the whole task"""
    reptile_batch: int = 10
    """reptile: examples of such a minibatch"""
    test_steps: int = 32
    """updates on the support in validation and test, for every method"""
    rates: tuple[float, ...] = (0.005, 0.007, 0.01, 0.014, 0.02, 0.028, 0.04, 0.056, 0.08)
    """inner rates that are tried on validation tasks for each method, the joint start included"""
    valid_tasks: int = 60
    """tasks for validation while training, and as many others to choose the rate with"""
    test_tasks: int = 600
    """test tasks, the same for every method"""
    seed: int = 0
    """of the random start and of all tasks"""
    tasks: TasksConfig = field(default_factory=TasksConfig)
    outer: OuterConfig = field(default_factory=OuterConfig)


@dataclass(frozen=True)
class PlanConfig:
    """Predicting what meta-training takes."""

    memory: int = 0
    """MiB that it may take; 0 is what the machine has available"""


@dataclass(frozen=True)
class StartConfig:
    """Learning a start θ0 of the base model from which a rule reads better."""

    method: Literal["fomaml", "reptile", "joint", "maml"] = "fomaml"
    """joint is plain training on the same text, the control"""
    rule: str = "gated"
    """rule of the run that reads in the inner loop"""
    segments: int = 48
    """segments read of each training article"""
    seed: int = 0
    outer: OuterConfig = field(default_factory=lambda: OuterConfig(steps=600, tasks=2, lr=5e-4, validate_every=100))


@dataclass(frozen=True)
class Recipe:
    """All settings of a run."""

    run: str = "runs/default"
    """the run directory: everything a command writes goes there"""
    overwrite: bool = False
    """replace what an earlier run of the same command left"""
    resume: bool = False
    """go on where the command stopped: from its checkpoint, or after what it has finished"""
    threads: int = 0
    """threads to compute with; 0: one for small models, else chosen by a measurement of some 50 ms"""
    quiet: bool = False
    """results only: no progress"""
    json: bool = False
    """print one JSON object with the figures to standard output; everything else goes to standard error"""
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


FLAGS = ("overwrite", "resume", "threads", "quiet", "json")
"""settings of one call: never of a recipe, and not kept in a run's recipe.json"""
FIXED_BY_TRAINING = ("data", "tokenizer", "model", "lora")
MADE_WITH = (*FIXED_BY_TRAINING, "read", "context")
"""tables that must be whole in recipe.json: a default would be another run"""


def load_recipe(path: Path) -> Recipe:
    """A recipe from a TOML file, which holds only what differs from the defaults.

    Raises:
        InputError: a missing file, text that is not TOML, an unknown key (with the nearest known one), a wrong type.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"recipe {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise InputError(f"recipe {path} is not TOML ({error})") from None
    for name in FLAGS:
        if name in values:
            raise InputError(f"recipe {path}: {name!r} is no setting of a recipe: give --{name} on the command line")
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


def build(kind: type[Any], values: Mapping[str, Any], where: str, default: Any = None) -> Any:
    """A (nested) config dataclass from plain values, every key and type checked; the rest is ``default``'s."""
    hints = get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    default, settings = default if default is not None else kind(), {}
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f": did you mean {close[0]!r}?" if close else f": known are {', '.join(known)}"
            raise InputError(f"{where}: unknown key {key!r}{hint}")
        settings[key] = _check(hints[key], value, f"{where}: {key}", getattr(default, key))
    return dataclasses.replace(default, **settings)


def _check(hint: Any, value: Any, where: str, default: Any = None) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(f"{where} is {value!r}: expected a [table] of settings")
        return build(hint, value, where, default) if isinstance(hint, type) else value
    arguments: tuple[Any, ...] = getattr(hint, "__args__", ())
    if getattr(hint, "__origin__", None) is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where} is {value!r}: expected a list")
        return tuple(_check(arguments[0], item, where) for item in value)
    if arguments:  # Literal
        if value not in arguments:
            raise InputError(f"{where} is {value!r}: expected one of {', '.join(map(repr, arguments))}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise InputError(f"{where} is {value!r} ({type(value).__name__}): expected {hint.__name__}")
    return value


def recipe_of_run(path: Path) -> Recipe:
    """The settings that a run directory was made with.

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


def saved_settings(recipe: Recipe) -> dict[str, Any]:
    """Return what a run keeps of a recipe: all but the flags of the call."""
    return {name: value for name, value in dataclasses.asdict(recipe).items() if name not in FLAGS}


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
