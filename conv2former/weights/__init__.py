"""Weight files: reading them safely, what is in them, and where they are installed. No network is needed for that."""
