"""`python -m conv2former.train`, and under torchrun `-m conv2former.train`: as scripts/train.py.

Training from Python is `conv2former.engine.train`.
"""

from .commands.console import run_command

if __name__ == "__main__":
    run_command("train")
