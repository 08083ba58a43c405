"""Measures speed and memory side by side in one run; ratios are what to compare.

The same as `conv2former benchmark`; `python scripts/benchmark.py --help` says more.
"""

from conv2former.commands.benchmark import run

if __name__ == "__main__":
    run()
