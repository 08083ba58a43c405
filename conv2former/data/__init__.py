"""From a data section to loaders and a class list.

The names below are imported when they are first asked for: reading class lists and tables, as a conversion does, needs
fewer packages than the loaders.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import Batch, Finish, Skipped
    from .loader import EpochSampler, batches, eval_loader, running_workers, train_loader
    from .seeding import Stream, seed_all
    from .sources import DataSource, open_train_and_val, open_val
    from .streams import StreamSource
    from .transforms import eval_transform, train_transforms
    from .workers import worker_errors

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
    "running_workers",
    "seed_all",
    "train_loader",
    "train_transforms",
    "worker_errors",
]

_MODULES = ("seeding", "batch", "transforms", "loader", "sources", "streams", "workers")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in (importlib.import_module(f".{module}", __name__) for module in _MODULES):
            if name in vars(module).get("__all__", ()):
                return globals().setdefault(name, getattr(module, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
