"""Names in scripts that matplotlib's own font does not have, with and without a font for them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from PIL import Image

from conv2former.engine import fonts
from conv2former.text import clipped, printable
from conv2former.tools.prediction.sheet import WHOLE, Cell, contact_sheet

CAT, DOG = "猫", "犬"


def make_font(path, family: str, characters: str) -> str:
    """Writes a font in which each of the characters is a black square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(point)
    pen.closePath()
    square, names = pen.glyph(), [f"u{ord(c):X}" for c in characters]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap(dict(zip(map(ord, characters), names, strict=True)))
    builder.setupGlyf(dict.fromkeys([".notdef", *names], square))
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names], (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900, usWinAscent=900, usWinDescent=100)
    builder.setupPost()
    builder.save(path)
    return str(path)


@pytest.fixture
def installed(monkeypatch):
    """What is installed is what a test says, whatever this machine has."""
    monkeypatch.setattr(fonts, "_known", {})
    monkeypatch.setattr(fonts, "_chosen", {})
    monkeypatch.setattr(fonts, "_told", False)
    own = [entry for entry in fontManager.ttflist if entry.name.startswith("DejaVu")]
    monkeypatch.setattr(fontManager, "ttflist", own)
    paths: list[str] = []
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: paths)
    return paths


def drawn(text: str) -> np.ndarray:
    figure = Figure(figsize=(2, 1), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_title(text)
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fonts.drawing(figure):
            canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., 0] < 100


def sheet(text: str) -> np.ndarray:
    cell = Cell(Image.new("RGB", (60, 60), "white"), "a.png", (60, 60), WHOLE, [(text, 0.0)])
    return np.asarray(contact_sheet([cell], 1, 200, "heading").convert("L")) < 100


@pytest.mark.parametrize("draw", [drawn, sheet])
def test_a_font_that_has_the_characters_is_used(installed, tmp_path, draw, capsys):
    installed += [make_font(tmp_path / "cat.ttf", "Cats", CAT), make_font(tmp_path / "dog.ttf", "Dogs", DOG + CAT)]
    (tmp_path / "broken.ttf").write_text("no font")
    installed.append(str(tmp_path / "broken.ttf"))
    black = [int(draw(text).sum()) for text in ("a", f"a{CAT}", f"a{CAT}{DOG}")]
    assert black[1] - black[0] > 50  # a full square
    assert black[2] - black[1] == pytest.approx(black[1] - black[0], rel=0.2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("draw", [drawn, sheet])
def test_where_there_is_none_one_line_says_so(installed, draw, capsys):
    for text in (f"a {CAT}{DOG}", DOG, f"{CAT} 鳥"):
        draw(text)
    out, err = capsys.readouterr()
    assert err == (
        f"note: no installed font has {DOG}{CAT}: pictures show boxes instead; install one that has them, such as Noto "
        "Sans\n"
    )
    assert not out


def test_nothing_is_looked_for_where_the_own_font_suffices(installed, monkeypatch):
    monkeypatch.setattr(fonts, "_installed", lambda: pytest.fail("fonts were looked through"))
    for text in ("plain", "Übergröße → ±", "кошка", "γάτα", "قط"):
        drawn(text)
        assert len(fonts.runs_of(text, 13)) == 1


def test_pieces(installed, tmp_path):
    """Vowel signs and joiners stay with the letter that they are part of."""
    installed.append(make_font(tmp_path / "hindi.ttf", "Hindi", "कु"))
    assert [piece for piece, _ in fonts.runs_of("a कु\u200dक b", 13)] == ["a ", "कु\u200dक", " b"]
    assert printable("क\u200d\u202e") == "क\u200d\\u202e"


def test_clipped():
    assert clipped("12345", 5) == "12345"
    assert clipped("123456", 5) == "1234…"
    assert clipped("123456", 5, keep_end=True) == "…3456"
    assert clipped(CAT * 4, 6) == f"{CAT}{CAT}…"  # two columns each
