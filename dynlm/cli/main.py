"""``dynlm COMMAND [RECIPE.toml] [--section.setting VALUE …]``."""

from __future__ import annotations

import dataclasses
import difflib
import io
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from functools import partial
from importlib import import_module, resources
from typing import TYPE_CHECKING, Any, NamedTuple

import dynlm
from dynlm import processes
from dynlm.claim import claim, recover
from dynlm.cli.launch import LAUNCHED, LOST, end_with_parent, launch
from dynlm.cli.terminal import noted, tell, usage_errors
from dynlm.files import Json
from dynlm.interrupt import Interrupted
from dynlm.lazy import optional
from dynlm.progress import hush_libraries, set_quiet
from dynlm.provenance import command as recorded
from dynlm.runs import Run
from dynlm.types import InputError

if TYPE_CHECKING:
    from dynlm.stages.recipe import Recipe


class Command(NamedTuple):
    """A command: MODULE.FUNCTION in dynlm, imported when it runs, as `dynlm read` needs no transformers."""

    function: str
    description: str
    resumes: bool = False
    """``--resume`` goes on from its checkpoint or after what it has finished"""
    begins: bool = False
    """makes the run directory where there is none"""
    trains: bool = False
    """logs its losses to the trackers of ``--log-with``"""
    table: str = ""
    """the one table of the recipe that the function takes after the call's flags; without it, the whole recipe"""
    shared: bool = False
    """``--workers``, torchrun and accelerate launch spread its work over processes"""


