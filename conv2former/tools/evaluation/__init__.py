"""Evaluation: `validate.py` and the files that it writes."""
