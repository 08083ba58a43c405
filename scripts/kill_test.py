"""Kills training runs at random moments, starts them again, and checks that they end bit for bit as if nothing was.

python scripts/kill_test.py --kills 20
python scripts/kill_test.py --kills 100 --processes 2 --workers 0 2
python scripts/kill_test.py --kills 20 --config FILE [key=value ...]

Without --config a small run on scikit-learn's digits is used in which everything is on that draws random numbers or
keeps state. Exit code 1 if any run differs.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from conv2former.printing import print_lines
from conv2former.tools.arguments import Parser
from conv2former.tools.cli import run_cli

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def main() -> None:
    from conv2former.config import load_config  # here, so that a missing package is one sentence
    from conv2former.tools.runs.killing import EVERYTHING_ON, kill_and_compare

    parser = Parser(text=__doc__, sections=())
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="how often to kill (default: 20)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of each run (default: 1)")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 2], metavar="N", help="loader workers, chosen at each start"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: 0)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the run to kill (default: a small one)")
    args, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="kill-test-") as folder:
        defaults = [] if args.config else [f"data.root={folder}/digits", *EVERYTHING_ON]
        config = load_config(args.config or CONFIG, [*defaults, *overrides])
        different = kill_and_compare(
            config,
            Path(folder) / "runs",
            args.kills,
            args.processes,
            args.workers,
            args.seed,
            print_lines,
        )
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    run_cli(main)
