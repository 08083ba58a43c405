"""`python -m conv2former.train`, and under torchrun `-m conv2former.train`: as scripts/train.py.

Training from Python is the function of this name, `conv2former.train`.
"""

import sys

from . import train
from .commands.console import run_command

if __name__ == "__main__":
    run_command("train")
else:  # whoever imports this file must not find it in the place of the function
    sys.modules[__name__] = train  # type: ignore[assignment]
