"""Images of characters by class: rendered from the fonts that matplotlib ships, or from a data set such as Omniglot.

A class is a code point present in at least 12 of 16 text fonts (DejaVu Sans, Sans Mono and Serif, STIX General, each in
four styles): letters, digits, punctuation, arrows and other symbols of many scripts. Code points made of others
(accents, ligatures) and box drawings are left out, as is every character whose mean image over the fonts nearly equals
that of an earlier one: Greek Α and Cyrillic А after Latin A, but also c after C, since size is normalised. An instance
is one font under a random rotation, shear, scale and shift. Images are white ink (1) on black (0); the settings decide
all of them.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dynlm.types import InputError

STYLES = {
    "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
    "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
}
MIN_FONTS = 12
CATEGORIES = frozenset(("Ll", "Lu", "Lo", "Nd", "Sm", "Sc", "So", "Po"))
LEFT_OUT = frozenset((*range(0x2500, 0x25A0), *range(0x2800, 0x2900)))  # box drawings and blocks, Braille
EM = 24
"""pixels an em that glyphs are drawn at"""
CANVAS = 48
"""side of the square that they are put on"""
SAME = 0.95
"""cosine of two mean images from which they count as the same character"""


@cache
def font_characters(side: int, variants: int, seed: int) -> dict[str, Tensor]:
    """Character to its (fonts · variants, side, side) instances, in the order of code points."""
    generator = torch.Generator().manual_seed(seed)
    return {
        character: vary_glyphs(glyphs.repeat_interleave(variants, 0), side, generator)
        for character, glyphs in _classes().items()
    }


@cache
def _classes() -> dict[str, Tensor]:
    """Character to its (fonts, CANVAS, CANVAS) glyphs: those that are told apart."""
    glyphs = {code: stack_glyphs(found) for code, found in draw_glyphs().items() if len(found) >= MIN_FONTS}
    return {chr(code): glyphs[code] for code in _distinct(glyphs)}


def _fonts() -> Iterator[Path]:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for family, styles in STYLES.items():
        for style in styles:
            yield folder / f"{family}{style}.ttf"


def draw_glyphs() -> dict[int, list[Tensor]]:
    """Code point to its drawing in each font that has it: ink cropped to its bounding box."""
    from matplotlib.ft2font import FT2Font

    fonts = [FT2Font(str(path)) for path in _fonts()]
    maps = [font.get_charmap() for font in fonts]
    present = Counter(code for charmap in maps for code in charmap)
    codes = sorted(code for code, n in present.items() if n >= MIN_FONTS and _is_wanted(code))
    drawn: dict[int, list[Tensor]] = {code: [] for code in codes}
    for font, charmap in zip(fonts, maps, strict=True):
        font.set_size(EM, 72)
        for code in codes:
            if code in charmap:
                font.set_text(chr(code), 0.0)
                font.draw_glyphs_to_bitmap(antialiased=True)
                ink = font.get_image()
                if ink.size and ink.max() > 127:
                    drawn[code].append(_crop(ink))
    return drawn


def _is_wanted(code: int) -> bool:
    character = chr(code)
    simple = not unicodedata.decomposition(character) and code not in LEFT_OUT
    return simple and unicodedata.category(character) in CATEGORIES


def _crop(ink: Any) -> Tensor:
    """Ink (rows, columns) of values 0–255 as 0–1 within its bounding box."""
    rows, columns = ((ink > 80).any(axis).nonzero()[0] for axis in (1, 0))
    box = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return torch.from_numpy(box.astype("float32") / 255)


def stack_glyphs(drawn: list[Tensor]) -> Tensor:
    """(fonts, CANVAS, CANVAS): each glyph centred, the longer side of its bounding box scaled to half the canvas."""
    canvas = torch.zeros(len(drawn), 1, CANVAS, CANVAS)
    zoom = torch.ones(len(drawn))
    for i, ink in enumerate(drawn):
        height, width = (min(n, CANVAS) for n in ink.shape)
        top, left = (CANVAS - height) // 2, (CANVAS - width) // 2
        canvas[i, 0, top : top + height, left : left + width] = ink[:height, :width]
        zoom[i] = max(height, width) / (CANVAS / 2)
    return _warp(canvas, torch.eye(2) * zoom[:, None, None], torch.zeros(len(drawn), 2), CANVAS)


def _warp(images: Tensor, matrices: Tensor, shifts: Tensor, side: int) -> Tensor:
    """Return (B, side, side): ``images`` (B, 1, h, w) at matrix (B, 2, 2) · place + shift (B, 2), places −1 to 1."""
    grid = F.affine_grid(torch.cat([matrices, shifts[:, :, None]], 2), [len(images), 1, side, side], False)
    return F.grid_sample(images, grid, align_corners=False)[:, 0]


def _distinct(glyphs: dict[int, Tensor]) -> list[int]:
    """Return the code points whose mean image, a little blurred, is like no earlier one's."""
    codes = list(glyphs)
    means = torch.stack(
        [F.avg_pool2d(glyphs[code].mean(0, keepdim=True), CANVAS // 8, CANVAS // 16) for code in codes]
    ).flatten(1)
    likeness = F.normalize(means) @ F.normalize(means).t()
    kept: list[int] = []
    for i in range(len(codes)):
        if not (likeness[i, kept] >= SAME).any():
            kept.append(i)
    return [codes[i] for i in kept]


def vary_glyphs(glyphs: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Rotation within ±10°, shear within ±0.1, scale within ±7 %, shift within ±7.5 % of the side."""
    n = len(glyphs)
    angle, shear, scale, *shift = (2 * torch.rand(5, n, generator=generator) - 1).unbind()
    angle, shear, zoom = angle * math.radians(10), 0.1 * shear, 1 / (1.4 + 0.1 * scale)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    matrices = torch.stack([cos, cos * shear - sin, sin, sin * shear + cos], 1).view(n, 2, 2)
    smooth = F.avg_pool2d(glyphs[:, None], 3, 1, 1)  # the warp below takes one point in every two or three
    return _warp(smooth, matrices, 0.15 * torch.stack(shift, 1) * zoom[:, None], side).clamp(0, 1)


def hub_characters(name: str, side: int) -> dict[str, Tensor]:
    """Classes of a Hugging Face data set with columns ``image`` and ``label``, all its splits together.

    Omniglot: Lake, Salakhutdinov & Tenenbaum 2015. Dark ink on white is inverted.
    """
    try:
        import datasets  # here, so that images without it can use the fonts

        splits = datasets.load_dataset(name)
    except ImportError:
        raise InputError(f"data set {name!r} needs the package datasets: install it, or take source 'fonts'") from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"data set {name!r} is neither cached nor reachable ({reason}): take source 'fonts'") from None
    classes: dict[str, list[Tensor]] = {}
    for rows in splits.values():
        missing = {"image", "label"} - set(rows.column_names)
        if missing:
            raise InputError(f"data set {name!r} has columns {rows.column_names}, not image and label: take another")
        for row in rows:
            grey = row["image"].convert("L").resize((side, side))
            pixels = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(side, side).float() / 255
            classes.setdefault(str(row["label"]), []).append(1 - pixels if pixels.mean() > 0.5 else pixels)
    return {label: torch.stack(instances) for label, instances in sorted(classes.items())}
