"""Prints the table of recipes, the configurations below configs/ that are runs, as in docs/recipes.md.

python scripts/list_recipes.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from conv2former.tools.cli import run_cli
from conv2former.tools.recipes import recipes_table


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(recipes_table(Path(__file__).parents[1] / "configs"))


if __name__ == "__main__":
    run_cli(main)
