"""Evaluates checkpoints on a validation set, alone or under torchrun with the same result.

The same as `conv2former validate`; `python scripts/validate.py --help` says more.
"""

from conv2former.commands.console import run_command

if __name__ == "__main__":
    run_command("validate")
