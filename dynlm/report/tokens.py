"""Text token by token, coloured by gain: what both pages show under their figures."""

from __future__ import annotations

import html
from collections.abc import Sequence

from dynlm.report.shades import label, shade


def tokens(texts: Sequence[str], static_T: Sequence[float], adapted_T: Sequence[float]) -> str:
    """One article as HTML; losses in nats."""
    return "".join(map(_token, texts, static_T, adapted_T))


def _token(text: str, static: float, adapted: float) -> str:
    gain = (round(1000 * static) - round(1000 * adapted)) / 1000  # of what is shown, as the page's script shades it
    kinds = (_shade_class(shade(gain)), "n" if text == "\n" else "" if text else "e")
    classes = " ".join(kind for kind in kinds if kind)
    attribute = f' class="{classes}"' if classes else ""
    shown = html.escape(text, quote=False).replace("\r", "&#13;")
    return f'<span{attribute} data-s="{static:.3f}" data-a="{adapted:.3f}">{shown}</span>'


def legend() -> list[tuple[str, str]]:
    """Return (class, meaning) of each shade."""
    return [(_shade_class(level), label(level)) for level in range(-4, 5)]


def _shade_class(level: int) -> str:
    return f"{'b' if level > 0 else 'w'}{abs(level)}" if level else ""
