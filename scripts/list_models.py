"""Prints the table of variants with measured parameters and multiply-accumulates, as in the README.

python scripts/list_models.py
"""

from __future__ import annotations

import argparse

from conv2former.tools.cli import run_cli
from conv2former.tools.table import variants_table


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(variants_table())


if __name__ == "__main__":
    run_cli(main)
