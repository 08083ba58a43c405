"""Whether modulation pays: see README.md."""
