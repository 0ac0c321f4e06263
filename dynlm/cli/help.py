"""Help of one command on one screen: its own settings, a line each; ``--help-all`` is the whole of it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import textwrap
from typing import Any, get_type_hints

from dynlm.kept import FLAGS
from dynlm.stages.recipe import Recipe

SECTIONS: dict[str, tuple[str, ...]] = {
    "demo": ("data", "train", "tune", "meta"),
    "train": ("data", "tokenizer", "model", "lora", "train"),
    "tune": ("tune", "prior", "read", "context"),
    "plan": ("plan", "meta", "model", "tokenizer", "read", "context"),
    "meta-train": ("meta", "prior", "read", "context"),
    "learn-optimizer": ("general",),
    "learn-start": ("start", "prior", "read", "context"),
    "evaluate": ("evaluate", "read", "context", "report", "prior"),
    "audit": ("audit", "evaluate", "read", "context"),
    "report": ("report",),
    "few-shot": ("fewshot",),
}
EXAMPLES = {
    "demo": "dynlm demo",
    "train": "dynlm train wikitext2-cpu\n  dynlm train --run runs/mine --data.source my-articles.jsonl",
    "tune": "dynlm tune --run runs/mine --tune.rules rms cache",
    "plan": "dynlm plan wikitext2-cpu",
    "meta-train": "dynlm meta-train --run runs/mine --meta.steps 400",
    "learn-optimizer": "dynlm learn-optimizer general",
    "learn-start": "dynlm learn-start --run runs/mine --start.method fomaml",
    "evaluate": "dynlm evaluate --run runs/mine --evaluate.methods static rms gated",
    "audit": "dynlm audit --run runs/mine --quick",
    "report": "dynlm report --run runs/mine --format png,svg",
    "few-shot": "dynlm few-shot sinusoid",
}
NAME, WIDTH = 38, 110


def command_help(command: str, description: str) -> str:
    """Return the help of ``command``: usage, examples, flags, and the settings of its sections with their defaults."""
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    lines = [
        f"usage: dynlm {command} [RECIPE] [--run DIR] [--section.setting VALUE ...]",
        "",
        f"{description[0].upper()}{description[1:]}.",
        "RECIPE is a .toml file, or one that ships. Settings of a recipe or an existing run are the defaults, flags",
        "come last. `--help-all` explains every setting of every command in full.",
        "",
        "examples:",
        f"  {EXAMPLES[command]}",
        "",
        "flags:",
        *(_line(f"--{name.replace('_', '-')}", doc, default, width) for name, doc, default in _own_fields(Recipe)),
    ]
    for name in SECTIONS[command]:
        section = getattr(Recipe(), name)
        lines += ["", f"{name}: {_first(type(section).__doc__ or '')}"]
        lines += [_line(f"--{flag}", doc, default, width) for flag, doc, default in _settings(name, section)]
    return "\n".join(lines) + "\n"


def _own_fields(kind: type[Any]) -> list[tuple[str, str, Any]]:
    docs, default = field_docs(kind), kind()
    return [(name, docs.get(name, ""), getattr(default, name)) for name in ("run", *FLAGS)]


def _settings(prefix: str, config: Any) -> list[tuple[str, str, Any]]:
    docs, found = field_docs(type(config)), []
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), f"{prefix}.{f.name}"
        found += _settings(name, value) if dataclasses.is_dataclass(value) else [(name, docs.get(f.name, ""), value)]
    return [(name.replace("_", "-"), doc, value) for name, doc, value in found]


def _line(flag: str, doc: str, default: Any, width: int) -> str:
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    room = width - NAME - len(shown) - 4
    text = textwrap.shorten(" ".join(doc.split()), max(room, 24), placeholder=" …")
    return f"  {flag:<{NAME - 3}} {text} ({shown})" if shown not in ("", "False") else f"  {flag:<{NAME - 3}} {text}"


def _first(doc: str) -> str:
    return " ".join(doc.split()).split(". ")[0].rstrip(".")


def field_docs(kind: type[Any]) -> dict[str, str]:
    """Return the texts that stand below the fields of a dataclass, inherited ones included."""
    docs: dict[str, str] = {}
    for base in reversed([c for c in kind.__mro__ if dataclasses.is_dataclass(c)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                docs[ast.unparse(field.target)] = str(after.value.value)
    return {name: text for name, text in docs.items() if name in get_type_hints(kind)}
