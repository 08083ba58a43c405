"""An int8 ONNX file by onnxruntime's static quantization, and what it costs on given images.

Which settings lose least is measured in docs/export.md: convolutions and the classifier, one scale per output channel,
unsigned activations, logits in float, and everything between them in float.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ...config import apply_overrides
from ...config.schema import NO_SPLIT, DataConfig
from ...data import Batch, DataSource, StreamSource, batches, eval_loader
from ...data.holdout import Part
from ...data.sources import open_split, open_train_and_val
from ...engine.evaluate import shown
from ...errors import ConfigError, DataError, OutputError, UserError, counted
from ...printing import print_lines
from ..evaluation.settings import EvaluationOptions
from ..evaluation.task import prepare_task
from ..output import replacing
from .comparing import compare
from .export import ClassSubject, describe
from .opening import Run, open_onnx, quiet
from .options import Options, check
from .subject import Exported
from .writing import write_checked

__all__ = ["CALIBRATION_IMAGES", "MAX_DROP", "Accuracy", "ImagesFor", "Quantized", "export_int8"]

CALIBRATION_IMAGES = 256
MAX_DROP = 1.0  # points of top-1; a larger drop is warned of
BATCH_SIZE = 16
SETTINGS: dict[str, Any] = {
    "op_types_to_quantize": ["Conv", "Gemm"],
    "per_channel": True,
    "reduce_range": True,  # 7 bits: x86 processors without VNNI add products of 8 bits in 16, which they exceed
    "extra_options": {"OpTypesToExcludeOutputQuantization": ["Gemm"]},  # 8 bits would make different logits equal
}
Source = DataSource | StreamSource


@dataclass(frozen=True)
class ImagesFor:
    """Which images to calibrate on and to evaluate with.

    Attributes:
        overrides: of the data section in the checkpoint, `data.root=...`.
        root: in place of `data.root`; then nothing of where the data is comes from the checkpoint.
        calibration: how many to calibrate on, evenly spaced over the training split, or the validation split where
            there is no training split; those are then not evaluated.
        evaluation: how many of the validation split to evaluate with, evenly spaced; None for all.
    """

    overrides: tuple[str, ...] = ()
    root: str | None = None
    calibration: int = CALIBRATION_IMAGES
    evaluation: int | None = None


@dataclass(frozen=True)
class Accuracy:
    """Both files on the same images.

    Attributes:
        n: images.
        float_top1, int8_top1: percent.
        agreement: percent of the images that both give the same class.
        skipped: a sentence for each unreadable image.
    """

    n: int
    float_top1: float
    int8_top1: float
    agreement: float
    skipped: list[str] = field(default_factory=list)

    @property
    def drop(self) -> float:
        """Points of top-1 that are lost."""
        return self.float_top1 - self.int8_top1


@dataclass(frozen=True)
class Quantized:
    """An int8 file that was written.

    Attributes:
        exported: the file; its cases and facts are those of the float file that it was made from.
        float_size: bytes of that.
        accuracy: of both.
        calibrated_on, evaluated_on: what images, in words.
        difference: the largest of the int8 file's logits, on noise, as a share of the largest logit.
    """

    exported: Exported
    float_size: int
    accuracy: Accuracy
    calibrated_on: str
    evaluated_on: str
    difference: float


def export_int8(
    checkpoint: str | Path,
    output: str | Path,
    options: Options | None = None,
    images: ImagesFor | None = None,
    say: Callable[[str], None] = print_lines,
) -> Quantized:
    """Writes an int8 ONNX file, after comparing the float file that it is made from with the network.

    Args:
        checkpoint: whatever `load_model` takes, of a classifier of RGB or grey images.
        output: the file.
        options: how to export; `overrides` in it, too, are of the data section.
        images: to calibrate on and to evaluate with.
        say: told what is being done, where it takes long.

    Raises:
        UserError: as `export`, or the images are missing or do not go with the checkpoint.
    """
    options, output, images = options or Options(), Path(output), images or ImagesFor()
    if check(checkpoint, output, options) != "onnx":
        raise ConfigError(f"{output}: int8 is for ONNX; end it in .onnx")
    say(f"reading {checkpoint}")
    words = [*options.overrides, *images.overrides]
    words += options.size_override
    task = prepare_task(
        Path(checkpoint),
        EvaluationOptions(
            overrides=tuple(words),
            use_ema=options.use_ema,
            data=images.root,
            preprocessing=options.preprocessing,
            among="all",
        ),
        {},
        keep=True,
    )
    assert task.model is not None
    preprocessing = next(iter(task.views.values()))
    metadata = describe(checkpoint, task.info, preprocessing, options)
    data = task.data.model_copy(update=vars(preprocessing))
    calibration, evaluation = _choose(data, task.source, words, images)
    size = BATCH_SIZE if options.dynamic else options.batch_size
    with replacing(output) as temporary:
        original = temporary.parent / "float" / temporary.name
        original.parent.mkdir()
        subject = ClassSubject(task.model, task.info, preprocessing, metadata)
        cases, facts = write_checked(subject, "onnx", original, options, say)
        say(f"calibrating on {counted(_length(calibration, images.calibration), 'image')}")
        used = _quantize(original, temporary, _inputs(calibration, data, size, images.calibration))
        float_run, int8_run = open_onnx(original)[0], open_onnx(temporary)[0]
        noise = compare(task.model, int8_run, subject.shapes(options), lambda text: None)
        if not all(np.isfinite(case.difference) for case in noise):
            raise OutputError(f"{output} is not written: the int8 network's answers are not all finite numbers")
        say("evaluating both files")
        accuracy = _evaluate(float_run, int8_run, evaluation, data, size, images.evaluation)
        calibrated_on, evaluated_on = (
            f"{counted(n, 'image')} of {source.name}" for n, source in ((used, calibration), (accuracy.n, evaluation))
        )
        metadata["quantization"] = json.dumps(
            {
                "weights": "int8, per output channel",
                "activations": "uint8",
                "calibrated_on": calibrated_on,
                "evaluated_on": evaluated_on,
                "float_top1": round(accuracy.float_top1, 3),
                "int8_top1": round(accuracy.int8_top1, 3),
            }
        )
        facts = _write_metadata(temporary, metadata)
        exported = Exported(output, "onnx", task.info, preprocessing, metadata, cases, temporary.stat().st_size, facts)
        float_size = original.stat().st_size
    difference = max(case.relative for case in noise)
    return Quantized(exported, float_size, accuracy, calibrated_on, evaluated_on, difference)


# ------------------------------------------------------------------------------------------------------ which images


def _choose(data: DataConfig, val: Source, words: list[str], images: ImagesFor) -> tuple[Source, Source]:
    """Returns the images to calibrate on and those to evaluate with; none is in both.

    Raises:
        DataError: there are too few, or a training split that was asked for is not there.
    """
    if images.calibration < 1 or (images.evaluation is not None and images.evaluation < 1):
        raise ConfigError("the numbers of images to calibrate on and to evaluate with are at least 1")
    is_asked = "train_split" in apply_overrides({}, words).get("data", {})
    train = _training_images(data, val, is_asked)
    if train is None and isinstance(val, StreamSource):
        raise DataError(f"{val.name}: there is no training split to calibrate on (data.train_split)")
    if train is None:
        assert isinstance(val, DataSource)
        if len(val) < 2:
            raise DataError(
                f"{val.name} has {counted(len(val), 'image')}; one to calibrate on and one to evaluate with"
            )
        chosen = _spaced(len(val), min(images.calibration, len(val) // 2))
        rest = np.setdiff1d(np.arange(len(val)), chosen)
        train, val = _part(val, chosen), replace(_part(val, rest), name=f"the others of {val.name}")
    elif isinstance(train, DataSource):
        train = _part(train, _spaced(len(train), images.calibration))
    if isinstance(val, DataSource) and images.evaluation is not None:
        val = _part(val, _spaced(len(val), images.evaluation))
    return train, val


def _training_images(data: DataConfig, val: Source, is_asked: bool) -> Source | None:
    """Returns the training split, without what is held out of it; None if there is none."""
    try:
        if data.holdout and data.val_split in (None, NO_SPLIT):
            return open_train_and_val(data)[0]
        train = open_split(data, data.train_split, val.class_names)
    except DataError:
        if is_asked:
            raise
        return None
    return None if train.name == val.name else train


def _spaced(length: int, count: int) -> np.ndarray:
    """Returns `count` indices below `length`, evenly spaced, or all; of sorted images that is some of every class."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))


