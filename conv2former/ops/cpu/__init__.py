"""The backends for a CPU: native functions that are compiled where they run, and PyTorch's operators."""
