"""Prints the table of recipes, the configurations below configs/ that are runs, as in docs/recipes.md.

python scripts/list_recipes.py
"""

from __future__ import annotations

import argparse

from .._configs import configs_folder
from ..tools.cli import run_cli
from ..tools.recipes import recipes_table


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(recipes_table(configs_folder()))


def run() -> None:
    """Runs the command and exits, errors as one message."""
    run_cli(main)
