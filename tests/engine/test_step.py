from __future__ import annotations

import pytest
import torch
from timm.optim import Lookahead

from conv2former import ConfigError
from conv2former.config import make_plan
from conv2former.data import Batch
from conv2former.engine import World
from conv2former.engine.build import autocast_for, build_run, check_names
from conv2former.engine.step import FiniteCheck, prepare_batch, train_step
from conv2former.errors import TrainingError, UserError
from conv2former.tasks import network
from conv2former.tasks.network import build_model, freeze

from .conftest import configure

WORLD = World(0, 1, torch.device("cpu"))


def make_run(raw: dict, **changes):
    config = configure(raw, **changes)
    return build_run(config, make_plan(config, 1, 44), WORLD, build_model(config, 3))


def step_of(run, batches, step: int, check: FiniteCheck | None = None):
    return train_step(run, batches, step, check or FiniteCheck(WORLD, run.optimizer))


def batch(size: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    return Batch(images, torch.randint(3, (size,), generator=generator), [])


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
    x, y, *_ = batch(8)
    weights, measured = [], []
    for split in (8, 4, 2):
        run = make_run(raw_config, **PLAIN, train__accum_steps=8 // split, train__batch_size=split)
        run.model.eval()
        run.forward.train = lambda mode=True, model=run.model: torch.nn.Module.train(model, False)
        parts = [Batch(*part, []) for part in zip(x.split(split), y.split(split), strict=True)]
        result = step_of(run, parts, step=5)
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
        result = step_of(run, [batch(4), batch(4, 1)], step=7)
        results.append(
            [result.loss, result.grad_norm, *run.model.state_dict().values(), *run.ema.state_dict().values()]
        )
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    run = make_run(raw_config)
    other = step_of(run, [batch(4), batch(4, 1)], step=8)
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
    result = step_of(run, [batch(4), batch(4, 1)], step=5)
    after = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    assert result.grad_norm > 1e-2  # the norm before clipping is what is reported
    # Nesterov momentum 0.9 makes the first step 1.9 gradients long
    assert (after - before).norm() == pytest.approx(1.9 * 1e-3 * result.lr, rel=1e-2)


def test_ema_follows(raw_config):
    run = make_run(raw_config, ema__warmup=False, ema__decay=0.75)
    before = {k: v.clone() for k, v in run.ema.module.state_dict().items()}
    step_of(run, [batch(4), batch(4, 1)], step=5)
    for key, value in run.ema.module.state_dict().items():
        if value.is_floating_point():
            expected = 0.75 * before[key] + 0.25 * run.model.state_dict()[key]
            assert torch.allclose(value, expected, atol=1e-6), key


@pytest.mark.parametrize("mixup", [0.0, 0.8])
def test_not_a_number_stops_before_the_weights_change(raw_config, mixup):
    run = make_run(raw_config, augment__mixup=mixup)
    before = {k: v.clone() for k, v in [*run.model.named_parameters(), *run.ema.named_parameters()]}
    bad = batch(4)
    bad.images[2, 0, 0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"not finite at step 5 \(loss nan on rank 0, .* learning rate"):
        step_of(run, [batch(4), bad], step=5)
    for key, value in [*run.model.named_parameters(), *run.ema.named_parameters()]:
        assert torch.equal(value, before[key]), key


def test_bf16_and_checkpointing_train(raw_config):
    run = make_run(raw_config, **PLAIN)
    expected = step_of(run, [batch(4)], step=5)
    for changes in ({"train__precision": "bf16"}, {"model__grad_checkpointing": True}):
        other = step_of(make_run(raw_config, **PLAIN, **changes), [batch(4)], step=5)
        assert other.loss == pytest.approx(expected.loss.item(), rel=0.05)
        assert other.grad_norm == pytest.approx(expected.grad_norm.item(), rel=0.2)


def test_precision_follows_the_device():
    assert autocast_for("auto", torch.device("cpu"))[0] == "fp32"
    assert autocast_for("fp16", torch.device("cpu"))[0] == "fp16"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optim__opt": "adamww"}, r"no optimizer 'adamww' \(did you mean 'adamw'"),
        ({"optim__opt": "sgd", "optim__betas": [0.9, 0.99]}, r"optim\.betas: sgd has none"),
        ({"model__variant": None, "model__name": "conv2former_x"}, "no variant 'conv2former_x'"),
        ({"model__variant": {"name": "oops", "dims": [1]}}, "model.variant: 3 mistakes"),
        ({"augment__auto_augment": "rand-m9-foo5"}, r"augment\.auto_augment: timm does not take 'rand-m9-foo5'"),
    ],
)
def test_wrong_names(raw_config, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        check_names(configure(raw_config, **changes), WORLD.device)


def test_wrong_names_are_listed_together(raw_config):
    with pytest.raises(ConfigError, match="3 mistakes") as error:
        wrong = {"model__variant": None, "model__name": "x", "optim__opt": "y", "train__batchnorm": "sync"}
        check_names(configure(raw_config, **wrong), WORLD.device)
    for key in ("model.name: ", "optim.opt: ", "train.batchnorm: "):
        assert key in str(error.value)


@pytest.mark.parametrize("until", ["nothing", "stem", "stage1", "stage2", "stage3", "stage4", "backbone"])
def test_freezing(raw_config, until):
    """What is frozen keeps its weights and BatchNorm's statistics; all the rest moves."""
    run = make_run(raw_config, model__freeze=until)
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    step_of(run, [batch(4), batch(4, 1)], step=5)
    count = ["nothing", "stem", "stage1", "stage2", "stage3", "stage4", "backbone"].index(until)
    frozen = ("stem.", "stages.0.", "stages.1.", "stages.2.", "stages.3.", "head_conv.")[:count]
    for key, value in run.model.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith(frozen), key
    modes = {name.split(".")[0]: module.training for name, module in run.model.named_modules() if name}
    assert modes["stem"] == (count < 1)
    grouped = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert grouped == {id(p) for p in run.model.parameters() if p.requires_grad}


def test_a_frozen_part_drops_no_paths(raw_config):
    run = make_run(raw_config, model__drop_path_rate=0.9, model__freeze="stage4")
    run.model.train()
    freeze(run.model, "stage4")
    x = batch(4).images
    torch.manual_seed(0)
    first = run.model.forward_features(x)
    assert torch.equal(first, run.model.forward_features(x))


def test_the_verdict_may_come_later(raw_config):
    """As on a GPU, where nobody waits for the gradient norm: the optimizer leaves the steps out by itself."""
    run = make_run(raw_config)
    check = FiniteCheck(WORLD, run.optimizer, lag=2)
    for step in range(2):
        step_of(run, [batch(4)], step, check)
    before = {k: v.clone() for k, v in run.model.named_parameters()}
    moments = [s["exp_avg"].clone() for s in run.optimizer.state.values()]
    bad = batch(4)
    bad.images[0, 0, 0, 0] = float("inf")
    step_of(run, [bad], 2, check)
    step_of(run, [batch(4)], 3, check)  # finite, but after it
    for key, value in run.model.named_parameters():
        assert torch.equal(value, before[key]), key
    for state, moment in zip(run.optimizer.state.values(), moments, strict=True):
        assert torch.equal(state["exp_avg"], moment)
    with pytest.raises(TrainingError, match="not finite at step 2 "):
        step_of(run, [batch(4)], 4, check)
    with pytest.raises(TrainingError, match="not finite at step 3 "):
        check.read()


def test_nothing_is_saved_before_its_verdict(raw_config):
    run = make_run(raw_config)
    check = FiniteCheck(WORLD, run.optimizer, lag=2)
    bad = batch(4)
    bad.images[0, 0, 0, 0] = float("nan")
    step_of(run, [bad], 0, check)
    with pytest.raises(TrainingError, match="not finite at step 0 "):
        check.read()


def test_an_overflow_in_fp16_is_not_an_error_until_it_stays(raw_config):
    run = make_run(raw_config, train__precision="fp16", **PLAIN)
    check = FiniteCheck(WORLD, run.optimizer, limit=4)
    before = {k: v.clone() for k, v in run.model.named_parameters()}
    bad = batch(4)
    bad.images[0, 0, 0, 0] = float("inf")
    for step in range(3):
        step_of(run, [bad], step, check)
    for key, value in run.model.named_parameters():
        assert torch.equal(value, before[key]), key
    assert run.scaler.get_scale() == 65536 / 8
    step_of(run, [batch(4)], 3, check)  # it recovers, and counting starts again
    assert any(not torch.equal(value, before[key]) for key, value in run.model.named_parameters())
    for step in range(4, 7):
        step_of(run, [bad], step, check)
    with pytest.raises(TrainingError, match="not finite for 4 steps in a row, whatever the scale, at step 7"):
        step_of(run, [bad], 7, check)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 1])
