"""From a data section to loaders and a class list."""

from .batch import Batch, Finish, Skipped, Stream, eval_transform, seed_all, train_transforms
from .loader import EpochSampler, batches, eval_loader, start_workers, train_loader
from .sources import DataSource, open_train_and_val, open_val
from .streams import StreamSource

__all__ = [
    "Batch",
    "DataSource",
    "EpochSampler",
    "Finish",
    "Skipped",
    "Stream",
    "StreamSource",
    "batches",
    "eval_loader",
    "eval_transform",
    "open_train_and_val",
    "open_val",
    "seed_all",
    "start_workers",
    "train_loader",
    "train_transforms",
]
