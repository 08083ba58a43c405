"""What is done with whole runs: comparison, and the kill test."""
