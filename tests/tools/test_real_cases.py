"""The measured cases of dense prediction: their files, runs with trainings that are played and one that is real."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conv2former._yaml import dump_yaml
from conv2former.errors import ConfigError
from experiments.real_cases import command, runs
from experiments.real_cases.plan import Run, read_case
from experiments.real_cases.results import costs_of
from experiments.real_cases.runs import find_results, run_case

from ..conftest import ROOT
from ..engine.conftest import without_pictures  # noqa: F401 - an automatic fixture
from ..segmentation.conftest import SHAPE, folder, make_folder, raw  # noqa: F401 - fixtures

CASES = sorted((ROOT / "experiments" / "real_cases").glob("*.yaml"))
HEAD = {"name": "segformer", "channels": 8, "auxiliary": 0.0}


@pytest.fixture
def path(tmp_path, raw) -> Path:  # noqa: F811
    """A case of two rows whose runs have one epoch."""
    raw["schedule"]["epochs"] = 1
    raw["model"]["head"] = HEAD
    raw["train"] |= {"batch_size": 4, "accum_steps": 1}
    (tmp_path / "recipe.yaml").write_text(dump_yaml(raw))
    other = {"name": "conv2former_sum", "fusion": "sum", **SHAPE}
    case = {
        "recipe": "recipe.yaml",
        "metrics": {"miou": "mIoU", "loss": "loss"},
        "per_class": "iou",
        "rows": {
            "product": {"label": "the product"},
            "sum": {"label": "the sum", "changes": {"model": {"variant": other}, "data": {"img_size": 64}}},
        },
    }
    (tmp_path / "case.yaml").write_text(dump_yaml(case))
    return tmp_path / "case.yaml"


def read(path, folder, **kwargs):  # noqa: F811
    return read_case(path, str(folder), path.parent / "out", **{"seeds": 2, **kwargs})


def test_every_row_differs_from_the_recipe_by_what_it_says(path, folder):  # noqa: F811
    case = read(path, folder)
    assert case.plan() == [Run("product", 0), Run("sum", 0), Run("product", 1), Run("sum", 1)]
    first, second = case.config(Run("product", 0)), case.config(Run("sum", 1))
    assert (first.train.seed, second.train.seed) == (0, 1)
    assert second.model.variant["fusion"] == "sum"
    assert (first.data.img_size, second.data.img_size) == (32, 64)
    assert first.data.root == second.data.root == str(folder)
    halves = read(path, folder, processes=2)
    assert halves.config(Run("sum", 0)).train.batch_size == 2
    one = costs_of(read(path, folder, only=["product"]), 3)["product"]
    two = costs_of(case, 3)["sum"]
    assert one[0] == two[0]  # parameters
    assert two[1] == pytest.approx(4 * one[1], rel=0.1)  # of a crop of four times the pixels


def test_runs_are_done_once_and_give_a_table(path, folder, monkeypatch, capsys):  # noqa: F811
    case, said = read(path, folder, only=["product"]), []
    command.run(case, said.append)
    results = find_results(case)
    assert list(results) == [Run("product", 0), Run("product", 1)]
    report = json.loads((case.folder(Run("product", 1)) / "report.json").read_text())
    assert results[Run("product", 1)].metrics["miou"] == report["miou"]
    assert set(results[Run("product", 1)].classes) <= {"ground", "square", "disc"}
    text = (case.output / "table.md").read_text()
    values = [outcome.metrics["miou"] for outcome in results.values()]
    assert f"| the product | 2 | {sum(values) / 2:.1f} ± " in text
    assert "| ground | " in text
    assert any(line.startswith("[1/2]  product, seed 0: mIoU ") for line in said)
    assert capsys.readouterr().out == ""  # what a run says is in its train.log

    played = []
    monkeypatch.setattr(runs, "train_quietly", lambda config, folder, processes: played.append(folder))
    command.run(case, said.append)
    assert not played  # both are done

    shutil.rmtree(case.folder(Run("product", 1)))
    with pytest.raises(AssertionError):  # as the training that was played leaves nothing
        run_case(case, said.append, lambda results: None)
    assert played == [case.folder(Run("product", 1))]

    with pytest.raises(ConfigError, match=r"seed0 holds a run with another configuration"):
        find_results(read(path, folder, only=["product"], overrides=["optim.base_lr=1e-4"]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"only": ["sums"]}, "no row 'sums' (did you mean 'sum'?)"),
        ({"seeds": 0}, "--seeds 0: give at least one"),
        ({"processes": 3}, "--processes 3: a batch of 4 images cannot be divided"),
        ({"overrides": ["train.seed=4"]}, "train.seed: has no effect here"),
        ({"overrides": ["data.root=x"]}, "data.root: has no effect here"),
    ],
)
def test_mistakes_are_named(path, folder, kwargs, message):  # noqa: F811
    with pytest.raises(ConfigError) as error:
        read(path, folder, **kwargs)
    assert message in str(error.value)


def test_a_file_that_is_no_case_is_refused(tmp_path):
    for text in ("rows: 3", "recipe: x"):
        (tmp_path / "case.yaml").write_text(text)
        with pytest.raises(ConfigError, match="not a case"):
            read_case(tmp_path / "case.yaml", "x", tmp_path, 1)


@pytest.mark.parametrize("path", CASES, ids=[path.stem for path in CASES])
def test_the_cases_of_the_project_are_right(path, tmp_path):
    case = read_case(path, str(tmp_path), tmp_path, 3)
    assert len(case.plan()) == 3 * len(case.rows)
    assert "recipe" in {row.name for row in case.rows}


def test_networks_that_are_compared_cost_the_same(tmp_path):
    case = read_case(CASES[0].with_name("camvid.yaml"), str(tmp_path), tmp_path, 1)
    costs = costs_of(case, 11)
    product, total, other = (costs[name][1] for name in ("product", "sum", "convnext"))
    assert product == total
    assert other == pytest.approx(product, rel=0.02)
