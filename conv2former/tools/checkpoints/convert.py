"""From a weight file in any known layout to timm's hub layout: which network, which images, which classes it is for."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from timm.data import ImageNetInfo
from timm.models import is_model
from torch import nn

from ..._preprocessing import FIELDS, size_text
from ..._yaml import cut
from ...data.classes import SYNSET, class_names_of
from ...errors import CheckpointError, ConfigError, DataError, closest, counted, shorten
from ...models import CheckpointInfo, Preprocessing, list_variants, variant
from ...models.restore import restore
from ...models.zoo import make_cfg
from ...text import printable
from ...variants import PretrainedTag, differences, names_of_same_file, parse_variant, read_builtin_variants
from ...weights.description import (
    OtherInfo,
    check_is_classifier,
    definition_in,
    describe_checkpoint,
    noted_kind,
    weights_text,
)
from ...weights.hub_config import SECTION
from ...weights.installed import NAME, file_sha256, published_tag
from ...weights.preprocessing import candidates
from ...weights.reading import read_checkpoint, weight_file

__all__ = ["Export", "choose_a_name", "convert", "fitting_files", "layout_of", "noted_metric", "summary"]

# of timm's `pretrained_cfg`, what is said of a network and not of its weights
_OF_NETWORK = ("classifier", "first_conv", "fixed_input_size", "pool_size", "paper_ids", "paper_name")


@dataclass(frozen=True)
class Export:
    """A network in timm's hub layout, in memory.

    Attributes:
        name: `variant.tag`, or what is known of it; empty where nothing is.
        model: a Conv2Former, or another network of timm's, with its `pretrained_cfg`.
        info: what its file says about it.
        preprocessing: of images, as it is noted.
        model_args: the arguments with which a built-in entry point builds it.
        config: what config.json holds beyond timm's own keys: class names, and this project's section.
        weights: the bytes of model.safetensors.
        notes: sentences for the user.
    """

    name: str
    model: Any
    info: CheckpointInfo
    preprocessing: Preprocessing
    model_args: dict[str, Any]
    config: dict[str, Any]
    weights: bytes
    notes: list[str]

    @property
    def title(self) -> str:
        """What to call it."""
        return self.name or "Conv2Former"

    @property
    def section(self) -> dict[str, Any]:
        """What this project notes: source, checksum, metric, recipe, definition."""
        return cast(dict[str, Any], self.config[SECTION])


def convert(
    checkpoint: str | Path,
    name: str = "",
    use_ema: bool | None = None,
    preprocessing: str | None = None,
    overrides: Sequence[str] = (),
    class_names: Sequence[str] | None = None,
    needs_tag: bool = False,
    half: bool = False,
) -> Export:
    """Reads a weight file, and puts together all that its folder in timm's hub layout will hold.

    Args:
        checkpoint: whatever `load_model` reads.
        name: `variant.tag`; empty for the published file that it must be, if there is only one that fits.
        use_ema: take the averaged weights; None for where the file has them, True if it must.
        preprocessing: 'imagenet' or 'inception' instead of what the file notes; see `candidates`.
        overrides: single values of it, `data.mean=[0.5,0.5,0.5]`.
        class_names: in index order, instead of those in the file.
        needs_tag: it is to be installed; a missing tag is then said before the work.
        half: round the weights to float16, for half the size. Who loads them computes in float32 as before.

    Raises:
        CheckpointError: the file cannot be read, is not what its name says, or has weights beyond float16's range.
        ConfigError: an override is wrong, or the tag is missing; says which it could have.
        DataError: the class names are more or fewer than the classes.
    """
    content = read_checkpoint(checkpoint)
    check_is_classifier(content, checkpoint)
    info = describe_checkpoint(content, checkpoint)
    if use_ema and info.weights() != "average":
        raise CheckpointError(f"{checkpoint} has no averaged weights; leave --ema out")
    if not info.num_classes:
        raise CheckpointError(f"{checkpoint} has no classifier; there is nothing to convert for classification")
    path = weight_file(checkpoint)
    earlier = _earlier(content, path)
    layout = earlier.get("source", {}).get("layout", info.layout)
    name, notes = name or earlier.get("name", ""), list[str]()
    if isinstance(info, OtherInfo):
        name = _name_of_other(name, info, needs_tag)
    else:
        name, notes = _name(name, info, layout, checkpoint)
    if needs_tag and "." not in name:
        raise ConfigError(choose_a_name(info, name, layout))
    model, info = restore(content, checkpoint, use_ema is not False)
    definition = definition_in(content)
    averaged_from = earlier.get("averaged_from", _plain(content.get("averaged_from")))
    del content
    source = earlier.get("source") or {
        "file": printable(path.name),
        "sha256": file_sha256(path),
        "layout": info.layout,
        "weights": {"average": "averaged"}.get(kind := info.weights(use_ema is not False), kind),
    }
    tag = published_tag(name)
    chosen, assumed = _preprocessing(info, tag, checkpoint, preprocessing, overrides)
    labels, labels_from = _labels(info, class_names, earlier)
    args = _model_args(info)
    if info.layer_scale and isinstance(definition.get("ls_init_value"), float):
        args["ls_init_value"] = definition["ls_init_value"]
    model.pretrained_cfg = model.default_cfg = _cfg(model, name, tag, info, chosen)
    if half:
        _round_to_half(model, checkpoint)
    data = _serialize(model, half)
    rate = {key: value for key, value in definition.items() if key == "train_drop_path_rate"}
    own = info.definition() if isinstance(info, OtherInfo) else {"name": name.partition(".")[0] or info.name, **args}
    section = {
        "name": name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "source": source,
        **({"averaged_from": averaged_from} if averaged_from else {}),
        "metric": _plain(info.metric) if isinstance(_plain(info.metric), float) else None,
        "epoch": info.epoch,
        "assumed": assumed,
        "class_names": labels_from,
        "variant": {key: value for key, value in {**own, **rate}.items() if key != "name" or value},
        "recipe": _plain(info.recipe),
    }
    return Export(name or info.name or "", model, info, chosen, args, {**labels, SECTION: section}, data, notes)


def _name_of_other(given: str, info: OtherInfo, needs_tag: bool) -> str:
    """Returns the name of a network of timm's registry, under which no weights but timm's own can be asked for."""
    if needs_tag or given not in ("", info.network.entry):
        raise ConfigError(
            f"--install and --name are for Conv2Former, and this is {info.name}; write a folder (--output) or push it"
        )
    return info.network.entry


def _model_args(info: CheckpointInfo) -> dict[str, Any]:
    """Returns the arguments with which an entry point of timm's builds a network."""
    if isinstance(info, OtherInfo):
        return dict(info.network.sized(info.preprocessing.size).args)
    return cast(dict[str, Any], _plain(info.model_args()))


