"""Names and titles that are safe to print, whatever they hold."""

from __future__ import annotations

import re

CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""what moves the cursor, ends or turns a line, or cannot be written"""


def printable(text: str) -> str:
    """One line that is safe to print, whatever names and titles it holds: controls become escapes such as ``\\n``."""
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
