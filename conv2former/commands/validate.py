"""Evaluates checkpoints on a validation set, alone or under torchrun with the same result.

python scripts/validate.py --checkpoint runs/quickstart/checkpoints/best.pt
python scripts/validate.py --checkpoint conv2former_t.pth.tar --data /data/imagenet --preprocessing both
python scripts/validate.py --checkpoint conv2former_t.hvision_in1k --data /data/imagenet --confirm
python scripts/validate.py --checkpoint a.pt b.safetensors --data photos/val --confusion --worst 20 --output results

A checkpoint of this project brings its data section along; any key of it can be changed, data.val_split=test. The
network and its preprocessing are read from the file. See docs/evaluate.md; of checkpoints of other tasks, whose section
evaluation can be changed, too, evaluation.mode=slide, docs/segmentation.md and docs/detection.md.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from ..engine.terminal import say
from ..tools.arguments import Parser
from ..tools.cli import run_cli
from ..tools.evaluation.confirm import check_confirmable, confirm
from ..tools.evaluation.files import DEFAULT_FOLDER, Extras
from ..tools.evaluation.registry import heading, summary, validate_files
from ..tools.evaluation.settings import PREPROCESSINGS
from ..tools.evaluation.task import AMONG

MAX_WORST = 200  # in one picture
LESS_MEMORY = (
    "lower train.eval_batch_size or data.workers, of a segmentation or a detection data.short_side, or of a "
    "segmentation set evaluation.mode=slide"
)


def main() -> None:
    parser = Parser("validate", __doc__, ("data", "train"), {"batch_size": "train.eval_batch_size"})
    add = parser.add_argument
    add("--checkpoint", required=True, nargs="+", metavar="FILE", help="any known layout, or local-dir:FOLDER")
    add(
        "--data",
        metavar="PATH",
        help="folder of classes, splits, tars or parquet files, a table, or a hub's OWNER/NAME",
    )
    add("--model", metavar="NAME", help="a variant, or its YAML file, that the network must be")
    add("--config", type=Path, metavar="FILE", help="take the data section of this configuration")
    add("--raw", action="store_true", help="evaluate the raw weights although a file has averaged ones")
    add(
        "--preprocessing",
        choices=PREPROCESSINGS,
        help="as the checkpoint says (default), or one or both candidates for the authors' files, in one pass",
    )
    add("--among", choices=AMONG, help="score among all the network's classes, or only those present in the data")
    add("--real", action="store_true", help="also score by the ReaL labels of ImageNet's validation images")
    add("--per-class", action="store_true", help="print the worst classes and write a table of all")
    add("--confusion", action="store_true", help="draw the confusions")
    add("--calibration", action="store_true", help="expected calibration error and reliability diagram")
    add(
        "--worst",
        type=_count,
        default=0,
        metavar="K",
        help="draw the K mistakes of the highest loss, or the images of the lowest IoU or of the most mistakes",
    )
    add(
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"for results.json, results.csv and pictures (default: none, or {DEFAULT_FOLDER} if there are pictures)",
    )
    add("--confirm", action="store_true", help="note beside installed weights that they have the published accuracy")
    args, overrides = parser.parse_known_args()
    # `--checkpoint` takes all words up to the next option, overrides too
    is_override = re.compile(r"\w+(\.\w+)+=").match
    files = [word for word in args.checkpoint if not is_override(word) or os.path.exists(word)]
    overrides = [word for word in args.checkpoint if word not in files] + overrides

    confirmable = check_confirmable(files) if args.confirm else None
    extras = Extras(args.real, args.per_class, args.confusion, args.calibration, args.worst)
    folder = extras.folder_for(args.output)

    def show(lines: list[str]) -> None:
        say(*lines, required=folder is None)

    rows = validate_files(
        files,
        args.config,
        overrides,
        not args.raw,
        model=args.model,
        data=args.data,
        preprocessing=args.preprocessing,
        among=args.among,
        extras=extras,
        output=args.output,
        announce=lambda known: show(heading(known)),
    )
    if os.environ.get("RANK", "0") == "0":
        show(summary(rows, folder, is_headed=True))
        if confirmable:
            say(confirm(confirmable, rows))


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= MAX_WORST:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to {MAX_WORST}, found '{text}'")
    return int(text)


def run() -> None:
    """Runs the command and exits, errors as one message."""
    run_cli(main, less_memory=LESS_MEMORY)
