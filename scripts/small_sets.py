"""The study of docs/finetune.md: which settings make the most of 30 to 4,000 images.

python scripts/small_sets.py --photos data/cifar10                       an hour on one core; stop and start it at will
python scripts/small_sets.py --photos data/cifar10 --list                the runs, and about how long they take
python scripts/small_sets.py --photos data/cifar10 --cells data/bccd     with cells of a blood smear, in COCO's format
python scripts/small_sets.py --photos data/cifar10 --sets photos_160     this set alone
python scripts/small_sets.py --photos data/cifar10 --part 1/2            with --part 2/2 beside it: two at a time

A small network is pre-trained on six of CIFAR-10's classes, and then trained on each set of
experiments/small_sets/study.yaml with each of the settings there, with several seeds. Every run is an ordinary run
folder below --output, without its checkpoints. A run that is done is not repeated, and one that was stopped goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from conv2former.printing import print_lines
from conv2former.tools.arguments import Parser
from conv2former.tools.cli import run_cli

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "experiments" / "small_sets" / "study.yaml"


def main() -> None:
    sys.path.insert(0, str(ROOT))  # the study is no part of the package
    # here, so that a missing package is one sentence
    from experiments.small_sets.command import list_runs, part_of, run
    from experiments.small_sets.plan import read_study

    parser = Parser(text=__doc__, sections=())
    parser.add_argument(
        "--photos", type=Path, default=Path("data/cifar10"), metavar="FOLDER",
        help="CIFAR-10's photos in train/CLASS and val/CLASS (default: data/cifar10)",
    )  # fmt: skip
    parser.add_argument(
        "--cells", type=Path, metavar="FOLDER",
        help="a data set in COCO's format, train.json, val.json, train/ and val/, such as BCCD (default: no cells)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("runs/small_sets"), metavar="FOLDER",
        help="for the runs and the table (default: runs/small_sets)",
    )  # fmt: skip
    parser.add_argument("--sets", nargs="+", default=[], metavar="SET", help="these alone (default: all)")
    parser.add_argument("--settings", nargs="+", default=[], metavar="SETTING", help="these alone (default: all)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each setting (default: 3)")
    parser.add_argument(
        "--part", default="1/1", metavar="I/N", help="do every N-th run alone, where N processes share the work"
    )
    parser.add_argument(
        "--list", action="store_true", help="print the runs and about how long they take; train nothing"
    )
    parser.add_argument("--study", type=Path, default=STUDY, metavar="FILE", help="another study.yaml")
    args = parser.parse_args()
    part = part_of(args.part)
    study = read_study(args.study, args.photos, args.cells, args.output, args.seeds, args.sets, args.settings)
    if args.list:
        list_runs(study, print_lines)
    else:
        run(study, print_lines, part)


if __name__ == "__main__":
    run_cli(main, "interrupted; the same command goes on from the last checkpoint", "close other programs")
