"""Converts a weight file to timm's hub layout, and installs it where `pretrained=True` finds it.

The same as `conv2former convert`; `python scripts/convert.py --help` says more.
"""

from conv2former.commands.console import run_command

if __name__ == "__main__":
    run_command("convert")
