"""Whole runs in one process; those of several processes are in tests/test_scripts.py."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch
import yaml

import conv2former
from conv2former import CheckpointError, ConfigError, DataError
from conv2former.engine import dry_run, evaluate, kernels_used, logging, prepare, train, trainer
from conv2former.engine.saved import first_not_finite
from conv2former.errors import OutputError, TrainingError, WorkerError
from conv2former.tasks.classification import task as classification
from conv2former.tools.evaluation.validate import validate
from conv2former.tools.runs.comparing import differing, differing_runs, metrics_of

from .conftest import Killed, configure, killed_after

pytestmark = pytest.mark.slow


def final(folder) -> dict:
    return torch.load(sorted((folder / "checkpoints").glob("step_*.pt"))[-1])


def assert_equal(a, b, where: str = "") -> None:
    assert not differing(a, b), where


def test_a_run_and_what_it_leaves(raw_config, tmp_path, with_pictures):
    report = train(configure(raw_config, log__tensorboard=True), tmp_path / "run")
    assert report["n"] == 7
    assert report["steps"] == 20  # 44 images / 8 per step = 5 steps, 4 epochs with the cool-down
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        ".lock", "checkpoints", "config.yaml", "confusion.png", "curves.png", "first_batch.png", "metrics.jsonl",
        "report.json", "tensorboard", "train.log",
    }  # fmt: skip
    evals = [row for row in metrics_of(tmp_path / "run") if row["kind"] == "eval"]
    assert [row["epoch"] for row in evals] == [1, 2, 3, 4]
    assert report["top1"] == max(row["ema_top1"] for row in evals)
    trains = [row["step"] for row in metrics_of(tmp_path / "run") if row["kind"] == "train"]
    assert trains == list(range(2, 21, 2))
    info = conv2former.inspect_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")
    assert (info.name, info.class_names, info.has_ema) == ("conv2former_test", ["a", "b", "c"], True)
    assert info.metric == report["top1"]
    assert info.recipe["optim"]["clip_grad"] == 5.0
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    assert last.samefile(sorted(last.parent.glob("step_*.pt"))[-1])
    assert (report["last_checkpoint"], report["last_top1"]) == (str(last), evals[-1]["ema_top1"])
    assert validate(last)["top1"] == evals[-1]["ema_top1"]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    train_tags = {"loss", "lr", "grad_norm", "images_per_second", "memory_gib", "data_wait"}
    assert {f"train/{tag}" for tag in train_tags} <= set(tags["scalars"])
    assert {"eval/top1", "eval/ema_top1", "eval/ema_loss"} <= set(tags["scalars"])
    assert not [tag for tag in tags["scalars"] if "top5" in tag]  # among three classes it says nothing
    assert set(tags["images"]) == {"first_batch", "curves", "confusion"}
    assert [event.value for event in events.Scalars("eval/top1")] == pytest.approx([row["top1"] for row in evals])


@pytest.mark.parametrize(("stop_after", "every_steps", "workers"), [(8, 3, 0), (8, 3, 2), (10, None, 0), (3, 1, 0)])
def test_a_resumed_run_equals_one_that_never_stopped(raw_config, tmp_path, stop_after, every_steps, workers):
    config = configure(raw_config, checkpoint__every_steps=every_steps)
    train(config, tmp_path / "whole")

    with killed_after(stop_after):
        train(config, tmp_path / "parts")
    report = train(
        configure(raw_config, checkpoint__every_steps=every_steps, data__workers=workers), tmp_path / "parts"
    )

    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    for key in ("model", "model_ema", "optimizer", "step", "epoch", "best_metric", "metric"):
        assert_equal(whole[key], parts[key], key)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")
    assert report["steps"] == 20


LOSSES = [1.1328, 1.1100, 1.1011, 1.1025, 1.1030]


@pytest.mark.parametrize("ema", [0.9, None])
@pytest.mark.parametrize("stop_after", [None, 5, 15])
def test_of_equal_accuracies_the_lower_loss_is_the_best(raw_config, tmp_path, monkeypatch, capsys, ema, stop_after):
    """Also where the run has been resumed in between."""
    real, real_step, done = trainer.evaluate, trainer.train_step, []

    def played(model, *args):
        result = real(model, *args)
        step = steps[-1]
        accuracy = [40.0, 50.0, 50.0, 50.0, 50.0][step // 5 - 1]
        result.metrics.update(top1=accuracy, loss=LOSSES[step // 5 - 1])
        return result

    def noted(run, window, step, check):
        if stop_after and len(done) == stop_after:
            done.append(step)
            raise Killed
        done.append(step)
        steps.append(step + 1)
        return real_step(run, window, step, check)

    steps: list[int] = [0]
    monkeypatch.setattr(trainer, "evaluate", played)
    monkeypatch.setattr(trainer, "train_step", noted)
    config = configure(raw_config, schedule__epochs=5, schedule__cooldown_epochs=0, ema__decay=ema)
    if stop_after:
        with pytest.raises(Killed):
            train(config, tmp_path / "run")
    report = train(config, tmp_path / "run")
    assert (report["epoch"], report["top1"], report["loss"]) == (3, 50.0, 1.1011)
    assert torch.load(tmp_path / "run" / "checkpoints" / "best.pt")["epoch"] == 3
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.pt")["epoch"] == 5
    lines = capsys.readouterr().out.split("\n")
    small = "validation: one of 7 images is 14.29 points of top-1; ± is one standard deviation, sqrt(p (1 - p) / n)"
    assert small in lines
    assert any(line.startswith("epoch 4/5  top-1 50.00 % ± 18.90  ") for line in lines)
    assert not any("top-5" in line for line in lines)


def test_a_checkpoint_without_the_loss_of_the_best_goes_on(raw_config, tmp_path):
    """As versions before the rule for equal accuracies wrote it, without a file `last.pt` and sums of losses, too."""
    train(configure(raw_config), tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    newest = sorted(checkpoints.glob("step_*.pt"))
    newest[-1].unlink()
    content = torch.load(newest[0])
    del content["losses"]
    content["best_row"] = None
    for path in (newest[0].with_name(newest[0].name + ".sha256"), checkpoints / "last.pt"):
        path.unlink()
    content["best_metric"] = 0.0
    torch.save(content, newest[0])
    report = train(configure(raw_config), tmp_path / "run")
    assert report["steps"] == 20
    assert torch.load(checkpoints / "last.pt")["step"] == 20


@pytest.mark.parametrize("stop_after", [3, 13])
def test_the_loss_that_is_logged_is_the_mean_since_the_last_line(raw_config, tmp_path, monkeypatch, stop_after):
    """Every seven steps, and at the end of an epoch without a line; the same after a stop between two lines."""
    real, losses = trainer.train_step, []

    def noted(run, window, step, check):
        if len(losses) == stop_after and not stopped:
            stopped.append(step)
            raise Killed
        result = real(run, window, step, check)
        losses.append(float(result.loss))
        return result

    stopped: list[int] = [0]
    monkeypatch.setattr(trainer, "train_step", noted)
    config = configure(raw_config, log__every_steps=7, checkpoint__every_steps=1)
    train(config, tmp_path / "whole")
    rows = [row for row in metrics_of(tmp_path / "whole") if row["kind"] == "train"]
    assert [(row["step"], row["epoch"]) for row in rows] == [(5, 1), (7, 2), (14, 3), (20, 4)]
    for row, first, end in zip(rows, (0, 5, 7, 14), (5, 7, 14, 20), strict=True):
        assert row["loss"] == pytest.approx(sum(losses[first:end]) / (end - first), rel=1e-6)
    stopped.clear()
    losses.clear()
    with pytest.raises(Killed):
        train(config, tmp_path / "parts")
    train(config, tmp_path / "parts")
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")


def test_lookahead_goes_on_exactly(raw_config, tmp_path):
    """Killed after 8 steps, of which the sixth made the slow weights, which are part of the checkpoint."""
    config = configure(raw_config, optim__opt="lookahead_adamw", checkpoint__every_steps=1)
    train(config, tmp_path / "whole")
    with killed_after(8):
        train(config, tmp_path / "parts")
    train(config, tmp_path / "parts")
    assert not differing_runs(tmp_path / "whole", tmp_path / "parts")
    state = final(tmp_path / "parts")["optimizer"]["state"]
    assert all("lookahead_slow_buff" in values for values in state.values())
    train(configure(raw_config, optim__opt="adamw"), tmp_path / "plain")
    assert differing(final(tmp_path / "plain")["model"], final(tmp_path / "whole")["model"])


def test_the_curves_are_drawn_while_the_run_is_on(raw_config, tmp_path, monkeypatch):
    """At an evaluation, not more often than every 30 seconds; TensorBoard gets the last picture."""
    late, real = [0.0], time.perf_counter
    drawn = []
    monkeypatch.setattr(time, "perf_counter", lambda: real() + late[0])
    monkeypatch.setattr(
        logging.RunLog, "picture", lambda log, name, _, step, board=True: drawn.append((name, step, board))
    )

    def long_evaluation(*args):
        late[0] += 20.0
        return evaluate(*args)

    monkeypatch.setattr(trainer, "evaluate", long_evaluation)
    train(configure(raw_config, ema__decay=None), tmp_path / "run")
    assert [item for item in drawn if item[0] == "curves"] == [
        ("curves", 10, False), ("curves", 20, False), ("curves", 20, True)
    ]  # fmt: skip


def test_the_seed_matters(raw_config, tmp_path):
    short = {"schedule__epochs": 2, "schedule__warmup_epochs": 0, "schedule__cooldown_epochs": 0}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(configure(raw_config, train__seed=seed, **short), tmp_path / name)
    a, b, c = (final(tmp_path / name)["model"] for name in "abc")
    assert_equal(a, b)
    assert not torch.equal(a["head.fc.weight"], c["head.fc.weight"])


def test_a_finished_run_stays_finished(raw_config, tmp_path):
    first = train(configure(raw_config), tmp_path / "run")
    before = final(tmp_path / "run")
    again = train(configure(raw_config), tmp_path / "run")
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in first.items() if k != "seconds"}
    assert_equal(final(tmp_path / "run"), before)


@pytest.mark.parametrize("content", [None, b""])
def test_the_best_weights_of_a_finished_run_are_lost(raw_config, tmp_path, capsys, content):
    """The same command says so, and what it recommends is there."""
    report = train(configure(raw_config), tmp_path / "run")
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    for path in best.parent.glob("step_*.pt"):
        if path.samefile(best):
            path.unlink()
    best.unlink()
    if content is not None:
        best.write_bytes(content)
    capsys.readouterr()
    again = train(configure(raw_config), tmp_path / "run")
    assert f"warning: {best}" in capsys.readouterr().out
    if report["epoch"] < report["epochs"]:
        assert (again["epoch"], again["top1"]) == (again["epochs"], again["last_top1"])
    assert torch.load(best)["epoch"] == again["epoch"]
    assert conv2former.load_model(again["checkpoint"])


def test_a_run_that_goes_on_with_other_kernels_says_so(raw_config, tmp_path, monkeypatch, capsys):
    config = configure(raw_config)
    monkeypatch.setenv("CONV2FORMER_COMPILE", "0")
    report = train(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert f"kernels: network {report['kernels']['network']}, images Pillow, torch {torch.__version__}" in said
    assert "PyTorch's operators" in report["kernels"]["network"]
    assert final(tmp_path / "run")["kernels"] == report["kernels"]
    train(config, tmp_path / "run")
    assert "other kernels" not in capsys.readouterr().out
    monkeypatch.setattr(kernels_used.compiling, "describe", lambda source, *flags: f"{source.name} compiled")
    train(config, tmp_path / "run")
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "other kernels" in line]
    assert f"network: {report['kernels']['network']} -> kernels.cpp compiled; images: Pillow -> pixels" in warning
    assert "torch:" not in warning


def test_resume_never_and_from_a_path(raw_config, tmp_path):
    train(configure(raw_config), tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run; choose another --output"):
        train(configure(raw_config), tmp_path / "run", resume="never")
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step_*.pt"))
    report = train(configure(raw_config), tmp_path / "other", resume=str(newest[0]))
    assert report["steps"] == 20
    assert_equal(final(tmp_path / "other")["model"], final(tmp_path / "run")["model"])
    again = train(configure(raw_config), tmp_path / "other", resume=str(newest[0]))  # the same command goes on
    assert (again["steps"], again["top1"]) == (20, report["top1"])
    finished = train(configure(raw_config), tmp_path / "finished", resume=str(newest[-1]))
    assert (tmp_path / "finished" / "checkpoints" / "best.pt").is_file()
    with pytest.raises(ConfigError, match="holds a run"):
        train(configure(raw_config), tmp_path / "other", resume=str(newest[-1]))
    last = [row for row in metrics_of(tmp_path / "run") if row["kind"] == "eval"][-1]
    assert (finished["steps"], finished["top1"]) == (20, last["ema_top1"])
    with pytest.raises(CheckpointError, match="no such file"):
        train(configure(raw_config), tmp_path / "other2", resume=str(tmp_path / "none.pt"))
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        with pytest.raises(CheckpointError) as error:
            train(configure(raw_config), tmp_path / "other2", resume=str(folder))
        assert f"{folder} is a folder; give the checkpoint to go on from: {newest[-1]}. " in str(error.value)
        assert f"--output {tmp_path / 'run'} --resume auto" in str(error.value)


def test_another_configuration_is_not_a_continuation(raw_config, tmp_path):
    train(configure(raw_config), tmp_path / "run")
    with pytest.raises(ConfigError) as error:
        train(configure(raw_config, optim__base_lr=5e-3, augment__hflip=0.1, log__every_steps=7), tmp_path / "run")
    assert "optim.base_lr: 0.001 -> 0.005" in str(error.value)
    assert "augment.hflip: 0.5 -> 0.1" in str(error.value)
    assert "log.every_steps" not in str(error.value)


def test_other_data_or_devices_are_not_a_continuation(raw_config, tmp_path, monkeypatch):
    train(configure(raw_config), tmp_path / "run")
    with monkeypatch.context() as patch:
        opened = classification.open_train_and_val

        def fewer(data):
            source, val = opened(data)
            source.images.__dict__["dataset"] = source.images.dataset.select(range(40))
            return source, val

        patch.setattr(classification, "open_train_and_val", fewer)
        with pytest.raises(ConfigError, match="images: 44 -> 40"):
            train(configure(raw_config), tmp_path / "run")
    plan = prepare.make_plan
    monkeypatch.setattr(prepare, "make_plan", lambda config, _, images: plan(config, 2, images))
    with pytest.raises(ConfigError, match="global_batch_size: 8 -> 16"):
        train(configure(raw_config), tmp_path / "run")


def test_the_global_batch_may_be_divided_anew(raw_config, tmp_path):
    """As after a change of the number of devices."""
    train(configure(raw_config), tmp_path / "run")
    for newest in sorted((tmp_path / "run" / "checkpoints").glob("step_*.pt"))[1:]:
        newest.unlink()
    report = train(configure(raw_config, train__batch_size=8, train__accum_steps=1), tmp_path / "run")
    assert report["steps"] == 20
    with pytest.raises(ConfigError, match="global_batch_size: 8 -> 4"):
        train(configure(raw_config, train__batch_size=4, train__accum_steps=1), tmp_path / "run")


def test_exploded_weights_are_not_saved(raw_config, tmp_path, monkeypatch):
    real = trainer.evaluate

    def exploded(*args):
        result = real(*args)
        result.metrics["loss"] = float("nan")
        return result

    monkeypatch.setattr(trainer, "evaluate", exploded)
    with pytest.raises(TrainingError, match="loss is not finite after step 5"):
        train(configure(raw_config), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [float("nan"), 1e38])
def test_one_bad_batch_spoils_nothing_that_is_saved(raw_config, tmp_path, monkeypatch, precision, value):
    """The second pass of an accumulation, with an average and BatchNorm's statistics: the run stops, and goes on."""
    config = configure(raw_config, train__precision=precision, checkpoint__every_steps=1)
    real = trainer.train_step

    def spoiled(run, batches, step, check):
        if step == 7:
            batches[1].images[:] = value
        return real(run, batches, step, check)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", spoiled)
        with pytest.raises(TrainingError, match=r"not finite.* at step 7|after step 8 .* not finite"):
            train(config, tmp_path / "run")
    saved = final(tmp_path / "run")
    assert saved["step"] == 7
    assert not first_not_finite(saved)
    assert train(config, tmp_path / "run")["steps"] == 20
    assert not first_not_finite(final(tmp_path / "run"))


