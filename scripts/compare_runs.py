"""Says whether two runs are the same, or the runs of two commits: what they logged and their weights, bit for bit.

The same as `conv2former compare-runs`; `python scripts/compare_runs.py --help` says more.
"""

from conv2former.commands.console import run_command

if __name__ == "__main__":
    run_command("compare-runs")
