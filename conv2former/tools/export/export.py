"""From a weight file to one for other runtimes: ONNX, torch.export or TorchScript, compared before it is kept.

The file carries what its user needs besides the network, as texts: how images become inputs, the class names, and where
the weights are from. docs/export.md lists them.
"""

from __future__ import annotations

import inspect
import io
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from timm.layers import SelectAdaptivePool2d
from torch import nn

from ... import __version__
from ...data.classes import class_names_of, display_names
from ...errors import CheckpointError, ConfigError, OutputError, UserError, counted, first_line
from ...models import CheckpointInfo, Conv2Former, Preprocessing
from ...models.others import check_size
from ...models.restore import restore
from ...printing import print_lines
from ...text import printable
from ...weights.description import OtherInfo
from ...weights.installed import file_sha256
from ...weights.preprocessing import candidates
from ...weights.reading import read_checkpoint, weight_file
from ..output import replacing
from ..prediction.predict import read_settings
from .options import DEFAULT_OPSET, MIN_SIZE, Options, check, format_of

__all__ = [
    "Case",
    "ClassSubject",
    "Exported",
    "Options",
    "Subject",
    "Traceable",
    "any_shape",
    "compare",
    "describe",
    "export",
    "open_classifier",
    "open_onnx",
    "open_session",
    "quiet",
    "read_metadata",
    "without_paths",
    "write_checked",
]

MAX_ONNX_BYTES = 1_500_000_000  # a file of Protocol Buffers ends at 2 GiB, and the exporter a little earlier
METADATA = (
    "preprocessing", "class_names", "display_names", "variant", "weights", "source", "source_sha256",
    "conv2former_version", "quantization", "task", "palette",
)  # fmt: skip

LOGITS = ("logit", "same class")  # what is compared of a network that gives them, see `Subject.compared`
Run = Callable[[np.ndarray], np.ndarray]  # (N, C, H, W) images to (N, classes) logits, or (N, classes, H, W)


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


# ------------------------------------------------------------------------------------------------ what the file carries


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


def read_metadata(path: str | Path, format: str | None = None) -> dict[str, str]:  # noqa: A002 - as in Options
    """Returns the texts in an exported file; `format` as in `Options`."""
    return _open(Path(path), format_of(Path(path), format))[1]


# -------------------------------------------------------------------------------------------------------------- writing


