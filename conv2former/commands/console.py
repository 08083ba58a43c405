"""`conv2former COMMAND`: the scripts as one command, wherever the package is installed."""

from __future__ import annotations

import importlib
import sys

from .. import __version__
from ..errors import ConfigError, closest
from ..tools.cli import run_cli

__all__ = ["COMMANDS", "run", "run_command"]

COMMANDS = {
    "train": "train a network by a recipe",
    "validate": "evaluate weight files on a validation set",
    "predict": "classes of images, and what speaks for them",
    "export": "ONNX, torch.export or TorchScript, int8",
    "convert": "install weights for pretrained=True, or write timm's hub layout",
    "average": "average weight files into one",
    "models": "list the variants, and the weights that are installed",
    "recipes": "list the recipes, which --config takes by name",
    "receptive-field": "draw which pixels move a feature",
    "compare-runs": "whether two runs, or those of two commits, are the same",
    "benchmark": "measure speed and memory",
}
HELP = """usage: conv2former COMMAND ...

{commands}

`conv2former COMMAND --help` says more. Every command loads torch first, which takes some seconds; so did this text.
On several GPUs: torchrun --nproc-per-node=N -m conv2former train ...
"""


def run_command(name: str) -> None:
    """Runs one of the commands and exits. Its own words are in `sys.argv`, from the second on."""

    def start() -> None:  # the import may already lack a package
        importlib.import_module(f".{name.replace('-', '_')}", __package__).run()

    run_cli(start, extra="export" if name == "export" else "train")


def run() -> None:
    """Runs `conv2former`: the first word is the command."""
    first = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if first in COMMANDS:
        del sys.argv[1]
        run_command(first)
    else:
        run_cli(lambda: _without_command(first))


def _without_command(word: str) -> None:
    if word in ("--help", "-h", "help"):
        width = max(map(len, COMMANDS))
        print(HELP.format(commands="\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())), end="")
    elif word == "--version":
        print(f"conv2former {__version__}")
    else:
        hint = closest(word, COMMANDS) or f"; there are: {', '.join(COMMANDS)}"
        raise ConfigError(f"'{word}' is no command of conv2former{hint}")
