"""The linear probe before the first step: its closed form, the run that begins with it, and what becomes best.pt."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest
import torch
from timm.layers import NormMlpClassifierHead
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from conv2former.commands.train import summary
from conv2former.config import load_config
from conv2former.engine import logging, train, trainer
from conv2former.engine.distributed import World
from conv2former.engine.early_stop import stop_reason
from conv2former.engine.prepare import changed_keys
from conv2former.engine.state import TrainState
from conv2former.errors import RunStopped
from conv2former.tasks.classification import probe as probes
from conv2former.tasks.classification.probe import LinearProbe, fit_ridge
from conv2former.tasks.classification.task import Classification

from .conftest import configure, killed_after
from .test_trainer import assert_equal, final, metrics_of

ALONE = World(0, 1, torch.device("cpu"))


def drawn(images: int = 40, width: int = 6, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around the mean of each class, which overlap; of the first class there are twice as many."""
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.zeros(images // 4, int), np.arange(images - images // 4) % classes])
    means = rng.normal(0, 1, (classes, width))
    features = means[labels] + rng.normal(0, 1, (images, width)) * np.linspace(0.1, 3, width) + 5
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


# --------------------------------------------------------------------------------------------------------- closed form


def test_an_image_left_out_is_answered_by_the_fit_to_all_others():
    """Against fits that are done anew, with intercept and the same penalty."""
    features, labels = drawn()
    x, y, n, penalty = features.double(), one_hot(labels, 3).double(), len(labels), 7.0

    def fitted(rows):
        mean, share = x[rows].mean(0), y[rows].mean(0)
        centred = x[rows] - mean
        weight = torch.linalg.solve(centred.T @ centred + penalty * torch.eye(6), centred.T @ (y[rows] - share))
        return lambda one: (one - mean) @ weight + share

    anew = torch.stack([fitted([j for j in range(n) if j != i])(x[i]) for i in range(n)])
    centred, targets = x - x.mean(0), y - y.mean(0)
    variances, basis = torch.linalg.eigh(centred.T @ centred / n)
    centred = centred @ basis
    found = probes._left_out(centred, targets, variances + penalty / n, centred.T @ targets / n, n) + y.mean(0)
    assert torch.allclose(found, anew, atol=1e-9)


def test_the_fit_tells_new_images_apart_and_knows_how_sure_it_is():
    features, labels = drawn(400)
    fit = fit_ridge(features[::2], labels[::2], 3, ALONE)
    logits = features[1::2] @ fit.weight.T + fit.bias
    assert fit.weight.dtype == torch.float32
    accuracy = (logits.argmax(1) == labels[1::2]).float().mean()
    share = labels.bincount().max() / len(labels)
    assert accuracy > share + 0.2
    loss = cross_entropy(logits, labels[1::2])
    assert loss < min(cross_entropy(scale * logits, labels[1::2]) for scale in (0.4, 2.5))  # the scale is near the best
    shifted = features + 1000.0  # the intercept takes it
    again = fit_ridge(shifted[::2], labels[::2], 3, ALONE)
    assert torch.allclose(shifted[1::2] @ again.weight.T + again.bias, logits, atol=0.05)


def test_parts_of_the_images_at_a_time_change_nothing(monkeypatch):
    features, labels = drawn()
    whole = fit_ridge(features, labels, 3, ALONE)
    monkeypatch.setattr(probes, "CHUNK", 21)
    parts = fit_ridge(features, labels, 3, ALONE)
    assert torch.allclose(whole.weight, parts.weight, atol=1e-6)
    assert torch.allclose(whole.bias, parts.bias, atol=1e-5)


class Together:
    """Processes that are threads."""

    def __init__(self, rank: int, size: int, barrier, values: list) -> None:
        self.rank, self.size, self.device, self.barrier, self.values = rank, size, torch.device("cpu"), barrier, values

    def gather(self, value):
        self.values[self.rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found

    def sum(self, value):
        return sum(self.gather(value.clone()))


@pytest.mark.parametrize("counts", [(20, 20), (40, 0)])
def test_two_processes_fit_as_one(counts):
    features, labels = drawn()
    whole = fit_ridge(features, labels, 3, ALONE)
    barrier, values, found = threading.Barrier(2), [None, None], {}

    def work(rank):
        rows = slice(0, counts[0]) if rank == 0 else slice(counts[0], None)
        found[rank] = fit_ridge(features[rows], labels[rows], 3, Together(rank, 2, barrier, values))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for rank in range(2):
        assert torch.allclose(found[rank].weight, whole.weight, atol=1e-6)
        assert torch.allclose(found[rank].bias, whole.bias, atol=1e-5)


@pytest.mark.parametrize(
    "features", [torch.ones(5, 4), torch.full((5, 4), torch.nan), torch.ones(1, 4)], ids=["equal", "nan", "one"]
)
def test_features_that_tell_nothing(features):
    assert fit_ridge(features, torch.zeros(len(features), dtype=torch.int64), 2, ALONE) is None


def test_a_class_without_images():
    features, labels = drawn()
    fit = fit_ridge(features, labels, 4, ALONE)
    assert torch.isfinite(fit.weight).all()
    assert torch.isfinite(fit.bias).all()
    assert ((features @ fit.weight.T + fit.bias).argmax(1) != 3).all()


class Net(nn.Module):
    def __init__(self, *heads: nn.Module, pool: bool = True) -> None:
        super().__init__()
        self.heads, self.pool = nn.ModuleList(heads), pool

    def get_classifier(self):
        return tuple(self.heads) if len(self.heads) > 1 else self.heads[0]

    def forward(self, x):
        x = x.mean((2, 3), keepdim=isinstance(self.heads[0], nn.Conv2d)) if self.pool else x.permute(0, 2, 3, 1)
        return sum(head(x).flatten(1) if self.pool else head(x).mean((1, 2)) for head in self.heads)


def source_of(root):
    words = [f"data.root={root}", "model.name=conv2former_n", "model.checkpoint=null"]
    return Classification().open_data(load_config("finetune/hf", words))[0]


def batch_of(labels: torch.Tensor):
    images = torch.randn(len(labels), 3, 4, 4, generator=torch.Generator().manual_seed(1))
    images += one_hot(labels, 3)[:, :, None, None] * 3.0
    return probes.Batch(images, labels, [])


@pytest.mark.parametrize(
    "heads",
    [
        [nn.Linear(3, 3)],
        [nn.Linear(3, 3, bias=False)],
        [nn.Conv2d(3, 3, 1)],
        [nn.Linear(3, 3), nn.Linear(3, 3)],
        [nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 3))],
    ],
    ids=["linear", "no bias", "convolution", "distilled", "with a norm"],
)
def test_kinds_of_classifiers(heads):
    model, labels = Net(*heads).eval(), torch.arange(12) % 3
    before = {key: value.clone() for key, value in model.state_dict().items()}
    probe = LinearProbe(model, torch.device("cpu"))
    images = batch_of(labels).images
    for some, own in zip(images.split(5), labels.split(5), strict=True):
        probe.update(model, probes.Batch(some, own, []))
    assert probe.fit(ALONE) == ""
    assert (model(images).argmax(1) == labels).all()
    probe.undo()
    assert_equal(dict(model.state_dict()), before)


