"""Training and evaluation."""

from .distributed import World, join_world
from .dryrun import dry_run
from .evaluate import Evaluation, evaluate
from .trainer import train

__all__ = ["Evaluation", "World", "dry_run", "evaluate", "join_world", "train"]
