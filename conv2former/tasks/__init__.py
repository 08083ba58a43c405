"""Tasks: what differs between training a classifier and training anything else. `task.py` says what a task is."""
