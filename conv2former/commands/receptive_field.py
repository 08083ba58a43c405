"""Draws the effective receptive field of a network: which pixels move a feature in the middle of a stage, how much.

python scripts/receptive_field.py --checkpoint conv2former_t.pth.tar --images photos
python scripts/receptive_field.py --checkpoint a.pt b.pt --stage 3 --stage 4          # side by side
python scripts/receptive_field.py --model conv2former_n conv2former_t --img-size 512  # random weights

Without --images noise is used. The picture says so. docs/predict.md tells how to read it.
"""

from __future__ import annotations

from pathlib import Path

from ..printing import print_lines
from ..tools.arguments import Parser
from ..tools.cli import run_cli
from ..tools.output import save_figure
from ..tools.prediction.predict import positive
from ..tools.prediction.receptive_field import check_picture, fields_figure, fields_table, measure_all


def main() -> None:
    parser = Parser("receptive-field", __doc__)
    parser.add_argument("--checkpoint", nargs="+", default=[], metavar="FILE", help="weights in any known layout")
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME", help="variants, with random weights")
    parser.add_argument("--stage", type=int, choices=[1, 2, 3, 4], action="append", help="can be repeated (default: 4)")
    parser.add_argument("--images", nargs="+", default=[], metavar="INPUT", help="files, folders or globs, else noise")
    parser.add_argument("--count", type=positive, default=50, metavar="N", help="images at most (default: 50)")
    parser.add_argument("--img-size", type=positive, metavar="N", help="pixels (default: the checkpoint's, or 224)")
    parser.add_argument("--output", type=Path, default=Path("receptive_field.png"), metavar="PNG")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    args = parser.parse_args()
    if not args.checkpoint and not args.model:
        parser.error("give --checkpoint FILE or --model NAME")
    check_picture(args.output)
    stages = sorted({*(args.stage or [4])})
    fields, note = measure_all(args.checkpoint, args.model, stages, args.images, args.count, args.img_size, args.device)
    print_lines(*note.split("\n"), *fields_table(fields).split("\n"))
    save_figure(fields_figure(fields, note), args.output)
    print_lines(f"in {args.output}")


def run() -> None:
    """Runs the command and exits, errors as one message."""
    run_cli(main)
