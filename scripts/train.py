"""Trains a Conv2Former from a configuration: on a CPU, on one GPU, or on many under torchrun.

The same as `conv2former train`; `python scripts/train.py --help` says more.
"""

from conv2former.commands.console import run_command

if __name__ == "__main__":
    run_command("train")
