"""Whether installed weights are the published ones: their accuracy on ImageNet's validation images, beside them.

The authors publish no checksums, so a file is taken for theirs by its shape alone. What is measured near the published
accuracy is written into the installed folder, and from then on the weights are no longer unverified.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, ConfigError, shorten
from ...models import InstalledModel, Preprocessing, list_installed
from ...weights.installed import CONFIRMATION, file_sha256, find_installed
from ...weights.preprocessing import noted_preprocessing
from ..output import replacing

__all__ = ["check_confirmable", "confirm", "margin"]

CLASSES = 1000  # of ImageNet-1k, on which the accuracies are published
MIN_IMAGES = 5000
TOLERANCE = 0.5  # percentage points: another resize, another version of torch or Pillow


def margin(published: float, n: int) -> float:
    """Returns by how much an accuracy may differ from the published one, in percentage points.

    Args:
        published: top-1 accuracy, percent.
        n: images it is measured on; three standard errors of such a share are allowed for.
    """
    share = published / 100
    return TOLERANCE + 300 * math.sqrt(share * (1 - share) / n)


def check_confirmable(checkpoints: Sequence[str | Path]) -> InstalledModel:
    """Checks, before the work, that what is to be confirmed is one installed file with a published accuracy.

    Raises:
        ConfigError: it is something else.
        CheckpointError: it is damaged.
    """
    name = str(checkpoints[0])
    if len(checkpoints) > 1:
        raise ConfigError("--confirm: give one installed name as --checkpoint")
    found = None if Path(name).exists() else find_installed(name)
    if found is None or found.published is None:
        names = shorten(model.name for model in list_installed() if model.published) or "none"
        raise ConfigError(
            f"--confirm: {name} is not the name of installed weights whose accuracy is published; such are: {names}"
        )
    if not found.sha256 or file_sha256(found.weights) != found.sha256:
        raise CheckpointError(f"{found.path} does not match its checksum: install it again")
    return found


def confirm(found: InstalledModel, rows: Sequence[Mapping[str, Any]]) -> str:
    """Notes beside installed weights that they have the published accuracy.

    Args:
        found: from `check_confirmable`.
        rows: of `validate_files`, of this file alone.

    Returns:
        What was measured and noted, as a sentence.

    Raises:
        CheckpointError: the accuracy is another one, or the images or settings are not those of the published one; the
            weights stay unverified.
        OutputError: the folder cannot be written.
    """
    published = found.published
    assert published is not None
    own, _ = noted_preprocessing({}, found.config["pretrained_cfg"], None)
    by_view = {Preprocessing(**{key: row[key] for key in own.to_dict()}): row for row in map(_hashable, rows)}
    row = by_view.get(own)
    stays = f"{found.name} stays unverified"
    if row is None:
        raise CheckpointError(f"{stays}: measured with other settings than it is installed with ({own})")
    if problem := _unfit(row):
        raise CheckpointError(f"{stays}: {problem}")
    allowed = margin(published.top1, row["n"])
    measured = f"measured {row['top1']:.2f} % top-1 on {row['n']:,} images"
    expected = f"published {published.top1} %, allowed difference {allowed:.2f}"
    if not abs(row["top1"] - published.top1) <= allowed:
        near = [key for key, other in by_view.items() if abs(other["top1"] - published.top1) <= allowed]
        hint = f"; with {near[0]} it is {by_view[near[0]]['top1']:.2f} %: install it so, with --force" if near else ""
        raise CheckpointError(f"{stays}: {measured}; {expected}{hint}")
    noted = {
        "top1": row["top1"],
        "top5": row["top5"],
        "n": row["n"],
        "published": published.top1,
        "margin": round(allowed, 3),
        "data": row["data"],
        "precision": row["precision"],
        "preprocessing": own.to_dict(),
        "date": datetime.date.today().isoformat(),
        "sha256": found.sha256,
    }
    with replacing(found.path / CONFIRMATION) as temporary:
        temporary.write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")
    return f"{found.name} is confirmed: {measured}; {expected}; noted in {found.path / CONFIRMATION}"


def _hashable(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "mean": tuple(row["mean"]), "std": tuple(row["std"])}


def _unfit(row: Mapping[str, Any]) -> str:
    """Returns why a result cannot be compared with a published one; empty if it can."""
    measured = f"measured {row['top1']:.2f} % top-1 on {row['n']:,} images"
    if row["network_classes"] != CLASSES or row["classes"] != CLASSES or row["present_classes"] not in (None, CLASSES):
        present = row["classes"] if row["present_classes"] is None else row["present_classes"]
        return f"{measured} of {present:,} classes; the accuracy is published for all {CLASSES:,} of ImageNet-1k"
    if row["n"] < MIN_IMAGES:
        return f"{measured}; at least {MIN_IMAGES:,} are needed to tell"
    return ""
