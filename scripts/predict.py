"""Predicts the classes of images, and shows what speaks for them.

The same as `conv2former predict`; `python scripts/predict.py --help` says more.
"""

from conv2former.commands.console import run_command

if __name__ == "__main__":
    run_command("predict")
