"""Installed weights are unverified until their accuracy was measured to be the published one."""

from __future__ import annotations

import json
import logging
import runpy
import sys

import pytest
import timm

import conv2former
from conv2former import CheckpointError, ConfigError, Preprocessing
from conv2former.commands import validate as command
from conv2former.tools.checkpoints.convert import convert, summary
from conv2former.tools.checkpoints.publish import install
from conv2former.tools.checkpoints.table import installed_table
from conv2former.tools.evaluation.confirm import check_confirmable, confirm, margin
from conv2former.tools.evaluation.files import heading
from conv2former.weights import contents
from conv2former.weights.installed import find_installed

from ..conftest import ROOT
from ..weights.test_installed import zoo  # noqa: F401
from .test_convert import authors_file, network


@pytest.fixture
def installed(zoo, tmp_path):  # noqa: F811
    """`pub_a.one`, of which 80 % are published, taken for it by its shape; and `pub_a.mine`."""
    path = authors_file(tmp_path / "a.pth.tar", network())
    install(convert(path))
    install(convert(path, "pub_a.mine"))
    contents._warn_once.cache_clear()
    return zoo


def row(top1: float = 80.2, n: int = 50_000, view: Preprocessing | None = None, **changes) -> dict:
    """Returns what `validate_files` would of pub_a.one on ImageNet's validation images."""
    own = view or Preprocessing(img_size=64)
    return {
        **own.to_dict(), "top1": top1, "top5": 95.0, "n": n, "classes": 1000, "network_classes": 1000,
        "present_classes": 1000, "data": "/data/imagenet/val", "precision": "fp32", **changes,
    }  # fmt: skip


def test_the_margin():
    """Half a point, and three standard errors: of 50,000 images 0.17 each."""
    assert margin(83.2, 50_000) == pytest.approx(0.5 + 3 * 0.167, abs=1e-3)
    assert margin(83.2, 5_000) > margin(83.2, 50_000)


def test_unverified_is_said_each_time(installed, caplog):
    for count, name in enumerate(("pub_a.one", "pub_a", "pub_a.one"), 1):
        timm.create_model(name, pretrained=True)
        assert len(caplog.records) == count
        text = caplog.records[-1].getMessage()
        assert "pub_a.one is unverified" in text
        assert "published: 80.0 % top-1" in text
        assert "python scripts/validate.py --checkpoint pub_a.one --data IMAGENET --confirm" in text
    timm.create_model("pub_a.one")
    timm.create_model("pub_a.mine", pretrained=True)  # nobody publishes an accuracy of it
    assert len(caplog.records) == 3
    conv2former.load_model("pub_a.one")
    assert "is unverified" in caplog.records[-1].getMessage()
    assert installed_table().splitlines()[-1].startswith("unverified: taken for the published file by its shape alone")


def test_a_conversion_claims_no_accuracy(installed, tmp_path):
    text = summary(convert(tmp_path / "a.pth.tar"))
    assert "accuracy  not measured here; published for pub_a.one: 80.0 % top-1" in text
    assert "this is taken for pub_a.one, the only published file of this shape, by that alone" in text
    assert "accuracy" not in summary(convert(tmp_path / "a.pth.tar", "pub_a.mine"))


def test_confirmed(installed, caplog):
    said = confirm(check_confirmable(["pub_a"]), [row()])
    assert "pub_a.one is confirmed: measured 80.20 % top-1 on 50,000 images; published 80.0 %" in said
    with caplog.at_level(logging.WARNING):
        timm.create_model("pub_a", pretrained=True)
    assert not caplog.records
    noted = json.loads((installed / "pub_a.one" / "confirmation.json").read_text())
    assert (noted["top1"], noted["n"], noted["data"]) == (80.2, 50_000, "/data/imagenet/val")
    assert noted["preprocessing"]["img_size"] == 64
    assert len(noted["date"]) == 10
    (line,) = (line for line in installed_table().splitlines() if line.startswith("pub_a.one"))
    assert line.endswith("80.20 % of 50,000")
    assert not find_installed("pub_a.one").problem
    assert not conv2former.list_installed(verify=True)[1].problem


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row(0.1)], r"measured 0\.10 % top-1 on 50,000 images; published 80\.0 %, allowed difference 1\.04"),
        ([row(float("nan"))], "measured nan"),
        ([row(n=4999)], "on 4,999 images; at least 5,000 are needed"),
        ([row(present_classes=200)], "of 200 classes; the accuracy is published for all 1,000 of ImageNet-1k"),
        ([row(network_classes=10, classes=10)], "is published for all 1,000"),
        ([row(view=Preprocessing(img_size=96))], r"other settings than it is installed with \(64 x 64"),
        ([row(70.0), row(80.1, view=Preprocessing(64, (0.5,) * 3))], r"with 64 x 64, .*0\.5.* it is 80\.10 %: install"),
    ],
)  # fmt: skip
def test_not_confirmed(installed, rows, expected):
    with pytest.raises(CheckpointError, match=f"^pub_a.one stays unverified: .*{expected}"):
        confirm(check_confirmable(["pub_a.one"]), rows)
    assert find_installed("pub_a.one").is_unverified


def test_other_weights_are_not_confirmed_by_an_old_note(installed, tmp_path):
    confirm(check_confirmable(["pub_a.one"]), [row()])
    note = (installed / "pub_a.one" / "confirmation.json").read_text()
    install(convert(authors_file(tmp_path / "b.pth.tar", network(1))), force=True)
    assert find_installed("pub_a.one").is_unverified
    path = installed / "pub_a.one" / "confirmation.json"
    for text in (note, "{", "[1]", '{"n": 1, "top1": "x"}'):
        path.write_text(text)
        assert find_installed("pub_a.one").is_unverified


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pub_a.mine"], r"pub_a.mine is not the name of installed weights whose accuracy is published; .*: pub_a.one"),
        (["FILE"], "FILE is not the name of installed weights"),
        (["pub_a.one", "pub_a.mine"], "give one installed name"),
    ],
)
def test_what_can_be_confirmed(installed, words, expected):
    with pytest.raises(ConfigError, match=expected):
        check_confirmable(words)


def test_damage_is_found_before_the_work(installed):
    path = installed / "pub_a.one" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        check_confirmable(["pub_a.one"])


@pytest.mark.parametrize(("top1", "code"), [(80.3, 0), (12.0, 2)])
def test_the_command(installed, monkeypatch, capsys, top1, code):
    found = {
        **row(top1), "checkpoint": "pub_a.one", "variant": "pub_a", "weights": "not noted",
        "preprocessing": "checkpoint", "changed": [], "top1_error": 0.2, "macro_f1": top1, "balanced_accuracy": top1,
        "loss": 1.0, "notes": [], "processes": 1, "images_per_second": 1.0, "skipped": [], "per_class": [],
    }  # fmt: skip

    def validate_files(*args, announce, **kwargs) -> list:
        announce([found])
        return [found]

    monkeypatch.setattr(command, "validate_files", validate_files)
    monkeypatch.setattr(sys, "argv", ["validate.py", "--checkpoint", "pub_a.one", "--data", "x", "--confirm"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "validate.py"), run_name="__main__")
        sys.exit(0)
    out, err = capsys.readouterr()
    assert int(stop.value.code or 0) == code
    assert "pub_a.one: pub_a, weights" in heading([found])
    assert ("is confirmed" in out, "stays unverified: measured 12.00 %" in err) == (code == 0, code == 2)
