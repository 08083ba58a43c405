"""Detections in COCO's result format, which pycocotools and other tools read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .average_precision import coco_boxes, text_of
from .objects import Detections

__all__ = ["coco_results"]


def coco_results(found: Detections, image_id: int | str, category_ids: Sequence[int | str]) -> list[dict[str, Any]]:
    """Returns an image's detections as JSON can hold them, the highest score first.

    Args:
        found: in the image.
        image_id: of it.
        category_ids: of the classes, in index order.
    """
    lines = []
    for i, (box, label) in enumerate(zip(coco_boxes(found.boxes), found.labels.tolist(), strict=True)):
        line = {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": float(found.scores[i])}
        lines.append(line | ({} if found.masks is None else {"segmentation": text_of(found.masks[i])}))
    return lines
