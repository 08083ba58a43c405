"""Exported files as their users open them: what runs them, and the texts in them."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...errors import OutputError, first_line
from .options import format_of

__all__ = ["Run", "open_file", "open_onnx", "open_session", "quiet", "read_metadata", "silent"]

METADATA = (
    "preprocessing", "class_names", "display_names", "variant", "weights", "source", "source_sha256",
    "conv2former_version", "quantization", "task", "palette",
)  # fmt: skip

Run = Callable[[np.ndarray], np.ndarray]  # (N, C, H, W) images to (N, classes) logits, or (N, classes, H, W)


def read_metadata(path: str | Path, format: str | None = None) -> dict[str, str]:  # noqa: A002 - as in Options
    """Returns the texts in an exported file; `format` as in `Options`."""
    return open_file(Path(path), format_of(Path(path), format))[1]


def open_file(path: Path, kind: str) -> tuple[Run, dict[str, str]]:
    """Reads a file back as its user would: what runs it, and the texts in it."""
    if kind == "onnx":
        return open_onnx(path)
    texts: dict[str, Any] = dict.fromkeys(METADATA, "")
    with quiet():
        if kind == "torch_export":
            module: nn.Module = torch.export.load(path, extra_files=texts).module()
        else:
            module = torch.jit.load(path, map_location="cpu", _extra_files=texts)
    plain = {key: text.decode() if isinstance(text, bytes) else text for key, text in texts.items()}

    def run(images: np.ndarray) -> np.ndarray:
        with quiet(), torch.no_grad():
            return module(torch.from_numpy(images)).numpy()

    return run, {key: text for key, text in plain.items() if text}


def open_onnx(path: Path) -> tuple[Run, dict[str, str]]:
    """Returns what runs an ONNX file of one answer, see `open_session`, and the texts in the file."""
    session, texts = open_session(path)
    name = session.get_inputs()[0].name
    return lambda images: np.asarray(session.run(None, {name: images})[0]), texts


def open_session(path: Path) -> tuple[Any, dict[str, str]]:
    """Returns onnxruntime's session of an ONNX file, on the CPU, and the texts in the file.

    Raises:
        OutputError: onnxruntime does not take it.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as e:  # its errors have no common class
        reason = re.sub(r"^\[.*?\] : \d+ : \w+ : ", "", first_line(e))
        version = onnxruntime.__version__
        raise OutputError(f"{path.name} is not written: onnxruntime {version} does not take it ({reason})") from None
    return session, dict(session.get_modelmeta().custom_metadata_map)


@contextmanager
def quiet(level: int = logging.WARNING) -> Iterator[None]:
    """Silences what the exporters say about themselves: warnings, and what is logged up to `level`."""
    previous = logging.root.manager.disable
    logging.disable(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@contextmanager
def silent() -> Iterator[None]:
    """Keeps back the pages of graphs that torch prints and logs where it cannot write a network."""
    with quiet(logging.CRITICAL), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
