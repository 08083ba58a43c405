"""Writes a checkpoint for other runtimes, compared with the network before it is kept.

python scripts/export.py --checkpoint conv2former_t.pth.tar --output model.onnx   # any batch size, height and width
python scripts/export.py --checkpoint conv2former_t.pth.tar --output model.pt2    # torch.export
python scripts/export.py --checkpoint conv2former_t.pth.tar --output model.ts     # TorchScript
python scripts/export.py --checkpoint best.pt --output wide.onnx --img-size 128 256 --fixed
python scripts/export.py --checkpoint best.pt --output int8.onnx --int8           # and its accuracy, before and after

Preprocessing, class names and where the weights are from are in the file; docs/export.md shows how to use them. What
is noted as preprocessing can be changed: data.mean=[.5,.5,.5] data.std=[.5,.5,.5]; of a detection also which of its
boxes count: evaluation.score=0.5.
"""

from __future__ import annotations

import argparse
import sys
from itertools import takewhile
from pathlib import Path

from .._preprocessing import as_img_size
from ..errors import ConfigError, counted
from ..printing import print_lines
from ..text import clipped, printable
from ..tools.arguments import Parser
from ..tools.cli import run_cli
from ..tools.export.options import DEFAULT_OPSET, DEFAULT_TOLERANCE, FORMATS, PREPROCESSINGS, Options
from ..tools.export.quantize import CALIBRATION_IMAGES, MAX_DROP, ImagesFor, Quantized, export_int8
from ..tools.export.registry import export
from ..tools.export.subject import Exported
from ..tools.output import text_table
from ..weights.description import weights_text


def parse() -> argparse.Namespace:
    parser = Parser("export", __doc__, ("data", "evaluation"))
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="data.KEY=VALUE",
        help="changes to the preprocessing; of a detection also evaluation.KEY",
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="this project's, the authors', birder's")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="ends in .onnx, .pt2 or .ts")
    parser.add_argument("--format", choices=list(FORMATS), help="for a file with another ending")
    parser.add_argument("--raw", action="store_true", help="take the raw weights although the file has averaged ones")
    parser.add_argument("--preprocessing", choices=PREPROCESSINGS, default="checkpoint", help="to note in the file")
    parser.add_argument(
        "--img-size",
        nargs="+",
        default=[],
        metavar="N",
        help="of the input, pixels: one number for a square, or height and width (default: the checkpoint's)",
    )
    shapes = parser.add_mutually_exclusive_group()
    shapes.add_argument(
        "--dynamic", action="store_true", help="any batch size, and sizes from 32 pixels on (the default)"
    )
    shapes.add_argument("--fixed", action="store_true", help="one input shape: --batch-size images of --img-size")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="with --fixed (default: 1)")
    parser.add_argument("--opset", type=int, default=DEFAULT_OPSET, metavar="N", help=f"of ONNX ({DEFAULT_OPSET})")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=DEFAULT_TOLERANCE,
        metavar="X",
        help=f"largest difference of a logit, as a share of the largest logit ({DEFAULT_TOLERANCE:g})",
    )
    group = parser.add_argument_group("int8")
    group.add_argument("--int8", action="store_true", help="quantize, and evaluate before and after; ONNX")
    group.add_argument("--data", metavar="FOLDER", help="with the images (default: as the checkpoint notes)")
    group.add_argument(
        "--calibrate", nargs="*", default=[], metavar="data.KEY=VALUE", help="the same in full, data.root=..."
    )
    group.add_argument("--calibration-images", type=int, default=CALIBRATION_IMAGES, metavar="N", help="from training")
    group.add_argument("--evaluation-images", type=int, metavar="N", help="from validation (default: all)")
    args = parser.parse_intermixed_args()
    args.img_size, rest = _size_of(args.img_size)
    args.overrides += rest
    if not args.int8 and (args.data or args.calibrate or args.evaluation_images):
        parser.error("--data, --calibrate and --evaluation-images go with --int8")
    return args