def test_a_step_left_out_in_fp16_leaves_no_trace(raw_config, value, place):
    run = make_run(raw_config, **{**PLAIN, "train__precision": "fp16", "ema__decay": 0.5, "train__accum_steps": 2})
    check = FiniteCheck(WORLD, run.optimizer, limit=4)
    step_of(run, [batch(4), batch(4)], 0, check)
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    average = {k: v.clone() for k, v in run.ema.module.state_dict().items()}
    bad = batch(4)
    bad.images[0, 0, 0, 0] = value
    result = step_of(run, [bad, batch(4)] if place == 0 else [batch(4), bad], 1, check)
    assert not torch.isfinite(result.grad_norm)
    for old, model in ((before, run.model), (average, run.ema.module)):
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, old[key]), key
    step_of(run, [batch(4), batch(4)], 2, check)
    assert not torch.equal(run.model.state_dict()["stem.norm1.running_mean"], before["stem.norm1.running_mean"])
    assert not torch.equal(run.ema.module.stem.conv1.weight, average["stem.conv1.weight"])


def test_mixing_ends_before_the_run_does(raw_config):
    run = make_run(raw_config, augment__mix_off_epochs=2)  # of 4, of 5 steps each
    for step, is_mixed in ((0, True), (9, True), (10, False), (19, False)):
        images, targets = prepare_batch(run, batch(4), step, 0)
        assert torch.equal(images, batch(4).images) != is_mixed
        assert targets.sum(1) == pytest.approx([1.0] * 4)
        assert (targets.max(1).values > 0.93).all() or is_mixed  # still smoothed
        again = prepare_batch(run, batch(4), step, 0)
        assert torch.equal(images, again[0])
        assert torch.equal(targets, again[1])


