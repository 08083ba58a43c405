"""What is installed: where `pretrained=True` finds weights, offline and in any process.

The store is the folder $CONV2FORMER_HOME, or else `conv2former` in the user's cache folder. In it is one folder per
weight file, in timm's hub layout, named as timm names weights: `conv2former_t.hvision_in1k`. `scripts/convert.py
--install` makes them. There is no index that could disagree with them, and what cannot be read is passed over until it
is asked for. The weights that the package brings are in a folder of the same kind, `conv2former/pretrained`; what is in
the store goes before them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .._store import shipped_folder, store_folder
from ..errors import CheckpointError, ConfigError, shorten
from ..variants import (
    MODEL_ARGS,
    PretrainedTag,
    differences,
    list_variants,
    names_of_same_file,
    parse_variant,
    variant,
)
from .contents import announce
from .hub_config import HUB_CONFIG, SECTION, read_hub_config

__all__ = [
    "InstalledModel",
    "file_sha256",
    "find_installed",
    "list_installed",
    "list_shipped",
    "published_tag",
    "say_if_unverified",
    "store_folder",
]

# of timm's hub layout, beside config.json, in the order in which timm looks for them
HUB_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
CONFIRMATION = (
    "confirmation.json"  # beside them, where the published accuracy was measured; see tools/evaluation/confirm.py
)
NAME = re.compile(r"[a-z][a-z0-9_]{0,99}\.[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


@dataclass(frozen=True)
class InstalledModel:
    """One installed weight file.

    Attributes:
        name: as `timm.create_model` takes it, `variant.tag`.
        path: its folder, in timm's hub layout.
        problem: why it cannot be used; empty if it can, as far as a look at the folder tells.
        num_classes: of its classifier.
        sha256: of its weights, as they were installed.
        source, source_sha256: name and checksum of the file that it was converted from.
        metric, epoch: as the training script noted them, None where it did not.
        config: its whole config.json.
        confirmation: what `scripts/validate.py --confirm` has measured with these weights, if it was near what is
            published: `top1`, `n`, `date` and more; None where it was not measured.
    """

    name: str
    path: Path
    problem: str = ""
    num_classes: int = 0
    sha256: str = ""
    source: str = ""
    source_sha256: str = ""
    metric: float | None = None
    epoch: int | None = None
    config: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    confirmation: dict[str, Any] | None = field(default=None, compare=False)

    @property
    def published(self) -> PretrainedTag | None:
        """The published file that it was taken for; None with a tag of one's own."""
        return published_tag(self.name)

    @property
    def is_unverified(self) -> bool:
        """Whether it bears the name of a published file, and its accuracy has not been measured to be that one's."""
        return self.published is not None and self.confirmation is None

    @property
    def is_shipped(self) -> bool:
        """Whether it is part of the package."""
        return self.path.parent == shipped_folder()

    @property
    def variant(self) -> str:
        """The network's name, before the dot."""
        return self.name.partition(".")[0]

    @property
    def tag(self) -> str:
        """Which weights, after the dot."""
        return self.name.partition(".")[2]

    @property
    def weights(self) -> Path:
        """The weight file."""
        return next((self.path / name for name in HUB_FILES if (self.path / name).is_file()), self.path / HUB_FILES[0])

    @property
    def weights_word(self) -> str:
        """What its config.json calls its weights: 'averaged', 'raw', 'soup of 3'; empty where it does not say."""
        return weights_word(self.config.get(SECTION, {}))

    @property
    def definition(self) -> dict[str, Any]:
        """The network's definition, as `parse_variant` reads it."""
        own = self.config.get(SECTION, {}).get("variant", {})
        built = {key: value for key, value in self.config.get("model_args", {}).items() if key in MODEL_ARGS}
        return {**own, **built, "name": self.variant}

    def model_args(self) -> dict[str, Any]:
        """Returns the arguments of `Conv2Former` that define the network.

        Raises:
            ConfigError: its config.json is wrong.
        """
        return parse_variant(self.definition, self.path / HUB_CONFIG).model_args()

    def pretrained_cfg(self, labels: bool = True) -> dict[str, Any]:
        """Returns timm's `pretrained_cfg` for it, without the class names unless `labels`."""
        cfg = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in self.config["pretrained_cfg"].items()
        }
        names = ("label_names", "label_descriptions") if labels else ()
        found = {key: self.config[key] for key in names if key in self.config}
        own = {"num_classes": self.num_classes, "architecture": self.variant, "tag": self.tag}
        return {**cfg, **found, **own, "file": str(self.weights)}