def test_a_damaged_newest_checkpoint_is_said_loudly(raw_config, tmp_path, capsys):
    train(configure(raw_config), tmp_path / "run")
    whole = final(tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step_*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    train(configure(raw_config), tmp_path / "run")
    assert f"damaged checkpoint: {newest}" in capsys.readouterr().out
    assert_equal(final(tmp_path / "run")["model"], whole["model"])


def test_fine_tuning_from_a_checkpoint_with_other_classes(raw_config, tiny, tmp_path, official_file, caplog):
    raw_config["model"] |= {"variant": None, "name": tiny}
    still = {"optim__base_lr": 1e-12, "schedule__warmup_lr": 0.0, "schedule__min_lr": 0.0}
    config = configure(raw_config, model__checkpoint=str(official_file), model__head_init_scale=0.001, **still)
    train(config, tmp_path / "run")
    assert "a classifier for 10 classes" in caplog.text
    weights = final(tmp_path / "run")["model"]
    official = torch.load(official_file, weights_only=False)["state_dict"]
    assert torch.allclose(weights["stages.2.blocks.1.mlp.fc1.weight"], official["stages.2.1.mlp.fc1.weight"], atol=1e-6)
    assert weights["head.fc.weight"].shape[0] == 3
    assert weights["head.fc.weight"].abs().max() < 1e-4


def test_mistakes_in_the_data(raw_config, tmp_path):
    with pytest.raises(DataError, match="fewer than one global batch of 100"):
        train(configure(raw_config, train__batch_size=50), tmp_path / "run")
    with pytest.raises(DataError, match="no such folder"):
        train(configure(raw_config, data__root=str(tmp_path / "none")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written(raw_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot be written .*file is a file"):
        train(configure(raw_config), tmp_path / "file" / "run")


def test_a_configuration_in_any_form(raw_config, tmp_path, monkeypatch):
    """A Config, plain types with the path of a variant, or a file; and the folder's default."""
    (tmp_path / "conv2former_in_any_form.yaml").write_text(
        "dims: [8, 16, 24, 40]\ndepths: [1, 1, 2, 1]\nkernel_size: 5\n"
    )
    raw = copy.deepcopy(raw_config) | {"schedule": {"epochs": 1, "warmup_epochs": 0, "cooldown_epochs": 0}}
    raw["model"]["variant"] = str(tmp_path / "conv2former_in_any_form.yaml")
    before = copy.deepcopy(raw)
    monkeypatch.chdir(tmp_path)
    report = train(raw)
    assert raw == before
    assert report["checkpoint"] == "runs/conv2former_in_any_form/checkpoints/best.pt"
    again = train("runs/conv2former_in_any_form/config.yaml", "other")
    assert (again["top1"], again["loss"]) == (report["top1"], report["loss"])


def test_the_same_name_for_another_network(raw_config, tmp_path):
    """As when a notebook tries shapes."""
    short = {"schedule__epochs": 1, "schedule__warmup_epochs": 0, "schedule__cooldown_epochs": 0}
    for width in (8, 16, 8):
        shape = {"name": "conv2former_trial", "dims": [width, 16, 24, 40], "depths": [1, 1, 1, 1], "kernel_size": 3}
        folder = tmp_path / f"{width}-{len(list(tmp_path.iterdir()))}"
        train(configure(raw_config, model__variant=shape, **short), folder)
        assert final(folder)["model"]["stem.conv3.weight"].shape[0] == width


def test_a_mistake_leaves_nothing_behind(raw_config, tmp_path):
    train(configure(raw_config), tmp_path / "run")
    with pytest.raises(ConfigError) as kept:  # a notebook keeps it
        train(configure(raw_config, train__seed=7), tmp_path / "run")
    lock = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    assert subprocess.run([sys.executable, "-c", lock, tmp_path / "run" / ".lock"]).returncode == 0
    assert kept.value
    train(configure(raw_config), tmp_path / "run")


def test_an_ablation_is_evaluated_as_what_it_is(raw_config, tmp_path):
    """The tensors do not tell how context and values were joined; the checkpoint does."""
    variant = raw_config["model"]["variant"] | {"name": "conv2former_test_sum", "fusion": "sum"}
    report = train(configure(raw_config, model__variant=variant), tmp_path / "run")
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    result = validate(best)
    assert result["variant"] == "conv2former_test_sum"
    assert result["loss"] == pytest.approx(report["loss"], rel=1e-6)
    with pytest.raises(CheckpointError, match=r"best.pt was trained with fusion 'sum', the network has 'product'"):
        train(configure(raw_config, model__checkpoint=str(best)), tmp_path / "other")


def test_one_run_at_a_time_in_a_process(raw_config, tmp_path, monkeypatch):
    real = trainer.train_step
    errors = []

    def second(*args):
        if not errors:
            with pytest.raises(ConfigError, match="another thread of this process is training") as error:
                train(configure(raw_config), tmp_path / "second")
            errors.append(error)
        return real(*args)

    monkeypatch.setattr(trainer, "train_step", second)
    train(configure(raw_config), tmp_path / "run")
    assert errors


def test_a_report_without_its_metrics(raw_config, tmp_path):
    first = train(configure(raw_config), tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    again = train(configure(raw_config), tmp_path / "run")
    assert {**again, "seconds": 0} == {**first, "seconds": 0}


def test_what_may_change_if_it_is_allowed(raw_config, tmp_path):
    train(configure(raw_config), tmp_path / "run")
    for newest in sorted((tmp_path / "run" / "checkpoints").glob("step_*.pt"))[1:]:
        newest.unlink()
    changes = {"optim__base_lr": 2e-3, "augment__hflip": 0.1, "augment__smoothing": 0.2}
    with pytest.raises(ConfigError) as error:
        train(configure(raw_config, **changes, checkpoint__allow_changes=["augment"]), tmp_path / "run")
    assert "optim.base_lr: 0.001 -> 0.002" in str(error.value)
    assert "augment." not in str(error.value)
    allowed = configure(raw_config, **changes, checkpoint__allow_changes=["augment", "optim.base_lr"])
    assert train(allowed, tmp_path / "run")["steps"] == 20


def test_an_error_in_a_worker_is_its_own_text(raw_config, tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        (tmp_path / "data" / split / "a").mkdir(parents=True)
        for i in range(16):
            Image.new("RGB", (32, 32)).save(tmp_path / "data" / split / "a" / f"{i}.png")
    bad = tmp_path / "data" / "train" / "a" / "7.png"
    bad.write_bytes(b"")
    raw_config["data"] = {"root": str(tmp_path / "data"), "img_size": 32, "workers": 2}
    before = set(multiprocessing.active_children())
    with pytest.raises(DataError) as error:
        train(configure(raw_config), tmp_path / "run")
    assert set(multiprocessing.active_children()) <= before  # although `error` keeps the loaders
    assert str(error.value).startswith(f"{bad}: not a readable image")
    assert "\n" not in str(error.value)


def test_a_killed_worker_is_one_error_and_the_run_goes_on(raw_config, tmp_path, monkeypatch):
    raw_config["data"]["workers"] = 1
    before, killed = trainer.train_step, []
    others = multiprocessing.active_children()

    def kill(run, batches, step, check):
        if step == 7 and not killed:
            killed.append(next(child for child in multiprocessing.active_children() if child not in others))
            killed[0].kill()
            os.waitid(os.P_PID, killed[0].pid, os.WEXITED | os.WNOWAIT)  # on a busy machine that takes a while
        return before(run, batches, step, check)

    monkeypatch.setattr(trainer, "train_step", kill)
    with pytest.raises(WorkerError, match="most likely by the system for want of memory"):
        train(configure(raw_config), tmp_path / "run")
    assert killed
    assert set(multiprocessing.active_children()) <= set(others)
    assert final(tmp_path / "run")["step"] == 5
    assert train(configure(raw_config), tmp_path / "run")["steps"] == 20


def test_an_unreadable_image_of_a_stream_counts_once(raw_config, tmp_path, capsys):
    """Although every epoch comes by it, at another place."""
    import datasets
    from PIL import Image

    good = io.BytesIO()
    Image.new("RGB", (32, 32)).save(good, "PNG")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for split, count in (("train", 24), ("validation", 6)):
        images = [{"bytes": good.getvalue() if i != 3 else b"no", "path": None} for i in range(count)]
        columns = {"image": images, "label": [i % 2 for i in range(count)]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    raw_config["data"] |= {"root": str(tmp_path), "streaming": True, "epoch_images": 24, "on_error": "skip"}
    report = train(configure(raw_config, data__max_skipped=0.2), tmp_path / "run")
    assert (report["skipped"], report["n"]) == (2, 5)
    assert capsys.readouterr().out.count("skipped: ") == 2
    with pytest.raises(DataError, match=r"1 of 6 validation images cannot be read, .* \(validation\), shard 0, row 3$"):
        train(configure(raw_config, data__max_skipped=0.1), tmp_path / "strict")


def test_dry_run(raw_config):
    lines = dry_run(configure(raw_config))
    text = "\n".join(lines)
    assert "conv2former_test from scratch, drop path 0.2, 32 x 32" in text
    assert "global batch 8 = 4 per device x 1 device x 2 accumulation steps" in text
    assert "learning rate 0.001 = 0.001 x 8 / 8" in text
    assert "4 epochs (1 warm-up, 1 cool-down) of 5 steps: schedule.epochs 3 + schedule.cooldown_epochs 1" in lines
    assert "3 classes" in text
    assert "one step on 2 random images: loss " in text


def test_the_bar_on_a_terminal(raw_config, tmp_path):
    """Played by this test, of 0 x 0 characters, as programs leave it."""
    import pty

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(configure(raw_config).to_dict()))
    code = "import sys; from conv2former.engine import train; train(sys.argv[1], sys.argv[2])"
    master, slave = pty.openpty()
    words = [sys.executable, "-c", code, tmp_path / "config.yaml", tmp_path / "run"]
    process = subprocess.Popen(words, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # the end
        while data := os.read(master, 4096):
            shown += data
    assert process.wait() == 0, shown.decode()
    bars = [line for line in shown.decode().replace("\r", "\n").split("\n") if "%|" in line]
    assert any("20/20" in line and "loss" in line and "images/s" in line for line in bars), bars[-5:]
    assert "epoch 4/4  top-1" in (tmp_path / "run" / "train.log").read_text()
    assert "%|" not in (tmp_path / "run" / "train.log").read_text()
