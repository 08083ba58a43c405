"""Variants as data: reads and checks `configs/models/*.yaml`, the only place where the variants are defined."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._configs import configs_folder
from ._yaml import cut, read_yaml, show
from .errors import ConfigError, closest, raise_mistakes

__all__ = [
    "MODEL_ARGS",
    "PretrainedTag",
    "Variant",
    "differences",
    "is_builtin",
    "list_variants",
    "names_of_same_file",
    "parse_variant",
    "read_variant",
    "variant",
]

NUM_STAGES = 4
MAX_WEIGHTS = 1e10  # 40 GB; Conv2Former-L has 2e8
# of a variant's keys, those that are arguments of `Conv2Former` and define the network
MODEL_ARGS = (
    "dims",
    "depths",
    "kernel_size",
    "mlp_ratio",
    "ls_init_value",
    "head_hidden_size",
    "stem_stride",
    "fusion",
    "norm_layer",
)
STEM_STRIDES = (2, 4)
FUSION_NAMES = ("product", "sum", "sigmoid", "l1", "unit")  # of `ablations.FUSIONS`, which needs torch
NORM_NAMES = ("layernorm2d", "batchnorm2d")  # of `block.NORMS`, timm's names


@dataclass(frozen=True)
class PretrainedTag:
    """One published weight file: what it was trained for and where its authors keep it.

    Attributes:
        tag: the part after the dot in `conv2former_t.hvision_in1k`.
        top1: published ImageNet-1k top-1 accuracy, percent.
        input_size: (channels, height, width) of the evaluation that gave `top1`.
        crop_pct, crop_mode: resize and crop of that evaluation, in timm's terms.
        num_classes: classes of its classifier.
        page: web page with the file.
        kernel_size: of the network in the file, where it is not the variant's; None where it is.
    """

    tag: str
    top1: float
    input_size: tuple[int, int, int] = (3, 224, 224)
    crop_pct: float = 0.875
    crop_mode: str = "center"
    num_classes: int = 1000
    page: str = ""
    kernel_size: int | None = None


@dataclass(frozen=True)
class Variant:
    """The definition of one network.

    Attributes:
        name: its name in timm's registry.
        dims: channels of the four stages.
        depths: blocks of the four stages.
        kernel_size: side of the modulation's depthwise kernels, one for all stages or one for each.
        mlp_ratio: hidden channels of the MLPs as a multiple of the stage's channels.
        ls_init_value: initial layer scale; None for no layer scale.
        head_hidden_size: channels between the last stage and the classifier.
        stem_stride: stride of the stem, 4, or 2 for images of some 32 pixels; the last stage's is eight times that.
        fusion: how the modulation joins context and values; all but 'product' are ablations, see `ablations.py`.
        norm_layer: of blocks, downsampling and head: 'layernorm2d', which is the paper's, or 'batchnorm2d'.
        train_drop_path_rate: what the training script uses unless its config says otherwise. `timm.create_model` itself
            starts at 0, as it does for every timm model.
        description: one line for people.
        pretrained: the published weight files.
    """

    name: str
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    kernel_size: int | tuple[int, ...]
    mlp_ratio: float = 4.0
    ls_init_value: float | None = 1e-6
    head_hidden_size: int = 1280
    stem_stride: int = 4
    fusion: str = "product"
    norm_layer: str = "layernorm2d"
    train_drop_path_rate: float = 0.0
    description: str = ""
    pretrained: tuple[PretrainedTag, ...] = field(default=())

    def model_args(self) -> dict[str, Any]:
        """Returns the arguments of `Conv2Former` that define the network."""
        return {key: getattr(self, key) for key in MODEL_ARGS}

    def num_weights(self) -> float:
        """Returns about how many weights the blocks have."""
        kernels = (self.kernel_size,) * NUM_STAGES if isinstance(self.kernel_size, int) else self.kernel_size
        return sum(
            depth * dim * (dim * (3 + 2 * self.mlp_ratio) + kernel**2)
            for dim, depth, kernel in zip(self.dims, self.depths, kernels, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the definition as plain built-in types, as `parse_variant` reads it, without the pretrained tags."""
        plain = {key: _plain(value) for key, value in self.model_args().items()}
        return {"name": self.name, **plain, "train_drop_path_rate": self.train_drop_path_rate}


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and _is_number(value, low, high)


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_odd(value: Any) -> bool:
    return _is_int(value, 1, 255) and value % 2 == 1


