"""Training and evaluation."""

from .distributed import World, join_world
from .evaluate import Evaluation, evaluate
from .trainer import dry_run, train

__all__ = ["Evaluation", "World", "dry_run", "evaluate", "join_world", "train"]
