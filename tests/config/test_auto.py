"""Keys that are `auto` until the number of training images is known."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest

from conv2former import ConfigError
from conv2former.config import BaseConfig, Config, check_config, fit_auto, fit_batch, load_config, make_plan, registry
from conv2former.config.auto import AUTO_KEYS, FEW_STEPS_LR, LEAST_LR, MIN_EPOCHS, MIN_STEPS, SMALL, fitted, value_at
from conv2former.config.base import BaseCheckpointConfig, BaseDataConfig
from conv2former.engine.images import fill_images
from conv2former.engine.prepare import changed_keys

from ..conftest import ROOT

FINETUNE = ROOT / "configs" / "finetune" / "folder.yaml"


def configure(**sections):
    return check_config({"data": {"root": "x"}, "train": {"batch_size": 32}, **sections}, "test")


def settle(config, images: int, **changes):
    return fit_auto(fit_batch(config, 1, images), 1, images, **changes)[0]


def test_every_key_has_a_value_for_every_size():
    before = None
    for images in (1, 2, 10, 31, 32, 40, 240, 4_000, 50_000, 1_300_000):
        batch = min(images, 32)
        values = fitted(images, batch)
        assert tuple(values) == AUTO_KEYS
        epochs, steps = values["schedule.epochs"], images // batch
        assert epochs >= MIN_EPOCHS
        assert epochs * steps >= MIN_STEPS
        assert epochs == MIN_EPOCHS or (epochs - 1) * steps < MIN_STEPS  # and not more
        assert 0 < values["schedule.warmup_epochs"] < epochs
        assert epochs // values["train.eval_every"] <= 60
        if before:  # larger sets: fewer epochs, a lower rate
            assert epochs <= before["schedule.epochs"]
            assert values["optim.base_lr"] <= before["optim.base_lr"]  # of these batches, all relative to 32 images
        before = values
        config = settle(load_config(FINETUNE), images)
        assert config.auto == ()
        assert make_plan(config, 1, images).total_steps == epochs * steps


def test_what_fits_follows_the_epochs_that_are_given():
    """A trial of two epochs is no run of which most is warm-up; one of a single epoch has none."""
    for epochs, warmup in ((1, 0), (2, 1), (10, 1)):
        values = fitted(240, 32, epochs)
        assert (values["schedule.epochs"], values["schedule.warmup_epochs"]) == (epochs, warmup)
        assert values["train.eval_every"] == 1
    config = settle(load_config(FINETUNE, ["schedule.epochs=2"]), 240)
    assert (config.schedule.epochs, config.schedule.warmup_epochs) == (2, 1)


def test_the_rate_follows_the_root_of_the_batch():
    rates = {batch: make_plan(settle(load_config(FINETUNE, [f"train.batch_size={batch}"]), 2**14), 1, 2**14).lr
             for batch in (8, 32, 128)}  # fmt: skip
    steps = {batch: MIN_EPOCHS * 2**14 // batch for batch in rates}
    for batch, lr in rates.items():
        expected = FEW_STEPS_LR * (MIN_STEPS / steps[batch]) ** 0.5 * (batch / 32) ** 0.5
        assert lr == pytest.approx(max(expected, LEAST_LR * (batch / 32) ** 0.5), rel=0.05)
    words = ["optim.base_batch_size=1024"]  # in other words, the same
    assert make_plan(settle(load_config(FINETUNE, words), 240), 1, 240).lr == pytest.approx(FEW_STEPS_LR, rel=0.05)


def test_the_page_shows_what_is_printed():
    page = (ROOT / "docs" / "finetune.md").read_text()
    assert fit_auto(load_config(FINETUNE), 1, 240)[1][0] in page
    for text in (
        f"{MIN_STEPS} steps, at least {MIN_EPOCHS}",
        f"{FEW_STEPS_LR:g} for {MIN_STEPS} steps",
        f"{SMALL:,} images",
    ):
        assert text.replace("0.002", "2e-3") in page


def test_a_recipe_keeps_auto_until_then():
    """Through plain types, other keys and copies; `--print-config` shows it."""
    config = load_config(FINETUNE, ["optim.base_lr=3e-4", "augment.scale=[0.5,1]"])
    assert set(config.auto) == {*AUTO_KEYS} - {"optim.base_lr", "augment.scale"}
    plain = config.to_dict()
    assert [key for key in AUTO_KEYS if value_at(plain, key) == "auto"] == list(config.auto)
    assert check_config(plain, "again") == config
    assert config.model_copy(update={"train": config.train}).auto == config.auto
    assert load_config(FINETUNE, {"optim": {"base_lr": "auto"}}).auto == AUTO_KEYS
    assert fit_auto(check_config({"data": {"root": "x"}}, "test"), 1, 50)[1] == []  # nothing to do, nothing to say


def test_what_is_given_stays_and_a_line_says_the_rest():
    config = load_config(FINETUNE, ["optim.base_lr=3e-4", "schedule.epochs=auto"])
    settled, lines = fit_auto(config, 1, 240)
    expected = fitted(240, 32)
    assert settled.optim.base_lr == 3e-4
    assert settled.schedule.epochs == expected["schedule.epochs"]
    assert settled.train.fitted == config.auto
    (line,) = lines
    assert line.startswith("auto, by 240 training images and 7 steps in an epoch: augment.scale=[0.5,1.0] ")
    assert f" schedule.epochs={expected['schedule.epochs']} " in line
    assert "base_lr" not in line
    # what it says can be given, and is the same run
    words = line.partition(": ")[2].split()
    again = load_config(FINETUNE, ["optim.base_lr=3e-4", *words])
    assert again.auto == ()
    assert again.to_dict() == {**settled.to_dict(), "train": {**settled.to_dict()["train"], "fitted": []}}


def test_without_a_count_it_is_a_large_set():
    settled, lines = fit_auto(load_config(FINETUNE), 1, None)
    assert settled.schedule.epochs == MIN_EPOCHS
    assert lines[0].startswith("auto, of a large training set, as the images were not counted: ")


def test_a_run_that_goes_on_keeps_what_it_found():
    """Although this version would find another value; but what was given then is no value that was found."""
    config = configure(schedule={"epochs": "auto", "warmup_epochs": "auto"})
    noted = settle(config, 240).to_dict()
    noted["schedule"] |= {"epochs": 7, "warmup_epochs": 2}
    assert settle(config, 240, noted=noted).schedule.epochs == 7
    noted["train"]["fitted"] = ["schedule.warmup_epochs"]
    again = settle(config, 240, noted=noted)
    assert (again.schedule.epochs, again.schedule.warmup_epochs) == (fitted(240, 32)["schedule.epochs"], 2)
    del noted["train"]["fitted"]  # of a version that had no such key
    assert settle(config, 240, noted=noted).schedule.warmup_epochs == fitted(240, 32)["schedule.warmup_epochs"]


class Poses(BaseConfig):
    """Of a task that has no section `augment`, and a value of its own for one key."""

    task: Literal["poses"] = "poses"
    data: BaseDataConfig = BaseDataConfig(source="folder", root="x")
    checkpoint: BaseCheckpointConfig = BaseCheckpointConfig(metric="error")
    auto_keys: ClassVar[tuple[str, ...]] = ("schedule.epochs",)

    def fitting_values(self, images, batch):
        return {"schedule.epochs": 1000 // images}


def test_a_task_says_which_keys_and_what_fits(monkeypatch):
    monkeypatch.setattr(registry, "_classes", {"classification": Config, "poses": Poses})
    raw = {"task": "poses", "schedule": {"epochs": "auto", "warmup_epochs": 0}}
    config = check_config(raw, "test")
    assert config.auto == ("schedule.epochs",)
    assert config.to_dict()["schedule"]["epochs"] == "auto"
    settled, lines = fit_auto(config, 1, 200)
    assert type(settled) is Poses
    assert (settled.schedule.epochs, settled.train.fitted) == (5, ("schedule.epochs",))
    assert lines == ["auto, by 200 training images and 1 step in an epoch: schedule.epochs=5"]
    assert changed_keys(settled.to_dict(), fill_images(config).to_dict(), ["model", "data"]) == []
    with pytest.raises(ConfigError, match=r"optim\.base_lr: .*found 'auto'; what can be auto: schedule\.epochs$"):
        check_config({**raw, "optim": {"base_lr": "auto"}}, "test")
    with pytest.raises(ConfigError, match=r"augment: unknown key"):
        check_config({**raw, "augment": {"scale": "auto"}}, "test")
    monkeypatch.setattr(Poses, "auto_keys", ())
    with pytest.raises(ConfigError, match=r"schedule\.epochs: .*found 'auto'; this task has no key that can be auto$"):
        check_config(raw, "test")


def test_the_keys_are_there():
    plain = Config().to_dict()
    assert [key for key in Config.auto_keys if key.partition(".")[2] not in plain[key.partition(".")[0]]] == []


@pytest.mark.parametrize("value", ["many", None, [], -1])
def test_a_run_with_values_that_are_none(value):
    config = configure(schedule={"epochs": "auto"}, optim={"base_lr": "auto"})
    noted = settle(config, 240).to_dict()
    noted["schedule"]["epochs"] = value
    with pytest.raises(ConfigError, match=r"^schedule\.epochs: no such value, in the run to go on with; give one$"):
        settle(config, 240, noted=noted)
    noted["schedule"]["epochs"] = "auto"  # nothing was found
    assert settle(config, 240, noted=noted) == settle(config, 240)
    for fitted_keys in (5, "schedule.epochs", None, [[]]):  # no list of keys
        noted["train"]["fitted"] = fitted_keys
        assert settle(config, 240, noted=noted) == settle(config, 240)


def test_mistakes():
    with pytest.raises(ConfigError, match=r"optim: a section, found 'auto'; its keys are set one by one: optim\.opt, "):
        configure(optim="auto")
    with pytest.raises(ConfigError, match=r"train\.batch_size: input should be a valid integer.*found 'auto'"):
        configure(train={"batch_size": "auto"})  # no key that may be
    with pytest.raises(ConfigError, match=r"schedule\.epochs: input should be a valid integer.*found 'automatic'"):
        configure(schedule={"epochs": "automatic"})
    with pytest.raises(ConfigError, match=r"optim\.bse_lr: unknown key"):
        configure(optim={"bse_lr": "auto"})
    # what involves a key that is auto is found when that has a value
    config = configure(schedule={"epochs": "auto", "warmup_epochs": 10_000, "min_lr": 0.5}, optim={"base_lr": "auto"})
    with pytest.raises(ConfigError) as error:
        fit_auto(config, 1, 240)
    assert "schedule.warmup_epochs: must be below schedule.epochs: 10000 of " in str(error.value)
    assert "schedule.min_lr: above optim.base_lr: 0.5 > " in str(error.value)
    config = configure(schedule={"epochs": "auto", "cooldown_epochs": 0}, augment={"mix_off_epochs": 10_000})
    with pytest.raises(ConfigError, match=r"augment\.mix_off_epochs: more than the run has: 10000"):
        fit_auto(config, 1, 240)