def write_checked(
    subject: Traceable, kind: str, path: Path, options: Options, say: Callable[[str], None]
) -> tuple[list[Case], list[str]]:
    """Writes the file, reads it back, and compares it with the network.

    Returns:
        The comparisons, and what there is to know about the file.

    Raises:
        UserError: it cannot be exported in this way, or differs by more than the tolerance.
    """
    model, info, metadata = subject.model, subject.info, subject.metadata
    fixed = None if options.dynamic else subject.shapes(options)[0]
    with quiet(), torch.no_grad():
        if kind == "torchscript":
            say("compiling the network")
            # through memory: on a full disk torch's own writing ends the program
            buffer = io.BytesIO()
            with _refusals_of(info, "write .onnx or .pt2"):
                torch.jit.save(torch.jit.script(model), buffer, _extra_files=metadata)
            path.write_bytes(buffer.getbuffer())
            facts = []
        else:
            say("tracing the network")
            with _refusals_of(info, "--fixed, for one input shape, may do, or .ts"):
                program = subject.trace(fixed)
            say(f"writing {kind}")
            if kind == "onnx":
                facts = _write_onnx(program, path, subject, options)
            else:
                buffer = io.BytesIO()
                torch.export.save(program, buffer, extra_files=metadata)
                path.write_bytes(buffer.getbuffer())
                facts = [counted(sum(node.op == "call_function" for node in program.graph.nodes), "operation")]
            del program
        run, found = _open(path, kind)
        assert found == metadata, found.keys()
    cases = compare(model, run, subject.shapes(options), say)
    worst = max(cases, key=lambda case: case.relative if math.isfinite(case.relative) else math.inf)
    if not worst.relative <= options.tolerance:
        shape = " x ".join(map(str, worst.shape))
        raise OutputError(
            f"{path.name} is not written: on {shape} noise its logits differ from the network's by up to "
            f"{worst.difference:.3g}, {worst.relative:.3g} of the largest logit, more than the tolerance of "
            f"{options.tolerance:g}"
        )
    return cases, facts


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what the exporters say about themselves."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@contextmanager
def _refusals_of(info: CheckpointInfo, advice: str) -> Iterator[None]:
    """Turns what torch says about one of timm's networks, which may have what it cannot write, into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # the compilers' errors have no common class
        if not isinstance(info, OtherInfo):
            raise
        raise OutputError(f"torch cannot write {info.name} so ({first_line(e)}): {advice}") from None


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


def without_paths(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Removes this machine's paths from a graph, and returns it."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def any_shape(in_chans: int, name: str = "x", size: tuple[int, int] | None = None) -> Any:
    """Returns the sizes that a file is for, in the terms of torch.export.

    Args:
        in_chans: channels of the images.
        name: of the argument that takes them.
        size: (height, width); None for any.
    """
    try:
        from torch.fx.experimental.dynamic_spec import ParamsSpec, ShapesSpec, ShapeVar, TensorSpec
    except ImportError:  # an older torch, which then holds for maps of the last stage of more than one pixel
        dynamic = torch.export.Dim.DYNAMIC
        return ({0: dynamic} if size else {0: dynamic, 2: dynamic, 3: dynamic},)
    sides = size or [ShapeVar(side, min=MIN_SIZE) for side in ("height", "width")]
    return ShapesSpec(params=ParamsSpec({name: TensorSpec([ShapeVar("batch", min=1), in_chans, *sides])}))


def _write_onnx(program: torch.export.ExportedProgram, path: Path, subject: Traceable, options: Options) -> list[str]:
    """Writes one ONNX file, and returns its opset and number of nodes.

    Args:
        program: what to write.
        path: of the file.
        subject: whose graph it is.
        options: how.

    Raises:
        UserError: it would be too large, or the opset cannot be written.
    """
    import onnx

    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if size > MAX_ONNX_BYTES:
        raise CheckpointError(
            f"the network has {size / 1e9:.1f} GB of weights, and one ONNX file holds {MAX_ONNX_BYTES / 1e9:.1f}; "
            "write .pt2 or .ts"
        )
    (argument,) = program.graph_signature.user_inputs
    try:
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=[subject.output],
            opset_version=options.opset,
            dynamic_shapes={argument: subject.open_sizes} if options.dynamic else None,
        )
    except torch.onnx.errors.OnnxExporterError as e:
        raise ConfigError(f"--opset {options.opset}: torch cannot write it ({first_line(e)})") from None
    assert exported is not None
    found = exported.model.opset_imports.get("", 0)
    if found != options.opset:
        raise ConfigError(f"--opset {options.opset}: torch wrote {found} instead; the default is {DEFAULT_OPSET}")
    graph = exported.model.graph
    for part in (graph, *graph.inputs, *graph.outputs, *graph.initializers.values(), *graph):
        part.metadata_props.clear()  # torch's notes on how it got there
    for node in graph:
        for value in node.outputs:
            value.metadata_props.clear()
    exported.model.metadata_props.update(subject.metadata)
    exported.save(path, external_data=False)
    onnx.checker.check_model(str(path), full_check=True)
    return [f"opset {found}", counted(graph.num_nodes(), "node")]


# ------------------------------------------------------------------------------------------------------------ comparing


def _open(path: Path, kind: str) -> tuple[Run, dict[str, str]]:
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


def shapes_of(info: CheckpointInfo, preprocessing: Preprocessing, options: Options) -> list[tuple[int, ...]]:
    """Returns the input shapes that a file is tried with.

    A dynamic file is tried with two batch sizes, of a Conv2Former each with the input size and two others that are
    neither square nor multiples of 32; another with its one shape, twice.
    """
    height, width = preprocessing.size
    if not options.dynamic:
        return [(options.batch_size, info.in_chans, height, width)] * 2
    if isinstance(info, OtherInfo):
        return [(batch, info.in_chans, height, width) for batch in (1, 3)]
    sizes = ((height, width), (height + 26, max(width - 34, 33)), (max(height // 2, 32) + 1, width + 7))
    return [(batch, info.in_chans, *size) for size in sizes for batch in (1, 3)]


def compare(model: nn.Module, run: Run, shapes: Sequence[tuple[int, ...]], say: Callable[[str], None]) -> list[Case]:
    """Runs the network and a file of it on the same noise.

    Raises:
        CheckpointError: the network's own answers are not finite numbers.
        OutputError: the file does not run.
    """
    rng = np.random.default_rng(0)
    cases = []
    for i, shape in enumerate(shapes):
        say(f"comparing, {i + 1} of {counted(len(shapes), 'batch', 'batches')}")
        images = rng.standard_normal(shape, dtype=np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(images)).numpy()
        if not np.isfinite(expected).all():
            raise CheckpointError("the network's answers to noise are not all finite numbers; its weights are broken")
        try:
            found = run(images)
        except Exception as e:  # the runtimes' errors have no common class
            size = " x ".join(map(str, shape))
            raise OutputError(f"the file does not run on an input of {size} ({first_line(e)})") from None
        if found.shape != expected.shape:
            raise OutputError(f"the file's answer has the shape {found.shape}, the network's {expected.shape}")
        same = float((found.argmax(1) == expected.argmax(1)).mean()) if expected.ndim == 4 else None
        cases.append(Case(shape, float(np.abs(expected).max()), float(np.abs(found - expected).max()), same))
    return cases
