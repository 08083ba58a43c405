"""The study of docs/transfer.md: pre-train on the digits 0 to 4, then learn 5 to 9 from few images in three ways.

python scripts/transfer.py prepare --per-class 10       writes the images, as folders
python scripts/transfer.py compare --seeds 5            trains from scratch, a linear probe and all weights; a table
python scripts/transfer.py tune                         how the rates and lengths of the three were chosen

`compare` and `tune` train through the same loop as scripts/train.py. A key of the configurations can be changed for
every run, schedule.epochs=5. Runs that are done are not repeated; one that was stopped goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from conv2former.printing import print_lines
from conv2former.tools.arguments import Parser
from conv2former.tools.cli import run_cli

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "finetune"


def main() -> None:
    sys.path.insert(0, str(ROOT))  # the study is no part of the package
    # here, so that a missing package is one sentence
    from conv2former.tools.output import replacing
    from experiments.digits_transfer.transfer import (
        compare,
        comparison_table,
        prepare,
        tune,
        tuning_table,
        write_results,
    )

    parser = Parser(text=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="prepare|compare|tune")
    images = commands.add_parser("prepare", help="write the images")
    images.add_argument(
        "--per-class", type=int, default=10, metavar="N", help="training images per class (default: 10)"
    )
    images.add_argument("--seed", type=int, default=0, metavar="N", help="which images these are (default: 0)")
    images.add_argument(
        "--root", type=Path, default=Path("data/transfer"), metavar="FOLDER", help="(default: data/transfer)"
    )
    for name, what, count, first, per_class in (
        ("compare", "the table", 5, 0, [2, 10, 50]),
        ("tune", "rates and lengths, on other seeds", 2, 100, [10]),
    ):
        runs = commands.add_parser(name, help=what, sections=())
        runs.add_argument("--seeds", type=int, default=count, metavar="N", help=f"how many (default: {count})")
        runs.add_argument("--first-seed", type=int, default=first, metavar="N", help=f"(default: {first})")
        runs.add_argument(
            "--per-class", type=int, nargs="+", default=per_class, metavar="N",
            help=f"training images per class (default: {' '.join(map(str, per_class))})",
        )  # fmt: skip
        runs.add_argument(
            "--output", type=Path, default=Path("runs") / f"transfer_{name}", metavar="FOLDER",
            help=f"for the runs and the table (default: runs/transfer_{name})",
        )  # fmt: skip
    args, overrides = parser.parse_known_args()
    if args.command == "prepare":
        if overrides:
            parser.error(f"unrecognized arguments: {' '.join(overrides)}")
        print_lines(*prepare(args.root, args.per_class, args.seed))
        return
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    common = (CONFIGS, seeds, args.per_class, args.output, overrides, print_lines)
    if args.command == "compare":
        results = compare(*common)
        print_lines("", *comparison_table(results).split("\n"))
        paths = write_results(results, args.output)
    else:
        results = tune(*common)
        print_lines("", *tuning_table(results).split("\n"))
        paths = [args.output / "table.md"]
        with replacing(paths[0]) as new:
            new.write_text(tuning_table(results, markdown=True) + "\n")
    print_lines("", "written: " + ", ".join(map(str, paths)))


if __name__ == "__main__":
    run_cli(main)
