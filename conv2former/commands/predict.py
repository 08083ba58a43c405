"""Predicts the classes of images, of their pixels, or of boxes in them, and shows what speaks for them.

python scripts/predict.py --checkpoint conv2former_t.pth.tar cat.jpg photos 'more/*.png'
python scripts/predict.py --checkpoint conv2former_t.pth.tar photos --output found              # JSON lines, pictures
python scripts/predict.py --checkpoint conv2former_t.pth.tar photos --output found --explain    # and maps

An INPUT is an image, a folder with all images in and below it, a glob pattern, or '-' for an image on standard input.
Images become inputs as the checkpoint notes it; data.img_size, mean, std, interpolation, crop_pct, crop_mode,
value_range and max_image_pixels can be changed, data.crop_pct=1. Images that cannot be read are named at the end, with
exit code 2. Of a checkpoint of task: segmentation, --output holds masks, overlays and shares of area; data.short_side,
evaluation.mode, window, overlap and flip can be changed. Of one of task: detection it holds photos with boxes,
detections.json in COCO's result format and, with --crops, what is in the boxes; data.short_side, long_side,
evaluation.score (0.5 unless given), nms and max_detections can be changed. See docs/predict.md, docs/segmentation.md
and docs/detection.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from ..data import Skipped
from ..engine.terminal import bar, say
from ..text import columns_of, printable
from ..tools.arguments import Parser
from ..tools.cli import run_cli
from ..tools.prediction.folder import check_results_folder, writing_folder
from ..tools.prediction.inputs import find_images, raise_unreadable
from ..tools.prediction.options import ExplainOptions, PredictionOptions
from ..tools.prediction.predict import positive
from ..tools.prediction.registry import open_predicting

STAGES = [1, 2, 3, 4]


def parse() -> argparse.Namespace:
    parser = Parser("predict", __doc__, ("data",))
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file, folder, 'glob', '-', or data.KEY=VALUE")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="this project's, the authors', birder's")
    parser.add_argument("--raw", action="store_true", help="take the raw weights although the file has averaged ones")
    parser.add_argument(
        "--topk", type=positive, default=5, metavar="K", help="classes per image that are shown (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of text")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="write predictions.jsonl, contact sheets and pictures there"
    )
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="images at a time (default: 32; of other tasks 1)"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--crops", action="store_true", help="cut out what a detection finds; needs --output")
    group = parser.add_argument_group("with --explain")
    group.add_argument("--explain", action="store_true", help="a picture of two maps for each image; needs --output")
    group.add_argument("--class", dest="class_name", metavar="NAME", help="explain this class, not the predicted one")
    group.add_argument("--stage", type=int, choices=STAGES, action="append", help="of the modulation; can be repeated")
    group.add_argument("--cam-stage", type=int, choices=STAGES, help="of the class activation map")
    args = parser.parse_intermixed_args()
    args.overrides = [
        text for text in args.inputs if re.match(r"(data|evaluation)\.\w+=", text) and not os.path.exists(text)
    ]
    args.inputs = [text for text in args.inputs if text not in args.overrides]
    if not args.inputs:
        parser.error("the following arguments are required: INPUT")
    if args.explain and args.output is None:
        parser.error("--explain writes pictures; give --output FOLDER")
    if args.crops and args.output is None:
        parser.error("--crops writes pictures; give --output FOLDER")
    if not args.explain and (args.class_name or args.stage or args.cam_stage):
        parser.error("--class, --stage and --cam-stage go with --explain")
    return args


def main() -> None:
    args = parse()
    images = find_images(args.inputs)
    if args.output:
        check_results_folder(args.output)
    explain = ExplainOptions(args.class_name, args.cam_stage, args.stage) if args.explain else None
    options = PredictionOptions(
        args.overrides, args.device, not args.raw, args.topk, args.batch_size, explain, args.crops
    )
    predicting = open_predicting(args.checkpoint, options)
    about = sys.stderr if args.json else sys.stdout
    alone = args.output is None  # then there is nothing to do once nobody reads the lines
    say(*str(predicting).split("\n"), file=about, required=alone)
    total, unreadable = len(images), []
    width = min(40, max(columns_of(printable(image.name)) for image in images))
    results_in = partial(predicting.results, images=images)
    with writing_folder(args.output, images, results_in) if args.output else nullcontext() as results:
        found = predicting.predict(images, results)
        for prediction in bar(found, total, " images", "predicting", file=sys.stderr):
            if isinstance(prediction, Skipped):
                unreadable.append(prediction)
                continue
            record = results.add(prediction) if results else prediction.to_dict()
            name = printable(prediction.name)
            text = f"{name}{' ' * (width - columns_of(name))}  {prediction}"
            say(json.dumps(record) if args.json else text, required=alone)
    if results and results.count:
        say(f"in {args.output}: {results}", file=about)
    raise_unreadable(unreadable, total)


def run() -> None:
    """Runs the command and exits, errors as one message."""
    run_cli(main, less_memory="lower --batch-size, or data.short_side")