def _cfg(
    model: Any, name: str, tag: PretrainedTag | None, info: CheckpointInfo, chosen: Preprocessing
) -> dict[str, Any]:
    """Returns timm's `pretrained_cfg` of a file."""
    if isinstance(info, OtherInfo):
        about = {key: value for key, value in model.pretrained_cfg.items() if key in _OF_NETWORK}
        size = {"num_classes": info.num_classes, "input_size": (info.in_chans, *chosen.size)}
        return {**about, **chosen.to_cfg(), "architecture": info.network.entry.partition(".")[0], **size}
    return {
        **make_cfg(tag),
        **chosen.to_cfg(),
        "architecture": _entry_point(info),
        "tag": name.partition(".")[2] or None,
        "num_classes": info.num_classes,
        "input_size": (info.in_chans, *chosen.size),
        "pool_size": tuple(side // (8 * info.stem_stride) for side in chosen.size),
        "license": "apache-2.0" if tag else None,  # that of the authors' repository; that of other files is not known
    }


def _earlier(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns what an earlier conversion noted, if these are still the weights that it wrote."""
    config = content.get("hub_config")
    section = config.get(SECTION) if isinstance(config, dict) else None
    if not isinstance(section, dict) or section.get("sha256") != file_sha256(path):
        return {}
    source = section.get("source")
    keys = ("file", "sha256", "layout", "weights")
    kinds = {"name": str, "source": dict, "averaged_from": list, "class_names": str}
    kept = {key: section[key] for key, kind in kinds.items() if isinstance(section.get(key), kind)}
    if not isinstance(source, dict) or not all(isinstance(source.get(key), str) for key in keys):
        kept.pop("source", None)
    return kept


def _round_to_half(model: nn.Module, path: object) -> None:
    """Rounds a network's weights to what float16 has, and leaves their type."""
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            half = value.half()
            if not torch.equal(value.isfinite(), half.isfinite()):
                raise CheckpointError(f"{path}: {key} has values beyond float16's range; leave --half out")
            value.copy_(half)


def _serialize(model: nn.Module, half: bool) -> bytes:
    import safetensors.torch

    tensors = model.state_dict()
    if half:
        tensors = {key: value.half() if value.is_floating_point() else value for key, value in tensors.items()}
    return safetensors.torch.save(tensors)


def _entry_point(info: CheckpointInfo) -> str:
    """Returns the built-in variant nearest to a network; it is what another process can be sure to know."""
    builtin = read_builtin_variants()
    same = [v.name for v in builtin if v.name == info.name]
    near = [v.name for v in builtin if (v.dims, v.depths) == (info.dims, info.depths)]
    return (same + near + ["conv2former_t"])[0]


# ------------------------------------------------------------------------------------------------------- which file


def fitting_files(info: CheckpointInfo, own: str) -> tuple[list[str], list[str]]:
    """Returns the published files that a file can be, and also those that differ in kernel or image size only."""
    fitting, near = [], []
    for known in map(variant, list_variants()):
        args = info.model_args()
        for tag in known.pretrained if own in ("", known.name) else ():
            wanted = {**known.model_args(), "kernel_size": tag.kernel_size or known.kernel_size}
            differing = differences(args, wanted)
            full = f"{known.name}.{tag.tag}"
            is_task = (info.num_classes, info.in_chans) == (tag.num_classes, 3)
            if is_task and all(text.startswith("kernel_size ") for text in differing):
                near.append(full)
                sized = "img_size" not in info.preprocessing_noted or tag.input_size[-1] == info.preprocessing.img_size
                if sized and not differing:
                    fitting.append(full)
    # of two names of one file that of the network without exceptions
    first = [name for name in fitting if name.partition(".")[0] == info.name]
    same = {other for name in first for other in names_of_same_file(name)}
    return [name for name in fitting if name in first or name not in same], near


def _name(given: str, info: CheckpointInfo, layout: str, path: object) -> tuple[str, list[str]]:
    """Finds the name of a file, and checks that it can be its name.

    Args:
        given: `variant.tag`, `variant`, or nothing.
        info: what the file is.
        layout: whose names the tensors of the original file have.
        path: named in errors.

    Returns:
        `variant.tag`, or `variant` where the tag is not known, or nothing; and sentences for the user.
    """
    own, dot, tag = given.partition(".")
    if dot and not NAME.fullmatch(given):
        raise ConfigError(
            f"'{cut(given)}': expected VARIANT.TAG, such as conv2former_t.mine: lower-case letters, digits and "
            "underscores, a dot, and letters, digits, - and _"
        )
    if own:
        _check_variant(own, info, path)
    if not tag:
        fitting, _ = fitting_files(info, own)
        if layout == "conv2former" or len(fitting) != 1:  # this project's are not the authors' files
            return own or info.name or "", []
        return fitting[0], [f"this is taken for {fitting[0]}, the only published file of this shape, by that alone"]
    published = published_tag(given)
    if published is None:
        tags = [source.tag for source in variant(own).pretrained] if own in list_variants() else []
        if tag.startswith("hvision_"):
            raise ConfigError(
                f"the authors published no {given}{closest(tag, tags)}; theirs are: {shorten(tags) or 'none'}"
            )
        return given, _kernel_note(info, own, None)
    if (info.num_classes, info.in_chans) != (published.num_classes, 3):
        raise CheckpointError(
            f"{path} has {counted(info.num_classes, 'class', 'classes')} and takes {info.in_chans} channels, {given} "
            f"has {published.num_classes:,} and takes 3; choose a tag of your own: {own}.TAG"
        )
    return given, _kernel_note(info, own, published)


def choose_a_name(info: CheckpointInfo, name: str, layout: str) -> str:
    """Returns what to say where no single published file is meant.

    Args:
        info: what the file is.
        name: what is known of its name, `variant` or nothing.
        layout: whose names the tensors of the original file have.
    """
    fitting, near = fitting_files(info, name)
    own = f"--install {name or 'VARIANT'}.TAG"
    if layout == "conv2former":
        also = f"; or, if this is a published file, its name: {shorten(near)}" if near else ""
        return f"the weights need a name: {own}, with a tag of your own{also}"
    if fitting:
        return f"{len(fitting)} published files have this network; say which this is: {_options(fitting)}"
    if near:
        found = f"kernel size {info.kernel_size}, images of {size_text(info.preprocessing.size)} pixels"
        return f"no published file is known to be quite this ({found}); say which it is: {_options(near)}, or {own}"
    return f"no published file has this network; it needs a name: {own}"


def _options(names: list[str]) -> str:
    return " or ".join(f"--install {name}" for name in names)


def _check_variant(own: str, info: CheckpointInfo, path: object) -> None:
    """Checks that a file can be of a variant; only its kernels may be of another size than anybody knew."""
    if own in list_variants():
        found = differences(info.model_args(), variant(own).model_args())
        if differing := [text for text in found if not text.startswith("kernel_size ")]:
            other = info.name if info.name in list_variants() else "a network of its own"
            raise CheckpointError(f"{path} is not {own} but {other}: {', '.join(differing)}")
        return
    if info.name in [known.name for known in read_builtin_variants()]:
        hint = closest(own, list_variants())
        raise ConfigError(f"there is no variant '{cut(own)}'{hint}; {path} is {info.name}: name it {info.name}.TAG")
    if is_model(own):
        raise ConfigError(f"timm has a model '{own}'; choose another name")
    parse_variant({**info.model_args(), "name": own}, "the name")


def _kernel_note(info: CheckpointInfo, own: str, published: PretrainedTag | None) -> list[str]:
    if own not in list_variants():
        return []
    known = (published.kernel_size if published else None) or variant(own).kernel_size
    if info.kernel_size == known:
        return []
    return [
        f"its kernel size is {info.kernel_size}, not {known} as of {own} here; the network is built as the file has it"
    ]


# ---------------------------------------------------------------------------------------------- images and class names


def _preprocessing(
    info: CheckpointInfo, tag: PretrainedTag | None, path: object, choice: str | None, overrides: Sequence[str]
) -> tuple[Preprocessing, list[str]]:
    """Returns the preprocessing to note, and the names of its fields that nobody noted or gave."""
    given = _given(overrides, info.in_chans)
    known = [*info.preprocessing_noted, *given]
    own = replace(info.preprocessing, **{key: value for key, value in given.items() if key == "img_size"})
    if tag:
        size = tag.input_size[-1]
        if "img_size" not in known:
            own = replace(own, img_size=size)
        elif own.img_size != size and "img_size" not in given:
            raise CheckpointError(
                f"{path} notes images of {own.img_size} pixels, and this tag is for {size}; give the tag that is "
                f"meant, or data.img_size={size}"
            )
        if not {"crop_pct", "crop_mode"} & set(known):
            own = replace(own, crop_pct=tag.crop_pct, crop_mode=tag.crop_mode)
    if choice:
        own, known = candidates(own.img_size, info.in_chans)[choice], list(FIELDS)
    return replace(own, **given), [key for key in FIELDS if key not in known]


def _given(overrides: Sequence[str], channels: int) -> dict[str, Any]:
    if not overrides:
        return {}
    from ...config import apply_overrides, check_config  # needs pydantic, which a conversion as such does not

    raw = apply_overrides({}, overrides)
    keys = FIELDS
    data = raw.get("data", {})
    other = [f"data.{key}" for key in (data if isinstance(data, dict) else ()) if key not in keys]
    other += [key for key in raw if key != "data"]
    if other or not isinstance(data, dict):
        raise ConfigError(
            f"{shorten(map(cut, other)) or 'data'}: has no effect here; of the images can be given: "
            + ", ".join(f"data.{key}" for key in keys)
        )
    checked = check_config({"data": {"root": "-", **data}}, "the command line").data
    return checked.given_for(channels)


def _labels(
    info: CheckpointInfo, given: Sequence[str] | None, earlier: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """Returns timm's keys for the class names, and where they come from: given, noted, assumed or unknown."""
    names = list(given) if given is not None else class_names_of(info.num_classes, info.class_names)
    if names is None:
        return {}, "unknown"
    if len(names) != info.num_classes:
        raise DataError(f"{len(names)} class names for {counted(info.num_classes, 'class', 'classes')}")
    came = "given" if given is not None else str(earlier.get("class_names", "noted")) if info.class_names else "assumed"
    labels: dict[str, Any] = {"label_names": names}
    if all(SYNSET.fullmatch(name) for name in names):
        imagenet = ImageNetInfo()
        with contextlib.suppress(KeyError):  # a WordNet id that is none of ImageNet's
            labels["label_descriptions"] = {name: imagenet.label_name_to_description(name) for name in names}
    return labels, came


def _plain(value: Any) -> Any:
    """Returns a recipe as JSON can hold it; what is no plain value becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return cut(value)


LABELS = {
    "given": "given at the conversion",
    "noted": "as noted in the file",
    "assumed": "taken to be ImageNet's, from their number",
    "unknown": "not known",
}


def layout_of(source: Mapping[str, Any]) -> str:
    """Returns whose names the tensors of a source file have, as text."""
    own = {"authors": "the authors'", "birder": "birder's", "conv2former": "this project's", "timm": "timm's"}
    return own.get(source["layout"], printable(cut(source["layout"])))


def noted_metric(section: Mapping[str, Any]) -> str:
    """Returns metric and epoch of a training script, as text."""
    epoch = "" if section["epoch"] is None else f", epoch {section['epoch']}"
    return "none" + epoch if section["metric"] is None else f"{section['metric']:g}{epoch}"


def summary(export: Export) -> str:
    """Returns what a conversion found, as text for a terminal."""
    info, section, tag = export.info, export.section, published_tag(export.name)
    source, assumed = section["source"], section["assumed"]
    shape = f"{info.num_parameters:,} parameters, {counted(info.num_classes, 'class', 'classes')}"
    lines = [
        f"{export.title}: {shape}",
        f"  source    {source['file']}, {layout_of(source)} layout, {weights_text(noted_kind(source['weights']))}",
        f"            sha256 {source['sha256']}",
        f"  metric    {noted_metric(section)}",
        *([f"  accuracy  not measured here; published for {export.name}: {tag.top1} % top-1"] if tag else []),
        f"  images    {export.preprocessing}" + (f"; assumed: {', '.join(assumed)}" if assumed else ""),
        f"  classes   names {LABELS[section['class_names']]}",
        f"  weights   sha256 {section['sha256']}",
    ]
    return "\n".join(map(printable, [*lines, *(f"note: {note}" for note in export.notes)]))
