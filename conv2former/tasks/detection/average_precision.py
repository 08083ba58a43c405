"""COCO's average precision of boxes and masks, by pycocotools, computed in memory.

What pycocotools computes on files of the same objects and detections is the same, number for number.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from .objects import Detections, Objects

__all__ = ["AveragePrecision", "ImageRecord", "average_precision", "coco_boxes", "text_of"]

AR_DETECTIONS = (1, 10, 100)  # of an image, for each of which COCO has an average recall
SIZES = ("small", "medium", "large")
ABSENT = -1  # pycocotools' value of what cannot be measured


class ImageRecord(NamedTuple):
    """An image, and what was found in it.

    Attributes:
        place: in the data set; results are counted in this order.
        name: of the image.
        size: height and width as it is stored.
        objects: of it.
        found: the detections.
    """

    place: int
    name: str
    size: tuple[int, int]
    objects: Objects
    found: Detections


class AveragePrecision(NamedTuple):
    """COCO's numbers, in percent.

    Attributes:
        summary: `ap` (mean over IoU 0.50 to 0.95 and the classes), `ap50`, `ap75`, `ap_small`, `ap_medium`, `ap_large`,
            `ar1`, `ar10`, `ar100`, `ar_small`, `ar_medium`, `ar_large`; those that cannot be measured, for want of
            objects, are left out.
        classes: for each class `ap`, `ap50` and `ap75`; empty where it has no object.
    """

    summary: dict[str, float]
    classes: list[dict[str, float]]


def coco_boxes(boxes: np.ndarray) -> list[list[float]]:
    """Returns boxes as COCO has them, left, top, width, height, from (n, 4) left, top, right, bottom."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()


def text_of(mask: dict[str, Any]) -> dict[str, Any]:
    """Returns a mask as JSON can hold it: COCO's compressed RLE with its counts as text."""
    counts = mask["counts"]
    return {
        "size": [int(side) for side in mask["size"]],
        "counts": counts.decode() if isinstance(counts, bytes) else counts,
    }


def average_precision(
    records: Sequence[ImageRecord], num_classes: int, kind: Literal["bbox", "segm"], max_detections: int
) -> AveragePrecision:
    """Computes COCO's numbers.

    Args:
        records: the images; of equal scores, that of an earlier image counts first.
        num_classes: of the data; those without an object are in no mean.
        kind: whether boxes are compared, or masks, which then all objects and detections have.
        max_detections: of an image, those of the highest scores, that AP counts; 100 in COCO's own definition.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def indexed(annotations: list[dict[str, Any]]) -> Any:
        found = COCO()
        sizes = [{"id": i, "height": record.size[0], "width": record.size[1]} for i, record in enumerate(records)]
        found.dataset = {"images": sizes, "annotations": annotations, "categories": categories}
        found.createIndex()
        return found

    if not records:
        return AveragePrecision({}, [{} for _ in range(num_classes)])
    categories = [{"id": i, "name": str(i)} for i in range(num_classes)]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(indexed(_truth(records, kind)), indexed(_found(records, kind)), kind)
        evaluation.params.maxDets = sorted({*AR_DETECTIONS, max_detections})
        evaluation.evaluate()
        evaluation.accumulate()
    return _summarised(evaluation, max_detections)


def _truth(records: Sequence[ImageRecord], kind: str) -> list[dict[str, Any]]:
    """Returns COCO's annotations of the objects; their ids begin at 1, since COCOeval takes 0 for no object."""
    annotations: list[dict[str, Any]] = []
    for i, record in enumerate(records):
        objects = record.objects
        fields = zip(coco_boxes(objects.boxes), objects.labels.tolist(), objects.crowd, objects.areas, strict=True)
        for j, (box, label, crowd, area) in enumerate(fields):
            made = {"id": len(annotations) + 1, "image_id": i, "category_id": label}
            made |= {"bbox": box, "iscrowd": int(crowd), "area": float(area)}
            annotations.append(made | _mask(objects.masks, j, kind))
    return annotations


def _found(records: Sequence[ImageRecord], kind: str) -> list[dict[str, Any]]:
    """Returns COCO's results as `COCO.loadRes` makes them, which takes no empty list.

    The area is the box's of boxes, and the mask's of masks.
    """
    from pycocotools import mask as coco_masks

    annotations: list[dict[str, Any]] = []
    for i, record in enumerate(records):
        found = record.found
        for j, (box, label, score) in enumerate(
            zip(coco_boxes(found.boxes), found.labels.tolist(), found.scores.tolist(), strict=True)
        ):
            mask = _mask(found.masks, j, kind)
            area = float(coco_masks.area(mask["segmentation"])) if mask else box[2] * box[3]
            made = {"id": len(annotations) + 1, "image_id": i, "category_id": label, "bbox": box, "score": score}
            annotations.append(made | {"area": area, "iscrowd": 0} | mask)
    return annotations


def _mask(masks: list[dict[str, Any]] | None, i: int, kind: str) -> dict[str, Any]:
    if kind == "bbox":
        return {}
    assert masks is not None
    return {"segmentation": dict(masks[i])}  # a copy: COCOeval writes into what it is given


def _summarised(evaluation: Any, max_detections: int) -> AveragePrecision:
    """Takes the means that `COCOeval.summarize` prints, which knows 100 detections alone."""
    # (10 IoUs, 101 recalls, classes, 4 areas, detections) and (10 IoUs, classes, 4 areas, detections)
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    params = evaluation.params
    places = {most: i for i, most in enumerate(params.maxDets)}
    areas = {name: i for i, name in enumerate(params.areaRngLbl)}
    all_counted = places[max_detections]
    ious = {"ap": slice(None), "ap50": params.iouThrs == 0.5, "ap75": params.iouThrs == 0.75}
    found = {key: _mean(precision[iou][..., areas["all"], all_counted]) for key, iou in ious.items()}
    found |= {f"ap_{size}": _mean(precision[..., areas[size], all_counted]) for size in SIZES}
    found |= {f"ar{most}": _mean(recall[..., areas["all"], places[most]]) for most in AR_DETECTIONS}
    found |= {f"ar_{size}": _mean(recall[..., areas[size], places[100]]) for size in SIZES}
    classes = []
    for k in range(precision.shape[2]):
        own = {key: _mean(precision[iou][..., k, areas["all"], all_counted]) for key, iou in ious.items()}
        classes.append({key: value for key, value in own.items() if value is not None})
    return AveragePrecision({key: value for key, value in found.items() if value is not None}, classes)


def _mean(values: np.ndarray) -> float | None:
    """Returns the mean over what can be measured, in percent."""
    there = values[values > ABSENT]
    return 100 * float(np.mean(there)) if there.size else None
