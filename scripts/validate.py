"""Evaluates a checkpoint on a validation set, alone or under torchrun with the same result.

python scripts/validate.py --checkpoint runs/quickstart/checkpoints/best.pt
python scripts/validate.py --checkpoint conv2former_t.pth.tar data.root=/data/imagenet

A checkpoint of this project brings its data section along; any key of it can be changed, data.val_split=test. For the
authors' files, and any other, the defaults of the configuration hold: 224 x 224, ImageNet mean and std, crop 0.875.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from conv2former.tools.cli import run_cli
from conv2former.tools.validate import validate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="FILE", help="this project's, or the authors'"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="take the data section of this configuration")
    parser.add_argument(
        "--raw", action="store_true", help="evaluate the raw weights although the file has averaged ones"
    )
    args, overrides = parser.parse_known_args()
    result = validate(args.checkpoint, args.config, overrides, use_ema=not args.raw)
    if os.environ.get("RANK", "0") != "0":
        return
    print(f"{result['variant']}, {result['weights']} weights, {result['precision']}, on {result['data']}")
    for reason in result["skipped"]:
        print(f"skipped: {reason}")
    print(
        f"top-1 {result['top1']:.2f} %  top-5 {result['top5']:.2f} %  loss {result['loss']:.4f}  ({result['n']} images)"
    )


if __name__ == "__main__":
    run_cli(main)
