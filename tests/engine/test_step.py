from __future__ import annotations

import pytest
import torch

from conv2former import ConfigError
from conv2former.config import make_plan
from conv2former.engine import World
from conv2former.engine.build import autocast_for, build_run, check_names
from conv2former.engine.step import train_step
from conv2former.errors import TrainingError

from .conftest import configure

WORLD = World(0, 1, torch.device("cpu"))


def make_run(raw: dict, **changes):
    config = configure(raw, **changes)
    return build_run(config, make_plan(config, 1, 44), WORLD, num_classes=3)


def batch(size: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 32, 32, generator=generator), torch.randint(3, (size,), generator=generator)


PLAIN = {
    "model__drop_path_rate": 0.0,
    "model__drop_rate": 0.0,
    "augment__mixup": 0.0,
    "augment__cutmix": 0.0,
    "ema__decay": None,
}


def test_the_schedule(raw_config):
    """Warm-up from warmup_lr, cosine to min_lr over `epochs`, then min_lr for the cool-down."""
    run = make_run(raw_config, schedule__epochs=4, schedule__warmup_epochs=1, schedule__cooldown_epochs=2)
    per_epoch = run.plan.steps_per_epoch
    peak = run.plan.lr
    rates = []
    for step in range(run.plan.total_steps):
        run.scheduler.step_update(step)
        rates.append(max(group["lr"] / group["lr_scale"] for group in run.optimizer.param_groups))
    assert rates[0] == pytest.approx(1e-6)
    assert rates[:per_epoch] == sorted(rates[:per_epoch])
    half = 1e-6 + 0.5 * (peak - 1e-6)  # cosine counts the warm-up: half of `epochs` is half of the way down
    assert rates[2 * per_epoch] == pytest.approx(half, rel=1e-6)
    assert rates[per_epoch + 1 : 4 * per_epoch] == sorted(rates[per_epoch + 1 : 4 * per_epoch], reverse=True)
    assert rates[4 * per_epoch :] == pytest.approx([1e-6] * (2 * per_epoch))


def test_accumulation_is_one_big_batch(raw_config):
    """Up to rounding, where no layer looks across the batch: here with BatchNorm's statistics frozen."""
    x, y = batch(8)
    weights, measured = [], []
    for split in (8, 4, 2):
        run = make_run(raw_config, **PLAIN, train__accum_steps=8 // split, train__batch_size=split)
        run.forward.train = lambda mode=True, model=run.model: torch.nn.Module.train(model, False)
        result = train_step(run, list(zip(x.split(split), y.split(split), strict=True)), step=5)
        measured.append([result.loss.item(), result.grad_norm.item()])
        weights.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    assert torch.allclose(weights[0], weights[1], atol=1e-5)
    assert torch.allclose(weights[0], weights[2], atol=1e-5)
    for other in measured[1:]:  # AdamW alone would not notice gradients of another scale
        assert other == pytest.approx(measured[0], rel=1e-4)


def test_a_step_is_a_function_of_its_number(raw_config):
    """The same step after other random draws gives the same weights, bit for bit, with mixup and drop path on."""
    results = []
    for noise in (0, 1):
        run = make_run(raw_config)
        torch.manual_seed(noise)
        result = train_step(run, [batch(4), batch(4, 1)], step=7)
        results.append(
            [result.loss, result.grad_norm, *run.model.state_dict().values(), *run.ema.state_dict().values()]
        )
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    run = make_run(raw_config)
    other = train_step(run, [batch(4), batch(4, 1)], step=8)
    assert not torch.equal(other.loss, results[0][0])


def test_weight_decay_leaves_out_norms_biases_and_layer_scale(raw_config):
    run = make_run(raw_config, optim__layer_decay=None)
    decay = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(run.model.parameters()))
    for name, parameter in run.model.named_parameters():
        assert decay[id(parameter)] == (0.05 if parameter.ndim > 1 else 0.0), name


def test_gradients_are_clipped(raw_config):
    run = make_run(
        raw_config, optim__opt="sgd", optim__clip_grad=1e-3, optim__weight_decay=0.0, optim__layer_decay=None
    )
    before = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    result = train_step(run, [batch(4), batch(4, 1)], step=5)
    after = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    assert result.grad_norm > 1e-2  # the norm before clipping is what is reported
    # Nesterov momentum 0.9 makes the first step 1.9 gradients long
    assert (after - before).norm() == pytest.approx(1.9 * 1e-3 * result.lr, rel=1e-2)


def test_ema_follows(raw_config):
    run = make_run(raw_config, ema__warmup=False, ema__decay=0.75)
    before = {k: v.clone() for k, v in run.ema.module.state_dict().items()}
    train_step(run, [batch(4), batch(4, 1)], step=5)
    for key, value in run.ema.module.state_dict().items():
        if value.is_floating_point():
            expected = 0.75 * before[key] + 0.25 * run.model.state_dict()[key]
            assert torch.allclose(value, expected, atol=1e-6), key


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_not_a_number_stops_before_the_weights_change(raw_config, mixup):
    run = make_run(raw_config, augment__mixup=mixup)
    before = {k: v.clone() for k, v in [*run.model.named_parameters(), *run.ema.named_parameters()]}
    x, y = batch(4)
    x[2, 0, 0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"not finite at step 5 \(rank 0, loss nan, .* learning rate"):
        train_step(run, [batch(4), (x, y)], step=5)
    for key, value in [*run.model.named_parameters(), *run.ema.named_parameters()]:
        assert torch.equal(value, before[key]), key


def test_bf16_and_compile_and_checkpointing_train(raw_config):
    run = make_run(raw_config, **PLAIN)
    expected = train_step(run, [batch(4)], step=5)
    for changes in ({"train__precision": "bf16"}, {"model__grad_checkpointing": True}):
        other = train_step(make_run(raw_config, **PLAIN, **changes), [batch(4)], step=5)
        assert other.loss == pytest.approx(expected.loss.item(), rel=0.05)
        assert other.grad_norm == pytest.approx(expected.grad_norm.item(), rel=0.2)


def test_precision_follows_the_device():
    assert autocast_for("auto", torch.device("cpu"))[0] == "fp32"
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        autocast_for("fp16", torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optim__opt": "adamww"}, r"no optimizer 'adamww' \(did you mean 'adamw'"),
        ({"optim__opt": "sgd", "optim__betas": [0.9, 0.99]}, r"optim\.betas: sgd has none"),
        ({"model__variant": None, "model__name": "conv2former_x"}, "no variant 'conv2former_x'"),
        ({"model__variant": {"name": "oops", "dims": [1]}}, "model.variant: 3 mistakes"),
    ],
)
def test_wrong_names(raw_config, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        check_names(configure(raw_config, **changes), WORLD.device)


def test_wrong_names_are_listed_together(raw_config):
    with pytest.raises(ConfigError, match="3 mistakes") as error:
        wrong = {"model__variant": None, "model__name": "x", "optim__opt": "y", "train__precision": "fp16"}
        check_names(configure(raw_config, **wrong), WORLD.device)
    for key in ("model.name: ", "optim.opt: ", "train.precision: "):
        assert key in str(error.value)
