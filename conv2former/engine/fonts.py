"""Fonts for names in any script: matplotlib's own has Latin, Greek, Cyrillic and more, but no Chinese, Hindi or emoji.

What it lacks comes from fonts that are installed on the machine. They are looked through only when a character asks
for it.
"""

from __future__ import annotations

import functools
import logging
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import counted
from ..text import printable
from .terminal import say

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from PIL.ImageFont import FreeTypeFont

__all__ = ["drawing", "prepare", "runs_of"]

NO_TEXT = ("LastResort", "AdobeBlank")  # fonts that have a sign, or none, for every character


class _Font(NamedTuple):
    """A font: its family, its file, and the place of its face in a file of several."""

    family: str
    path: str
    face: int


_known: dict[str, _Font | None] = {}  # by character that the base lacks; None where no font has it
_chosen: dict[_Font, frozenset[int]] = {}  # with the characters that they have
_told = False


@contextmanager
def drawing(figure: Figure) -> Iterator[None]:
    """Makes every text of a figure `printable`, and legible while it is drawn, as far as fonts for it are installed.

    What no font has is said once, in a line on standard error, and is a box in the picture.
    """
    for text in _texts(figure):  # before it is drawn; the line ends are those of whoever drew the figure
        if not text.get_text().isprintable():
            text.set_text("\n".join(map(printable, text.get_text().split("\n"))))
    texts = [text for text in _texts(figure) if not text.get_text().isascii()]
    prepare(text.get_text() for text in texts)
    for text in texts:
        families = text.get_fontfamily()
        more = [font.family for font in _fonts_for(text.get_text()) if font.family not in families]
        if more:
            text.set_fontfamily([*families, *more])
    with _without_warnings():
        yield


def _texts(artist: Artist) -> Iterator[Text]:
    """Goes over what is written in a figure; the ticks of axes that are not drawn would take seconds to make."""
    from matplotlib.axis import Axis
    from matplotlib.text import Text

    if isinstance(artist, Text):
        yield artist
    for child in artist.get_children():
        if not isinstance(child, Axis) or child.axes.axison:
            yield from _texts(child)


def prepare(texts: Iterable[str]) -> None:
    """Looks for the fonts of many texts at once, so that one line says what no font has."""
    _fonts_for("".join(text for text in texts if not text.isascii()))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hides matplotlib's dozens on missing characters, for which there is a line, and on weights of fonts."""
    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from", category=UserWarning)
            yield
    finally:
        log.setLevel(level)


def runs_of(text: str, size: int, bold: bool = False) -> list[tuple[str, FreeTypeFont]]:
    """Returns text for Pillow in pieces, each with a font that has its characters.

    Args:
        text: in one line.
        size: pixels.
        bold: where the base font has the characters.
    """
    base = _for_pillow(_base(bold), size)
    if text.isascii() or not _fonts_for(text):
        return [(text, base)]
    pieces: list[tuple[str, FreeTypeFont]] = []
    for character in text:
        font = _known.get(character)
        chosen = _for_pillow(font, size) if font else base
        if pieces and (pieces[-1][1] is chosen or _joins(character)):
            pieces[-1] = (pieces[-1][0] + character, pieces[-1][1])
        else:
            pieces.append((character, chosen))
    return pieces


def _joins(character: str) -> bool:
    """Whether a character is part of the one before it, or nothing to see: a vowel sign, a joiner."""
    return unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf")


@functools.cache
def _for_pillow(font: _Font, size: int) -> FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.truetype(font.path, size, font.face)


def _fonts_for(text: str) -> list[_Font]:
    """Returns the fonts for what the base font lacks of a text, in the order of their first characters."""
    if _base() not in _chosen:
        _chosen[_base()] = _characters(_base())
    has = _chosen[_base()]
    lacking = [c for c in dict.fromkeys(text) if ord(c) not in has and c.isprintable() and not c.isspace()]
    _look_for({c for c in lacking if c not in _known})
    return list(dict.fromkeys(font for c in lacking if (font := _known[c])))


def _look_for(characters: set[str]) -> None:
    """Chooses fonts for characters, as few as possible, and says so if there are none for some."""
    rest = set(characters)
    for font, has in _chosen.items():
        rest -= _take(font, {c for c in rest if ord(c) in has})
    if not rest:
        return
    found = {font: {c for c in rest if ord(c) in has} for font in _installed() if (has := _characters(font))}
    while rest and found:
        best = max(found, key=lambda font: len(found[font] & rest))  # of equal ones the first
        if not found[best] & rest:
            break
        _chosen[best] = _characters(best)
        rest -= _take(best, found[best] & rest)
    _known.update(dict.fromkeys(rest))
    if rest:
        _tell(rest)


def _take(font: _Font, characters: set[str]) -> set[str]:
    _known.update(dict.fromkeys(characters, font))
    return characters


def _tell(characters: set[str]) -> None:
    global _told
    if not _told:
        letters, rest = "".join(sorted(characters)[:10]), len(characters) - 10
        more = f" and {counted(rest, 'more character')}" if rest > 0 else ""
        end = "pictures show boxes instead; install one that has them, such as Noto Sans"
        say(f"note: no installed font has {letters}{more}: {end}", file=sys.stderr)
    _told = True


# ------------------------------------------------------------------------------------------------- what there is


@functools.cache
def _base(bold: bool = False) -> _Font:
    """Returns the font that matplotlib brings along, and draws in unless told otherwise: the same on every machine."""
    from matplotlib import get_data_path

    file = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return _Font("DejaVu Sans", str(Path(get_data_path(), "fonts", "ttf", file)), 0)


def _installed() -> list[_Font]:
    """Returns a font of each family that is installed, those without serifs first."""
    from matplotlib.font_manager import FontProperties, findSystemFonts, fontManager

    listed = {str(entry.fname) for entry in fontManager.ttflist}
    for path in sorted(findSystemFonts()):  # matplotlib's list is of the day that it was first asked for
        if path not in listed:
            with suppress(OSError, RuntimeError, ValueError, NotImplementedError):  # broken, or of pictures
                fontManager.addfont(path)
    names = {entry.name for entry in fontManager.ttflist if not entry.name.replace(" ", "").startswith(NO_TEXT)}
    fonts = []
    with _without_warnings():
        for name in sorted(names, key=lambda name: ("Serif" in name, "Sans" not in name, name)):
            path = fontManager.findfont(FontProperties(family=[name]), fallback_to_default=False)  # as drawing chooses
            fonts.append(_Font(name, str(path), getattr(path, "face_index", 0)))
    return fonts


def _characters(font: _Font) -> frozenset[int]:
    """Returns the code points that a font has; none where it cannot be read."""
    from matplotlib.ft2font import FT2Font

    place: Any = {"face_index": font.face} if font.face else {}  # since matplotlib 3.11
    try:
        return frozenset(FT2Font(font.path, **place).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()
