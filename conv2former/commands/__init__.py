"""What users run: `conv2former COMMAND`, and the scripts of the same names."""
