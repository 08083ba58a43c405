"""Measures speed as ratios, side by side in one run.

python scripts/benchmark.py loop
python scripts/benchmark.py loop --config FILE [key=value ...]

loop: the training loop against a bare loop of forward, backward and step on the same synthetic batches.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from conv2former.config import load_config
from conv2former.tools.benchmark import compare_loop
from conv2former.tools.cli import run_cli

CONFIG = Path(__file__).parents[1] / "configs" / "imagenet1k" / "conv2former_t.yaml"
SMALL = ["train.batch_size=16", "data.img_size=160"]  # steps of some seconds on two CPU cores


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", choices=["loop"], help="what to compare")
    parser.add_argument("--config", type=Path, metavar="FILE", help="network and training (default: t, small images)")
    parser.add_argument("--steps", type=int, default=1, metavar="N", help="of one timing (default: 1)")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="timings of each (default: 20)")
    args, overrides = parser.parse_known_args()
    overrides = ["data.num_classes=1000", *([] if args.config else SMALL), *overrides]
    config = load_config(args.config or CONFIG, overrides)
    print("\n".join(compare_loop(config, args.steps, args.rounds)))


if __name__ == "__main__":
    run_cli(main)