def weights_word(section: Mapping[str, Any]) -> str:
    """Returns what this project's section of a config.json calls the weights; empty where it does not say."""
    parts, source = section.get("averaged_from"), section.get("source")
    if isinstance(parts, list) and parts:
        return f"soup of {len(parts)}"
    return str(source.get("weights", "")) if isinstance(source, dict) else ""


def published_tag(name: str) -> PretrainedTag | None:
    """Returns the published file of that name, `variant.tag`, if it is one's."""
    own, _, tag = name.partition(".")
    tags = variant(own).pretrained if own in list_variants() else ()
    return next((source for source in tags if source.tag == tag), None)


def say_if_unverified(path: object, once: bool = True) -> None:
    """Logs a warning if `path` is the name of installed weights of unverified accuracy.

    Args:
        path: a name, or the path of a file, of which nothing is said.
        once: not again in this process.
    """
    if Path(str(path)).exists() or not (found := find_installed(str(path))):
        return
    if found.is_unverified and found.published:
        announce(
            f"{found.name} is unverified: it was taken for that published file by its shape, and its own accuracy is "
            f"unknown (published: {found.published.top1} % top-1); measure it: python scripts/validate.py --checkpoint "
            f"{found.name} --data IMAGENET --confirm",
            once,
        )


def file_sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def list_installed(verify: bool = False) -> list[InstalledModel]:
    """Lists the weights in the store, by name; those that cannot be used say why in `problem`.

    Args:
        verify: also read the weight files and compare their checksums.
    """
    return _list(store_folder(), verify)


def list_shipped(verify: bool = False) -> list[InstalledModel]:
    """Lists the weights that are part of the package, as `list_installed` does."""
    return _list(shipped_folder(), verify)


def _list(folder: Path, verify: bool) -> list[InstalledModel]:
    found = [_read(*item) for item in _names(folder).items()]
    return [_verified(model) if verify and not model.problem else model for model in found]


def names_installed(own: str) -> list[str]:
    """Returns the names, `variant.tag`, under which weights of a variant are installed, published ones first."""
    installed = _names()
    published = [f"{own}.{source.tag}" for source in variant(own).pretrained] if own in list_variants() else []
    found = [name for name in published if not set(installed).isdisjoint(names_of_same_file(name))]
    return found + [name for name in installed if name.partition(".")[0] == own and name not in published]


def find_installed(name: str) -> InstalledModel | None:
    """Finds weights by name, in the store or in the package.

    Args:
        name: `variant.tag`, or `variant` alone: the first of its published files if that is installed, or else the only
            weights that are.

    Returns:
        What is installed, under the name that was asked for; None if nothing is.

    Raises:
        CheckpointError: it is damaged, or several would do.
    """
    own, _, tag = name.partition(".")
    names = [name] if tag else names_installed(own)
    if len(names) > 1:
        published = variant(own).pretrained if own in list_variants() else ()
        if not published or names[0] != f"{own}.{published[0].tag}":
            raise CheckpointError(f"several weights of {own} are installed; name one of them: {shorten(names)}")
    if not names:
        return None
    installed = _names()
    stored = next((same for same in names_of_same_file(names[0]) if same in installed), None)
    if stored is None:
        return None
    found = _read(stored, installed[stored])
    if found.problem:
        again = f"it again with python scripts/convert.py FILE --install {stored} --force"
        again = "conv2former again" if found.is_shipped else again
        raise CheckpointError(f"{found.path} is damaged ({found.problem}): install {again}")
    return replace(found, name=names[0])


def variants_installed() -> list[str]:
    """Returns the names of the variants of which weights are installed."""
    return list(dict.fromkeys(name.partition(".")[0] for name in _names()))


