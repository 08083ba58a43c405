from __future__ import annotations

from dataclasses import replace

import datasets
import pytest
from PIL import Image

from conv2former import DataError
from conv2former.config import check_config
from conv2former.data import EpochSampler, eval_loader, open_train_and_val, train_loader

COUNT = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """6 training shards of 10 images and 2 validation shards; an image's number is its shade, and its class mod 3."""
    root = tmp_path_factory.mktemp("Stream")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    for split, shards, count in (("train", 6, COUNT), ("validation", 2, 7)):
        numbers = list(range(count))
        columns = {
            "image": [Image.new("RGB", (32, 32), (number * 4,) * 3) for number in numbers],
            "label": [number % 3 for number in numbers],
        }
        dataset = datasets.Dataset.from_dict(columns, features=features)
        for shard in range(shards):
            part = dataset.shard(shards, shard, contiguous=True)
            part.to_parquet(root / f"{split}-{shard:05d}-of-{shards:05d}.parquet")
    return root


def config(root, **data):
    data = {"source": "hf", "root": str(root), "img_size": 32, "workers": 0, "streaming": True} | data
    plain = {"scale": [1, 1], "ratio": [1, 1], "hflip": 0, "re_prob": 0, "auto_augment": None, "color_jitter": 0}
    data = {"mean": [0, 0, 0], "std": [1, 1, 1], "epoch_images": COUNT, "shuffle_images": 32} | data
    return check_config({"data": data, "augment": plain}, "test")


def read(config, batch_size=2, rank=0, world_size=1, epoch=0, first_step=0, accum_steps=1) -> list[list[int]]:
    """Returns the numbers of the images of each batch."""
    train, _ = open_train_and_val(config.data)
    sampler = EpochSampler(len(train), batch_size, accum_steps, rank, world_size, seed=1)
    sampler.set_epoch(epoch, first_step)
    batches = []
    for batch in train_loader(train, config, sampler, False):
        numbers = (batch.images[:, 0, 0, 0] * 255 / 4).round().int().tolist()
        assert [number % 3 for number in numbers] == batch.labels.tolist()
        batches.append(numbers)
    return batches


def flat(batches) -> list[int]:
    return [number for batch in batches for number in batch]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_is_divided_among_the_processes(folder, world_size):
    """With shards of one size every image comes once."""
    shares = [flat(read(config(folder), 5, rank, world_size)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(flat(shares)) == list(range(COUNT))
    assert shares[0] != sorted(shares[0])


@pytest.mark.slow
def test_more_processes_than_shards(folder):
    shares = [flat(read(config(folder), 2, rank, 10)) for rank in range(10)]
    assert sorted(flat(shares)) == list(range(COUNT))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_workers_change_nothing(folder, workers):
    for rank in range(2):
        expected = read(config(folder), 2, rank, 2)
        assert read(config(folder, workers=workers), 2, rank, 2) == expected


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_in_the_middle(folder, workers):
    for first_step in (1, 4, 9):
        expected = read(config(folder), 2, 1, 2, epoch=3, accum_steps=2)
        parts = read(config(folder, workers=workers), 2, 1, 2, epoch=3, first_step=first_step, accum_steps=2)
        assert parts == expected[first_step * 2 :]


def test_epochs_differ_and_are_as_long_as_stated(folder):
    assert flat(read(config(folder), epoch=0)) != flat(read(config(folder), epoch=1))
    assert flat(read(config(folder), epoch=1)) == flat(read(config(folder), epoch=1))
    assert len(flat(read(config(folder, epoch_images=20)))) == 20
    numbers = flat(read(config(folder, epoch_images=3 * COUNT)))  # more than there are: the stream starts again
    assert sorted(numbers) == sorted([*range(COUNT)] * 3)


@pytest.mark.slow
def test_one_loader_over_epochs_with_persistent_workers(folder):
    run = config(folder, workers=2)
    train, _ = open_train_and_val(run.data)
    sampler = EpochSampler(len(train), 2, seed=1)
    loader = train_loader(train, run, sampler, False)
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        numbers = [(batch.images[:, 0, 0, 0] * 255 / 4).round().int().tolist() for batch in loader]
        assert numbers == read(config(folder), epoch=epoch)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_evaluation_sees_every_image_once(folder, world_size, workers):
    run = config(folder, workers=workers)
    _, val = open_train_and_val(run.data)
    seen = []
    for rank in range(world_size):
        for batch in eval_loader(val, run.data, 3, rank, world_size, False):
            seen += (batch.images[:, 0, 0, 0] * 255 / 4).round().int().tolist()
    assert sorted(seen) == list(range(7))


def test_unreadable_images_in_a_stream(folder, tmp_path):
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    good = datasets.load_dataset(str(folder), split="train").cast_column("image", datasets.Image(decode=False))
    rows = [row["image"] for row in good.select(range(8))]
    rows[3] = {"bytes": b"no image", "path": None}
    for split in ("train", "validation"):
        columns = {"image": rows, "label": [i % 2 for i in range(8)]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    run = config(tmp_path, epoch_images=8, on_error="skip")
    train, val = open_train_and_val(run.data)
    batches = list(train_loader(train, run, EpochSampler(8, 4), False))
    assert len([item for batch in batches for item in batch.skipped]) == 1
    assert all(batch.images.shape == (4, 3, 32, 32) for batch in batches)
    evaluated = list(eval_loader(val, run.data, 4, 0, 1, False))
    assert sum(len(batch.labels) for batch in evaluated) == 7
    run = config(tmp_path, epoch_images=8)
    with pytest.raises(DataError, match=r"\(train\), shard 0, row 3: not a readable image"):
        list(train_loader(open_train_and_val(run.data)[0], run, EpochSampler(8, 4), False))


def test_a_stream_needs_named_or_counted_classes(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for split in ("train", "validation"):
        columns = {"image": [Image.new("RGB", (32, 32))] * 4, "label": [0, 1, 2, 1]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(DataError, match=r"must be a ClassLabel, or hold integers from 0 to below data\.num_classes"):
        open_train_and_val(config(tmp_path).data)
    run = config(tmp_path, num_classes=3)
    train, _ = open_train_and_val(run.data)
    assert train.class_names == ["0", "1", "2"]
    run = config(tmp_path, num_classes=2, epoch_images=4)
    train, _ = open_train_and_val(run.data)
    with pytest.raises(DataError, match="label 2 is none of the 2 classes"):
        list(train_loader(train, run, EpochSampler(4, 4), False))


def test_a_damaged_shard_is_an_error_that_names_the_data(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    bad = tmp_path / "train-00003-of-00006.parquet"
    data = bad.read_bytes()
    bad.write_bytes(data[:100] + bytes(len(data) - 600) + data[-500:])
    with pytest.raises(DataError, match=r"\(train\): reading the stream failed"):
        flat(read(config(tmp_path)))


def test_lanes_are_whole_shards(folder):
    train, _ = open_train_and_val(config(folder).data)
    assert [train.lanes(world_size) for world_size in (1, 2, 3, 6, 7)] == [6, 3, 2, 1, 1]

    class Shards:
        def __init__(self, count: int) -> None:
            self.num_shards = count

    lanes = [replace(train, dataset=Shards(count)).lanes(1) for count in (16, 17, 24, 294, 1021)]
    assert lanes == [16, 16, 12, 14, 16]
