"""``dynlm COMMAND [RECIPE.toml] [--section.setting VALUE …]``."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynlm.cli.terminal import tell
from dynlm.runs import Run
from dynlm.types import InputError

if TYPE_CHECKING:
    from dynlm.cli.recipe import Recipe

# MODULE.FUNCTION, imported when its command runs: `dynlm read` needs no transformers, which takes seconds.
COMMANDS: dict[str, tuple[str, str]] = {
    "read": ("read.main", "read your own texts and see, token by token, what learning while reading gains"),
    "train": ("stages.train", "train tokenizer and base model, or take up a ready one"),
    "tune": ("stages.tune", "tune the hand-made rules on the meta split"),
    "plan": ("plan.plan", "predict memory and time of meta-training; needs no data"),
    "meta-train": ("stages.meta_training", "train a learned rule, from a tuned hand-made one"),
    "learn-optimizer": ("general.learn_optimizer", "meta-train the general-purpose optimizer on small training tasks"),
    "learn-start": ("start.learn_start_stage", "learn a start θ0 of the base model for reading with a rule"),
    "evaluate": ("stages.evaluate", "read held-out articles with every method and write the report"),
    "audit": ("audit.audit_stage", "check that every method of a run reads without leaks and adds up"),
    "report": ("stages.report", "write the report of an evaluation again"),
    "few-shot": ("fewshot.few_shot", "learn a start for few-shot tasks with several methods and compare them"),
}
USAGE = """usage: dynlm COMMAND [RECIPE.toml] [--run DIR] [--section.setting VALUE ...]
       dynlm read FILE... [--html FILE]

commands:
  demo            the whole chain on the documentation that Python carries, no download
{commands}
`dynlm COMMAND --help` lists every setting with its unit and default. Without a recipe, the settings of an existing
--run are taken up; flags come last. Every command prints its run directory. Exit code 2: bad input, told in one line.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:<15} {text}" for name, (_, text) in COMMANDS.items())))
        return 0 if arguments else 2
    try:
        _run(arguments[0], arguments[1:])
    except InputError as error:
        tell(str(error))
        return 2
    except OSError as error:
        tell(f"{error.strerror or error} ({error.filename}): nothing was replaced")
        return 2
    except KeyboardInterrupt:
        print(
            "dynlm: interrupted; finished files are whole, --resume goes on from the last checkpoint", file=sys.stderr
        )
        return 130
    return 0


def _run(command: str, arguments: list[str]) -> None:
    if command == "demo":
        with resources.as_file(resources.files("dynlm.cli") / "demo.toml") as path:
            demo(parse(command, [str(path), *arguments]))
        return
    if command not in COMMANDS:
        raise InputError(f"unknown command {command!r}: choose one of demo, {', '.join(COMMANDS)}")
    if command == "read":  # has settings of its own
        stage(command)(arguments)
        return
    recipe = parse(command, arguments)
    print(f"run directory: {recipe.run}")
    stage(command)(recipe)


def stage(command: str) -> Any:
    """The function of a command."""
    module, _, name = COMMANDS[command][0].partition(".")
    return getattr(import_module(f"dynlm.cli.{module}"), name)


def parse(command: str, arguments: Sequence[str]) -> Recipe:
    """Defaults, then the recipe file (or the run's own settings), then flags."""
    import tyro

    from dynlm.cli.recipe import Recipe, load_recipe, recipe_of_run

    flags = list(arguments)
    default = Recipe()
    if flags and not flags[0].startswith("-"):
        default = load_recipe(Path(flags.pop(0)))
    elif "--run" in flags[:-1]:
        run = Run(flags[flags.index("--run") + 1])
        if run.recipe.is_file():
            default = recipe_of_run(run.recipe)
            default = dataclasses.replace(default, run=str(run.path))
    return tyro.cli(Recipe, prog=f"dynlm {command}", args=flags, default=default, description=_description(command))


def _description(command: str) -> str:
    return COMMANDS[command][1] if command in COMMANDS else "the whole chain on Python's own documentation"


def demo(recipe: Recipe) -> None:
    """Train, tune, meta-train, evaluate and report, each in turn."""
    started = time.perf_counter()
    print(f"run directory: {recipe.run}")
    if Run(recipe.run).path.exists() and not recipe.overwrite:
        recipe = dataclasses.replace(recipe, overwrite=True)  # the demo's own directory, made to be made again
    for name in ("train", "tune", "meta-train", "evaluate"):
        print(f"\n── {name}: {COMMANDS[name][1]} ({time.perf_counter() - started:.0f} s)", flush=True)
        stage(name)(recipe)
    print(f"done in {(time.perf_counter() - started) / 60:.1f} minutes on {os.cpu_count()} cores")


if __name__ == "__main__":
    sys.exit(main())
