"""The embedded corpus: the English documentation that every Python carries.

One article a topic of ``pydoc_data.topics`` and one a standard-library module (its docstrings in source order). Sources
are parsed with ``ast``; nothing is imported or executed. The text differs a little between Python versions.
"""

from __future__ import annotations

import ast
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from dynlm.types import Article, InputError

MIN_CHARACTERS = 1000  # shorter modules hold too little to learn from while reading
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}


def load_articles(root: Path | None = None) -> list[Article]:
    """Documentation topics and modules with at least ``MIN_CHARACTERS`` of docstrings, in a fixed order.

    Raises:
        InputError: when ``root`` (default: this Python's library folder) carries no such documentation.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    articles = [*_topics(root / "pydoc_data" / "topics.py"), *_modules(root)]
    if not articles:
        raise InputError(
            f"no documentation found in {root}: this Python ships without its sources; name another source"
        )
    return articles


def load_topics(root: Path | None = None) -> list[Article]:
    """The documentation topics alone, which are found in a fraction of a second; none where this Python has none."""
    return list(_topics((root or Path(sysconfig.get_path("stdlib"))) / "pydoc_data" / "topics.py"))


def _topics(path: Path) -> Iterator[Article]:
    tree = _parse(path)
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            for topic, text in sorted(ast.literal_eval(node.value).items()):
                if len(text) >= MIN_CHARACTERS:
                    yield Article(id=f"topic:{topic}", title=topic, text=_terminated(text))


def _modules(root: Path) -> Iterator[Article]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).with_suffix("")
        if SKIPPED.intersection(relative.parts):
            continue
        tree = _parse(path)
        if tree is None:
            continue
        name = ".".join(part for part in relative.parts if part != "__init__")
        text = "\n\n".join(_docstrings(tree, name))
        if len(text) >= MIN_CHARACTERS:
            yield Article(id=f"module:{name}", title=name, text=_terminated(text))


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    """``name`` and docstring of a module, then of its classes and functions, in source order."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield f"{name}\n{inspect.cleandoc(docstring)}"
        for child in node.body:
            yield from _docstrings(child, getattr(child, "name", ""))


def _parse(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None  # templates and broken samples are not documentation


def _terminated(text: str) -> str:
    """With one final newline, and without what UTF-8 cannot hold (docstrings may spell lone surrogates)."""
    return text.encode("utf-8", "replace").decode("utf-8").rstrip("\n") + "\n"
