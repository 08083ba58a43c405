from __future__ import annotations

import re

import pytest
import torch
from PIL import Image

from conv2former.data import transforms
from conv2former.tools.benchmark import cached_input
from conv2former.tools.benchmark import input as benchmark_input
from conv2former.tools.benchmark.input import compare_input, write_photos


def test_the_photos_are_like_those_of_imagenet(tmp_path):
    size = write_photos(tmp_path, 8)
    files = sorted(tmp_path.glob("*/*.jpg"))
    assert len(files) == 8
    assert size == pytest.approx(sum(file.stat().st_size for file in files) / 8, abs=1)
    assert 40_000 < size < 120_000
    assert len({file.read_bytes() for file in files}) == 8
    for file in files:
        with Image.open(file) as image:
            assert (image.size, image.mode) == ((500, 375), "RGB")
            assert image.layer[0][1:3] == (2, 2)  # 4:2:0
    first = files[0].read_bytes()
    write_photos(tmp_path, 8)
    assert files[0].read_bytes() == first


def test_what_the_comparison_says(monkeypatch):
    """All of it, on one batch; another number of threads and other cores afterwards would slow down what follows."""
    monkeypatch.setattr(benchmark_input, "BATCH_SIZE", 4)
    threads = torch.get_num_threads()
    lines = list(compare_input(images=3, rounds=2))
    assert torch.get_num_threads() == threads
    assert lines[0].startswith("4 JPEGs of 500 x 375")
    ratios = [line for line in lines if "this package over timm" in line]
    assert len(ratios) == 2
    assert all(re.search(r"timm: \d\.\d+ \(middle half of 2 rounds", line) for line in ratios)
    shares = [float(line.split("%")[0]) for line in lines if re.match(r" +\d+\.\d%", line)]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert len(shares) == 7
    assert lines[-1].startswith("4 of 4 normalised images equal")


def test_other_pixels_are_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark_input, "BATCH_SIZE", 4)
    real = transforms.TrainTransform.__call__

    def darker(self, image):
        result = real(self, image)
        return result._replace(image=result.image.point(lambda value: value // 2))

    write_photos(tmp_path / "train", 4)
    source = benchmark_input._source(tmp_path)
    assert benchmark_input._same_pixels(source).startswith("4 of 4")
    monkeypatch.setattr(transforms.TrainTransform, "__call__", darker)
    assert benchmark_input._same_pixels(source).startswith("0 of 4")


def test_what_the_comparison_of_cached_images_says(monkeypatch, tmp_path):
    monkeypatch.setattr(cached_input, "IMAGES", 8)
    monkeypatch.setattr(cached_input, "BATCH_SIZE", 4)
    write_photos(tmp_path, 12)
    for folder, size in ((None, "0.0 MiB"), (tmp_path, "4.3 MiB")):
        lines = list(cached_input.compare_cached(folder, rounds=2))
        assert lines[0].startswith(f"data.cache: 8 images in {size}, crop to 32 x 32 and flip, batch 4, ")
        for line, title in zip(lines[1:], ("no worker process", "one worker process"), strict=False):
            assert re.match(
                rf"{title}: [\d,]+ images/s from memory, [\d,]+ from files, \d\.\d+ \(middle half of 2", line
            )
        shares = [float(line.split("%")[0]) for line in lines if re.match(r" +\d+\.\d%", line)]
        assert sum(shares) == pytest.approx(100, abs=1)
        assert lines[-1] == "8 of 8 augmented images from memory equal those from files, to the bit"
