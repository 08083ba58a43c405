"""From a weight file to one for other runtimes: ONNX, torch.export or TorchScript, compared before it is kept.

The file carries what its user needs besides the network, as texts: how images become inputs, the class names, and where
the weights are from. docs/export.md lists them.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from timm.layers import SelectAdaptivePool2d
from torch import nn

from ... import __version__
from ...data.classes import class_names_of, display_names
from ...models import CheckpointInfo, Conv2Former, Preprocessing
from ...models.others import check_size
from ...models.restore import restore
from ...printing import print_lines
from ...text import printable
from ...weights.installed import file_sha256
from ...weights.preprocessing import candidates
from ...weights.reading import read_checkpoint, weight_file
from ..output import replacing
from ..prediction.predict import read_settings
from .comparing import shapes_of
from .options import Options, check
from .subject import LOGITS, Case, Exported, Subject
from .writing import any_shape, without_paths, write_checked

__all__ = ["ClassSubject", "chosen_preprocessing", "describe", "export", "open_classifier"]


@dataclass(frozen=True)
class ClassSubject:
    """A classifier; see `Traceable`."""

    model: nn.Module
    info: CheckpointInfo
    preprocessing: Preprocessing
    metadata: dict[str, str]
    compared: ClassVar = LOGITS

    def write(
        self, kind: str, path: Path, options: Options, say: Callable[[str], None]
    ) -> tuple[list[Case], list[str]]:
        return write_checked(self, kind, path, options, say)

    @property
    def output(self) -> str:
        return "logits" if self.info.num_classes else "features"

    @property
    def open_sizes(self) -> dict[int, str]:
        return {0: "batch", 2: "height", 3: "width"} if isinstance(self.model, Conv2Former) else {0: "batch"}

    def trace(self, shape: tuple[int, ...] | None) -> torch.export.ExportedProgram:
        return _trace(self.model, self.info.in_chans, self.preprocessing.size, shape)

    def shapes(self, options: Options) -> list[tuple[int, ...]]:
        return shapes_of(self.info, self.preprocessing, options)


def open_classifier(checkpoint: str | Path, content: Mapping[str, Any], kind: str, options: Options) -> ClassSubject:
    """Returns what is exported of a classifier's file.

    Args:
        checkpoint: whatever `load_model` takes.
        content: of it.
        kind: one of `FORMATS`.
        options: how.

    Raises:
        UserError: it cannot be loaded, or does not go with the options.
    """
    model, info = restore(content, checkpoint, options.use_ema)
    preprocessing = chosen_preprocessing(info, options)
    check_size(model, checkpoint, preprocessing.size, info.in_chans)
    return ClassSubject(model, info, preprocessing, describe(checkpoint, info, preprocessing, options))


def export(
    checkpoint: str | Path,
    output: str | Path,
    options: Options | None = None,
    say: Callable[[str], None] = print_lines,
    open_subject: Callable[[str | Path, Mapping[str, Any], str, Options], Subject] = open_classifier,
) -> Exported:
    """Writes a network for another runtime, and compares the file with the network before it is put in its place.

    Args:
        checkpoint: whatever `load_model` takes.
        output: the file; its ending is the format, unless `options` say it.
        options: how.
        say: told what is being done, where it takes long.
        open_subject: returns what is exported of a weight file, of its path, its content, the format and the options.

    Raises:
        UserError: the options, the checkpoint or the output are wrong, a package is missing, or the file's answers
            differ from the network's by more than the tolerance. The output is then as it was.
    """
    options, output = options or Options(), Path(output)
    kind = check(checkpoint, output, options)
    say(f"reading {checkpoint}")
    subject = open_subject(checkpoint, read_checkpoint(checkpoint), kind, options)
    with replacing(output) as temporary:
        written = subject.write(kind, temporary, options, say)
        size = temporary.stat().st_size
    cases, facts = written
    return Exported(
        output, kind, subject.info, subject.preprocessing, subject.metadata, cases, size, facts, subject.compared
    )


def chosen_preprocessing(info: CheckpointInfo, options: Options) -> Preprocessing:
    """Returns the preprocessing to note in the file.

    Raises:
        ConfigError: an override is impossible, or changes something else.
    """
    noted = info.preprocessing
    if options.preprocessing != "checkpoint":
        noted = candidates(options.img_size or noted.img_size, noted.channels)[options.preprocessing]
    return read_settings(noted, [*options.size_override, *options.overrides]).preprocessing


def describe(checkpoint: str | Path, info: CheckpointInfo, preprocessing: Any, options: Options) -> dict[str, str]:
    """Returns the texts that go with the network; see docs/export.md."""
    source = weight_file(checkpoint)
    names = class_names_of(info.num_classes, info.class_names)
    texts = {
        "preprocessing": json.dumps(preprocessing.to_dict()),
        "weights": info.weights(options.use_ema),
        "source": printable(source.name),
        "source_sha256": file_sha256(source),
        "conv2former_version": __version__,
    }
    if info.name:
        texts["variant"] = info.name
    if names is not None:
        texts["class_names"] = json.dumps(names)
        if (shown := display_names(names)) != names:
            texts["display_names"] = json.dumps(shown)
    return texts


def _trace(
    model: nn.Module, in_chans: int, size: tuple[int, int], shape: tuple[int, ...] | None
) -> torch.export.ExportedProgram:
    """Returns the network's graph.

    Args:
        model: the network.
        in_chans: channels of its input.
        size: (height, width) of its input.
        shape: of the input; None for any batch size, and of a Conv2Former any height and width.
    """
    if not isinstance(model, Conv2Former):
        example = torch.zeros(shape or (2, in_chans, *size))
        name = next(iter(inspect.signature(model.forward).parameters))
        dynamic = None if shape else any_shape(in_chans, name, size)
        return without_paths(torch.export.export(model, (example,), dynamic_shapes=dynamic))
    example = torch.zeros(shape or (2, in_chans, 64, 96))
    pool = model.head.global_pool
    # The same mean, without a look at the size: adaptive pooling asks whether the map is one pixel wide.
    model.head.global_pool = SelectAdaptivePool2d(pool_type="fast", flatten=True)
    try:
        dynamic = None if shape else any_shape(in_chans)
        return without_paths(torch.export.export(model, (example,), dynamic_shapes=dynamic))
    finally:
        model.head.global_pool = pool