COMMANDS: dict[str, Command] = {
    "read": Command("cli.read.main", "read your own texts and see, token by token, what learning while reading gains"),
    "train": Command(
        "stages.train.train",
        "train tokenizer and base model, or copy a ready one into the run",
        True,
        True,
        True,
        shared=True,
    ),
    "tune": Command("stages.tune.tune", "tune the hand-made rules on the meta split", True, shared=True),
    "plan": Command("stages.plan.plan", "predict memory and time of meta-training; needs no data"),
    "meta-train": Command(
        "stages.run.meta_training", "train a learned rule, from a tuned hand-made one", True, trains=True, shared=True
    ),
    "learn-optimizer": Command(
        "labs.general.command.learn_optimizer",
        "meta-train the general-purpose optimizer on small training tasks",
        True,
        True,
        True,
        "general",
        shared=True,
    ),
    "learn-start": Command(
        "stages.start.learn_start_stage",
        "learn a start θ0 of the base model for reading with a rule",
        True,
        trains=True,
        shared=True,
    ),
    "evaluate": Command(
        "stages.evaluate.evaluate", "read held-out articles with every method and write the report", True, shared=True
    ),
    "audit": Command("stages.audit.audit_stage", "check that every method of a run reads without leaks and adds up"),
    "report": Command("stages.evaluate.report", "write the report of an evaluation again"),
    "few-shot": Command(
        "labs.fewshot.command.few_shot",
        "learn a start for few-shot tasks with several methods and compare them",
        True,
        True,
        table="fewshot",
        shared=True,
    ),
    "demo": Command(
        "cli.main.demo",
        "run the whole chain on the documentation that Python carries, no download",
        begins=True,
        trains=True,
    ),
}
USAGE = """usage: dynlm COMMAND [RECIPE] [--run DIR] [--section.setting VALUE ...]
       dynlm read FILE... [--html FILE]
       dynlm report RUN RUN [--html FILE]

commands:
{commands}
  env             print versions and what was found on this machine, for bug reports

`dynlm COMMAND --help` lists the settings of a command, `--help-all` all settings in full. RECIPE is a .toml file, or
one that ships ({recipes}).
Without a recipe, the settings of an existing --run are the defaults; flags come last.
Shell completion: `dynlm COMMAND --tyro-print-completion bash` (zsh, tcsh). Exit code 2: bad input, in one line.
"""
DEMO = "demo.toml"
OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory")
"""what torch says, whose errors are no MemoryError on a CPU"""
ASKED = re.compile(r"tried to allocate [\d.]+ \w+", re.IGNORECASE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    if arguments[:1] in (["--version"], ["-V"]):
        print(f"dynlm {dynlm.__version__}")
        return 0
    hush_libraries()
    try:
        with optional(f"`{' '.join(['dynlm', *arguments[:1]])}`"):
            if not arguments or arguments[0] in ("-h", "--help"):
                print(_usage())
                return 0 if arguments else 2
            with processes.joined():
                return _run(arguments[0], arguments[1:])
    except processes.LostProcess:
        if LAUNCHED not in os.environ:
            tell("another process of this command has ended: --resume goes on with what was kept")
        return LOST
    except InputError as error:
        tell(f"{error}{_flag(arguments[:1], error.setting)}")
        return 2
    except OSError as error:
        tell(f"{error.strerror or error} ({error.filename}): nothing was replaced")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        asked = ASKED.search(str(error))
        tell(f"there is not enough memory{f' ({asked[0]})' if asked else ''}: lower the sizes in the settings")
        return 2
    except Interrupted as error:
        tell(str(error))
        return 128 + error.signal
    except KeyboardInterrupt:
        tell("interrupted: what was finished is whole, the rest was not saved")
        return 130


READ_FLAGS = {
    "context.carry": "carry",
    "lora.rank": "lora-rank",
    "overwrite": "overwrite",
    "prior_text": "prior-text",
    "rule": "rule",
    "run": "run",
    "save_memory": "save-memory",
}
"""settings that `dynlm read`, which has no recipe, has a flag for"""


def _flag(command: Sequence[str], setting: str) -> str:
    """Return the flag that sets what an error names, in brackets; nothing where the command has none."""
    name = READ_FLAGS.get(setting, "") if command == ["read"] else setting.replace("_", "-")
    return f" (--{name})" if name else ""


def _usage() -> str:
    from dynlm.stages.recipe import shipped_recipes

    commands = "\n".join(f"  {name:<15} {command.description}" for name, command in COMMANDS.items())
    return USAGE.format(commands=commands, recipes=", ".join(shipped_recipes()))


def _run(name: str, arguments: list[str]) -> int:
    """Run a command; returns the exit code. Other processes of it begin when the main one has put the run in order."""
    if name == "env":
        _print_environment("--json" in arguments)
        return 0
    if name == "report" and len(arguments) > 1 and not any(word.startswith("-") for word in arguments[:2]):
        from dynlm.cli import versus

        versus.main(arguments)  # two runs: has settings of its own
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(COMMANDS)}, env"
        raise InputError(f"unknown command {name!r}: {hint}")
    if name == "read":  # has settings of its own
        stage(name)(arguments)
        return 0
    end_with_parent()
    if {"-h", "--help"} & set(arguments):
        from dynlm.cli.help import command_help

        print(command_help(name, COMMANDS[name].description), end="")
        return 0
    if not processes.is_main():
        import_module("dynlm.stages.recipe")  # takes seconds, while the main process reads its settings
        processes.barrier()
    recipe = parse(name, arguments)
    command, run = COMMANDS[name], Run(recipe.run)
    _require_sharing(name, recipe)
    if recipe.resume and not command.resumes:
        raise InputError(f"`dynlm {name}` has nothing to resume: leave --resume out, or add --overwrite to start again")
    if recipe.log_with and not command.trains:
        raise InputError(f"`dynlm {name}` trains nothing that a tracker could follow: leave --log-with out")
    if recipe.workers > 1 and processes.launched() == 1:
        return launch([name, *arguments], recipe.workers)
    if not processes.is_main():
        recipe = dataclasses.replace(recipe, quiet=True, log_with=())
    set_quiet(recipe.quiet)
    with _printing(recipe), noted(partial(print, flush=True)):
        print(f"run directory: {recipe.run}", flush=True)
        claimed = nullcontext() if name == "plan" else claim(run, begins=command.begins, writes=name != "audit")
        with recorded(shlex.join(["dynlm", name, *arguments]), recipe), claimed:
            if processes.is_main():
                processes.barrier()
            processes.require_alike(dataclasses.replace(recipe, quiet=False, log_with=(), json=False), "recipe")
            figures = stage(name)(recipe) or {}
    if recipe.json and processes.is_main():
        print(json.dumps({"command": name, "run": recipe.run, **figures}, ensure_ascii=False, allow_nan=False))
    return 0


