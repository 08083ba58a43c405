"""Muon, whose matrices of one shape are orthogonalised together."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.optim import Muon, create_optimizer_v2
from torch import nn

from conv2former.config import check_config
from conv2former.config.resolve import Plan
from conv2former.engine import muon
from conv2former.engine.muon import GroupedMuon
from conv2former.engine.optimizer import build_optimizer


def network() -> nn.Module:
    """With matrices that share a shape and others, dense and depthwise convolutions, norms and biases."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)) for _ in range(5)]
    convolutions = [nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, *convolutions, nn.Flatten(), nn.Linear(32, 8), nn.Linear(8, 8))


def optimizer_of(model: nn.Module, grouped: bool, **args) -> Muon:
    options = {"opt": "muon", "lr": 0.02, "weight_decay": 0.1} | args
    made = create_optimizer_v2(model, **options)
    assert type(made) is Muon
    return GroupedMuon.of(made) if grouped else made


def give_gradients(model: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def assert_alike(ours: nn.Module, theirs: nn.Module, lr: float) -> None:
    """To a hundredth of a step: together, other kernels may round the bfloat16 of the orthogonal matrices."""
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.01 * lr, msg=name)


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"opt": "nmuon", "momentum": 0.6, "layer_decay": 0.5},
        {"adjust_lr_fn": "original", "scale_eps": True, "ns_steps": 3, "ns_coefficients": "polar_express"},
        {"conv_mode": "batched"},
        {"algo": "adamuon"},
    ],
    ids=str,
)
def test_the_values_are_timms(args):
    theirs = network()
    if "layer_decay" in args:  # layers of timm's networks are known
        theirs = timm.create_model("conv2former_n", dims=(8, 8, 8, 8), depths=(1, 2, 3, 1), num_classes=8)
    ours = copy.deepcopy(theirs)
    optimizers = optimizer_of(theirs, False, **args), optimizer_of(ours, True, **args)
    before = copy.deepcopy(theirs)
    for step in range(4):
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            give_gradients(model, step)
            optimizer.step()
            assert all(parameter.grad is not None for parameter in model.parameters())
        assert_alike(ours, theirs, 0.02)
    moved = [(a - b).abs().max() for a, b in zip(ours.parameters(), before.parameters(), strict=True)]
    assert min(moved) > 0  # every parameter


def test_matrices_of_one_shape_are_one_call(monkeypatch):
    """In parts that are not too large, and one alone is timm's."""
    shapes = []

    def counted(params, *args, **kwargs):
        shapes.append(tuple(params[0].shape))
        return muon_of_timm(params, *args, **kwargs)

    muon_of_timm = muon.muon
    monkeypatch.setattr(muon, "muon", counted)
    monkeypatch.setattr(muon, "LARGEST", 64 * 4)
    model = network()
    optimizer = optimizer_of(model, True)
    give_gradients(model, 0)
    optimizer.step()
    assert shapes == []  # the first is timm's
    model[1][0].weight.grad = None
    optimizer.step()
    # 4 blocks of the 5 and a linear layer are 8 x 8, of which the fifth is alone; the dense convolutions are too large
    assert shapes == [(8, 8, 4)]
    shapes.clear()
    monkeypatch.setattr(muon, "LARGEST", 8 * 72 * 3)
    optimizer.step()
    assert sorted(shapes) == [(8, 8, 5), (8, 72, 3)]


def test_what_has_no_gradient_stays():
    model = network()
    optimizer = optimizer_of(model, True)
    give_gradients(model, 0)
    optimizer.step()
    model[1][0].weight.grad = None
    before = model[1][0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[1][0].weight, before)
    assert model[1][0].weight.grad is None


@pytest.mark.parametrize("grouped", [True, False])
def test_a_checkpoint_of_either_goes_on_with_the_other(grouped):
    theirs = network()
    whole = optimizer_of(theirs, grouped)
    for step in range(2):
        give_gradients(theirs, step)
        whole.step()
    ours = copy.deepcopy(theirs)
    other = optimizer_of(ours, not grouped)
    other.load_state_dict(copy.deepcopy(whole.state_dict()))
    for model, optimizer in ((theirs, whole), (ours, other)):
        give_gradients(model, 2)
        optimizer.step()
    assert_alike(ours, theirs, 0.02)


def test_a_closure_is_called_once_and_its_loss_returned():
    model = network()
    optimizer = optimizer_of(model, True)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(1)
        give_gradients(model, 0)
        return 2.5

    assert optimizer.step(closure) == 2.5
    assert len(calls) == 1


@pytest.mark.parametrize(("opt", "kind"), [("muon", GroupedMuon), ("nmuon", GroupedMuon), ("adamw", torch.optim.AdamW)])
def test_runs_take_it(opt, kind):
    plan = Plan(global_batch_size=8, lr=0.1, steps_per_epoch=1, epochs=1)
    config = check_config({"data": {"root": "x"}, "optim": {"opt": opt}}, "test")
    assert type(build_optimizer(config, plan, network())) is kind
    again = check_config({"data": {"root": "x"}, "optim": {"opt": f"lookahead_{opt}"}}, "test")
    assert isinstance(build_optimizer(again, plan, network()), torch.optim.Optimizer)
