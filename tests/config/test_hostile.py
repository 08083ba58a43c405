"""Input that nobody means well: a configuration comes out that holds together, or one ConfigError that can be read."""

from __future__ import annotations

import contextlib
import copy
import datetime
import itertools
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conv2former import ConfigError, UserError
from conv2former._yaml import parse_yaml_value
from conv2former.config import BaseConfig, Config, check_config, img_size_at, load_config, make_plan
from conv2former.variants import MAX_WEIGHTS, parse_variant, read_variant

from ..conftest import ROOT, TINY_YAML

pytestmark = pytest.mark.slow

# The same examples in every run.
thorough = settings(
    derandomize=True, database=None, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck)
)


def fields_of(field) -> list[str]:
    return list(getattr(field.annotation, "model_fields", ()))


KEYS = [f"{name}.{key}" for name, field in Config.model_fields.items() for key in fields_of(field)]
VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 31, 32, 33, 100, 1000, 10**6, 10**9, 10**12, -(10**12), 10**400,
    0.0, -0.0, 0.5, 1.0, 1.5, 1e-320, 1e300, -1e300, float("inf"), float("-inf"), float("nan"),
    "", " ", "x", "1", "1e400", "nan", "Größe 💥", "\0", "\ud800", "../..", "rand-", "adamw",
    [], [1], [1, 2], [0.1, 0.2], [2, 1], [1, 2, 3], ["a"], [None] * 3, [[[1]]], [10**400] * 2, [float("nan")] * 3,
    {}, {"a": 1}, {1: 2}, {"a": {"b": [{}]}}, {"\ud800": "\ud800"}, b"\xff", datetime.date(2024, 1, 1), {1, 2},
]  # fmt: skip
LARGE = [10**5000, "9" * 5000, "x" * 100_000, list(range(10_000)), {"x" * 10_000: 1}, object()]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 300),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=20),
    st.sampled_from(VALUES),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4),
    max_leaves=8,
)
keyed = st.dictionaries(st.sampled_from(KEYS), values, max_size=4)
TEXTS = [path.read_text() for path in sorted(ROOT.glob("configs/**/*.yaml"))]
FRAGMENTS = [
    *"\t\0\r\n\ufeff\x85\u2028💥{}[]'\"|>&*!%@`#:,?-=~ ", "\r\n", "- ", "? ", ": ", "&a ", "*a", "<<: *a", "---\n",
    "...\n", "!!python/name:os.system ", "!!binary ", "!!set ", "1e999", ".inf", ".nan", "-.inf", "2024-02-30",
    "1:60:60", "0o7", "0xFF", "1_0", "9" * 50, "null", "yes", '"\\ud800"', '"\\UFFFFFFFF"', "base: ", "model: ",
    "data: {root: x}\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy of configs/, so that mutated files find their bases."""
    path = tmp_path_factory.mktemp("hostile") / "configs"
    shutil.copytree(ROOT / "configs", path)
    return path


def dotted(pairs: dict) -> dict:
    """Returns nested sections for `section.key: value`."""
    nested: dict = {}
    for key, value in pairs.items():
        section, name = key.split(".")
        nested.setdefault(section, {})[name] = value
    return nested


def refused(call, *args) -> str | None:
    """Returns the message of the ConfigError, None if there is none. Any other exception is the test's failure."""
    try:
        call(*args)
    except ConfigError as e:
        message = str(e)
        assert 0 < len(message) < 20_000
        assert max(map(len, message.splitlines())) < 2000
        assert "Traceback" not in message
        return message
    return None


def load(path: Path, text: str | bytes) -> None:
    """Loads a file of this content: it gives a configuration that holds together, or an error that names a file."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    message = refused(lambda: holds_together(load_config(path)))
    assert message is None or str(path.parent) in message or re.match(r"/.*: (no such file|cannot be read)", message)


def holds_together(config: BaseConfig) -> None:
    plain = config.to_dict()
    assert repr(check_config(plain, "again").to_dict()) == repr(plain)  # repr: nan is not nan
    saved = yaml.safe_dump(plain, sort_keys=False)
    if not re.search(r"(^|\s)[-+]?\.?\d[\d_.]*[eE]\d+(:|$)", saved, re.MULTILINE):  # PyYAML does not quote it
        again = check_config(parse_yaml_value(saved), "again")
        assert repr(again.to_dict()) == repr(plain)
    for devices, images in ((1, 1), (1, 100_000), (8, 1_281_167)):
        try:
            plan = make_plan(config, devices, images)
        except UserError:
            continue
        assert 1 <= plan.total_steps <= 2e5 * images
        assert 0 < plan.lr < float("inf")
    epochs = config.schedule.epochs + config.schedule.cooldown_epochs
    if not isinstance(config, Config):
        return  # images grow in classification alone
    if config.data.img_size is None and config.model.checkpoint:
        return  # the size is the checkpoint's
    whole = [img_size_at(config, epoch) for epoch in (*range(min(epochs, 200)), epochs - 1)]
    sizes = [size if isinstance(size, int) else min(size) for size in whole]
    last = min(config.data.preprocessing.size)
    first = config.augment.first_img_size or last
    assert all(32 <= size <= last and (size == last or (size - first) % 32 == 0) for size in sizes)
    assert sizes == sorted(sizes)
    assert sizes[-1] == last


@thorough
@given(st.text() | st.binary() | st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join))
def test_files_of_anything(folder, text):
    load(folder / "hostile.yaml", text)
    if isinstance(text, str):
        refused(load_config, None, [f"data.root={text}"])


@thorough
@given(
    st.sampled_from(TEXTS),
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 30), st.sampled_from(FRAGMENTS) | st.text(max_size=5)),
        min_size=1,
        max_size=4,
    ),
)
def test_damaged_recipes(folder, text, changes):
    for place, length, new in changes:
        at = int(place * len(text))
        text = text[:at] + new + text[at + length :]
    load(folder / "imagenet1k" / "hostile.yaml", text)


@thorough
@given(keyed | st.dictionaries(st.sampled_from(list(Config.model_fields)) | st.text(max_size=5), values, max_size=3))
def test_structures(folder, raw):
    nested = dotted(raw) if all(key in KEYS for key in raw) else raw
    refused(lambda: holds_together(check_config(copy.deepcopy(nested), "test")))
    try:
        text = yaml.dump({"data": {"root": "x"}, **nested}, allow_unicode=True)
    except ValueError:  # more than 4300 digits
        return
    load(folder / "hostile.yaml", text)


def passing_pairs() -> list[tuple]:
    """Returns every key with every value that it takes beside the defaults."""
    found = []
    for key, value in itertools.product(KEYS, VALUES):
        with contextlib.suppress(ConfigError):
            check_config(dotted({"data.root": "x", key: value}), "test")
            found.append((key, value))
    return found


@thorough
@given(st.deferred(lambda: st.lists(st.sampled_from(passing_pairs()), max_size=8)))
def test_extreme_but_right(pairs):
    refused(lambda: holds_together(check_config(dotted({"data.root": "x", **dict(pairs)}), "test")))


@pytest.mark.parametrize("key", KEYS)
def test_every_key_with_every_value(key):
    """Also beside what lets it pass `conflicts`."""
    section, name = key.split(".")
    for value in VALUES + LARGE:
        for rest in ({"data": {"root": "x"}, "schedule": {"warmup_epochs": 0}}, {"train": {"batch_size": 2}}):
            raw = {**rest, section: {**rest.get(section, {}), name: value}}
            message = refused(lambda raw=raw: check_config(check_config(raw, "test").to_dict(), "again"))
            assert len(message or "") < 2000


@thorough
@given(
    st.lists(
        st.text(max_size=10)
        | st.sampled_from(
            ["", "=", "--", "--=", "a..b=1", ".=1", "=1", "a.b", "--a", "data=1", "data.root.x=1", "ä.ö=ü"]
        )
        | st.sampled_from(
            ["a." * 5000 + "a=1", "model.variant." + "a." * 300 + "a=1", "x" * 100_000, "x=" + "[" * 9999]
        )
        | st.builds("{}={}".format, st.sampled_from(KEYS), st.text(max_size=10))
        | st.sampled_from(KEYS).map("--{}".format),
        max_size=4,
    )
)
def test_overrides(words):
    refused(lambda: holds_together(load_config(None, ["data.root=x", *words])))


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{chr(b)}: &{chr(b)} [{', '.join([f'*{chr(b - 1)}'] * 9)}]\n" for b in range(98, 120)
)


@pytest.mark.parametrize(
    "text",
    [
        "model: {name: !!python/object/apply:os.system ['touch CANARY']}",
        "model: !!python/object/apply:subprocess.run [['touch', 'CANARY']]",
        "!!python/object/apply:os.system ['touch CANARY']: 1",
        "model: {name: !!python/object/new:os.system ['touch CANARY']}",
        "model: {name: !<tag:yaml.org,2002:python/object/apply:os.system> ['touch CANARY']}",
        "%TAG ! tag:yaml.org,2002:python/\n---\nmodel: !object/apply:os.system ['touch CANARY']",
        "model: {name: !!python/name:os.system }",
        "model: {name: !!python/module:os }",
        "model: {name: !mine x}",
        "model: {name: !<x> x}",
        "model: {name: !!binary /w==}",
        "model: {variant: !!set {a, b}}",
        "model: {variant: !!omap [a: 1]}",
        "model: {variant: !!timestamp x}",
        "train: {seed: !!int ''}",
        "train: {tf32: !!bool x}",
        "a: &a [*a]",
        "&a model: *a",
        "data: &d {root: x}\nmodel: {<<: *d}",
        "model: {<<: {name: x}}",
        LAUGHS,
        "data: {root: x}\n---\ndata: {root: y}",
        "data: {root: x, root: y}",
        "{[a]: 1}",
        "{{a: 1}: 1}",
        "null: 1",
        "1: 2",
        "true: {root: x}",
        "? |\n  data\n: 1",
        "x: " + "y" * 90_000,
        "x: " + "9" * 90_000,
        "train: {seed: " + "1:" * 400 + "1}",
        "train: {seed: " + ":".join(["1"] * 400) + ".5}",
        'data: {root: "\\UFFFFFFFF"}',
        'data: {root: "\\ud800"}',
        'data: {root: "a\\0b"}',
        'model: {checkpoint: "a\\0b"}',
        "".join(f"key{i}: 1\n" for i in range(5000)),
        "checkpoint: {allow_changes: [" + "{}, " * 5000 + "]}",
        'base: "a\\0b"',
        'base: "\\ud800"',
        "base: " + "x" * 90_000,
        "base: " + "x/" * 40_000,
        "base: [" + "x, " * 30_000 + "]",
        "base: [[[]]]",
        "base: .",
        "base: ''",
        "base: /dev/zero",
        "base: fifo",
        "base: loop",
        "base: large",
        "base: level999.yaml",
        "base: twice20.yaml",
        "model: {variant: ''}",
        "model: {variant: /dev/zero}",
        "model: {variant: fifo}",
        'model: {variant: "\\0"}',
    ],
)
def test_tricks(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    os.symlink("loop", "loop")
    with open("large", "wb") as file:
        file.truncate(50 * 2**20)
    for name in ("level", "twice"):  # one base each: deep; two bases each: a million files
        if name in text:
            for i in range(1000):
                Path(f"{name}{i}.yaml").write_text(
                    f"base: [{f'{name}{i - 1}.yaml, ' * (1 + (name == 'twice'))}]" if i else ""
                )
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert refused(load_config, path)
    assert not Path("CANARY").exists()
    assert refused(load_config, None, [f"model.variant={text}"])
    assert not Path("CANARY").exists()


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "x" * 5000, "x" * 300, "/dev/zero", ".", "/"])
def test_paths(path):
    assert refused(load_config, path)
    assert refused(load_config, None, [f"model.variant={path}"])
    assert refused(read_variant, path)


@pytest.mark.parametrize(
    "key",
    [
        "model.head_init_scale", "data.num_classes", "data.epoch_images", "data.shuffle_images", "data.img_size",
        "data.workers", "augment.color_jitter", "augment.mixup", "augment.mix_off_epochs", "optim.base_lr",
        "optim.base_batch_size", "schedule.epochs", "schedule.warmup_epochs", "schedule.cooldown_epochs",
        "train.batch_size", "train.accum_steps", "train.eval_batch_size", "train.eval_every", "train.timeout_minutes",
        "checkpoint.every_steps", "checkpoint.keep", "log.every_steps",
    ],
)  # fmt: skip
def test_absurd_numbers_are_refused(key):
    """What a run would die of long after its start, in the memory it takes or the time it needs."""
    message = refused(load_config, None, ["data.root=x", f"{key}=1{'0' * 15}"])
    assert f"{key}: input should be less than or equal to " in message


sizes = st.integers() | st.sampled_from([1, 2, 8, 64, 1000, 16384, 10**9, 10**12, True])
per_stage = st.lists(sizes, min_size=4, max_size=4)
definitions = st.fixed_dictionaries(
    {"dims": per_stage | values, "depths": per_stage | values, "kernel_size": st.just(7) | sizes | per_stage},
    optional={
        "name": st.just("mine") | values,
        "mlp_ratio": st.floats() | values,
        "ls_init_value": st.floats() | values,
        "head_hidden_size": sizes | values,
        "fusion": values,
        "train_drop_path_rate": st.floats() | values,
        "description": values,
        "pretrained": st.dictionaries(
            st.text(max_size=3) | st.none(),
            values | st.dictionaries(st.just("top1"), st.just(80.0) | values),
            max_size=2,
        )
        | values,
    },
)


@thorough
@given(definitions | st.dictionaries(st.text(max_size=5) | st.integers(), values, max_size=3))
def test_variants(folder, raw):
    def check(variant):
        assert variant.num_weights() <= MAX_WEIGHTS
        assert parse_variant(variant.to_dict(), "again").model_args() == variant.model_args()

    refused(lambda: check(parse_variant(raw, "test", name="mine")))
    refused(lambda: holds_together(check_config({"data": {"root": "x"}, "model": {"variant": raw}}, "test")))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"dims": [10**12] * 4}, "four even numbers from 2 to 16384"),
        ({"depths": [1, 1, 10**9, 1]}, "four whole numbers from 1 to 1000"),
        ({"kernel_size": 10**9 + 1}, "an odd number from 1 to 255"),
        ({"mlp_ratio": 1e308}, "a number from 1 to 64"),
        ({"head_hidden_size": 10**9}, "a whole number from 1 to 65536"),
        ({"dims": [16384] * 4, "depths": [1000] * 4}, r"dims or depths"),
        ({"name": "x" * 1000}, "at most 100"),
        ({f"key{i}": 1 for i in range(5000)}, "5,000 mistakes, the first 20"),
        ({"description": list(range(10**5))}, r"found \[0, 1, 2, .*, \.\.\.\]$"),
        ({"pretrained": {1: {"top1": 1}}}, "pretrained.1: expected a word"),
    ],
)
def test_absurd_variants(change, expected):
    message = refused(parse_variant, {**yaml.safe_load(TINY_YAML), "name": "mine", **change}, "test")
    assert re.search(expected, message)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: !!python/object/apply:os.system ['touch CANARY']", ["--dry-run"]),
        (LAUGHS, ["--print-config"]),
        ("data: {root: '\\ud800', img_size: 1000000000}", ["--dry-run", "schedule.epochs=1000000000000000"]),
        ("data: {root: x}", ["--dry-run", "model.variant={dims: [1000000000000, 2, 2, 2]}"]),
        ("data: {root: x}", ["--print-config", "a..b=1"]),
    ],
)
def test_train_prints_one_message(tmp_path, monkeypatch, capsys, text, words):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(text)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "a.yaml", *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.err.count("error: ") == 1
    assert "Traceback" not in printed.err
    assert not printed.out
    assert os.listdir() == ["a.yaml"]