@pytest.mark.parametrize(
    "model", [Net(NormMlpClassifierHead(3, 3, hidden_size=4)), Net(nn.Conv2d(3, 3, 3)), Net(nn.Identity())]
)
def test_what_is_not_one_linear_layer(model, small_data):
    probe = LinearProbe(model, torch.device("cpu"))
    assert probe.problem(source_of(small_data)) == "the network's classifier is not one linear layer"


def test_a_classifier_before_the_pooling():
    """Its features are of places, not of images."""
    model = Net(nn.Linear(3, 3), pool=False)
    probe = LinearProbe(model, torch.device("cpu"))
    probe.update(model, batch_of(torch.arange(12) % 3))
    assert probe.fit(ALONE) == "the classifier is not given one vector of features for each image"


def test_a_large_set_is_looked_at_in_part(monkeypatch, small_data):
    """Drawn: where classes take turns in a table, every other image would be of half of them."""
    monkeypatch.setattr(probes, "MOST_IMAGES", 20)
    probe, source = LinearProbe(Net(nn.Linear(3, 3)), torch.device("cpu")), source_of(small_data)
    some = probe.some_of(source)
    assert (len(source), len(some)) == (44, 20)
    assert set(some.images.labels) == {0, 1, 2}
    names = [some.images.name(i) for i in range(20)]
    assert len(set(names)) == 20
    assert names == [probe.some_of(source).images.name(i) for i in range(20)]
    monkeypatch.setattr(probes, "MOST_IMAGES", 44)
    assert probe.some_of(source) is source