NEEDS_MORE = ("bnb", "fused", "adahessian")  # other packages; second derivatives


@pytest.mark.slow
def test_every_optimizer_of_timm_steps_or_says_why_not(raw_config):
    from timm.optim import list_optimizers

    for name in list_optimizers():
        if name.startswith("kron"):
            continue  # takes minutes to compile itself
        changes = {**PLAIN, "optim__opt": str(name), "optim__layer_decay": None}
        if name.startswith(NEEDS_MORE):
            with pytest.raises(ConfigError, match=rf"optim\.opt: {name} (cannot be used here|needs second)"):
                check_names(configure(raw_config, **changes), WORLD.device)
            continue
        check_names(configure(raw_config, **changes), WORLD.device)
        run = make_run(raw_config, **changes)
        before = run.model.stem.conv1.weight.detach().clone()
        for step in (5, 6):
            step_of(run, [batch(4)], step)
        after = run.model.stem.conv1.weight
        assert torch.isfinite(after).all(), name
        assert not torch.equal(after, before), name


def test_names_of_optimizers(raw_config):
    """Those that timm would take for others, because it reads from their last underscore, are refused."""

    def check(opt: str) -> None:
        check_names(configure(raw_config, optim__opt=opt), WORLD.device)

    for opt in ("lookahead_adamw", "Lookahead_SGD", "lookahead_lion"):
        check(opt)
        run = make_run(raw_config, optim__opt=opt)
        assert isinstance(run.optimizer, Lookahead)
        step_of(run, [batch(4), batch(4, 1)], step=5)
    for opt, near in (
        ("lookahead_adamww", "lookahead_adamw"),
        ("lookaheadadamw", "lookahead_adamw"),
        ("adam_w", "adamw"),
        ("fast_adamw", "fusedadamw"),
        ("lookahead_lookahead_lion", "lookahead_lion"),
        ("_lion", "lion"),
    ):
        with pytest.raises(ConfigError, match=rf"optim.opt: timm has no optimizer '{opt}' \(did you mean '{near}'\?\)"):
            check(opt)
    with pytest.raises(ConfigError, match="lookahead_adahessian needs second derivatives"):
        check("lookahead_adahessian")
    with pytest.raises(ConfigError, match=r"optim\.betas: lookahead_sgd has none"):
        check_names(configure(raw_config, optim__opt="lookahead_sgd", optim__betas=[0.9, 0.99]), WORLD.device)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] can't allocate memory: you tried to")])
def test_a_network_that_is_too_large_advises_no_smaller_batch(raw_config, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(network.timm, "create_model", full)
    with pytest.raises(UserError, match=r"needs more memory than there is .*choose a smaller network") as raised:
        build_model(configure(raw_config), 3)
    assert "batch" not in str(raised.value)
