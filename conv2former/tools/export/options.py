"""How to export, and all that can be a mistake in it before a weight file is read."""

from __future__ import annotations

import importlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

from ...config import apply_overrides
from ...errors import ConfigError, OutputError, UserError, closest
from ...weights.reading import weight_file
from ..output import check_writable

__all__ = [
    "DEFAULT_OPSET",
    "DEFAULT_TOLERANCE",
    "FORMATS",
    "MIN_SIZE",
    "PREPROCESSINGS",
    "Options",
    "check",
    "format_of",
]

FORMATS = {"onnx": ".onnx", "torch_export": ".pt2", "torchscript": ".ts"}
PREPROCESSINGS = ("checkpoint", "imagenet", "inception")
DEFAULT_OPSET = 20  # the first with GELU as one node
DEFAULT_TOLERANCE = 1e-4  # full-size networks differ by less than a tenth of it: docs/export.md
MIN_SIZE, MAX_SIZE = 32, 4096  # pixels; below, the last stage would be left without any


@dataclass(frozen=True)
class Options:
    """How to export.

    Attributes:
        format: one of `FORMATS`; None for that of the output's ending.
        dynamic: any batch size, and of a Conv2Former any height and width from 32 pixels on; otherwise `batch_size` and
            the input size.
        img_size: of the input, pixels: one number for a square, or height and width; None for the checkpoint's.
        batch_size: of a file that is not dynamic.
        opset: of ONNX.
        tolerance: the largest difference of a logit that is accepted, as a share of the largest logit.
        preprocessing: 'checkpoint', as the file notes it; 'imagenet' or 'inception', the two that the authors' files
            may have been evaluated with.
        overrides: changes to it, `data.crop_pct=1`.
        use_ema: take the averaged weights where the file has them.
    """

    format: str | None = None
    dynamic: bool = True
    img_size: int | tuple[int, int] | None = None
    batch_size: int = 1
    opset: int = DEFAULT_OPSET
    tolerance: float = DEFAULT_TOLERANCE
    preprocessing: str = "checkpoint"
    overrides: tuple[str, ...] = ()
    use_ema: bool = True

    @property
    def size_override(self) -> list[str]:
        """`img_size` as an override, if it is set."""
        size = self.img_size
        return [] if size is None else [f"data.img_size={size if isinstance(size, int) else list(size)}"]


def check(checkpoint: str | Path, output: Path, options: Options) -> str:
    """Checks what can be checked before the weight file is read, and returns the format.

    Raises:
        UserError: something is wrong.
    """
    kind = format_of(output, options.format)
    size = options.img_size
    sides = () if size is None else (size,) if isinstance(size, int) else size
    if not all(MIN_SIZE <= side <= MAX_SIZE for side in sides):
        raise ConfigError(f"--img-size {' '.join(map(str, sides))}: expected {MIN_SIZE} to {MAX_SIZE} pixels")
    if sides and "img_size" in apply_overrides({}, options.overrides).get("data", {}):
        raise ConfigError("--img-size and data.img_size are two ways to say the same; give one")
    if options.preprocessing not in PREPROCESSINGS:
        raise ConfigError(f"preprocessing '{options.preprocessing}': expected {', '.join(PREPROCESSINGS)}")
    if not 0 < options.tolerance < math.inf:
        raise ConfigError(f"--tolerance {options.tolerance:g}: expected a number above 0")
    if options.batch_size < 1 or (options.dynamic and options.batch_size != 1):
        raise ConfigError(f"--batch-size {options.batch_size}: goes with --fixed, and is at least 1")
    if kind == "torchscript" and not options.dynamic:
        raise ConfigError("--fixed: a TorchScript file takes any batch size, height and width; leave it out")
    if kind == "onnx":
        require("onnx", "onnxruntime", "onnxscript")
    check_writable(output)
    source = weight_file(checkpoint)
    if output.exists() and os.path.samefile(source, output):
        raise OutputError(f"{output} is the checkpoint itself; give another file name")
    return kind


def format_of(output: Path, wanted: str | None) -> str:
    endings = {ending: name for name, ending in FORMATS.items()}
    found = endings.get(output.suffix.lower())
    if wanted is not None and wanted not in FORMATS:
        raise ConfigError(f"--format {wanted}: expected {', '.join(FORMATS)}")
    if wanted is None and found is None:
        known = ", ".join(f"{ending} ({name})" for ending, name in endings.items())
        hint = closest(output.suffix, endings)
        raise ConfigError(f"{output}: its ending says no format{hint}; expected {known}, or --format")
    if wanted and found and wanted != found:
        raise ConfigError(f"{output}: the ending is that of {found}, not of {wanted}; end it in {FORMATS[wanted]}")
    return wanted or found or ""


def require(*packages: str) -> None:
    """Checks that the packages of the extra `export` are there.

    Raises:
        UserError: one is not; says how to install them.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as e:
            raise UserError(f"ONNX needs the package {package} ({e}): pip install 'conv2former[export]'") from None
