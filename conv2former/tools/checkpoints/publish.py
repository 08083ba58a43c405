"""What is done with a converted network: a folder in timm's hub layout, the store of `pretrained=True`, the hub."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import push_to_hf_hub

from ... import _private
from ..._store import store_folder
from ..._yaml import cut, dump_yaml
from ...errors import CheckpointError, ConfigError, OutputError, closest, first_line, shorten
from ...models import CheckpointInfo, InstalledModel, list_installed
from ...models.zoo import register_installed
from ...text import printable
from ...variants import names_of_same_file
from ...weights.description import OtherInfo, noted_kind, weights_text
from ...weights.hub_config import HUB_CONFIG, SECTION
from ...weights.installed import HUB_FILES, names_installed, published_tag
from ..output import replacing
from .convert import LABELS, Export, choose_a_name, layout_of, noted_metric

__all__ = ["check_folder", "check_hub", "install", "push", "uninstall", "write_folder"]

WEIGHTS, CARD = HUB_FILES[0], "README.md"
OWN = "Conv2Former, a ConvNet that replaces self-attention by convolutional modulation."
OTHER = "A network of timm's registry, trained on the classes below."
CONVERTED = "Converted from the source file below; the result was loaded again and gave the same outputs."
CITATION = """@article{hou2024conv2former,
  title   = {Conv2Former: A Simple Transformer-Style ConvNet for Visual Recognition},
  author  = {Hou, Qibin and Lu, Cheng-Ze and Cheng, Ming-Ming and Feng, Jiashi},
  journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
  year    = {2024},
  doi     = {10.1109/TPAMI.2024.3401450}
}"""


def write_folder(export: Export, folder: Path, force: bool = False) -> None:
    """Writes model.safetensors, config.json and the model card; the folder appears when it is known to load.

    Raises:
        OutputError: it cannot be written, or holds something already and is not to be replaced.
    """
    check_folder(folder, force)
    with replacing(folder) as temporary:
        _write(export, temporary)
        if force and folder.exists():
            os.replace(folder, temporary.with_name("replaced"))  # goes with the temporary folder


def check_folder(folder: Path, force: bool = False) -> None:
    """Checks that `write_folder` may write, before the work whose result it is to hold.

    Raises:
        OutputError: it may not.
    """
    if folder.suffix in (".safetensors", ".pth", ".pt", ".tar", ".bin") and not folder.is_dir():
        raise OutputError(f"{folder}: expected a folder; {WEIGHTS}, {HUB_CONFIG} and {CARD} are written into it")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not force:
            raise OutputError(f"{folder} holds something already; give another folder, or --force to replace it")
        if others := sorted(path.name for path in folder.iterdir() if path.name not in (*HUB_FILES, HUB_CONFIG, CARD)):
            raise OutputError(
                f"{folder} holds other files ({shorten(others, 3)}), which are not replaced; give another folder"
            )
    with replacing(folder / ".test" if folder.is_dir() else folder):
        pass


def _write(export: Export, folder: Path) -> None:
    folder.mkdir()
    _private.write_hub_config(export.model, folder / HUB_CONFIG, export.config, export.model_args)
    (folder / WEIGHTS).write_bytes(export.weights)
    text = _private.model_card(_card(export, "local-dir:FOLDER"), export.title)
    (folder / CARD).write_text(text, encoding="utf-8")
    _check_loads(export, folder)


@torch.inference_mode()
def _check_loads(export: Export, folder: Path) -> None:
    """Builds the network from the folder, as timm does, and compares it with the one that was read."""
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    own, theirs = export.model.state_dict(), again.state_dict()
    size = export.preprocessing.size if isinstance(export.info, OtherInfo) else (64, 64)
    images = torch.rand(1, export.info.in_chans, *size, generator=torch.Generator().manual_seed(0))
    is_equal = own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
    if not is_equal or not torch.equal(export.model(images), again(images)):
        has_nan = not all(torch.isfinite(tensor).all() for tensor in own.values())
        reason = "its weights are not all numbers" if has_nan else "please report this"
        raise CheckpointError(f"what was written does not load as the network that was read: {reason}")


def _card(export: Export, where: str) -> dict[str, Any]:
    """Returns the model card as timm's `push_to_hf_hub` takes it.

    Args:
        export: what it is about.
        where: the name by which timm creates the model.
    """
    info, section, tag = export.info, export.section, published_tag(export.name)
    source, assumed = section["source"], section["assumed"]
    images = f"assumed, since the file does not note them: {', '.join(assumed)}" if assumed else "as noted or given"
    is_other = isinstance(info, OtherInfo)
    details: dict[str, Any] = {
        "Architecture": printable(_architecture(info)),
        "Parameters": f"{info.num_parameters:,}",
        "Classes": f"{info.num_classes:,}, names {LABELS[section['class_names']]}",
        "Images": f"{export.preprocessing}; {images}",
        "Source file": {
            "name": _code(source["file"]),
            "sha256": _code(source["sha256"]),
            "layout": f"{layout_of(source)}, {weights_text(noted_kind(source['weights']))}",
        },
        **({"The mean of": _parts(section["averaged_from"])} if section.get("averaged_from") else {}),
        f"sha256 of {WEIGHTS}": f"`{section['sha256']}`",
        "Metric noted in the file": noted_metric(section),
    }
    if tag:
        details["Published"] = (
            f"{tag.top1} % top-1 on ImageNet-1k at {tag.input_size[-1]} pixels; by the authors, not measured"
        )
        details["Page of the file"] = tag.page
    usage = [
        "```python",
        "import timm" if is_other else "import conv2former, timm  # importing conv2former registers it with timm",
        "",
        f'model = timm.create_model("{where}", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        "```",
    ]
    if section["recipe"]:
        recipe = dump_yaml(section["recipe"]).rstrip()
        fence = _fence(recipe, 3)
        usage += ["", "## Recipe noted in the file", "", f"{fence}yaml", recipe, fence]
    return {
        "tags": ["image-classification", "timm", *([] if is_other else ["conv2former"])],
        "license": export.model.pretrained_cfg.get("license") or "unknown",
        "description": f"{OTHER if is_other else OWN} {CONVERTED}",
        "details": details,
        "usage": "\n".join(usage),
        **({} if is_other else {"citation": CITATION}),
    }


def _architecture(info: CheckpointInfo) -> str:
    if isinstance(info, OtherInfo):
        return str(info.network)
    shape = f"dims {list(info.dims)}, depths {list(info.depths)}, kernel size {info.kernel_size}, fusion {info.fusion}"
    shape += "" if info.stem_stride == 4 else f", stem stride {info.stem_stride}"
    shape += "" if info.norm_layer == "layernorm2d" else f", norm {info.norm_layer}"
    return f"{info.name or 'Conv2Former'}: {shape}"


# ----------------------------------------------------------------------------------------------------------- the store


def _parts(sources: Any) -> list[str]:
    """Returns a line for each file that scripts/average.py took."""
    parts = [part for part in sources if isinstance(part, dict)]
    return [f"{_code(part.get('file'))}, sha256 {_code(part.get('sha256'))}" for part in parts]


def _code(text: object) -> str:
    """Returns text as code in Markdown, in one line, whatever is in it."""
    line = cut(printable(str(text)))
    ticks = _fence(line, 1)
    blank = " " if "`" in line else ""  # which Markdown takes off again
    return f"{ticks}{blank}{line}{blank}{ticks}"


def _fence(text: str, least: int) -> str:
    """Returns as many backticks as no text between two of them ends."""
    return "`" * max(least, *(len(run) + 1 for run in re.findall("`+", text)), 0)


def install(export: Export, force: bool = False) -> tuple[Path, bool]:
    """Puts a network where `pretrained=True` finds it, in this process and in any later one.

    Args:
        export: has a name, `variant.tag`.
        force: replace other weights of that name.

    Returns:
        Its folder, and whether it is new: the same weights, preprocessing and class names are not installed again.

    Raises:
        ConfigError: it has no tag.
        OutputError: other weights are installed under that name, or it cannot be written.
    """
    check_install(export, force)
    own = export.name.partition(".")[0]
    folder = store_folder() / export.name
    before = _stored(export.name)
    if before is None or not _is_same(export, before):
        try:
            with replacing(folder) as temporary:
                _write(export, temporary)
                if force and folder.exists():
                    os.replace(folder, temporary.with_name("replaced"))
        except OutputError:
            after = _stored(export.name)  # another process may have been faster
            if after is None or not _is_same(export, after):
                raise
            return after.path, False
        if before is not None and before.path != folder:  # under the other name of the same file
            shutil.rmtree(before.path, ignore_errors=True)
        register_installed(own)
        return folder, True
    register_installed(own)
    return before.path, False


def check_install(export: Export, force: bool = False) -> None:
    """Checks that `install` may, before anything is written.

    Raises:
        ConfigError: the network has no tag; says which it could have.
        OutputError: other weights are installed under its name.
    """
    if "." not in export.name:
        raise ConfigError(choose_a_name(export.info, export.name, export.section["source"]["layout"]))
    before = _stored(export.name)
    if before is not None and not force and not _is_same(export, before):
        state = f"damaged ({before.problem})" if before.problem else "with other weights, preprocessing or class names"
        raise OutputError(
            f"{before.name} is installed already, {state}, from {before.source or 'an unknown file'}; --force replaces "
            "it, or choose another tag"
        )
    if (store_folder() / export.name).is_file():
        raise OutputError(f"{store_folder() / export.name} is a file; remove it")


def _stored(name: str) -> InstalledModel | None:
    """Returns what is in the store under a name or another name of the same file, damaged or not."""
    by_name = {found.name: found for found in list_installed()}
    return next((by_name[same] for same in names_of_same_file(name) if same in by_name), None)


def _is_same(export: Export, found: InstalledModel) -> bool:
    """Whether a network is installed already, preprocessing and class names included."""
    if found.problem or found.sha256 != export.section["sha256"]:
        return False
    cfg = found.config["pretrained_cfg"]
    images = {**export.preprocessing.to_cfg(), "input_size": export.model.pretrained_cfg["input_size"]}
    own = {**images, "mean": export.model.pretrained_cfg["mean"], "std": export.model.pretrained_cfg["std"]}
    same = all(cfg.get(key) == (list(value) if isinstance(value, tuple) else value) for key, value in own.items())
    return same and found.config.get("label_names") == export.config.get("label_names")


def uninstall(name: str) -> Path:
    """Removes installed weights.

    Args:
        name: `variant.tag`, or `variant` where only one tag of it is installed.

    Returns:
        The folder that is gone.

    Raises:
        CheckpointError: nothing is installed under that name, or several tags are.
        OutputError: it cannot be removed.
    """
    installed = [each.name for each in list_installed()]
    names = names_installed(name) if "." not in name else [name]
    names = [each for each in names if not {*names_of_same_file(each)}.isdisjoint(installed)]  # not what is shipped
    if len(names) > 1:
        raise CheckpointError(f"several weights of {name} are installed; name one of them: {shorten(names)}")
    found = _stored(names[0]) if names else None
    if found is None:
        raise CheckpointError(
            f"{cut(name)} is not installed{closest(name, installed)}; installed: {shorten(installed) or 'nothing'}"
        )
    gone = found.path.with_name(f".{found.name}-{os.getpid()}")
    try:
        os.replace(found.path, gone)  # at once; removing its files is not
        shutil.rmtree(gone)
    except OSError as e:
        raise OutputError(f"{found.path} cannot be removed ({e.strerror or e})") from None
    for own in {same.partition(".")[0] for same in names_of_same_file(found.name)}:
        register_installed(own)
    return found.path


# ------------------------------------------------------------------------------------------------------------- the hub


def check_hub(repo_id: str) -> None:
    """Checks all that can be checked without the network before something is sent to the Hugging Face hub.

    Raises:
        ConfigError: the name is none, nobody is logged in, or the hub is switched off.
    """
    import huggingface_hub
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
        is_name = repo_id.count("/") == 1
    except HFValidationError:
        is_name = False
    if not is_name:
        raise ConfigError(f"'{cut(repo_id)}': expected the name of a repository on the hub, USER/NAME")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is set, so nothing can be sent to the hub; unset it")
    if not huggingface_hub.get_token():
        raise ConfigError("no token for the Hugging Face hub: log in with `hf auth login`, or set HF_TOKEN")


def push(export: Export, repo_id: str, private: bool = False) -> str:
    """Sends a network to the Hugging Face hub by timm's own function: weights, configuration and model card.

    The files are one commit, so all of them appear or none; the repository is made before.

    Args:
        export: what to send.
        repo_id: `USER/NAME`, made if it does not exist.
        private: whether a new repository is.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: see `check_hub`.
        OutputError: the hub cannot be reached, or refuses.
    """
    check_hub(repo_id)
    config = {**export.config, SECTION: {**export.section, "recipe": _without_paths(export.section["recipe"])}}
    public = replace(export, config=config)
    try:
        commit = push_to_hf_hub(
            export.model,
            repo_id,
            commit_message=f"Add {export.title}",
            private=private,
            model_config=config,
            model_card=_card(public, f"hf-hub:{repo_id}"),
            model_args=export.model_args,
            safe_serialization=True,
        )
    except Exception as e:  # of the hub's client, of the library below it, or of the system
        raise OutputError(f"{repo_id}: the hub did not take it ({first_line(e)}); no file was sent") from None
    return str(commit)


def _without_paths(value: Any) -> Any:
    """Returns a recipe without the folders of the machine that it ran on: of an absolute path the last part stays."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return os.path.basename(value.rstrip("/")) if isinstance(value, str) and os.path.isabs(value) else value
