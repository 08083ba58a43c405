"""Contact sheets: many images on a page, each with its name and its classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

from ...engine.fonts import prepare, runs_of

__all__ = ["WHOLE", "Cell", "Colour", "contact_sheet", "layout_for", "legend", "text_length", "write_text"]

GAP, LINE, MARGIN = 18, 20, 4  # between cells, of a line of text, inside a bar; pixels
Colour = tuple[int, int, int]
WHOLE = (0.0, 0.0, 1.0, 1.0)  # the frame of a whole image; it is not drawn
SIZE = 13  # of the letters, pixels
LEGEND_ROWS, LEGEND_WIDTH = 40, 240  # entries of a column, and its pixels
FRAME, BAR, GROUND = "#ff9d00", "#bcd7f0", "#f3f3f3"
# up to so many images in all, columns of a page, and the side of the square that each is fitted into, pixels
LAYOUTS = ((1, 1, 560), (4, 2, 400), (12, 4, 260), (10**9, 6, 210))


class Cell(NamedTuple):
    """An image on a sheet.

    Attributes:
        image: no side is longer than that of the sheet's squares.
        title: its name.
        size: width and height of the original, pixels.
        frame: left, top, right and bottom of a part of it, as shares of width and height.
        bars: texts, each with a share from 0 to 1.
        colours: of the bars' classes in the image, a square before each text; none if they have none.
    """

    image: Image.Image
    title: str
    size: tuple[int, int]
    frame: tuple[float, float, float, float]
    bars: list[tuple[str, float]]
    colours: Sequence[Colour] = ()


def layout_for(count: int) -> tuple[int, int]:
    """Returns the columns of a page, and the side of an image in pixels, for so many images in all."""
    return next((columns, side) for most, columns, side in LAYOUTS if count <= most)


def contact_sheet(cells: Sequence[Cell], columns: int, side: int, heading: str) -> Image.Image:
    """Draws images in rows, each between its name and a bar chart of its classes, on a page of 8-bit RGB.

    Args:
        cells: the images.
        columns: images in a row, at most.
        side: of the square that an image is fitted into, pixels.
        heading: above all of them; what does not fit into three lines is left out.
    """
    prepare([heading, *(text for cell in cells for text in (cell.title, *(text for text, _ in cell.bars)))])
    columns = min(columns, len(cells))
    height = 2 * LINE + side + MARGIN + LINE * max(len(cell.bars) for cell in cells)
    width = GAP + columns * (side + GAP)
    words = _wrapped(heading, width - 2 * GAP)[:3]
    top = GAP + LINE * len(words)
    page = Image.new("RGB", (width, top + -(-len(cells) // columns) * (height + GAP)), "white")
    draw = ImageDraw.Draw(page)
    for i, text in enumerate(words):
        write_text(draw, GAP, GAP // 2 + i * LINE, text, "#555")
    for i, cell in enumerate(cells):
        _draw_cell(page, cell, GAP + i % columns * (side + GAP), top + i // columns * (height + GAP), side)
    return page


def legend(entries: Sequence[tuple[Colour, str]]) -> Image.Image:
    """Draws colours with their names, in columns, as 8-bit RGB."""
    prepare([text for _, text in entries])
    rows = min(len(entries), LEGEND_ROWS)
    columns = -(-len(entries) // rows)
    page = Image.new("RGB", (GAP + columns * (LEGEND_WIDTH + GAP), 2 * GAP + rows * LINE), "white")
    draw = ImageDraw.Draw(page)
    for i, (colour, text) in enumerate(entries):
        x, y = GAP + i // rows * (LEGEND_WIDTH + GAP), GAP + i % rows * LINE
        draw.rectangle((x, y + 1, x + LINE, y + LINE - 3), colour, outline="#777")
        write_text(draw, x + LINE + MARGIN + 2, y + 1, _fitting(text, LEGEND_WIDTH - LINE - 2 * MARGIN), "black")
    return page


def _draw_cell(page: Image.Image, cell: Cell, left: int, top: int, side: int) -> None:
    draw = ImageDraw.Draw(page)
    right = left + side - 1
    write_text(draw, left, top, _fitting(cell.title, side, bold=True, keep_end=True), "black", bold=True)
    write_text(draw, left, top + LINE - 2, f"{cell.size[0]} x {cell.size[1]}", "#777", size=11)
    top += 2 * LINE
    draw.rectangle((left, top, right, top + side - 1), GROUND)
    x, y = left + (side - cell.image.width) // 2, top + (side - cell.image.height) // 2
    page.paste(cell.image, (x, y))
    if cell.frame != WHOLE:
        _draw_frame(draw, cell, x, y)
    top += side + MARGIN
    column = text_length("100.0 %") + MARGIN  # of the percentages, where no bar reaches
    square = SIZE + MARGIN if cell.colours else 0  # of a class's colour
    room = side - column - 2 * MARGIN - square
    for i, (text, share) in enumerate(cell.bars):
        percent = f"{100 * share:.1f} %"
        if square:
            draw.rectangle((left, top + 3, left + SIZE - 2, top + SIZE + 1), cell.colours[i])
        start = left + square
        draw.rectangle((start, top + 1, start + round(share * (room + MARGIN)), top + LINE - 2), BAR)
        write_text(draw, start + MARGIN, top + 2, _fitting(text, room), "black")
        write_text(draw, right - MARGIN - text_length(percent), top + 2, percent, "black")
        top += LINE


def _draw_frame(draw: ImageDraw.ImageDraw, cell: Cell, x: int, y: int) -> None:
    """Draws the cell's frame, dark inside and light outside, so that it is seen on any image."""
    left, top, right, bottom = cell.frame
    width, height = cell.image.size
    box = (
        x + round(left * width),
        y + round(top * height),
        x + round(right * width) - 1,
        y + round(bottom * height) - 1,
    )
    box = (box[0], box[1], max(box[0], box[2]), max(box[1], box[3]))
    if min(box[2] - box[0], box[3] - box[1]) > 4:
        draw.rectangle((box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1), outline="black")
    draw.rectangle(box, outline=FRAME)


def write_text(
    draw: ImageDraw.ImageDraw, x: float, y: float, text: str, colour: str, size: int = SIZE, bold: bool = False
) -> None:
    """Writes a line of text with its upper left corner at (x, y), each character in a font that has it."""
    base = y + runs_of("", size, bold)[0][1].getmetrics()[0]
    for piece, font in runs_of(text, size, bold):
        draw.text((x, base), piece, colour, font, anchor="ls")
        x += font.getlength(piece)


def text_length(text: str, bold: bool = False, size: int = SIZE) -> float:
    """Returns the width of text in pixels."""
    return sum(font.getlength(piece) for piece, font in runs_of(text, size, bold))


def _fitting(text: str, room: float, bold: bool = False, keep_end: bool = False) -> str:
    """Cuts text to a width in pixels; `keep_end` cuts its beginning, of a path the part that says least."""
    short = text[-200:] if keep_end else text[:200]
    if short == text and text_length(text, bold) <= room:
        return text
    while short and text_length(short + "…", bold) > room:
        short = short[1:] if keep_end else short[:-1]
    return "…" + short if keep_end else short.rstrip() + "…"


def _wrapped(text: str, room: float) -> list[str]:
    """Breaks text between words into lines of a width in pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_length(longer) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
