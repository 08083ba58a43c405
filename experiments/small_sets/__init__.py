"""Which settings make the most of small sets: see README.md."""
