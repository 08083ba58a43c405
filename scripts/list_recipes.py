"""Prints the table of recipes, the configurations below configs/ that are runs, as in docs/recipes.md.

The same as `conv2former recipes`; `python scripts/list_recipes.py --help` says more.
"""

from conv2former.commands.console import run_command

if __name__ == "__main__":
    run_command("recipes")
