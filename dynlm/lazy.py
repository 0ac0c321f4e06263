"""Public names that load their modules when first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module


def lazy(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], object]:
    """Return the ``__getattr__`` of a package (PEP 562): ``homes`` has its modules, and what each of them gives."""

    def find(name: str) -> object:
        for module, names in homes.items():
            if name in names:
                return getattr(import_module(module), name)
            if module == f"{package}.{name}":
                return import_module(module)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find
