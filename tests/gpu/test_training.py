"""Runs of the training script on a GPU: each precision, repeated, with graphs and without, killed, continued."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from conv2former.config import load_config
from conv2former.engine import dry_run, train
from conv2former.engine.logging import read_metrics
from conv2former.tools.recipes import find_recipes
from conv2former.tools.runs.comparing import differing_runs
from conv2former.tools.runs.killing import kill_and_compare

from ..conftest import ROOT
from ..test_recipes import shallow  # noqa: F401 - a fixture
from .conftest import DEVICE, REHEARSES, needs_gpu

PRECISIONS = ["fp32", "bf16"] if REHEARSES else ["fp32", "bf16", "fp16"]
GRAPHS = "off" if REHEARSES else "on"


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_learns_and_repeats_bit_for_bit(configure, tmp_path, precision):
    """With a CUDA graph twice, and without: all logged losses and all weights are the same."""
    for name, graph in (("first", GRAPHS), ("second", GRAPHS), ("eager", "off")):
        train(configure(f"train.precision={precision}", f"train.cuda_graph={graph}"), tmp_path / name)
    assert not differing_runs(tmp_path / "first", tmp_path / "second")
    assert not differing_runs(tmp_path / "first", tmp_path / "eager")
    found = losses(tmp_path / "first")
    assert all(torch.isfinite(torch.tensor(found)))
    assert found[-1] < found[0]


def test_the_quickstart_learns(configure, tmp_path):
    changes = ["train.accum_steps=1", "train.batch_size=48", "augment.mixup=0", "augment.cutmix=0", "model.drop_rate=0"]
    report = train(configure(*changes, "schedule.epochs=12"), tmp_path)
    assert report["top1"] > 90


@pytest.mark.parametrize("change", ["train.batchnorm=sync", "train.channels_last=false", "train.compile=true"])
def test_other_settings_learn(configure, tmp_path, change):
    if REHEARSES and change == "train.batchnorm=sync":
        pytest.skip("cannot be rehearsed without a GPU")
    train(configure(change, "schedule.epochs=2"), tmp_path)
    found = losses(tmp_path)
    assert found[-1] < found[0]


def test_killed_runs_end_as_if_nothing_was(configure, tmp_path):
    lines: list[str] = []
    assert kill_and_compare(configure(), tmp_path / "runs", 2, 1, [0, 2], 0, lines.append) == 0, "\n".join(lines)


def test_torchrun_with_one_process(configure, digits, tmp_path):
    configure()
    words = ["scripts/train.py", "--config", "configs/quickstart.yaml", "--output", tmp_path / "run"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    command = [*torchrun, *words, f"data.root={digits}", "schedule.epochs=2", "schedule.warmup_epochs=1"]
    ended = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "Warning" not in ended.stderr
    assert "Traceback" not in ended.stderr


@needs_gpu
def test_gradients_through_nccl(tmp_path):
    """One process averages with itself, so that its gradients must stay what they are."""
    from .test_numerics import Case, batch_for, network, step

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=DEVICE)
    try:
        case = Case("conv2former_n", torch.bfloat16, 4, (64, 64), True)
        model, batch = network(case.name, True), batch_for(case)
        alone = step(model, *batch, case.dtype)
        model = network(case.name, True)
        together = step(
            DistributedDataParallel(model, device_ids=[0], gradient_as_bucket_view=True), *batch, case.dtype
        )
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    finally:
        dist.destroy_process_group()


CONFIGS = ROOT / "configs"
RECIPES = find_recipes(CONFIGS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_recipe_does_a_step(path, shallow):  # noqa: F811
    """With one block in each stage and small images, 16 of them."""
    words = ["data.img_size=64", "train.batch_size=16", "model.checkpoint=null"]
    whole = load_config(path)
    words += ["model.name=conv2former_n"] if whole.model.name == "auto" else []
    lines = dry_run(load_config(path, [*words, f"data.num_classes={whole.data.num_classes or 7}"]))
    assert "one step on 16 random images: loss " in lines[-1] or REHEARSES
