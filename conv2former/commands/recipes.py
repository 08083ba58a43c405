"""Prints the table of recipes, the configurations below configs/ that are runs, as in docs/recipes.md.

python scripts/list_recipes.py
python scripts/list_recipes.py --names      # only what --config takes

A recipe can be named without its folder `configs/` and without `.yaml`: --config finetune/folder.
"""

from __future__ import annotations

from .._configs import configs_folder, recipe_names
from ..printing import print_lines
from ..tools.arguments import Parser
from ..tools.cli import run_cli


def main() -> None:
    parser = Parser("recipes", __doc__)
    parser.add_argument("--names", action="store_true", help="print the names alone, one a line")
    if parser.parse_args().names:
        print_lines(*recipe_names())
        return
    from ..tools.recipes import recipes_table  # needs pydantic, which the names do not

    print_lines(*recipes_table(configs_folder()).split("\n"))


def run() -> None:
    """Runs the command and exits, errors as one message."""
    run_cli(main)