def _require_sharing(name: str, recipe: Recipe) -> None:
    """Refuse processes that have nothing to share, and two ways of starting them."""
    if max(recipe.workers, processes.launched()) > 1 and not COMMANDS[name].shared:
        raise InputError(f"`dynlm {name}` works in one process: start it with --workers 1 and without a launcher")
    if processes.launched() not in (1, recipe.workers) and recipe.workers > 1:
        raise InputError(
            f"--workers {recipe.workers}: a launcher has started {processes.launched()}: leave --workers out"
        )


def _printing(recipe: Recipe) -> AbstractContextManager[object]:
    """Inside, what is printed goes to standard error where that is for JSON, and nowhere but in the main process."""
    if not processes.is_main():
        return redirect_stdout(io.StringIO())
    return redirect_stdout(sys.stderr) if recipe.json else nullcontext()


def stage(command: str) -> Any:
    """Return the function of a command: takes its settings, and returns its figures where it has some."""
    module, _, name = COMMANDS[command].function.rpartition(".")
    function, table = getattr(import_module(f"dynlm.{module}"), name), COMMANDS[command].table
    return (lambda recipe: function(recipe, getattr(recipe, table))) if table else function


def parse(command: str, arguments: Sequence[str]) -> Recipe:
    """Defaults, then the recipe file (or the run's own settings), then flags."""
    from dynlm.stages.recipe import Recipe, find_recipe, load_recipe, recipe_of_run

    flags = ["--help" if flag == "--help-all" else flag for flag in arguments]
    if command == "demo":
        with resources.as_file(resources.files("dynlm.cli") / DEMO) as path:
            return _flags(command, flags, load_recipe(path))
    if flags and not flags[0].startswith("-"):
        return _flags(command, flags[1:], load_recipe(find_recipe(flags[0])))
    recipe = _flags(command, flags, Recipe())
    run = Run(recipe.run)
    recover(run)
    if command == "train" and recipe.resume and run.retraining.recipe.is_file():
        return _flags(command, flags, dataclasses.replace(recipe_of_run(run.retraining.recipe), run=str(run.path)))
    if not run.recipe.is_file():
        return recipe
    return _flags(command, flags, dataclasses.replace(recipe_of_run(run.recipe), run=str(run.path)))


def _flags(command: str, flags: Sequence[str], default: Recipe) -> Recipe:
    """Return the recipe with the flags in it."""
    import tyro

    from dynlm.stages.recipe import Recipe

    description = COMMANDS[command].description
    with usage_errors():
        return tyro.cli(Recipe, prog=f"dynlm {command}", args=list(flags), default=default, description=description)


def _print_environment(as_json: bool) -> None:
    from dynlm.cli.env import environment

    found = environment()
    print(json.dumps(found) if as_json else "\n".join(f"{name + ':':<20} {value}" for name, value in found.items()))


def demo(recipe: Recipe) -> Json:
    """Train, tune, meta-train, evaluate and report, each in turn; the demo's own run is made again."""
    started, run, figures = time.perf_counter(), Run(recipe.run), Json()
    if run.recipe.exists() and not recipe.overwrite:
        if not run.demo.is_file():
            raise InputError(f"{run.path} exists and is no run of the demo: choose another --run")
        print(f"{run.path} is an earlier run of the demo: it is replaced")
        recipe = dataclasses.replace(recipe, overwrite=True)
    for name in ("train", "tune", "meta-train", "evaluate"):
        print(f"\n── {name}: {COMMANDS[name].description} ({time.perf_counter() - started:.0f} s)", flush=True)
        figures[name] = (stage(name)(recipe, demo=True) if name == "train" else stage(name)(recipe)) or {}
    print(f"done in {(time.perf_counter() - started) / 60:.1f} minutes on {os.cpu_count()} cores")
    return figures


if __name__ == "__main__":
    sys.exit(main())