def _size_of(words: list[str]) -> tuple[int | tuple[int, int] | None, list[str]]:
    """Returns what is given as --img-size, and the overrides that stand behind it."""
    numbers = list(takewhile(lambda word: "=" not in word, words))
    if not all(word.isascii() and word.isdigit() for word in numbers) or len(numbers) > 2 or (words and not numbers):
        raise ConfigError(f"--img-size {' '.join(words)}: expected one number, or height and width, in pixels")
    sides = [int(word) for word in numbers]
    size = as_img_size(sides if len(sides) == 2 else sides[0]) if sides else None
    return size, words[len(numbers) :]


def say(text: str) -> None:
    """Shows what is being done, on a terminal, until the next thing."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{clipped(text, 79)}{' ...' if text else ''}", end="", file=sys.stderr, flush=True)


def describe(exported: Exported) -> str:
    info = exported.info
    names = "with their names" if "class_names" in exported.metadata else "without names"
    classes = f"{counted(info.num_classes, 'class', 'classes')} {names}"
    number, same = exported.compared
    has_shares = any(case.agreement is not None for case in exported.cases)
    rows = [
        (
            " x ".join(map(str, case.shape)),
            f"{case.scale:.4g}",
            f"{case.difference:.3g}",
            f"{case.relative:.2g}",
            *[f"{100 * (case.agreement or 0.0):.3f} %"] * has_shares,
        )
        for case in exported.cases
    ]
    columns = ("noise, N x C x H x W", f"largest {number}", "largest difference", "relative")
    facts = ", ".join([exported.format, *exported.facts, f"{exported.size / 1e6:.2f} MB"])
    return "\n".join(
        [
            f"{printable(info.name or 'unnamed variant')}, {info.num_parameters:,} parameters, "
            f"{weights_text(exported.metadata['weights'])}, "
            f"{classes if info.num_classes else 'no classifier: it gives features'}",
            f"images: {exported.preprocessing}",
            text_table((*columns, *[same] * has_shares), rows),
            printable(f"{exported.path}: {facts}"),
        ]
    )


def describe_int8(done: Quantized) -> str:
    accuracy = done.accuracy
    rows = [
        ("float32", f"{done.float_size / 1e6:.2f}", f"{accuracy.float_top1:.2f}", str(accuracy.n)),
        ("int8", f"{done.exported.size / 1e6:.2f}", f"{accuracy.int8_top1:.2f}", str(accuracy.n)),
    ]
    return "\n".join(
        [
            printable(f"calibrated on {done.calibrated_on}"),
            printable(f"evaluated on {done.evaluated_on}, both in onnxruntime"),
            *(printable(f"skipped: {reason}") for reason in accuracy.skipped),
            text_table(("", "MB", "top-1 %", "images"), rows),
            f"the same class on {accuracy.agreement:.2f} % of the images; on noise the logits of int8 differ by up to "
            f"{done.difference:.2g} of the largest",
        ]
    )


def main() -> None:
    args = parse()
    options = Options(
        format=args.format,
        dynamic=not args.fixed,
        img_size=args.img_size,
        batch_size=args.batch_size,
        opset=args.opset,
        tolerance=args.tolerance,
        preprocessing=args.preprocessing,
        overrides=tuple(args.overrides),
        use_ema=not args.raw,
    )
    try:
        if not args.int8:
            done = export(args.checkpoint, args.output, options, say)
        else:
            images = ImagesFor(tuple(args.calibrate), args.data, args.calibration_images, args.evaluation_images)
            quantized = export_int8(args.checkpoint, args.output, options, images, say)
    finally:
        say("")
    if not args.int8:
        print_lines(*describe(done).split("\n"))
        return
    print_lines(*describe(quantized.exported).split("\n"), *describe_int8(quantized).split("\n"))
    if quantized.accuracy.drop > MAX_DROP:
        print(
            f"warning: int8 loses {quantized.accuracy.drop:.2f} points of top-1, more than {MAX_DROP:g}; calibrate on "
            "more images, or use the float file",
            file=sys.stderr,
        )


def run() -> None:
    """Runs the command and exits, errors as one message."""
    run_cli(main)
