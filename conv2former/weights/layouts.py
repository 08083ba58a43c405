"""The names of tensors in a state dict: this project's, the authors' and birder's, and what wrappers put before them.

Three layouts of the same network are understood: this project's, that of the authors' code
(github.com/HVision-NKU/Conv2Former), and that of birder (github.com/birder-project/birder). timm's `features_only=True`
writes a fourth, `stages_0` for `stages.0`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

__all__ = ["layout_of_keys", "native_key", "network_prefixes", "rename_keys_in_place", "without_compile"]

_STEM = {"0": "conv1", "2": "norm1", "3": "conv2", "5": "norm2", "6": "conv3"}
_RULES: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # the backbone: the authors' downsample_layers, stages.S.B, head, pred; birder's stem, body.stageN, features
        (r"^(?:downsample_layers\.0|stem)\.([02356])\.", lambda m: f"stem.{_STEM[m[1]]}."),
        (r"^downsample_layers\.(\d+)\.([01])\.", lambda m: f"stages.{m[1]}.downsample.{('norm', 'conv')[int(m[2])]}."),
        (
            r"^body\.stage(\d+)\.downsample\.([01])\.",
            lambda m: f"stages.{int(m[1]) - 1}.downsample.{('norm', 'conv')[int(m[2])]}.",
        ),
        (r"^body\.stage(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}."),
        (r"^stages_(\d+)\.", r"stages.\1."),  # timm's FeatureListNet
        (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"^(?:head|features)\.([02])\.", lambda m: f"head_conv.{'conv' if m[1] == '0' else 'norm'}."),
        (r"^(?:pred|classifier)\.", "head.fc."),
        # a block, and its two branches when they are loaded alone
        (r"(^|\.)attn\.(?:att|attn)\.([02])\.", lambda m: f"{m[1]}attn.{'a' if m[2] == '0' else 'conv_dw'}."),
        (r"^(?:att|attn)\.([02])\.", lambda m: "a." if m[1] == "0" else "conv_dw."),
        (r"(^|\.)mlp\.pos\.", r"\1mlp.conv_dw."),
        (r"^pos\.", "conv_dw."),
        (r"(^|\.)layer_scale_([12])$", r"\1ls\2.gamma"),
    )
]
_FOREIGN = {
    "authors": re.compile(r"(?:^|\.)(?:downsample_layers\.\d|att\.[02]\.|pred\.)"),
    "birder": re.compile(r"(?:^|\.)(?:body\.stage\d|attn\.attn\.[02]\.|features\.[02]\.)"),
}
_FIRST_CONV = re.compile(r"((?:.*\.)?)(?:stem\.conv1|stem\.0|downsample_layers\.0\.0)\.weight")
_MODULATION = re.compile(
    r"(?:stages[._]\d+\.(?:blocks\.)?\d+|body\.stage\d+\.blocks\.\d+)\.attn\.(?:conv_dw|attn?\.2)\.weight"
)


def without_compile(key: str) -> str:
    """Returns a key without the `_orig_mod.` of torch.compile, which can stand before any module's name."""
    return re.sub(r"(^|\.)_orig_mod\.", r"\1", key)


def native_key(key: str) -> str:
    """Returns a key of any known layout as this project has it, without what wrappers put before it."""
    key = re.sub(r"^(?:module\.)+", "", without_compile(key))  # DistributedDataParallel, ModelEma
    for pattern, replacement in _RULES:
        key = pattern.sub(replacement, key)
    return key


def rename_keys_in_place(state_dict: dict[str, Any], prefix: str = "") -> None:
    """Renames the keys below `prefix` from any known layout, wrapper prefixes removed, to this project's own.

    Keys that are already right, and keys of other modules, stay as they are.
    """
    for key in [k for k in state_dict if isinstance(k, str) and k.startswith(prefix)]:
        native = prefix + native_key(key[len(prefix) :])
        value = state_dict[key]
        if native.endswith("norm.eps") and value.numel() == 1 and abs(float(value) - 1e-6) < 1e-12:
            del state_dict[key]  # birder keeps it as a buffer
        elif native != key:
            del state_dict[key]
            if native.endswith(".gamma") and value.ndim > 1:
                value = value.reshape(-1)  # birder keeps layer scale as (1, C, 1, 1)
            state_dict[native] = value


def layout_of_keys(keys: Iterable[str]) -> str:
    """Returns whose names these are: 'authors', 'birder' or 'conv2former'."""
    keys = list(keys)
    return next((name for name, pattern in _FOREIGN.items() if any(pattern.search(key) for key in keys)), "conv2former")


def network_prefixes(keys: Iterable[str]) -> list[str]:
    """Returns what stands before the names of each Conv2Former among the keys: '' or, for example, 'model.'.

    Args:
        keys: without torch.compile's prefix.
    """
    keys = list(keys)
    found = dict.fromkeys(match[1] for key in keys if (match := _FIRST_CONV.fullmatch(key)))
    return [
        prefix
        for prefix in found
        if any(key.startswith(prefix) and _MODULATION.fullmatch(key, len(prefix)) for key in keys)
    ]
