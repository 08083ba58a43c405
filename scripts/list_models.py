"""Prints the table of variants with measured parameters and multiply-accumulates, as in the README.

The same as `conv2former models`; `python scripts/list_models.py --help` says more.
"""

from conv2former.commands.models import run

if __name__ == "__main__":
    run()
