"""What tasks on a backbone's maps do alike: the order of the images, what is frozen, what is compiled."""

from __future__ import annotations

from collections.abc import Sized
from typing import cast

from torch import nn

from ...config import BaseConfig
from ...data import EpochSampler
from ..task import Processes, Task
from .maps import DenseNetwork, compile_parts, freeze

__all__ = ["DenseTask"]


class DenseTask(Task):
    """See `tasks.task.Task`; its networks are `DenseNetwork`s."""

    def sampler(self, config: BaseConfig, source: Sized, world: Processes) -> EpochSampler:
        """Returns the order of a split's images on one of the processes."""
        train = config.train
        return EpochSampler(
            len(source), train.batch_size, train.accum_steps, world.rank, world.size, train.seed, train.keep_tail
        )

    def freeze(self, model: nn.Module, until: str) -> None:
        freeze(cast(DenseNetwork, model), until)

    def compile_model(self, model: nn.Module) -> nn.Module:
        return compile_parts(cast(DenseNetwork, model))
