"""What is exported: a network with what goes with it; and what comes out: a file, compared with the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ...models import CheckpointInfo
from .options import Options

__all__ = ["LOGITS", "Case", "Exported", "Subject", "Traceable"]

LOGITS = ("logit", "same class")  # what is compared of a network that gives them, see `Subject.compared`


@dataclass(frozen=True)
class Case:
    """The file's answer beside the network's, for one batch of noise.

    Attributes:
        shape: of the input, (N, C, H, W).
        scale: the largest logit of the network, as an absolute value; of a detection the largest score.
        difference: the largest of a logit; of a detection of the score of a box that both have.
        agreement: of a segmentation, the share of the pixels that have the same class; of a detection, of the boxes
            that both have; None of a classifier.
    """

    shape: tuple[int, ...]
    scale: float
    difference: float
    agreement: float | None = None

    @property
    def relative(self) -> float:
        """The difference as a share of `scale`."""
        return self.difference / max(self.scale, 1e-12)


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how it compares.

    Attributes:
        path: of the file.
        format: one of `FORMATS`.
        info: what the weight file is.
        preprocessing: of images, as noted in the file; as text, for people.
        metadata: the texts in the file.
        cases: the comparisons.
        size: bytes.
        facts: what there is to know about its content, such as 'opset 20'.
        compared: see `Subject`.
    """

    path: Path
    format: str
    info: CheckpointInfo
    preprocessing: Any
    metadata: dict[str, str]
    cases: list[Case]
    size: int
    facts: list[str] = field(default_factory=list)
    compared: tuple[str, str] = LOGITS


class Subject(Protocol):
    """A network to export, with what goes with it.

    Attributes:
        model: in evaluation mode.
        info: what its file says about itself.
        preprocessing: to be noted; as text, for people.
        metadata: the texts for the file.
        compared: what of its answers is: a number, and what `Case.agreement` is the share of.
    """

    compared: ClassVar[tuple[str, str]]

    @property
    def model(self) -> nn.Module: ...

    @property
    def info(self) -> CheckpointInfo: ...

    @property
    def preprocessing(self) -> Any: ...

    @property
    def metadata(self) -> dict[str, str]: ...

    def write(
        self, kind: str, path: Path, options: Options, say: Callable[[str], None]
    ) -> tuple[list[Case], list[str]]:
        """Writes the file, and compares it with the network; see `write_checked`."""


class Traceable(Subject, Protocol):
    """A network that is a program of torch.export.

    Attributes:
        output: the name of what it gives, in ONNX.
        open_sizes: names of the input's dimensions that a dynamic file leaves open.
    """

    @property
    def output(self) -> str: ...

    @property
    def open_sizes(self) -> dict[int, str]: ...

    def trace(self, shape: tuple[int, ...] | None) -> torch.export.ExportedProgram:
        """Returns the network's graph, for one input shape; None for all that `open_sizes` allows."""

    def shapes(self, options: Options) -> list[tuple[int, ...]]:
        """Returns the input shapes that a file is tried with."""
