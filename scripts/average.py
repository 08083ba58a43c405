"""Averages weight files of one network into one: a model soup.

The same as `conv2former average`; `python scripts/average.py --help` says more.
"""

from conv2former.commands.console import run_command

if __name__ == "__main__":
    run_command("average")