def _per_stage(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and len(value) == NUM_STAGES and all(map(check, value))


# key -> (is the value right?, what it should be)
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (
        lambda v: isinstance(v, str) and re.fullmatch(r"[a-z][a-z0-9_]{0,99}", v) is not None,
        "a name of lower-case letters, digits and underscores, at most 100",
    ),
    "dims": (
        _per_stage(lambda v: _is_int(v, 2, 16384) and v % 2 == 0),
        "four even numbers from 2 to 16384, the channels of the four stages",
    ),
    "depths": (
        _per_stage(lambda v: _is_int(v, 1, 1000)),
        "four whole numbers from 1 to 1000, the blocks of the four stages",
    ),
    "kernel_size": (lambda v: _is_odd(v) or _per_stage(_is_odd)(v), "an odd number from 1 to 255, or four of them"),
    "mlp_ratio": (lambda v: _is_number(v, 1, 64), "a number from 1 to 64"),
    "ls_init_value": (
        lambda v: v is None or _is_number(v, 0, 1e6),
        "a number from 0 to 1e6, or null for no layer scale",
    ),
    "head_hidden_size": (lambda v: _is_int(v, 1, 65536), "a whole number from 1 to 65536"),
    "stem_stride": (lambda v: _is_int(v, 2, 4) and v in STEM_STRIDES, "2 or 4"),
    "fusion": (lambda v: v in FUSION_NAMES, "one of " + ", ".join(FUSION_NAMES)),
    "norm_layer": (lambda v: v in NORM_NAMES, "one of " + ", ".join(NORM_NAMES)),
    "train_drop_path_rate": (lambda v: _is_number(v, 0, 0.999), "a number in [0, 1)"),
    "description": (lambda v: isinstance(v, str), "text"),
}
_TAG_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "top1": (lambda v: _is_number(v, 0, 100), "a percentage"),
    "input_size": (
        lambda v: isinstance(v, list) and len(v) == 3 and all(_is_int(n, 1, 4096) for n in v),
        "[channels, height, width]",
    ),
    "crop_pct": (lambda v: _is_number(v, 0.01, 1), "a number in (0, 1]"),
    "crop_mode": (lambda v: v in ("center", "squash", "border"), "center, squash or border"),
    "num_classes": (lambda v: _is_int(v, 1, 10**6), "a whole number from 1 to 1000000"),
    "page": (lambda v: isinstance(v, str), "the address of a web page"),
    "kernel_size": (_is_odd, "an odd number from 1 to 255"),
}


def _check(raw: dict[Any, Any], rules: dict, required: tuple[str, ...], also: tuple[str, ...], at: str) -> list[str]:
    """Returns every mistake in `raw`: unknown keys, missing keys, wrong values."""
    known = (*rules, *also)
    mistakes = [f"{at}{cut(key)}: unknown key{closest(key, known)}" for key in raw if key not in known]
    mistakes += [f"{at}{key}: missing; expected {rules[key][1]}" for key in required if key not in raw]
    for key, (is_right, expected) in rules.items():
        if key in raw and not is_right(raw[key]):
            mistakes.append(f"{at}{key}: expected {expected}, found {show(raw[key])}")
    return mistakes


