"""A task that is not the project's: the mean colour of images, shaped as detection is, to show that `Task` carries it.

Images of a batch differ in size and are a list, targets are a list of dicts, the network returns its own losses in
training, there is no validation loss, and an evaluation gathers lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from conv2former.config import BaseConfig
from conv2former.config.base import BaseCheckpointConfig, BaseDataConfig, BaseEarlyStopConfig, BaseTrainConfig, Section
from conv2former.data import EpochSampler, Stream, seed_all
from conv2former.tasks import network
from conv2former.tasks.task import Metric, Task


class ColourData(BaseDataConfig):
    source: Literal["noise"] = "noise"
    count: int = 21  # training images


class ColourEarlyStop(BaseEarlyStopConfig):
    metric: Literal["error"] | None = None


class ColourTrain(BaseTrainConfig):
    early_stop: ColourEarlyStop | None = None


class ColourCheckpoint(BaseCheckpointConfig):
    metric: Literal["error"] = "error"


class LossConfig(Section):
    beta: float = 1.0  # of the smooth L1 loss


class ColourConfig(BaseConfig):
    task: Literal["colour"] = "colour"
    data: ColourData = ColourData()
    loss: LossConfig = LossConfig()
    train: ColourTrain = ColourTrain()
    checkpoint: ColourCheckpoint = ColourCheckpoint()

    @property
    def image_fields(self) -> tuple[str, ...]:
        return ()  # its images are of any size, and not normalised


class ColourBatch(NamedTuple):
    images: list[torch.Tensor]
    targets: list[dict[str, torch.Tensor]]
    places: list[int]
    skipped: list[Any]


@dataclass
class Noise(Dataset):
    name: str
    count: int
    seed: int
    class_names: ClassVar[list[str]] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: int | tuple[int, ...]):
        place = key[1] if isinstance(key, tuple) else key
        generator = torch.Generator().manual_seed(place)
        height, width = (32 * int(torch.randint(1, 3, (), generator=generator)) for _ in range(2))
        image = torch.rand(3, 1, 1, generator=generator) + 0.1 * torch.randn(3, height, width, generator=generator)
        if isinstance(key, tuple):  # augmented
            seed_all(Stream.IMAGE, self.seed, *key)
            image = image * (0.8 + 0.4 * torch.rand(()))
        return image, {"colour": image.mean((1, 2))}, place


def collate(items) -> ColourBatch:
    images, targets, places = zip(*items, strict=True)
    return ColourBatch(list(images), list(targets), list(places), [])


class ColourNetwork(nn.Module):
    def __init__(self, backbone: nn.Module, beta: float) -> None:
        super().__init__()
        self.backbone, self.beta = backbone, beta

    def forward(self, images, targets=None):
        colours = torch.cat([self.backbone(image[None]) for image in images])
        if not self.training:
            return colours
        truth = torch.stack([target["colour"] for target in targets])
        return {"colour": nn.functional.smooth_l1_loss(colours.float(), truth, beta=self.beta)}


class ColourObjective:
    def prepare(self, batch: ColourBatch, step: int):
        noisy = [image + 0.01 * torch.randn_like(image) for image in batch.images]  # of the step's place in the run
        return noisy, batch.targets

    def loss(self, forward, inputs, targets):
        return sum(forward(inputs, targets).values())


@dataclass
class ColourEvaluation:
    metrics: dict[str, float]
    skipped: list[Any]
    worst: list[int]

    def row(self, class_names):
        return self.metrics

    def details(self):
        return {"worst": self.worst}


class ColourEvaluator:
    def __init__(self) -> None:
        self.errors: list[tuple[float, int]] = []

    def update(self, answer, batch: ColourBatch) -> None:
        for colour, target, place in zip(answer(batch.images), batch.targets, batch.places, strict=True):
            self.errors.append((float((colour.float() - target["colour"]).abs().mean()), place))

    def total(self, world, skipped) -> ColourEvaluation:
        errors = sorted(error for errors in world.gather(self.errors) for error in errors)
        mean = sum(error for error, _ in errors) / len(errors)
        return ColourEvaluation({"error": mean, "n": len(errors)}, skipped, [place for _, place in errors[-3:]])


class ColourTask(Task):
    name = "colour"
    config = ColourConfig
    metrics: ClassVar = {"error": Metric("the error", is_percent=False, higher_is_better=False)}
    headline = "error"
    curve_title = "Mean absolute error"
    details: ClassVar = {"worst": lambda value: value is None or all(type(place) is int for place in value)}
    no_graph = "its images differ in size"

    def open_data(self, config):
        return Noise("noise", config.data.count, config.train.seed), Noise("other noise", 7, config.train.seed)

    def train_loader(self, config, source, world, worker_init):
        train = config.train
        sampler = EpochSampler(
            len(source), train.batch_size, train.accum_steps, world.rank, world.size, train.seed, train.keep_tail
        )
        workers = config.data.workers  # persistent: one that ends while its batch is on the way takes it along
        options = {"collate_fn": collate, "num_workers": workers, "persistent_workers": workers > 0}
        return sampler, DataLoader(source, batch_sampler=sampler, **options)

    def eval_loader(self, config, source, world, worker_init):
        return DataLoader(source, 3, sampler=range(world.rank, len(source), world.size), collate_fn=collate)

    def known_classes(self, config):
        return 0

    def synthetic_batch(self, config, num_classes, size, generator):
        return collate([(torch.randn(3, 32, 64, generator=generator), {"colour": torch.zeros(3)}, 0)] * size)

    def build_model(self, config, num_classes, class_names):
        return ColourNetwork(network.build_model(config, 3), config.loss.beta)

    def freeze(self, model, until):
        network.freeze(model.backbone, until)

    def compile_model(self, model):
        network.compile_network(model.backbone)
        return model

    def objective(self, config, plan, device, model, statistics):
        return ColourObjective()

    def evaluator(self, config, class_names, device):
        return ColourEvaluator()

    def result_line(self, row, has_average, num_classes):
        return f"error {row['error']:.4f}" + (f"  averaged weights {row['ema_error']:.4f}" if has_average else "")

    def summarise(self, report):
        return f"error {report['error']:.4f}", []
