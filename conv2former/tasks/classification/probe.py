"""A linear probe in closed form: the classifier that fits the features of a network as it is.

Least squares on centred features with a ridge (Hoerl and Kennard, 1970), to targets of 1 for an image's class; logits
are a factor times the answers, plus the logarithm of the classes' shares. Ridge and factor are those of the lowest
cross-entropy when each image is left out in turn, which least squares have without fitting anew. So nothing is drawn at
random, and there is no rate to choose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...data import Batch, DataSource, Skipped
from ...data.holdout import Part
from ...data.sources import Source
from ...models.others import classifiers
from ..task import Processes

__all__ = ["MOST_IMAGES", "LinearProbe", "fit_ridge"]

MOST_IMAGES = 20_000  # that are looked at, drawn from the training set
RIDGES = torch.logspace(-3, 3, 7, dtype=torch.float64)  # times the features' mean variance
SCALES = torch.logspace(0, 2, 11, dtype=torch.float64)  # of least squares' answers, about 0 to 1, as logits
CHUNK = 2**22  # answers that are in memory at a time
LEAST_LEFT = 1e-6  # of an image's weight on its own answer, below 1


@dataclass(frozen=True)
class _Fit:
    """A layer's weight, (classes, features), and bias, (classes,), float32, and its loss, summed over the images."""

    weight: Tensor
    bias: Tensor
    loss: float


class LinearProbe:
    """An evaluator that collects the features of images, and fits the classifier to those of all processes.

    Args:
        model: a network of timm's.
        device: of it.
        channels_last: memory format of the images.
        stays: whether training starts from it.
    """

    def __init__(self, model: nn.Module, device: torch.device, channels_last: bool = True, stays: bool = False) -> None:
        self.device, self.stays = device, stays
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.layers = [_linear_in(part) for part in classifiers(model)]
        self._features: list[list[Tensor]] = [[] for _ in self.layers]
        self._labels: list[Tensor] = []
        self._loss = torch.zeros((), dtype=torch.float64)  # of the classifier as it is
        self._before: list[tuple[Tensor, Tensor]] = []

    def problem(self, source: Source) -> str:
        """Returns why there is none for a training split, as a part of a sentence; '' if there is one."""
        if not isinstance(source, DataSource):
            return "the training images come in a stream"
        return "" if self.layers and None not in self.layers else "the network's classifier is not one linear layer"

    def some_of(self, source: DataSource) -> DataSource:
        """Returns the images of a training split that it looks at: `MOST_IMAGES` at most, drawn, always the same."""
        if len(source) <= MOST_IMAGES:
            return source
        drawn = np.random.default_rng(0).permutation(len(source))[:MOST_IMAGES]
        return replace(source, images=Part(source.images, np.sort(drawn)))

    def update(self, answer: Callable[[Tensor], Tensor], batch: Batch) -> None:
        """Takes the features of a batch that has images; see `tasks.task.Evaluator`."""
        images = batch.images.to(self.device, memory_format=self.memory_format, non_blocking=True)
        with ExitStack() as hooks:
            for layer, features in zip(self.layers, self._features, strict=True):
                assert layer is not None
                hook = layer.register_forward_pre_hook(
                    lambda _, inputs, features=features: features.append(inputs[0].float().flatten(1).cpu())
                )
                hooks.callback(hook.remove)
            logits = answer(images)
        self._labels.append(batch.labels.cpu())
        self._loss += functional.cross_entropy(logits.double().cpu(), batch.labels.cpu(), reduction="sum")

    def total(self, world: Processes, skipped: list[Skipped]) -> tuple[str, list[Skipped]]:
        """Returns what `fit` does, and this process's unreadable images."""
        return self.fit(world), skipped

    @torch.no_grad()
    def fit(self, world: Processes) -> str:
        """Gives the classifier of the network the weights that fit best; every process calls it.

        Where that is the classifier that is there, as in a file for the same classes, it stays.

        Args:
            world: the processes, which all get the same weights.

        Returns:
            Why there are none, as a part of a sentence, and the classifier is as before; '' if there are.
        """
        labels = torch.cat(self._labels) if self._labels else torch.empty(0, dtype=torch.int64)
        collected, self._features = self._features, []  # which are needed no more
        fits = []
        for layer, batches in zip(self.layers, collected, strict=True):
            assert layer is not None
            classes, width = layer.weight.shape[:2]
            features = torch.cat(batches) if batches else torch.empty(0, width)
            is_fine = features.ndim == 2 and features.shape[1] == width and len(features) == len(labels)
            if not all(world.gather(is_fine)):
                return "the classifier is not given one vector of features for each image"
            fit = fit_ridge(features, labels, classes, world)
            found = world.gather(fit if world.rank == 0 else None)[0]
            if found is None:
                return "the features are the same for all images, or are not finite"
            fits.append(found)
        (loss,) = _sum(world, self._loss)
        if loss <= min(found.loss for found in fits):
            return ""
        for layer, found in zip(self.layers, fits, strict=True):
            assert layer is not None
            self._set(layer.weight, found.weight)
            if layer.bias is not None:
                self._set(layer.bias, found.bias)
        return ""

    def _set(self, parameter: Tensor, value: Tensor) -> None:
        self._before.append((parameter, parameter.clone()))
        parameter.copy_(value.view_as(parameter))

    @torch.no_grad()
    def undo(self) -> None:
        """Gives the classifier the weights that it had."""
        for parameter, before in self._before:
            parameter.copy_(before)