def _part(source: DataSource, indices: np.ndarray) -> DataSource:
    return replace(source, images=Part(source.images, indices))


def _length(source: Source, most: int) -> int:
    return len(source) if isinstance(source, DataSource) else most


def _loaded(source: Source, data: DataConfig, size: int, most: int | None) -> Iterator[Batch]:
    """Goes over batches of `size` images, of a stream over the first ones."""
    loaded = batches(eval_loader(source, data, size, 0, 1, pin_memory=False))
    yield from islice(loaded, -(-most // size)) if most and isinstance(source, StreamSource) else loaded


def _inputs(source: Source, data: DataConfig, size: int, most: int) -> Iterator[np.ndarray]:
    for batch in _loaded(source, data, size, most):
        if len(batch.images):
            yield batch.images.numpy()


# -------------------------------------------------------------------------------------------------------- the two files


def _quantize(original: Path, path: Path, inputs: Iterator[np.ndarray]) -> int:
    """Writes the int8 file, and returns how many images it was calibrated on.

    Raises:
        DataError: not one image can be read.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quant_pre_process,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        seen = 0

        def get_next(self) -> dict[str, np.ndarray] | None:
            images = next(inputs, None)
            if images is None:
                return None
            self.seen += len(images)
            return {"images": padded(images, original_batch)}

    import onnx

    dims = onnx.load(original).graph.input[0].type.tensor_type.shape.dim
    original_batch = dims[0].dim_value  # 0 for any
    prepared, reader = original.with_name("prepared.onnx"), Reader()
    with quiet():
        quant_pre_process(str(original), str(prepared), skip_symbolic_shape=True)
        try:
            quantize_static(
                str(prepared),
                str(path),
                reader,
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                **SETTINGS,
            )
        except ValueError as e:
            if reader.seen or isinstance(e, UserError):
                raise
            raise DataError("not one image to calibrate on can be read") from None
    return reader.seen


def padded(images: np.ndarray, batch: int) -> np.ndarray:
    """Repeats the last image until there are `batch`; 0 for as they are."""
    missing = max(0, batch - len(images))
    return np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])


def _evaluate(float_run: Run, int8_run: Run, source: Source, data: DataConfig, size: int, most: int | None) -> Accuracy:
    """Runs both files on the same images."""
    n = same = 0
    right = np.zeros(2, np.int64)
    skipped: list[str] = []
    total = most if most and isinstance(source, StreamSource) else len(source)
    for batch in shown(_loaded(source, data, size, most), total, "evaluating both files"):
        skipped += [item.reason for item in batch.skipped]
        count = len(batch.images)
        if not count:
            continue
        pixels, labels = padded(batch.images.numpy(), size), batch.labels.numpy()
        answers = np.stack([run(pixels)[:count].argmax(1) for run in (float_run, int8_run)])
        n, same = n + count, same + int((answers[0] == answers[1]).sum())
        right += (answers == labels).sum(1)
    total = n + len(skipped)
    if not n or len(skipped) > data.max_skipped * total:
        raise DataError(
            f"{len(skipped)} of {counted(total, 'image')} of {source.name} cannot be read, more than "
            f"data.max_skipped = {data.max_skipped:g} allows{f': {skipped[0]}' if skipped else ''}"
        )
    float_top1, int8_top1 = (100 * right / n).tolist()
    return Accuracy(n, float_top1, int8_top1, 100 * same / n, skipped)


def _write_metadata(path: Path, metadata: dict[str, str]) -> list[str]:
    """Puts the texts into the file, and returns its opset and number of nodes."""
    import onnx

    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, metadata)
    used = {node.domain for node in model.graph.node}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    onnx.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return [f"opset {opset}", counted(len(model.graph.node), "node")]
