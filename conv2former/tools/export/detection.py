"""A detection as the export sees it: one image of any size to boxes, scores, labels and masks, by ONNX alone.

What a detector does with boxes cannot be written as a `torch.export` program, so the file comes from torchvision's own
way to ONNX: a trace of the network at work. Suppression of double boxes is inside the file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import CheckpointError, ConfigError, OutputError, counted, first_line
from ...models import CheckpointInfo
from ...tasks.detection.config import UNUSED_AUGMENT, DetectionConfig, EvaluationConfig
from ...tasks.detection.network import DetectionNetwork
from ...tasks.detection.restore import restore_network
from ...text import clipped
from ..prediction.dense import dense_settings
from .export import describe
from .opening import open_session, quiet
from .options import MIN_SIZE, Options
from .subject import Case
from .writing import MAX_ONNX_BYTES

__all__ = ["BoxSubject", "compared", "open_detection"]

SETTINGS = {
    "data": ("short_side", "long_side", "img_size", "mean", "std", "value_range"),
    "evaluation": ("score", "nms", "max_detections"),
}  # keys that matter here
Answer = list[np.ndarray]  # boxes (n, 4), scores (n,), labels (n,), and of a network with masks (n, 1, h, w)
NAMES = ("boxes", "scores", "labels", "masks")
OPSETS = (16, 20)  # with the boxes' cut-outs as torchvision has them; the last one that a trace is written in
TRIED = 2  # inputs of each size
LARGEST = (320, 448)  # height and width: a file for any size is tried with no more
# Boxes are the same if their sides are, to so many pixels, and their masks but for this share of their pixels. A pixel
# whose probability differs by less than this is the same, even if rounding moves it across the limit
SAME_PIXELS, SAME_MASK, SAME_PROBABILITY = 0.5, 0.01, 0.01
# Of boxes of nearly the same score, or that overlap by nearly the limit, rounding decides which one stays
MIN_AGREEMENT = 0.95


@dataclass(frozen=True)
class BoxPreprocessing:
    """How images become inputs.

    Attributes:
        short_side, long_side: to which an image is resized with its aspect ratio, pixels.
        mean, std: of values from 0 to 1, for each channel.
        size: (height, width) of the input of a file for one size.
    """

    short_side: int
    long_side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Returns what is noted in a file."""
        return {
            "short_side": self.short_side,
            "long_side": self.long_side,
            "interpolation": "bilinear",
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return (
            f"shorter side {self.short_side} pixels, longer at most {self.long_side}, bilinear, mean {mean}, std {std}"
        )


class _Tensors(nn.Module):
    """A detection for a tracer: a tensor to tensors.

    Args:
        model: the network.
    """

    def __init__(self, model: DetectionNetwork) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps (1, C, H, W) to boxes, scores, labels, and perhaps masks."""
        (found,) = self.model([images[0]])
        return tuple(found[key] for key in NAMES if key in found)


class Compared(NamedTuple):
    """An answer of the file beside the network's, or several.

    Attributes:
        same: boxes of both that the other has as well.
        boxes: of both.
        scale: the largest score.
        difference: the largest of the scores of a box that both have.
    """

    same: int
    boxes: int
    scale: float
    difference: float

    @classmethod
    def of_all(cls, found: Sequence[Compared]) -> Compared:
        same, boxes, scales, differences = zip(*found, strict=True)
        return cls(sum(same), sum(boxes), max(scales), max(differences))


@dataclass(frozen=True)
class BoxSubject:
    """A detection; see `export.Subject`."""

    model: DetectionNetwork
    info: CheckpointInfo
    preprocessing: BoxPreprocessing
    metadata: dict[str, str]
    evaluation: EvaluationConfig
    compared: ClassVar = ("score", "same boxes")

    def write(
        self, kind: str, path: Path, options: Options, say: Callable[[str], None]
    ) -> tuple[list[Case], list[str]]:
        """See `export.Subject`.

        Random inputs make few boxes of the scores that count. So a file without such a limit is compared first, and
        then the one that is kept, with it.
        """
        facts: list[str] = []
        inputs = [
            np.random.default_rng(i).standard_normal(shape, dtype=np.float32) * (i + 1)
            for shape in self.shapes(options)
            for i in range(TRIED)
        ]
        found: list[Compared] = []
        for limit in (self._low_limit(inputs[0]), self.evaluation.score):
            self.model.limit(self.evaluation.model_copy(update={"score": limit}))
            say("tracing the network")
            facts = self._write_onnx(inputs[0].shape, path, options)
            session, metadata = open_session(path)
            assert metadata == self.metadata, metadata.keys()
            for i, images in enumerate(inputs):
                say(f"comparing, {i + 1} of {counted(len(inputs), 'image')}")
                found.append(self._compare(session, images))
        by_shape: dict[tuple[int, ...], list[Compared]] = {}
        for images, one in zip(inputs * 2, found, strict=True):
            by_shape.setdefault(images.shape, []).append(one)
        cases = []
        for shape, some in by_shape.items():
            same, boxes, scale, difference = Compared.of_all(some)
            cases.append(Case(shape, scale, difference, same / boxes if boxes else 1.0))
        self._check(cases, path, options)
        return cases, facts

    def shapes(self, options: Options) -> list[tuple[int, ...]]:
        """Returns the input shapes that a file is tried with; of a dynamic one also odd ones."""
        sizes = [self.preprocessing.size]
        if options.dynamic:
            height, width = (min(side, largest) for side, largest in zip(sizes[0], LARGEST, strict=True))
            odd = (height + 27, max(width - 33, MIN_SIZE)), (max(height // 2, MIN_SIZE) + 1, width + 7)
            sizes = [(height, width), *odd]
        return [(1, self.info.in_chans, *size) for size in sizes]

    def _low_limit(self, images: np.ndarray) -> float:
        """Returns a score that so many boxes reach as the network may give.

        Raises:
            CheckpointError: its answers are not finite numbers.
        """
        self.model.limit(self.evaluation.model_copy(update={"score": 0.0}))
        boxes, scores, *_ = self._answer(images)
        if not len(scores) or not np.isfinite(boxes).all() or not np.isfinite(scores).all():
            raise CheckpointError("the network finds nothing in noise, whatever the score; its weights are broken")
        return float(scores.min()) / 2

    def _answer(self, images: np.ndarray) -> Answer:
        with torch.inference_mode():
            return [tensor.numpy() for tensor in _Tensors(self.model)(torch.from_numpy(images))]

    def _write_onnx(self, shape: Sequence[int], path: Path, options: Options) -> list[str]:
        """Writes a file, and returns its opset and number of nodes.

        Raises:
            UserError: it would be too large, or torch cannot write it.
        """
        import onnx

        size = sum(tensor.numel() * tensor.element_size() for tensor in self.model.state_dict().values())
        if size > MAX_ONNX_BYTES:
            raise CheckpointError(
                f"the network has {size / 1e9:.1f} GB of weights, and one ONNX file holds {MAX_ONNX_BYTES / 1e9:.1f}"
            )
        names = NAMES if self.model.has_masks else NAMES[:3]
        open_sizes: dict[str, dict[int, str]] = {name: {0: "detections"} for name in names}
        if options.dynamic:
            open_sizes["images"] = {2: "height", 3: "width"}
        if self.model.has_masks:
            sides = ("height", "width") if options.dynamic else ()
            open_sizes["masks"] |= dict(enumerate(sides, 2))
        example = torch.from_numpy(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
        buffer = io.BytesIO()
        try:
            with quiet(), torch.no_grad():
                torch.onnx.export(
                    _Tensors(self.model).eval(),
                    (example,),
                    buffer,  # type: ignore[arg-type]
                    dynamo=False,
                    input_names=["images"],
                    output_names=list(names),
                    opset_version=options.opset,
                    dynamic_axes=open_sizes,
                )
        except Exception as e:  # the compilers' errors have no common class
            raise OutputError(f"torch cannot write {self.info.name} ({clipped(first_line(e), 200)})") from None
        model = onnx.load_from_string(buffer.getvalue())
        onnx.helper.set_model_props(model, self.metadata)
        onnx.checker.check_model(model, full_check=True)
        path.write_bytes(model.SerializeToString())
        return [f"opset {model.opset_import[0].version}", counted(len(model.graph.node), "node")]

    def _compare(self, session: Any, images: np.ndarray) -> Compared:
        """Returns how the file's answer compares with the network's.

        Raises:
            OutputError: the file does not run.
        """
        expected = self._answer(images)
        try:
            found = session.run(None, {"images": images})
        except Exception as e:  # the runtime's errors have no common class
            size = " x ".join(map(str, images.shape))
            raise OutputError(f"the file does not run on an input of {size} ({first_line(e)})") from None
        return compared(expected, found)

    def _check(self, cases: Sequence[Case], path: Path, options: Options) -> None:
        advice = ": give --fixed, and --img-size HEIGHT WIDTH" if options.dynamic else ""
        for case in cases:
            size = " x ".join(map(str, case.shape))
            if case.agreement is None or case.agreement < MIN_AGREEMENT:
                raise OutputError(
                    f"{path.name} is not written: on {size} noise {100 * (case.agreement or 0):.1f} % of its boxes are "
                    f"the network's, and {100 * MIN_AGREEMENT:g} % are needed{advice}"
                )
            if not case.relative <= options.tolerance:
                raise OutputError(
                    f"{path.name} is not written: on {size} noise its scores differ from the network's by up to "
                    f"{case.difference:.3g}, {case.relative:.3g} of the largest score, more than the tolerance of "
                    f"{options.tolerance:g}{advice}"
                )


def compared(expected: Answer, found: Answer) -> Compared:
    """Returns how two answers to an image compare: which boxes both have, of one class, and their scores."""
    boxes, scores, labels, *masks = expected
    others, other_scores, other_labels, *other_masks = found
    scale = max(scores.max(initial=0.0), other_scores.max(initial=0.0))
    apart = np.abs(scores[:, None] - other_scores[None])
    is_same = (np.abs(boxes[:, None] - others[None]) <= SAME_PIXELS).all(2)
    apart[~is_same | (labels[:, None] != other_labels[None])] = np.inf
    pairs = [(i, int(row.argmin())) for i, row in enumerate(apart) if np.isfinite(row).any()]
    if masks:
        pairs = [(i, j) for i, j in pairs if _is_same_mask(masks[0][i], other_masks[0][j])]
    difference = max((float(apart[pair]) for pair in pairs), default=0.0)
    return Compared(2 * len({j for _, j in pairs}), len(boxes) + len(others), float(scale), difference)


def _is_same_mask(first: np.ndarray, second: np.ndarray) -> bool:
    one, other = first > 0.5, second > 0.5
    differs = (one != other) & (np.abs(first - second) > SAME_PROBABILITY)
    return bool(differs.sum() <= max(1, SAME_MASK * (one | other).sum()))


def open_detection(checkpoint: str | Path, content: Mapping[str, Any], kind: str, options: Options) -> BoxSubject:
    """Returns what is exported of a detection's checkpoint; see `export.open_classifier`."""
    if options.preprocessing != "checkpoint":
        raise ConfigError("--preprocessing: of classifiers, and this is a detection; leave it out")
    if kind != "onnx":
        raise ConfigError("a detection is written as ONNX alone, which has its suppression of double boxes; give .onnx")
    if options.batch_size != 1:
        raise ConfigError(f"--batch-size {options.batch_size}: the file of a detection takes one image; leave it out")
    if not OPSETS[0] <= options.opset <= OPSETS[1]:
        raise ConfigError(f"--opset {options.opset}: a detection is written in opset {OPSETS[0]} to {OPSETS[1]}")
    model, info = restore_network(content, checkpoint, options.use_ema)
    words = [*options.size_override, *options.overrides]
    # with a size, which only jitter knows
    unused = {"augment": {**UNUSED_AUGMENT, "resize": "large_scale_jitter"}, "data": {"img_size": MIN_SIZE}}
    config: DetectionConfig = dense_settings(SETTINGS, info.recipe, words, **unused)
    data, images = config.data, config.data.preprocessing
    size = images.size if options.img_size else (data.short_side, data.long_side)
    given = BoxPreprocessing(data.short_side, data.long_side, tuple(images.mean), tuple(images.std), size)
    metadata = describe(checkpoint, info, given, options) | {"task": "detection"}
    return BoxSubject(model, info, given, metadata, config.evaluation)
