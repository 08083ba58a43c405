"""Draws the effective receptive field of a network: which pixels move a feature in the middle of a stage, how much.

The same as `conv2former receptive_field`; `python scripts/receptive_field.py --help` says more.
"""

from conv2former.commands.receptive_field import run

if __name__ == "__main__":
    run()