def _linear_in(part: nn.Module) -> nn.Linear | nn.Conv2d | None:
    """Returns the one linear layer of a classifier, also as a 1x1 convolution; None where there is not just one."""
    found = [layer for layer in part.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    if len(found) != 1 or (isinstance(found[0], nn.Conv2d) and found[0].kernel_size != (1, 1)):
        return None
    return found[0]


def fit_ridge(features: Tensor, labels: Tensor, classes: int, world: Processes) -> _Fit | None:
    """Fits a linear classifier to the features of all processes, which all call it.

    Args:
        features: of this process's images, (N, features), float32, on the CPU.
        labels: of them, (N,), int64.
        classes: how many there are.
        world: the processes; only sums over images are exchanged.

    Returns:
        The classifier, the same on every process but for rounding, and its loss with each image left out; None where
        the features are the same for all images, or are not finite.
    """
    x, rows = features.double(), max(1, CHUNK // classes)
    count, sums, counts = _sum(
        world, torch.tensor(len(x)), x.sum(0), torch.bincount(labels, minlength=classes)[:classes]
    )
    n = max(1.0, float(count))
    mean, share = sums / n, counts / n
    x = x - mean

    def chunks(found: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields features, labels and centred targets of some images after the other."""
        for some, own in zip(found.split(rows), labels.split(rows), strict=True):
            yield some, own, functional.one_hot(own, classes) - share

    cross = torch.zeros(x.shape[1], classes, dtype=torch.float64)
    for some, _, targets in chunks(x):
        cross += some.T @ targets / n
    gram, cross = _sum(world, x.T @ x / n, cross)
    if not (torch.isfinite(gram).all() and gram.trace() > 0):
        return None
    log_share = ((counts + 1) / (n + classes)).log()  # of a class without images, too
    variances, basis = torch.linalg.eigh(gram)
    variances, x, cross = variances.clamp_min(0), x @ basis, basis.T @ cross
    losses = torch.zeros(len(RIDGES), len(SCALES), dtype=torch.float64)
    for some, own_labels, targets in chunks(x):
        for i, ridge in enumerate(RIDGES * variances.mean()):
            answers = _left_out(some, targets, variances + ridge, cross, n)
            for j, scale in enumerate(SCALES):
                losses[i, j] += functional.cross_entropy(scale * answers + log_share, own_labels, reduction="sum")
    (losses,) = _sum(world, losses)
    i, j = divmod(int(losses.argmin()), len(SCALES))
    weight = SCALES[j] * (basis @ (cross / (variances + RIDGES[i] * variances.mean())[:, None])).T
    return _Fit(weight.float(), (log_share - weight @ mean).float(), float(losses[i, j]))


def _left_out(x: Tensor, targets: Tensor, ridged: Tensor, cross: Tensor, n: float) -> Tensor:
    """Returns what is answered to images, each by the fit to all others.

    Args:
        x: features in the basis in which they are uncorrelated, (N, features).
        targets: (N, classes), centred.
        ridged: the features' variances with the ridge, (features,).
        cross: covariances of features and targets, (features, classes).
        n: images that the fit is of.
    """
    weight_of_own = (x.square() / ridged).sum(1, keepdim=True) / n + 1 / n
    return (x @ (cross / ridged[:, None]) - weight_of_own * targets) / (1 - weight_of_own).clamp_min(LEAST_LEFT)


def _sum(world: Processes, *values: Tensor) -> Sequence[Tensor]:
    """Returns the sums over all processes of float64 tensors, on the CPU."""
    return [world.sum(value.double().to(world.device)).cpu() for value in values]
