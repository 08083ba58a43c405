"""Draws the effective receptive field of a network: which pixels move a feature in the middle of a stage, how much.

The same as `conv2former receptive-field`; `python scripts/receptive_field.py --help` says more.
"""

from conv2former.commands.console import run_command

if __name__ == "__main__":
    run_command("receptive-field")
