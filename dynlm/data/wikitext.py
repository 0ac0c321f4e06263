"""WikiText files: articles cut at their title lines, every line kept.

An article starts at a level-one title line `` = Title = `` that has an empty line before and after it. Both empty lines
matter: table legends such as `` = Played , W = `` look like titles and are not. The articles partition the file, so
words, lines and bytes add up to the file's own (Merity et al. 2016, arXiv:1609.07843).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dynlm.types import Article

TITLE = re.compile(r"^ = (?!= )(.+?)(?<! =) = ?$")


def split_articles(text: str, source: str) -> list[Article]:
    """Articles of one WikiText file; ``source`` (say ``wiki.train``) prefixes their ids.

    Lines before the first title belong to the first article. A text without any title line gives no article.
    """
    lines = text.split("\n")
    if lines and lines[-1] == "":
        lines.pop()
    starts = [i for i in range(len(lines)) if _is_title(lines, i)]
    if not starts:
        return []
    bounds = [0, *starts[1:], len(lines)]
    articles = []
    for number, start in enumerate(starts):
        match = TITLE.match(lines[start])
        assert match is not None
        body = "\n".join(lines[bounds[number] : bounds[number + 1]]) + "\n"
        articles.append(Article(id=f"{source}:{number}", title=match.group(1), text=body))
    return articles


def _is_title(lines: Sequence[str], i: int) -> bool:
    if not TITLE.match(lines[i]):
        return False
    empty_before = i == 0 or not lines[i - 1].strip()
    empty_after = i + 1 < len(lines) and not lines[i + 1].strip()
    return empty_before and empty_after
