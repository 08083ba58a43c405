"""Boxes, masks and labels drawn on a photo at its own size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ...engine.fonts import prepare
from ...tasks.detection.objects import Detections
from ...tasks.detection.placing import label_places
from ...text import clipped
from .sheet import text_length, write_text

__all__ = ["annotated"]

OPACITY = 0.45  # of masks over a photo
NAME = 24  # columns of a class's name in a label
SMALL, ENLARGED = 240, 480  # pixels of the longer side: what is below the one becomes at least the other
BRIGHTNESS = (0.299, 0.587, 0.114)  # how bright red, green and blue are


def annotated(photo: Image.Image, found: Detections, names: Sequence[str], palette: np.ndarray) -> Image.Image:
    """Returns a photo with what was found in it: masks, boxes, and labels for which there is room.

    A small photo is enlarged by a whole number, so that there is room for letters.

    Args:
        photo: of any mode.
        found: in it.
        names: of the classes.
        palette: a colour for each class, (classes, 3) uint8.
    """
    page, longest = _with_masks(photo.convert("RGB"), found, palette), max(photo.size)
    factor = -(-ENLARGED // longest) if longest < SMALL else 1
    if factor > 1:
        page = page.resize((factor * page.width, factor * page.height), Image.Resampling.NEAREST)
    draw, longest, boxes = ImageDraw.Draw(page), factor * longest, (factor * found.boxes).tolist()
    # of one pixel between white ones nobody would see the colour
    line, letters = max(2, round(longest / 400)), min(48, max(10, round(longest / 60)))
    colours: list[Any] = [tuple(palette[label].tolist()) for label in found.labels]
    for (left, top, right, bottom), colour in reversed([*zip(boxes, colours, strict=True)]):
        _outline(draw, (left, top, max(left, right - 1), max(top, bottom - 1)), line, colour)
    words = [
        f"{clipped(names[label], NAME)} {score:.2f}"
        for label, score in zip(found.labels.tolist(), found.scores.tolist(), strict=True)
    ]
    prepare(words)
    margin = max(1, letters // 6)
    sizes = [(text_length(word, size=letters) + 2 * margin, letters * 1.25 + 2 * margin) for word in words]
    places = label_places(boxes, sizes, page.size)
    for place, (width, height), colour, word in zip(places, sizes, colours, words, strict=True):
        if place is not None:
            x, y = place
            draw.rectangle((x, y, x + width - 1, y + height - 1), colour)
            ink = "black" if np.dot(colour, BRIGHTNESS) > 140 else "white"
            write_text(draw, x + margin, y + margin, word, ink, letters)
    return page


def _outline(
    draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float], line: int, colour: tuple[int, int, int]
) -> None:
    """Draws a box with a thin white border inside and outside, so that it is seen on any photo."""
    left, top, right, bottom = box
    border = max(1, line // 2)
    for extra, width, ink in ((border, line + 2 * border, (255, 255, 255)), (0, line, colour)):
        corners = (left - extra, top - extra, right + extra, bottom + extra)
        draw.rectangle(corners, outline=ink, width=width)


def _with_masks(photo: Image.Image, found: Detections, palette: np.ndarray) -> Image.Image:
    """Returns a photo with the masks in their classes' colours, that of the highest score above the others."""
    if not found.masks:
        return photo
    from pycocotools import mask as coco_masks

    pixels = np.array(photo)
    colour = pixels.copy()
    for mask, label in reversed([*zip(found.masks, found.labels.tolist(), strict=True)]):
        colour[coco_masks.decode(mask).astype(bool)] = palette[label]
    return Image.blend(photo, Image.fromarray(colour), OPACITY)