def _names(*folders: Path) -> dict[str, Path]:
    """Returns what is in folders, by name, sorted; the first that has a name counts.

    Args:
        folders: where to look; the store and what the package brings if there are none.
    """
    found: dict[str, Path] = {}
    for folder in folders or (store_folder(), shipped_folder()):
        with contextlib.suppress(OSError):  # there is none, or it is not to be read
            # names of unfinished copies begin with a dot
            found = {name: folder / name for name in os.listdir(folder) if NAME.fullmatch(name)} | found
    return dict(sorted(found.items()))


def _read(name: str, path: Path) -> InstalledModel:
    """Looks at the folder of some weights. Whatever is wrong with it is its `problem`."""
    found = InstalledModel(name, path)
    try:
        config = read_hub_config(found.path / HUB_CONFIG)
        _check(config)
    except OSError as e:
        return replace(found, problem=f"{HUB_CONFIG}: {e.strerror or e}")
    except ValueError as e:
        return replace(found, problem=f"{HUB_CONFIG}: {e}")
    own = config.get(SECTION, {})
    source = own.get("source", {})
    found = replace(
        found,
        num_classes=config["num_classes"],
        sha256=str(own.get("sha256", "")),
        source=str(source.get("file", "")),
        source_sha256=str(source.get("sha256", "")),
        metric=own["metric"] if isinstance(own.get("metric"), (int, float)) else None,
        epoch=own["epoch"] if isinstance(own.get("epoch"), int) else None,
        config=config,
    )
    found = replace(found, confirmation=_confirmation(found))
    return replace(found, problem=_problem(found, own.get("bytes")))


def _confirmation(found: InstalledModel) -> dict[str, Any] | None:
    """Returns what was measured with just these weights; what cannot be read confirms nothing."""
    try:
        noted = json.loads((found.path / CONFIRMATION).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_right = isinstance(noted, dict) and type(noted.get("n")) is int and isinstance(noted.get("top1"), (int, float))
    return noted if is_right and found.sha256 and noted.get("sha256") == found.sha256 else None


def _check(config: dict[str, Any]) -> None:
    """Raises a ValueError if a config.json that could be read is not one that `scripts/convert.py` writes."""
    if not isinstance(config.get("pretrained_cfg"), dict):
        raise ValueError("not the configuration of a timm model")
    own = config.get(SECTION, {})
    parts = [config.get("model_args", {}), own]
    parts += [own.get(key, {}) for key in ("source", "variant")] if isinstance(own, dict) else []
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError("not what scripts/convert.py writes")
    if type(own.get("bytes")) not in (int, type(None)):
        raise ValueError(f"{SECTION}.bytes: expected a whole number")
    if config["pretrained_cfg"].get("input_size") is None:
        raise ValueError("pretrained_cfg.input_size: expected [channels, height, width]")
    if config.get("num_classes") is None:
        raise ValueError("num_classes: expected a whole number")


def _problem(found: InstalledModel, size: int | None) -> str:
    """Returns what is wrong with a folder whose config.json could be read, or an empty text."""
    try:
        file_size = found.weights.stat().st_size
        args = parse_variant(found.definition, HUB_CONFIG).model_args()
    except OSError as e:
        return f"{found.weights.name}: {e.strerror or e}"
    except ConfigError as e:
        return " ".join(str(e).split())  # in one line
    if size not in (None, file_size):
        return f"{found.weights.name} has {file_size:,} bytes instead of {size:,}"
    if found.variant in list_variants():
        # a kernel of another size is what nobody knew before; everything else is another network
        differing = [d for d in differences(args, variant(found.variant).model_args()) if "kernel_size" not in d]
        if differing:
            return f"it is another network than {found.variant}: {', '.join(differing)}"
    return ""


def _verified(found: InstalledModel) -> InstalledModel:
    try:
        is_right = file_sha256(found.weights) == found.sha256 or not found.sha256
    except OSError as e:
        return replace(found, problem=f"{found.weights.name}: {e.strerror or e}")
    return found if is_right else replace(found, problem=f"{found.weights.name} does not match its checksum")
