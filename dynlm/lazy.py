"""Public names that load their modules when first used, and libraries that only an extra of dynlm brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module

EXTRAS = {
    **dict.fromkeys(("transformers", "tokenizers", "huggingface_hub", "accelerate", "sentencepiece"), "lm"),
    **dict.fromkeys(("datasets", "pyarrow", "tqdm", "tyro"), "lm"),
    "optuna": "tune",
    **dict.fromkeys(("matplotlib", "jinja2"), "report"),
    "peft": "lora",
    "gguf": "gguf",
}
"""the extra that brings a library, by the name that is imported"""


def lazy(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], object]:
    """Return the ``__getattr__`` of a package (PEP 562): ``homes`` has its modules, and what each of them gives."""

    def find(name: str) -> object:
        for module, names in homes.items():
            if name in names or module == f"{package}.{name}":
                with optional(f"{package}.{name}"):
                    found = import_module(module)
                return getattr(found, name) if name in names else found
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


@contextmanager
def optional(what: str) -> Iterator[None]:
    """Inside, a library that is not installed is one line: ``what`` needs it, and the extra of dynlm that brings it.

    Raises:
        InputError: instead of ModuleNotFoundError, for a library of an extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in EXTRAS:
            raise
        from dynlm.types import InputError  # torch, which importing dynlm does not import

        advice = f'pip install "dynlm[{EXTRAS[library]}]", or dynlm[all]'
        raise InputError(f"{what} needs {library}, which is not installed: {advice}") from None
