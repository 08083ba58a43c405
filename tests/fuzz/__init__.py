"""Hostile files against everything that reads files: `python -m tests.fuzz --seed 1 --minutes 5`."""
