"""Prints the table of variants with measured parameters and multiply-accumulates, as in the README.

The same as `conv2former models`; `python scripts/list_models.py --help` says more.
"""

from conv2former.commands.console import run_command

if __name__ == "__main__":
    run_command("models")
