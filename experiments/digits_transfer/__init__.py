"""Transfer between two sets of digits: see README.md."""
