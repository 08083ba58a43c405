"""Training and evaluation."""

from .distributed import World, join_world
from .evaluate import evaluate
from .trainer import dry_run, train

__all__ = ["World", "dry_run", "evaluate", "join_world", "train"]
