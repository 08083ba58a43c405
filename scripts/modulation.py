"""The study of docs/modulation.md: product, sum, small kernels, ConvNeXt and Swin at equal cost on CIFAR-10's photos.

python scripts/modulation.py --data data/cifar10             all of it: hours; stop it and start it again at will
python scripts/modulation.py --data data/cifar10 --list      the runs, and about how long those not done will take
python scripts/modulation.py --data hf --only product sum    the data set of the Hugging Face hub, two networks

Each network is tuned over the settings of experiments/modulation/study.yaml on a held-out part of the training images,
and then trained with the best one on all of them, with several seeds. Every run is an ordinary run folder below
--output. A run that is done is not repeated, and one that was stopped goes on. A key of the recipe can be changed for
every run, augment.hflip=0; give another --output with it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from conv2former.printing import print_lines
from conv2former.tools.arguments import Parser
from conv2former.tools.cli import run_cli

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "experiments" / "modulation" / "study.yaml"


def main() -> None:
    sys.path.insert(0, str(ROOT))  # the study is no part of the package
    # here, so that a missing package is one sentence
    from experiments.modulation.command import list_runs, run
    from experiments.modulation.plan import read_study

    parser = Parser(text=__doc__, sections=())
    parser.add_argument(
        "--data", default="data/cifar10", metavar="FOLDER|hf",
        help="folder with the photos in train/CLASS and val/CLASS, or hf: uoft-cs/cifar10 of the Hugging Face hub "
        "(default: data/cifar10)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("runs/modulation"), metavar="FOLDER",
        help="for the runs and the table (default: runs/modulation)",
    )  # fmt: skip
    parser.add_argument("--epochs", type=int, metavar="N", help="of every run (default: the recipe's)")
    parser.add_argument(
        "--tuning-epochs", type=int, metavar="N", help="of the runs of the tuning (default: as many as the others)"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="final runs of each network (default: 3)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NETWORK", help="train these alone (default: all)")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N",
        help="that train each run together on this machine, each with an N-th of every batch (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--list", action="store_true", help="print the runs and about how long they take; train nothing"
    )
    parser.add_argument("--study", type=Path, default=STUDY, metavar="FILE", help="another study.yaml")
    args, overrides = parser.parse_known_args()
    only = [word for word in args.only if "=" not in word]
    overrides += [word for word in args.only if "=" in word]  # keys right behind the names of networks
    study = read_study(
        args.study, args.data, args.output, args.seeds, args.epochs, only, args.processes, overrides, args.tuning_epochs
    )
    (list_runs if args.list else run)(study, print_lines)


if __name__ == "__main__":
    run_cli(
        main,
        "interrupted; the same command goes on from the last checkpoint",
        "lower train.batch_size, or start it with more --processes",
    )