def parse_variant(raw: dict[str, Any], where: object, name: str | None = None) -> Variant:
    """Checks a variant's definition, as read from YAML.

    Args:
        raw: the definition; `dims`, `depths` and `kernel_size` are needed, the rest has defaults.
        where: named in the error, usually the file.
        name: the name if `raw` gives none.

    Raises:
        ConfigError: it has mistakes; all are listed.
    """
    raw = {"name": name, **raw} if name else dict(raw)
    mistakes = _check(raw, _RULES, ("name", "dims", "depths", "kernel_size"), ("pretrained",), "")
    tags = raw.pop("pretrained", None) or {}
    if not isinstance(tags, dict):
        mistakes.append(f"pretrained: expected 'tag: definition' lines, found {show(tags)}")
        tags = {}
    for tag, content in tags.items():
        at = f"pretrained.{cut(tag)}"
        if not isinstance(tag, str):
            mistakes.append(f"{at}: expected a word")
        elif isinstance(content, dict):
            mistakes += _check(content, _TAG_RULES, ("top1",), (), f"{at}.")
        else:
            mistakes.append(f"{at}: expected 'key: value' lines, found {show(content)}")
    raise_mistakes(where, mistakes)

    def frozen(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    pretrained = tuple(PretrainedTag(tag, **{k: frozen(v) for k, v in c.items()}) for tag, c in tags.items())
    new = Variant(**{k: frozen(v) for k, v in raw.items()}, pretrained=pretrained)
    if new.num_weights() > MAX_WEIGHTS:
        raise ConfigError(
            f"{where}: {new.num_weights():.1e} weights in the blocks, more than {MAX_WEIGHTS:.0e}: lower dims or depths"
        )
    return new


def read_variant(path: str | Path) -> Variant:
    """Reads a variant from a YAML file; its name is the file's unless it gives one.

    Raises:
        ConfigError: the file cannot be read, or has mistakes; all are listed.
    """
    return parse_variant(read_yaml(path), path, name=Path(path).stem)


_variants: dict[str, Variant] = {}


def read_builtin_variants() -> list[Variant]:
    """Reads the project's own variants, smallest first.

    Raises:
        ConfigError: a file has mistakes.
    """
    found = [read_variant(path) for path in (configs_folder() / "models").glob("*.yaml")]
    return sorted(found, key=lambda v: (v.dims[-1], sum(v.depths), v.name))


def is_builtin(name: str) -> bool:
    """Whether a variant is one of the project's own."""
    return (configs_folder() / "models" / f"{name}.yaml").is_file()


def add_variant(new: Variant) -> None:
    """Remembers a variant under its name, for `variant`, `list_variants` and the naming of checkpoints."""
    _variants[new.name] = new


def list_variants() -> list[str]:
    """Returns the names of all known variants: the project's own, then the user's."""
    return list(_variants)


def variant(name: str) -> Variant:
    """Returns the definition of a known variant; a pretrained tag after a dot is ignored.

    Raises:
        ConfigError: no variant has that name.
    """
    name = name.split(".", 1)[0]
    if name not in _variants:
        raise ConfigError(f"'{name}' is not a Conv2Former variant{closest(name, _variants)}: {', '.join(_variants)}")
    return _variants[name]


def find_variant(**model_args: Any) -> str | None:
    """Returns the name of the first variant that has these values of `Variant.model_args`, or None.

    Without `fusion` and `stem_stride` they are the usual ones: their shapes do not tell networks that differ in these.
    """
    wanted = {"fusion": "product", "stem_stride": 4, **model_args}
    for known in _variants.values():
        if wanted.items() <= known.model_args().items():
            return known.name
    return None


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Returns how two networks differ, each as `key found for wanted`.

    Args:
        found, wanted: as `Variant.model_args`; of the initial layer scale only whether there is one is compared.
    """
    out = []
    for key in wanted:
        a, b = _plain(found[key]), _plain(wanted[key])
        stages = [value if isinstance(value, list) else [value] * NUM_STAGES for value in (a, b)]
        if key != "ls_init_value" and stages[0] != stages[1]:  # one number is the same one for every stage
            out.append(f"{key} {a} for {b}")
    if (found["ls_init_value"] is None) != (wanted["ls_init_value"] is None):
        out.append(f"{'without' if found['ls_init_value'] is None else 'with'} layer scale")
    return out


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def names_of_same_file(name: str) -> list[str]:
    """Returns all names, `variant.tag`, of the published file that has this one, which comes first."""
    own, _, tag = name.partition(".")
    published = _variants[own].pretrained if own in _variants else ()
    page = next((source.page for source in published if source.tag == tag), "")
    same = [f"{v.name}.{source.tag}" for v in _variants.values() for source in v.pretrained if source.page == page]
    return [name, *(other for other in same if page and other != name)]
