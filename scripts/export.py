"""Writes a checkpoint for other runtimes, compared with the network before it is kept.

The same as `conv2former export`; `python scripts/export.py --help` says more.
"""

from conv2former.commands.console import run_command

if __name__ == "__main__":
    run_command("export")
