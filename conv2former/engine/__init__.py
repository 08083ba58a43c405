"""Training and evaluation."""

from .distributed import World, join_world
from .dryrun import dry_run
from .evaluate import evaluate
from .trainer import train

__all__ = ["World", "dry_run", "evaluate", "join_world", "train"]
