"""Writes ten of the digits that the quickstart does not train on as PNG files, to try predict.py on.

python scripts/sample_digits.py digits
"""

from __future__ import annotations

from pathlib import Path

from conv2former.printing import print_lines
from conv2former.tools.arguments import Parser
from conv2former.tools.cli import run_cli


def main() -> None:
    from conv2former.data.digits import write_samples  # here, so that a missing package is one sentence

    parser = Parser(text=__doc__)
    parser.add_argument("folder", type=Path, help="made if need be")
    args = parser.parse_args()
    print_lines(f"in {args.folder}: {', '.join(path.name for path in write_samples(args.folder))}")


if __name__ == "__main__":
    run_cli(main)
