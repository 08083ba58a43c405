"""The data set of the quickstart: scikit-learn's 1,797 scans of handwritten digits, which need no download."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["write_digits"]


def write_digits(root: Path) -> None:
    """Writes the digits as a parquet data set, 1,437 training and 360 validation images, each digit in proportion.

    A data set that is already there stays as it is.

    Args:
        root: the folder to make: `root/train.parquet` and `root/validation.parquet` with the columns `image` (8 x 8,
            grey) and `label`.
    """
    if (root / "validation.parquet").is_file():  # the last to be written
        return
    import datasets
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    indices = train_test_split(np.arange(len(digits.target)), test_size=360, stratify=digits.target, random_state=0)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(name) for name in digits.target_names])}
    )
    root.mkdir(parents=True, exist_ok=True)
    for split, chosen in zip(("train", "validation"), indices, strict=True):
        pixels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # 17 shades of grey
        columns = {"image": [Image.fromarray(p) for p in pixels], "label": digits.target[chosen].tolist()}
        dataset = datasets.Dataset.from_dict(columns, features=features)
        with tempfile.TemporaryDirectory(dir=root) as folder:
            dataset.to_parquet(f"{folder}/part")  # the split's file is whole or not there
            os.replace(f"{folder}/part", root / f"{split}.parquet")
