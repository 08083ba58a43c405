"""Averages weight files of one network into one: a model soup.

The same as `conv2former average`; `python scripts/average.py --help` says more.
"""

from conv2former.commands.average import run

if __name__ == "__main__":
    run()
