"""From a data section to loaders and a class list."""

from .loader import EpochSampler, Stream, eval_loader, eval_transform, seed_all, train_loader, train_transform
from .sources import DataSource, open_train_and_val, open_val

__all__ = [
    "DataSource",
    "EpochSampler",
    "Stream",
    "eval_loader",
    "eval_transform",
    "open_train_and_val",
    "open_val",
    "seed_all",
    "train_loader",
    "train_transform",
]
