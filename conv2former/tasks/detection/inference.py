"""From images to what a network finds in them, in pixels of the images as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.pixels import normalize
from .config import DetectionConfig
from .objects import Detections

__all__ = ["Finder", "to_stored"]

MASK_PIXELS = 1 << 25  # of masks that are enlarged together: 128 MB
INSIDE = 0.5  # probability above which a pixel is of a mask


class Finder:
    """Asks a network for what is in images.

    Images of one size are answered together and others apart: in a batch of several sizes all are filled up to the
    largest, and a network sees that at their edges.

    Args:
        config: the run: normalisation of the images.
        device: of the network.
    """

    def __init__(self, config: DetectionConfig, device: torch.device) -> None:
        given = config.data.preprocessing
        self.device = device
        self.mean, self.std = (torch.tensor(values, device=device) for values in (given.mean, given.std))

    def __call__(
        self, answer: Callable[[Any], Any], images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Returns what the network finds in each image.

        Args:
            answer: the network in evaluation mode: of a list of normalised images, see `DetectionNetwork`.
            images: each (channels, h, w) of 8 bits.
            sizes: of each as it is stored, height and width.
        """
        of_size: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            of_size.setdefault(tuple(image.shape), []).append(i)
        found: dict[int, Detections] = {}
        for (_, height, width), members in of_size.items():
            pixels = torch.stack([images[i] for i in members]).to(self.device, non_blocking=True)
            inputs = normalize(pixels.permute(0, 2, 3, 1), self.mean, self.std).permute(0, 3, 1, 2)
            outputs = answer(list(inputs.contiguous().unbind(0)))
            for i, output in zip(members, outputs, strict=True):
                found[i] = to_stored(output, (height, width), sizes[i])
        return [found[i] for i in range(len(images))]


def to_stored(output: Mapping[str, Tensor], input_size: tuple[int, int], stored_size: tuple[int, int]) -> Detections:
    """Returns a network's answer in pixels of the image as it is stored, on the CPU, the highest score first.

    Boxes or scores that are no numbers, as broken weights give, are left out.

    Args:
        output: of an image: `boxes` (n, 4), `scores`, `labels`, and perhaps `masks` (n, 1, h, w) probabilities.
        input_size: height and width of what the network saw.
        stored_size: of the image as it is stored.
    """
    boxes, scores = output["boxes"].detach().float().cpu(), output["scores"].detach().float().cpu()
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.isfinite(scores[order]) & torch.isfinite(boxes[order]).all(1)]
    (height, width), (rows, columns) = input_size, stored_size
    scale = torch.tensor([columns / width, rows / height] * 2)
    limits = torch.tensor([columns, rows] * 2, dtype=torch.float32)
    boxes = torch.minimum((boxes[order] * scale).clamp(min=0), limits)
    masks = output.get("masks")
    return Detections(
        boxes.numpy(),
        scores[order].numpy(),
        output["labels"].detach().cpu()[order].long().numpy(),
        None if masks is None else _encoded(masks.detach()[order.to(masks.device)], stored_size),
    )


def _encoded(masks: Tensor, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Returns masks, (n, 1, h, w) probabilities, at a height and width, as COCO's compressed RLE."""
    from pycocotools import mask as coco_masks

    found: list[dict[str, Any]] = []
    for some in masks.split(max(1, MASK_PIXELS // (size[0] * size[1]))):
        if some.shape[2:] != size:
            some = torch.nn.functional.interpolate(some.float(), size, mode="bilinear", align_corners=False)
        inside = (some[:, 0] > INSIDE).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        found += coco_masks.encode(np.asfortranarray(inside))
    return found
