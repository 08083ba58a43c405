"""What a data set names must not lead to other files of the machine, nor to the network."""

from __future__ import annotations

import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conv2former import DataError
from conv2former.config import check_config
from conv2former.config.schema import DataConfig
from conv2former.data.sources import open_split
from conv2former.errors import ConfigError

COLUMNS = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})


@pytest.fixture
def root(tmp_path):
    """A folder with an image in it and one beside it."""
    (tmp_path / "data" / "in").mkdir(parents=True)
    for path in ("data/in/0.png", "outside.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / path)
    return tmp_path / "data"


def write_parquet(path, *images: str) -> None:
    """Writes a parquet file that names its images by path."""
    image = pa.array([{"bytes": None, "path": name} for name in images], COLUMNS["image"].pa_type)
    label = pa.array(["cat"] * len(images))
    schema = COLUMNS.arrow_schema  # which says to `datasets` that the column has images
    pq.write_table(pa.Table.from_arrays([image, label], schema=schema), path)


def opened(root, **kwargs):
    return open_split(DataConfig(source="hf", root=str(root), **kwargs), "train")


def refused(root, match: str, **kwargs) -> None:
    with pytest.raises(DataError, match=match):
        opened(root, **kwargs).images[0]


def test_paths_below_the_root_are_read(root, tmp_path, monkeypatch):
    (root / "link.png").symlink_to(tmp_path / "outside.png")  # of the user's own
    (tmp_path / "short").symlink_to(root)
    for path in (
        root / "in" / "0.png",
        root / "in" / ".." / "in" / "0.png",
        root / "link.png",
        tmp_path / "short/in/0.png",
    ):
        write_parquet(root / "train.parquet", str(path))
        assert opened(tmp_path / "short").images[0][0].size == (8, 8)
    monkeypatch.chdir(root)
    write_parquet(root / "train.parquet", "in/0.png")
    assert opened(root).images[0][0].size == (8, 8)


@pytest.mark.parametrize(
    "path", ["{}/outside.png", "{}/data/../outside.png", "../outside.png", "zip://a.png::{}/a.zip"]
)
def test_paths_elsewhere_are_refused(path, root, tmp_path, monkeypatch):
    monkeypatch.chdir(root)
    write_parquet(root / "train.parquet", path.format(tmp_path))
    refused(root, r"data \(train\): '.*' is refused: it lies outside the folder data.root; data.absolute_paths=true")
    if path == "{}/outside.png":
        assert opened(root, absolute_paths=True).images[0][0].size == (8, 8)


@pytest.mark.parametrize(
    "path",
    [
        "https://localhost:9/x.png",
        "file:///etc/hostname",
        "hf://datasets/a/b/x.png",
        "zip://x::http://localhost:9/a.zip",
        "zip://x::s3://bucket/a.zip",
        "simplecache::http://localhost:9/x.png",
        "memory://x",
    ],
)
def test_addresses_are_refused(path, root):
    write_parquet(root / "train.parquet", path)
    for absolute in (False, True):
        refused(root, "is refused: an address, and nothing is fetched from elsewhere", absolute_paths=absolute)


def test_a_file_among_images_in_the_data(root, tmp_path):
    """It is refused when it is read: in a stream, too."""
    content = (root / "in" / "0.png").read_bytes()
    images = [{"bytes": content, "path": "../anything.png"}, {"bytes": None, "path": str(tmp_path / "outside.png")}]
    arrays = [pa.array(images, COLUMNS["image"].pa_type), pa.array(["cat", "cat"])]
    pq.write_table(pa.Table.from_arrays(arrays, schema=COLUMNS.arrow_schema), root / "train.parquet")
    source = opened(root)
    assert source.images[0][0].size == (8, 8)
    with pytest.raises(DataError, match=r"row 1: '.*outside.png' is refused: it lies outside"):
        source.images[1]


@pytest.mark.parametrize("path", ["../outside.parquet", "{}/outside.parquet", "https://localhost:9/x.parquet"])
def test_data_files_that_a_readme_names(path, root, tmp_path):
    write_parquet(tmp_path / "outside.parquet", str(root / "in" / "0.png"))
    path = path.format(tmp_path)
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {path}\n---\n")
    refused(root, "is refused")


def test_arrow_files_elsewhere(root, tmp_path):
    datasets.Dataset.from_dict({"image": [str(root / "in" / "0.png")], "label": ["cat"]}, COLUMNS).save_to_disk(
        root / "disk"
    )
    assert opened(root / "disk").images[0][0].size == (8, 8)
    state = root / "disk" / "state.json"
    name = next(path.name for path in (root / "disk").glob("*.arrow"))
    os.rename(root / "disk" / name, tmp_path / name)
    state.write_text(state.read_text().replace(name, f"../../{name}"))
    refused(root / "disk", "is refused: it lies outside")


@pytest.mark.parametrize("path", ["../outside.png", "in/../../outside.png", "..\\outside.png"])
def test_tables_that_lead_out(path, root, tmp_path):
    table = tmp_path / "list.csv"
    config = DataConfig(source="csv", root=str(root), csv=str(table))
    table.write_text(f"image,label\nin/0.png,cat\n{path},dog\n")
    with pytest.raises(
        DataError, match=r"list.csv, line 3: \S+ leads out of data.root by '\.\.'; make data.root a folder"
    ):
        open_split(config, "train")
    table.write_text(f"image,label\nin/../in/0.png,cat\n{tmp_path}/outside.png,dog\n")
    assert len(open_split(config, "train")) == 2


def test_where_absolute_paths_is_for():
    with pytest.raises(ConfigError, match=r"data.absolute_paths: only with data.source hf, not csv"):
        check_config({"data": {"root": "x", "source": "csv", "absolute_paths": True}}, "test")
