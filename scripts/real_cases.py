"""The measured cases of docs/segmentation.md and docs/detection.md: several seeds and networks of one recipe, a table.

python scripts/real_cases.py camvid --data data/camvid                    all rows, three seeds; stop and start at will
python scripts/real_cases.py camvid --data data/camvid --only recipe      the recipe alone
python scripts/real_cases.py camvid --data data/camvid --processes 2      two processes train each run together

A case is a file of experiments/real_cases/. Every run is an ordinary run folder below --output. A run that is done is
not repeated, and one that was stopped goes on. A key of the recipe can be changed for every run,
schedule.epochs=10; give another --output with it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from conv2former.printing import print_lines
from conv2former.tools.arguments import Parser
from conv2former.tools.cli import run_cli

ROOT = Path(__file__).parents[1]
CASES = ROOT / "experiments" / "real_cases"


def main() -> None:
    sys.path.insert(0, str(ROOT))  # the cases are no part of the package
    # here, so that a missing package is one sentence
    from experiments.real_cases.command import run
    from experiments.real_cases.plan import read_case

    names = sorted(path.stem for path in CASES.glob("*.yaml"))
    parser = Parser(text=__doc__, sections=())
    parser.add_argument("case", metavar="CASE", help=f"{', '.join(names)}, or the path of a YAML file")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="of the data set")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for the runs (default: runs/real_cases/CASE)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each row (default: 3)")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="train these alone (default: all)")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N",
        help="that train each run together on this machine, each with an N-th of every batch (default: 1)",
    )  # fmt: skip
    args, overrides = parser.parse_known_args()
    only = [word for word in args.only if "=" not in word]
    overrides += [word for word in args.only if "=" in word]  # keys right behind the names of rows
    path = CASES / f"{args.case}.yaml" if args.case in names else Path(args.case)
    output = args.output or Path("runs/real_cases") / path.stem
    run(read_case(path, args.data, output, args.seeds, only, args.processes, overrides), print_lines)


if __name__ == "__main__":
    run_cli(
        main,
        "interrupted; the same command goes on from the last checkpoint",
        "lower train.batch_size or data.img_size",
    )
