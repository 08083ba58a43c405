"""Measures speed and memory side by side in one run; ratios are what to compare.

The same as `conv2former benchmark`; `python scripts/benchmark.py --help` says more.
"""

from conv2former.commands.console import run_command

if __name__ == "__main__":
    run_command("benchmark")