def test_a_classifier_that_fits_better_stays():
    """That of a file for the same classes, which has seen more images."""
    model, labels = Net(nn.Linear(3, 3)), torch.arange(12) % 3
    with torch.no_grad():
        model.heads[0].weight.copy_(20 * torch.eye(3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    probe = LinearProbe(model, torch.device("cpu"))
    probe.update(model, batch_of(labels))
    assert not probe.fit(ALONE)
    assert_equal(dict(model.state_dict()), before)
    probe.undo()
    assert_equal(dict(model.state_dict()), before)


# ----------------------------------------------------------------------------------------------------------- in a run


def classifier_of(folder, name: str = "best.pt", key: str = "model") -> list[torch.Tensor]:
    weights = torch.load(folder / "checkpoints" / name)[key]
    return [weights[key] for key in weights if key.startswith("classifier")]


def test_the_probe_is_best_until_something_is_better(raw_config, tmp_path, capsys, with_pictures):
    """And training goes on as without it, to the bit."""
    slow = {"optim__base_lr": 1e-9, "schedule__min_lr": 0.0, "schedule__warmup_lr": 0.0}
    train(configure(raw_config, **slow), tmp_path / "none")
    capsys.readouterr()
    report = train(configure(raw_config, **slow, train__linear_probe="evaluate"), tmp_path / "probe")
    out = capsys.readouterr().out
    for key in ("model", "model_ema", "optimizer", "step", "metric"):
        assert_equal(final(tmp_path / "none")[key], final(tmp_path / "probe")[key], key)
    first, *rest = metrics_of(tmp_path / "probe")
    assert (first["kind"], first["step"], first["epoch"]) == ("eval", 0, 0)
    assert rest == metrics_of(tmp_path / "none")
    assert first["top1"] == first["ema_top1"] == report["top1"] > final(tmp_path / "probe")["metric"]
    assert (report["epoch"], report["epochs_done"]) == (0, 4)
    assert "linear probe  top-1 100.00 %" in out.replace("averaged weights 100.00 %  ", "")
    assert (
        "a linear probe of the starting weights; nothing that was trained was better)" in summary(report, tmp_path)[1]
    )
    best = torch.load(tmp_path / "probe" / "checkpoints" / "best.pt")
    assert best["step"] == best["epoch"] == 0
    assert_equal(best["model"], best["model_ema"])
    assert not (tmp_path / "probe" / "checkpoints" / "step_00000000.pt").exists()
    assert (tmp_path / "probe" / "curves.png").is_file()


def test_training_that_is_better_takes_its_place(raw_config, tmp_path, monkeypatch):
    monkeypatch.setattr(LinearProbe, "fit", lambda self, *args: "")  # the fresh classifier, which knows nothing
    report = train(configure(raw_config, train__linear_probe="evaluate", optim__base_lr=3e-3, **SHORT), tmp_path)
    rows = [row for row in metrics_of(tmp_path) if row["kind"] == "eval"]
    assert report["epoch"] > 0
    assert report["top1"] > rows[0]["ema_top1"]


def test_training_can_start_from_it(raw_config, tmp_path):
    slow = {"optim__base_lr": 1e-9, "schedule__min_lr": 0.0, "schedule__warmup_lr": 0.0}
    frozen = configure(raw_config, **slow, train__linear_probe="start", model__freeze="backbone", **SHORT)
    train(frozen, tmp_path)
    for start, end in zip(classifier_of(tmp_path), classifier_of(tmp_path, "last.pt"), strict=True):
        assert torch.allclose(start, end, atol=1e-5)
        assert end.abs().max() > 1e-2


SHORT = {"schedule__epochs": 2, "schedule__warmup_epochs": 0, "schedule__cooldown_epochs": 0}


def assert_same_run(whole, parts) -> None:
    for key in ("model", "model_ema", "optimizer", "history", "best_metric", "best_row"):
        assert_equal(final(whole)[key], final(parts)[key], key)
    assert metrics_of(whole) == metrics_of(parts)
    assert_equal(classifier_of(whole), classifier_of(parts))


@pytest.mark.parametrize("mode", ["evaluate", "start"])
def test_a_run_that_goes_on(raw_config, tmp_path, monkeypatch, mode):
    """Killed before anything but best.pt is saved it begins anew; the probe is not fitted again later."""
    config = configure(raw_config, train__linear_probe=mode, checkpoint__every_steps=2, **SHORT)
    train(config, tmp_path / "whole")
    for stop_after in (0, 7):
        parts = tmp_path / f"parts{stop_after}"
        with killed_after(stop_after):
            train(config, parts)
        assert (parts / "checkpoints" / "best.pt").exists()
        with monkeypatch.context() as patch:
            if stop_after:
                patch.setattr(LinearProbe, "__init__", None)
            train(config, parts)
        assert_same_run(tmp_path / "whole", parts)


def test_a_signal_before_the_first_step(raw_config, tmp_path, monkeypatch):
    """The run is saved as it begins, without the probe's classifier, and does all of it when it goes on."""
    config = configure(raw_config, train__linear_probe="evaluate", **SHORT)
    train(config, tmp_path / "whole")
    signals = []
    real = trainer.Trainer.__init__

    def noted(self, job, world, stop):
        signals.append(stop)
        real(self, job, world, stop)

    for name in ("update", "fit"):  # while features are collected, while the probe is evaluated
        found = getattr(LinearProbe, name)

        def stopped(self, *args, found=found):
            signals[-1].name = "SIGTERM"
            return found(self, *args)

        with monkeypatch.context() as patch, pytest.raises(RunStopped, match="stopped by SIGTERM after step 0"):
            patch.setattr(trainer.Trainer, "__init__", noted)
            patch.setattr(LinearProbe, name, stopped)
            train(config, tmp_path / name)
        train(config, tmp_path / name)
        assert_same_run(tmp_path / "whole", tmp_path / name)


def test_a_probe_that_is_lost(raw_config, tmp_path, monkeypatch, capsys):
    """The file of step 0, which a signal leaves, holds the start without the probe and does not take its place."""
    config = configure(raw_config, train__linear_probe="evaluate", **SHORT)
    real = LinearProbe.update
    with monkeypatch.context() as patch, pytest.raises(RunStopped):
        patch.setattr(
            LinearProbe, "update", lambda self, *args: os.kill(os.getpid(), signal.SIGTERM) or real(self, *args)
        )
        train(config, tmp_path)
    assert (tmp_path / "checkpoints" / "step_00000000.pt").exists()
    with killed_after(7):
        train(config, tmp_path)
    best = tmp_path / "checkpoints" / "best.pt"
    for lost in ("missing", "another"):
        best.unlink(missing_ok=True)
        if lost == "another":
            best.write_bytes((tmp_path / "checkpoints" / "step_00000000.pt").read_bytes())
            best.with_name("best.pt.sha256").unlink(missing_ok=True)
        capsys.readouterr()
        with killed_after(0):
            train(config, tmp_path)
        assert "The best weights so far, of epoch 0, are lost" in capsys.readouterr().out
    report = train(config, tmp_path)
    assert report["epoch"] > 0
    assert torch.load(best)["best_row"]["epoch"] == report["epoch"]


def test_workers_are_forked_before_trackers_have_threads(raw_config, tmp_path, monkeypatch):
    order = []
    for of, name in ((LinearProbe, "update"), (logging.RunLog, "begin"), (logging.RunLog, "evaluation")):
        real = getattr(of, name)

        def noted(self, *args, real=real, name=name):
            order.append(name)
            return real(self, *args)

        monkeypatch.setattr(of, name, noted)
    train(configure(raw_config, train__linear_probe="evaluate", **SHORT), tmp_path)
    assert [name for i, name in enumerate(order) if name not in order[:i]] == ["update", "begin", "evaluation"]


def test_the_time_of_the_probe_is_none_of_the_steps(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    log = logging.RunLog(tmp_path, 10, 0, False, True)
    now[0] = 100.0
    log.start_clock()
    now[0] = 102.0
    log.advance()
    assert str(log._plain).endswith("0:18 left")
    log.step(1, 1, dict.fromkeys(("loss", "lr", "images_per_second", "data_wait"), 1.0))
    assert "0:18 left" in (tmp_path / "train.log").read_text()


def test_no_probe_of_a_stream(raw_config, tmp_path, capsys):
    stream = {"data__streaming": True, "data__epoch_images": 16, **SHORT}
    train(configure(raw_config, train__linear_probe="evaluate", **stream), tmp_path)
    assert "no linear probe: the training images come in a stream" in capsys.readouterr().out
    assert next(row["step"] for row in metrics_of(tmp_path) if row["kind"] == "eval") > 0


def test_a_continued_run_may_differ_in_it(raw_config, tmp_path):
    """A recipe has had it only since a version."""
    with killed_after(6):
        train(configure(raw_config, **SHORT), tmp_path)
    now = configure(raw_config, train__linear_probe="evaluate", **SHORT)
    assert changed_keys(configure(raw_config, **SHORT).to_dict(), now.to_dict()) == [
        "train.linear_probe: 'none' -> 'evaluate'"  # what a study takes for another run
    ]
    train(now, tmp_path)
    assert metrics_of(tmp_path)[0]["kind"] == "train"


# ----------------------------------------------------------------------------------------------------- which is better


@pytest.mark.parametrize(
    ("metric", "n", "row", "is_better"),
    [
        ("top1", 100, {"top1": 90.0, "loss": 0.9}, True),  # by more than an error, though the loss is higher
        ("top1", 100, {"top1": 82.0, "loss": 0.9}, False),  # by less
        ("top1", 100, {"top1": 82.0, "loss": 0.5}, True),  # by less, and the loss is lower
        ("top1", 100, {"top1": 78.0, "loss": 0.5}, True),
        ("top1", 100, {"top1": 70.0, "loss": 0.1}, False),
        ("top1", 100_000, {"top1": 82.0, "loss": 0.9}, True),  # of many images
        ("top1", 100, {"top1": 80.0, "loss": 0.7}, False),
        ("loss", 100, {"top1": 99.0, "loss": 0.71}, False),
        ("loss", 100, {"top1": 10.0, "loss": 0.69}, True),
    ],
)
def test_what_is_better_than_the_probe(raw_config, metric, n, row, is_better):
    class Job:
        task, config = Classification(), configure(raw_config, checkpoint__metric=metric)

    state = object.__new__(TrainState)
    state.job, state.run, state.best_metric = Job(), type("Run", (), {"ema": None})(), 80.0
    state.best_row = {"epoch": 0, "top1": 80.0, "loss": 0.7, "n": n}
    assert state._is_best({**row, "n": n}) is is_better


def test_the_probe_is_no_progress_for_an_early_stop(raw_config):
    config = configure(raw_config, train__early_stop={"patience": 2})
    rows = [[epoch, top1, 1.0, top1, top1] for epoch, top1 in enumerate([90.0, 10.0, 20.0, 30.0])]
    assert not stop_reason(config, rows)
    assert "best: top-1 10.00" not in stop_reason(config, [*rows, [4, 25.0, 1, 1, 1], [5, 25.0, 1, 1, 1]])
    assert "epoch 3" in stop_reason(config, [*rows, [4, 25.0, 1, 1, 1], [5, 25.0, 1, 1, 1]])


def test_recipes():
    for name, mode in (("finetune", "evaluate"), ("linear_probe", "start"), ("scratch", "none")):
        for kind in ("folder", "csv", "hf"):
            assert load_config(f"{name}/{kind}", ["data.root=x"]).train.linear_probe == mode
    assert load_config("imagenet1k/conv2former_t", ["data.root=x"]).train.linear_probe == "none"
