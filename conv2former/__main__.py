"""`python -m conv2former COMMAND`, and under torchrun `-m conv2former COMMAND`."""

from .commands.console import run

if __name__ == "__main__":
    run()
