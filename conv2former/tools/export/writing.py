"""Writes a network's graph in one of the formats, and compares the file with the network."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError, ConfigError, OutputError, UserError, counted, first_line
from ...models import CheckpointInfo
from ...weights.description import OtherInfo
from .comparing import compare
from .opening import open_file, quiet, silent
from .options import DEFAULT_OPSET, MIN_SIZE, Options
from .subject import Case, Traceable

__all__ = ["MAX_ONNX_BYTES", "any_shape", "without_paths", "write_checked"]

MAX_ONNX_BYTES = 1_500_000_000  # a file of Protocol Buffers ends at 2 GiB, and the exporter a little earlier


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
            with _refusals_of(info, "--fixed, for one input shape, may do, or .ts"), silent():
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
        run, found = open_file(path, kind)
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
